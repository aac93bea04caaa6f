"""Reads schedules of torch.distributed.pipelining as text, and says whether they would hang. Pure.

A line for each rank, its actions between commas, as `_dump_csv` of a schedule writes them, or a line for each step and
a column for each rank, as errors and logs of torch print them: `0F0` is the forward of stage 0 for micro-batch 0; B a
backward, I and W its parts for inputs and weights, `1SEND_F0` a send. A text with sends
is judged as it is: a send waits for its recv, a recv is posted where it stands and waited for where its stage computes.
A text without is judged by what computations need; and with each send after its computation, each recv before.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from dinfer.errors import DinferError
from dinfer.trace.events import CallRecord, Event, Group
from dinfer.verdict.matching import MatchedOps, RecordedOp
from dinfer.verdict.rendezvous import Step, judged, play
from dinfer.verdict.verdict import Verdict

_ACTION = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD|F|I|B|W)(\d*)")
_OVERLAPPED = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
_GRID_HEAD = re.compile(r" *Rank 0( +Rank \d+)* *")
_GRID_STEP = re.compile(r"Step \d+: ")
_GRID_MARK = " <-- ERROR HERE"

GROUP = "pipeline"

MOST_ACTIONS = 200_000


class ScheduleError(DinferError, ValueError):
    """The text is no schedule; the message names line and action."""


class PipelineAction(NamedTuple):
    """One action. `kind` as torch writes it; `batch`: the micro-batch, if any; `column`: of the line."""

    stage: int
    kind: str
    batch: int | None
    column: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.batch is None else self.batch}"


class ScheduleProof(NamedTuple):
    """What was found: `flaw` in one sentence, "" if the schedule comes to its end; `verdict`: of the hang, if it is
    one; `note`: what holds besides."""

    ranks: int
    actions: int
    flaw: str = ""
    verdict: Verdict | None = None
    note: str = ""

    @property
    def proved(self) -> bool:
        return not self.flaw

    def __str__(self) -> str:
        if self.flaw:
            return f"refuted: {self.flaw}"
        text = f"proved: {self.ranks} ranks, {self.actions} actions: every rank comes to its end"
        return f"{text}\n{self.note}" if self.note else text


def is_schedule(text: str) -> bool:
    """Whether a text looks like a schedule: its first action is one, or it is a table of steps and ranks."""
    if _GRID_HEAD.fullmatch(next((line for line in text.splitlines() if line.strip()), "")):
        return True
    first = next((part.strip() for part in re.split(r"[,\n]", text) if part.strip()), "")
    return bool(_ACTION.fullmatch(first.partition(";")[0].lstrip("(")))


def parse_schedule(text: str) -> list[list[PipelineAction]]:
    """The actions of each rank. Raises ScheduleError."""
    lines = [line for line in text.splitlines() if line.strip()]
    is_grid = bool(lines) and bool(_GRID_HEAD.fullmatch(lines[0]))
    ranks = list(_by_rank(lines) if is_grid else _by_line(text))
    if sum(map(len, ranks)) > MOST_ACTIONS:
        raise ScheduleError(f"it has more than {MOST_ACTIONS:,} actions.")
    if not any(ranks):
        raise ScheduleError("it has no actions.")
    return ranks


def _by_line(text: str) -> Iterator[list[PipelineAction]]:
    """The actions of a text with a line for each rank."""
    for number, line in enumerate(text.splitlines(), 1):
        words = [part.strip().strip('"') for part in line.split(",")]
        actions = [
            one for column, word in enumerate(words, 1) for one in _parsed(word, f"line {number}", column)
        ]
        if line.strip() or actions:
            yield actions


def _by_rank(lines: Sequence[str]) -> Iterator[list[PipelineAction]]:
    """The same of a table with a line for each step, under a head that says where the column of each rank begins."""
    begins = [found.start() for found in re.finditer(r"Rank \d+", lines[0])]
    for line in lines[1:]:
        if not _GRID_STEP.match(line):
            raise ScheduleError(f"{line.strip()!r} is no step of the schedule, such as `Step 0: 0F0`.")
    for rank, (begin, end) in enumerate(pairwise([*begins, None])):
        cells = [line.removesuffix(_GRID_MARK)[begin:end].strip() for line in lines[1:]]
        yield [
            one
            for step, cell in enumerate(cells)
            for one in _parsed(cell, f"step {step} of rank {rank}", step + 1)
        ]


def _parsed(word: str, place: str, column: int) -> Iterator[PipelineAction]:
    """One action, or those that overlap, or none. Raises ScheduleError."""
    overlapped = _OVERLAPPED.fullmatch(word)
    for one in (overlapped[1].split(";") if overlapped else [word]) if word else ():
        found = _ACTION.fullmatch(one.strip())
        if not found:
            raise ScheduleError(f"{place}: {one!r} is no action of a pipeline, such as 0F0 or 1SEND_B2.")
        stage, kind, batch = found.groups()
        if len(stage) > 6 or len(batch) > 9:
            raise ScheduleError(f"{place}: {one!r} has a number that is too large.")
        yield PipelineAction(int(stage), kind, int(batch) if batch else None, column)


def verify_schedule(ranks: Sequence[Sequence[PipelineAction]]) -> ScheduleProof:
    """Prove that every rank comes to its end, or say why not."""
    count = sum(map(len, ranks))
    owners = _owners(ranks)
    if isinstance(owners, str):
        return ScheduleProof(len(ranks), count, owners)
    has_comms = any(action.kind.startswith(("SEND", "RECV")) for actions in ranks for action in actions)
    if has_comms:
        flaw, verdict = _played(ranks, owners, blocking=False)
        return ScheduleProof(len(ranks), count, flaw, verdict)
    if flaw := _unmet(ranks, owners):
        return ScheduleProof(len(ranks), count, flaw)
    lowered = [list(_lowered(actions, rank, owners)) for rank, actions in enumerate(ranks)]
    flaw, _ = _played(lowered, owners, blocking=True)
    note = (
        "also with blocking sends, each after its computation, and recvs, each before"
        if not flaw
        else f"but not with blocking sends, each after its computation, and recvs, each before: {flaw}"
    )
    return ScheduleProof(len(ranks), count, note=note)


def _owners(ranks: Sequence[Sequence[PipelineAction]]) -> dict[int, int] | str:
    """The rank of each stage, or what is wrong with them."""
    owners: dict[int, int] = {}
    for rank, actions in enumerate(ranks):
        for action in actions:
            if owners.setdefault(action.stage, rank) != rank:
                return (
                    f"stage {action.stage} is on rank {owners[action.stage]} and on rank {rank} (`{action}`)"
                )
    absent = set(range(max(owners) + 1)) - set(owners)
    return f"no rank has stage {min(absent)}" if absent else owners


def _link(action: PipelineAction, owners: dict[int, int]) -> tuple[int, str]:
    """Of a send or recv: the rank at its other end, and what goes over it."""
    step = 1 if action.kind in ("SEND_F", "RECV_B") else -1
    return owners.get(action.stage + step, -1), "hidden" if action.kind.endswith("F") else "gradient"


def _played(
    ranks: Sequence[Sequence[PipelineAction]], owners: dict[int, int], *, blocking: bool
) -> tuple[str, Verdict | None]:
    """What goes wrong, "" for nothing. `blocking`: a recv is waited for where it stands."""
    events: list[Event] = []
    for rank, actions in enumerate(ranks):
        for index, action in enumerate(actions):
            if not action.kind.startswith(("SEND", "RECV")):
                continue
            peer, what = _link(action, owners)
            if peer < 0:
                return f"rank {rank}'s `{action}` has no stage at its other end", None
            if peer == rank:
                return f"rank {rank}'s `{action}` would go to itself: both stages are on that rank", None
            kind, forwards = action.kind.split("_")
            target = action.stage if (kind == "RECV") else action.stage + (1 if forwards == "F" else -1)
            call = CallRecord(
                GROUP, "nccl", file=f"rank {rank}", line=action.column, function=str(action), is_async=True
            )
            events.append(
                Event(
                    rank,
                    "main",
                    kind.lower(),
                    index,
                    index,
                    index,
                    1 << 40,
                    what,
                    action.batch,
                    target,
                    peer,
                    index=index,
                    call=call,
                )
            )
    groups = {GROUP: Group(tuple(range(len(ranks))))}
    ops = MatchedOps(events, groups)
    for send, recv in ops.messages():
        if (send.event.what, send.event.chunk, send.event.layer) != (
            recv.event.what,
            recv.event.chunk,
            recv.event.layer,
        ):
            return (
                f"messages cross: rank {send.event.rank}'s `{_name(send)}` is the {send.number + 1}. to rank "
                f"{recv.event.rank}, whose {recv.number + 1}. recv from it is `{_name(recv)}`"
            ), None
    for mine in ops.by_rank.values():
        for op in mine:
            if ops.other_end(op) is None:
                lacks = "receives" if op.event.kind == "send" else "sends"
                return f"rank {op.event.rank}'s `{_name(op)}`: rank {op.event.peer} nowhere {lacks} it", None
    programs = [
        list(_steps(actions, ops.by_rank.get(rank, []), blocking=blocking))
        for rank, actions in enumerate(ranks)
    ]
    outcome = play(ops, programs)
    if outcome.hangs:
        verdict = judged(outcome, groups)
        return verdict.sentence, verdict
    return "", None


def _name(op: RecordedOp) -> str:
    return op.event.call.function if op.event.call else ""


def _steps(actions: Sequence[PipelineAction], ops: Sequence[RecordedOp], *, blocking: bool) -> Iterator[Step]:
    """What a rank does: a send waits for its recv, a computation for what it was to receive."""
    by_index = {op.event.index: op for op in ops}
    awaited: dict[tuple[str, int, int | None], RecordedOp] = {}
    for index, action in enumerate(actions):
        op = by_index.get(index)
        if op is not None:
            yield Step(op, waits=False)
            if blocking or op.event.kind == "send":
                yield Step(op, waits=True)
            else:
                awaited[action.kind, action.stage, action.batch] = op
            continue
        needed = {"F": "RECV_F", "B": "RECV_B", "I": "RECV_B"}.get(action.kind)
        if needed and (recv := awaited.pop((needed, action.stage, action.batch), None)):
            yield Step(recv, waits=True)


def _lowered(
    actions: Sequence[PipelineAction], rank: int, owners: dict[int, int]
) -> Iterator[PipelineAction]:
    """With a recv before each computation, and a send after it."""
    last = max(owners)
    for action in actions:
        forward, backward = action.kind == "F", action.kind in ("B", "I")
        before = action.stage - 1 if forward else action.stage + 1
        after = action.stage + 1 if forward else action.stage - 1
        if (forward or backward) and 0 <= before <= last and owners[before] != rank:
            yield action._replace(kind="RECV_F" if forward else "RECV_B")
        yield action
        if (forward or backward) and 0 <= after <= last and owners[after] != rank:
            yield action._replace(kind="SEND_F" if forward else "SEND_B")


def _unmet(ranks: Sequence[Sequence[PipelineAction]], owners: dict[int, int]) -> str:
    """Why the computations cannot all be done, "" if they can: a forward needs that of the stage before, a backward
    that of the stage after and its own forward."""
    at, done, last = [0] * len(ranks), set[tuple[str, int, int | None]](), max(owners)
    has_backward = any(action.kind in ("B", "I") for actions in ranks for action in actions)

    def missing(action: PipelineAction) -> str:
        stage, batch = action.stage, action.batch
        if action.kind == "F" and stage and ("F", stage - 1, batch) not in done:
            return f"{stage - 1}F{batch}"
        if action.kind in ("B", "I"):
            if ("F", stage, batch) not in done:
                return f"{stage}F{batch}"
            if stage < last and ("B", stage + 1, batch) not in done:
                return f"{stage + 1}B{batch}"
        if action.kind == "W" and has_backward and ("B", stage, batch) not in done:
            return f"{stage}I{batch}"
        return ""

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ranks):
            while at[rank] < len(actions) and not missing(actions[at[rank]]):
                action = actions[at[rank]]
                done.add(("B" if action.kind == "I" else action.kind, action.stage, action.batch))
                at[rank] += 1
                moved = True
    stuck = [(rank, actions[at[rank]]) for rank, actions in enumerate(ranks) if at[rank] < len(actions)]
    planned = {str(action) for actions in ranks for action in actions}
    absent = [(rank, action) for rank, action in stuck if not planned & _forms(missing(action))]
    if absent:  # what else stands, stands for want of these
        texts = (f"rank {rank}'s `{action}` needs `{missing(action)}`" for rank, action in absent)
        return f"{'; '.join(texts)}, which no rank does"
    texts = (
        f"rank {rank} stands before `{action}`, which needs `{missing(action)}`" for rank, action in stuck
    )
    return f"deadlock even with buffered sends: {'; '.join(texts)}" if stuck else ""


def _forms(action: str) -> set[str]:
    """A backward, or its part for inputs, which does as well."""
    return {action, action.replace("B", "I"), action.replace("I", "B")}
