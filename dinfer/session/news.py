"""What a session logs of its run by itself: a failure, ranks that fall silent, a hang, and the end of these."""

from collections.abc import Iterator, Sequence

from dinfer.cluster.ranks import RankState
from dinfer.run.run import Run
from dinfer.run.state import with_remedy


class RunNews:
    """Compares what is known of a run with what was known at the last look, whoever has found it."""

    def __init__(self) -> None:
        self._seen: tuple[Run | None, str, str, str] = (None, "", "", "")

    def of(self, run: Run, ranks: Sequence[RankState]) -> Iterator[str]:
        """Lines on what is new."""
        before, self._seen = self._seen, (run, run.cause, run.silence, run.hang)
        failure, silence, hang = before[1:] if before[0] is run else ("", "", "")
        if run.cause and not failure:
            yield _marked(run, run.cause)
            for rank, state in enumerate(ranks):
                if state.error:
                    yield f"rank {rank}:\n{state.error.traceback}"
        elif run.silence != silence:
            yield _marked(run, run.silence) if run.silence else "all ranks answer again"
        elif run.hang != hang and not run.failure:
            verdict = run.told
            yield _marked(run, str(verdict)) if verdict else "the run moves again"
            for rank, stack in verdict.stacks.items() if verdict else ():
                yield f"rank {rank} stands at:\n{stack}"


def _marked(run: Run, text: str) -> str:
    """After the run's state and the mark of how grave that is, before its remedy."""
    standing = run.standing()
    state = f"{standing.state}: "
    said = state if standing.remedy and not text.startswith(state) else ""
    return standing.severity.marked(f"{said}{with_remedy(text, standing.remedy)}")
