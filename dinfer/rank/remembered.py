"""What a rank remembers of its session, so that the next one can go on where that one has ended.

A session may go at any moment: its notebook's kernel is restarted, or another notebook takes the engines. The rank then
still has weights, group and prompt. It keeps the commands that made them, and repeats what it has reported of its run.
"""

from collections.abc import Iterator
from typing import Any

from msgspec.structs import replace

from dinfer.messages import (
    Answer,
    BlockCorrupt,
    BreakpointHit,
    Command,
    Failed,
    JoinGroup,
    Lanes,
    LoadModel,
    MeasureRank,
    Note,
    PreparePrompt,
    RankMeasured,
    RankReport,
    SetBreakpoints,
    SetFaults,
)
from dinfer.rank.commands import C, Handler


class Remembered:
    """The last command of each kind that was carried out, what was measured with the present weights, and the reports
    about the present prompt."""

    def __init__(self) -> None:
        self._commands: dict[type[Command[Any]], Command[Any]] = {}
        self._measured: dict[bool, tuple[int, RankMeasured]] = {}
        self._lanes: Lanes | None = None
        self._failed: Failed | None = None
        self._notes: list[Note] = []

    def noting(self, handler: Handler) -> Handler:
        """The handler, which also notes each command that it has carried out."""
        if handler.kind not in (LoadModel, JoinGroup, PreparePrompt, SetBreakpoints, SetFaults, MeasureRank):
            return handler

        def carry_out(command: Command[Any]) -> Answer | None:
            done = handler.function(command)
            self._commands[type(command)] = command
            match command, done:
                case LoadModel(), _:
                    self._measured.clear()
                case MeasureRank(tokens=tokens, digests=digests), RankMeasured():
                    self._measured[digests] = tokens, done
            return done

        return handler._replace(function=carry_out)

    def last(self, kind: type[C]) -> C | None:
        """The last command of that type."""
        found = self._commands.get(kind)
        assert found is None or isinstance(found, kind)
        return found

    def measured(self) -> tuple[tuple[bool, int, RankMeasured], ...]:
        """What was measured with the present weights, as `Holdings` has it."""
        return tuple((digests, tokens, found) for digests, (tokens, found) in self._measured.items())

    def take_model(self, before: "Remembered") -> None:
        """The rank has taken over the weights of another one in its process, and nothing else."""
        if found := before.last(LoadModel):
            self._commands[LoadModel] = found

    def heard(self, report: RankReport) -> None:
        """The rank reports this. With new lanes a new prompt begins."""
        match report:
            case Lanes():
                self._lanes, self._failed, self._notes = report, None, []
                self._commands.pop(SetBreakpoints, None)
                self._commands.pop(SetFaults, None)
            case Failed():
                self._failed = report
            case BreakpointHit():
                pass  # it is about an order of this session
            case Note():
                self._notes.append(report)

    def forget(self, kind: type[Note]) -> None:
        """Notes of that type no longer hold."""
        self._notes = [note for note in self._notes if not isinstance(note, kind)]

    def repeated(self) -> Iterator[RankReport]:
        """What a session must hear to know the present prompt, in order."""
        if self._lanes:
            yield self._lanes
            for note in list(self._notes):
                # No session follows an order of another one.
                yield replace(note, order=None) if isinstance(note, BlockCorrupt) else note
        if self._failed:
            yield self._failed
