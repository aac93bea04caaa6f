"""Verdict: why a run does not move, or that it does, in one sentence; a line for each rank; and who waits for whom."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dinfer.display import Displayable, Tidy, html_text
from dinfer.severity import Severity
from dinfer.verdict.blocked import own_frames
from dinfer.verdict.drawing import Arrow, Box, drawing
from dinfer.verdict.folds import folds_html
from dinfer.verdict.waits import HUNG, SLOW, HangKind, Wait, Waits

MOST_LINES = 30
"""that a verdict prints"""

MOST_RANKS = 12
"""lines of ranks among them"""

LEAST_FRAMES = 3
"""that are printed of a rank which is shown"""


@dataclass(frozen=True, repr=False)
class Verdict(Tidy, Displayable):
    """What `run.verdict()` returns.

    `kind`: in one word; `sentence`: the verdict; `ranks`: the culprits; `peer`: the other end of the message or link,
    if it is about one; `blocked`: the ranks that wait for the culprits. `chain` leads from a waiting rank to the root;
    `lines`: a line for each rank; `waits`: the whole graph; `stacks`: by rank, as text.
    """

    kind: HangKind
    sentence: str
    ranks: tuple[int, ...] = ()
    peer: int | None = None
    blocked: tuple[int, ...] = ()
    chain: tuple[Wait, ...] = ()
    lines: tuple[str, ...] = ()
    waits: Waits = field(default_factory=dict, compare=False)
    stacks: Mapping[int, str] = field(default_factory=dict, compare=False)

    @property
    def rank(self) -> int | None:
        """The first culprit; None if there is none."""
        return self.ranks[0] if self.ranks else None

    @property
    def is_hung(self) -> bool:
        """Whether the run will not go on by itself."""
        return self.kind in HUNG

    @property
    def severity(self) -> Severity:
        if self.is_hung:
            return Severity.ERROR
        return Severity.WARNING if self.kind in SLOW else Severity.NOTE

    def __str__(self) -> str:
        lines = [self.sentence, *(f"  {line}" for line in self.lines[:MOST_RANKS])]
        if (more := len(self.lines) - MOST_RANKS) > 0:
            lines.append(f"  … and {more} more: verdict.lines")
        if len(self.chain) > 1:
            lines.append(f"chain: {'; '.join(f'rank {wait.node.rank} {wait.text}' for wait in self.chain)}")
        lines += self._own_lines(MOST_LINES - 1 - len(lines))
        if any(self.stacks.values()):
            lines.append("all frames of all threads: verdict.stacks")
        return "\n".join(lines)

    def _own_lines(self, room: int) -> list[str]:
        """Where each rank stands in the user's code, the culprits first, in at most so many lines."""
        stacks = {rank: self.stacks.get(rank, "") for rank in (*self.ranks, *sorted(self.stacks))}
        frames = {rank: own for rank, stack in stacks.items() if (own := own_frames(stack))}
        shown = list(frames)[: room // (1 + LEAST_FRAMES)]
        each = room // len(shown) - 1 if shown else 0
        lines = []
        for rank in shown:
            lines += [f"rank {rank}'s Python:", *(f"  {frame}" for frame in frames[rank][:each])]
        return lines

    def picture(self) -> tuple[list[Box], list[Arrow]]:
        """The waiting ranks and the culprits, and what each waits for."""
        shown = {
            node: wait
            for node, wait in self.waits.items()
            if wait.on or (wait.root and wait.root.rank in self.ranks)
        }
        ranks = sorted({node.rank for node in shown} | {to.rank for w in shown.values() for to in w.on})
        boxes = []
        for rank in ranks:  # with the op at which it stands
            found = [wait for node, wait in self.waits.items() if node.rank == rank]
            found.sort(key=lambda wait: (wait.root is None or wait.root.kind != self.kind, not wait.on))
            text = str(found[0].op or found[0].what or found[0].text) if found else ""
            boxes.append(Box(rank, f"rank {rank}", text, rank in self.ranks, found[0].text if found else ""))
        arrows = {}
        for node, wait in shown.items():
            to = {other.rank for other in wait.on} | ({wait.root.rank} if wait.root else set())
            for rank in to & {*ranks} - {node.rank}:  # also to whom it has met, and who does something else
                arrows[node.rank, rank] = Arrow(node.rank, rank, wait.what or wait.text)
        return boxes, list(arrows.values())

    def svg(self) -> str:
        """The same as a small picture."""
        return drawing(self.sentence, *self.picture())

    def _repr_html_(self) -> str:
        """The sentence, the picture, and a fold for each rank."""
        if not self.is_hung:
            return f"<div>{html_text(str(self), self.severity)}</div>"
        sentence = html_text(self.sentence, self.severity)
        return f"<div>{sentence}{self.svg()}{folds_html(self.lines, self.stacks, self.ranks)}</div>"
