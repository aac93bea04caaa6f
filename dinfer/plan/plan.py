"""Plan: every rank's lanes as pure data, and a text form that people can edit."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dinfer.errors import excerpt
from dinfer.plan.ops import DIGITS, Op, PlanError, parse_op
from dinfer.plan.partition import MAX_CELLS, Shape

HEADER = "dinfer plan 1"

ISSUE = "issue"
"""the name of each rank's one lane in a lowered plan: its ops are issued in order, without waiting"""


class Lane(NamedTuple):
    """The ops that one thread of one rank runs one after another."""

    name: str
    ops: tuple[Op, ...]


class OpPlace(NamedTuple):
    """Where an op stands in a plan."""

    rank: int
    lane: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which means nothing for a place


@dataclass(frozen=True, repr=False)
class Plan:
    """What a schedule and a sync strategy expand to. `lanes[rank]`: that rank's lanes."""

    shape: Shape
    schedule: str
    sync_strategy: str
    lanes: tuple[tuple[Lane, ...], ...]

    @property
    def world_size(self) -> int:
        return self.shape.world_size

    def __repr__(self) -> str:
        """In one line: a plan has thousands of ops, which `text()` gives."""
        shape = self.shape
        return (
            f"<plan {self.schedule}, {self.sync_strategy}: {shape.tokens_text}, "
            f"{shape.layers} layers on {self.world_size} ranks; .text() has its ops>"
        )

    @cached_property
    def id(self) -> int:
        """64 bits of the text's SHA-256, by which ranks compare their plans."""
        return int.from_bytes(hashlib.sha256(self.text().encode()).digest()[:8], "little")

    @property
    def is_lowered(self) -> bool:
        """Whether `lower` made it: one lane a rank, for NCCL."""
        return all([lane.name for lane in lanes] == [ISSUE] for lanes in self.lanes)

    def op(self, place: OpPlace) -> Op:
        """The op at a place."""
        return self.lanes[place.rank][place.lane].ops[place.index]

    def places(self) -> Iterator[tuple[OpPlace, Op]]:
        """Every op with its place, rank by rank and lane by lane."""
        for rank, lanes in enumerate(self.lanes):
            for number, lane in enumerate(lanes):
                for index, op in enumerate(lane.ops):
                    yield OpPlace(rank, number, index), op

    def expected_tokens(self, op: Op) -> int:
        """How many tokens a transfer of this op's value carries."""
        return 1 if op.what == "final" else len(self.shape.chunks[op.chunk])

    def text(self) -> str:
        """One op a line; `parse_plan` reads it back."""
        shape = self.shape
        lines = [
            HEADER,
            f"layers {shape.layers}, tokens {shape.tokens}, chunk_size {shape.chunks_text}",
            "stages start at " + " ".join(map(str, shape.starts)),
            f"schedule {self.schedule}, sync_strategy {self.sync_strategy}",
        ]
        for rank, lanes in enumerate(self.lanes):
            for lane in lanes:
                lines.append(f"rank {rank} lane {lane.name}")
                lines.extend(f"  {op}" for op in lane.ops)
        return "\n".join(lines) + "\n"


def parse_plan(text: str) -> Plan:
    """The inverse of `plan.text()`; empty lines and comments after `#` are ignored. PlanErrors name the line."""
    if text.count("\n") > 3 * MAX_CELLS:
        raise PlanError(f"this is not a plan: it has more than {3 * MAX_CELLS:,} lines.")
    if not text.isascii():
        _check_characters(text)
    lines = [
        (n, stripped) for n, raw in enumerate(text.splitlines(), 1) if (stripped := raw.split("#")[0].strip())
    ]
    if not lines or lines[0][1] != HEADER:
        given = f"it starts with {excerpt(lines[0][1])}" if lines else "it is empty"
        raise PlanError(f"this is not a plan: {given}; the first line of a plan is {HEADER!r}.")
    if len(lines) < 4:
        raise PlanError(
            "the plan's header is incomplete: after the first line come one line each for layers, stages and schedule."
        )
    shape = _parse_shape(lines[1], lines[2])
    words = _words(lines[3], "schedule NAME, sync_strategy NAME")
    lanes: list[dict[str, list[Op]]] = [{} for _ in shape.starts]
    current: list[Op] | None = None
    for number, line in lines[4:]:
        try:
            if line.startswith("rank "):
                current = _open_lane(line, lanes)
            elif current is None:
                raise PlanError(
                    f"{excerpt(line)} is before the first lane; a lane starts with 'rank 0 lane compute'."
                )
            else:
                current.append(parse_op(line))
        except PlanError as error:
            raise PlanError(f"line {number}: {error}") from None
    built = tuple(tuple(Lane(name, tuple(ops)) for name, ops in rank.items()) for rank in lanes)
    return Plan(shape, words[1], words[3], built)


def _check_characters(text: str) -> None:
    """Raises PlanError for halves of characters, which no file holds but a Python text may."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise PlanError(
            f"line {line}: {text[error.start]!r} is half of a surrogate pair, and no character."
        ) from None


def _parse_shape(sizes: tuple[int, str], stages: tuple[int, str]) -> Shape:
    form = "layers N, tokens N, chunk_size N[+N…]"
    words = _words(sizes, form)
    *intro, starts = stages[1].partition("stages start at ")
    try:
        if intro != ["", "stages start at "]:
            raise ValueError
        lengths = [int(length) for length in words[5].split("+")]
        firsts, uneven = tuple(map(int, starts.split())), tuple(lengths) if len(lengths) > 1 else ()
        return Shape(int(words[1]), int(words[3]), max(lengths), firsts, uneven)
    except PlanError as error:
        raise PlanError(f"lines {sizes[0]}–{stages[0]}: {error}") from None
    except ValueError:
        raise PlanError(
            f"lines {sizes[0]}–{stages[0]}: {excerpt(sizes[1])} and {excerpt(stages[1])} should read {form!r} and "
            "'stages start at 0 …'."
        ) from None


def _words(line: tuple[int, str], form: str) -> list[str]:
    """The words of a line that reads like `form`, in which words in capitals stand for any word."""
    words, wanted = (text.replace(",", " ").split() for text in (line[1], form))
    if len(words) != len(wanted) or any(
        w != p and not p.isupper() for w, p in zip(words, wanted, strict=True)
    ):
        raise PlanError(f"line {line[0]}: {excerpt(line[1])} should read {form!r}.")
    return words


def _open_lane(line: str, lanes: list[dict[str, list[Op]]]) -> list[Op]:
    words = line.split()
    if len(words) != 4 or words[2] != "lane" or not words[1].isdecimal() or len(words[1]) > DIGITS:
        raise PlanError(f"{excerpt(line)} should read 'rank 0 lane compute'.")
    rank, name = int(words[1]), words[3]
    if rank >= len(lanes):
        last = len(lanes) - 1
        raise PlanError(
            f"rank {rank} does not exist: the plan has {len(lanes)} stages, so ranks 0 to {last}."
        )
    if name in lanes[rank]:
        raise PlanError(f"rank {rank} has two lanes named {excerpt(name)}.")
    return lanes[rank].setdefault(name, [])
