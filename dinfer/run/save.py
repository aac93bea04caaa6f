"""Saving: a run as a folder: what its ranks hold, where they stand, and what they have done."""

import time
from collections.abc import Sequence
from pathlib import Path

from dinfer.cluster.kv import Live
from dinfer.cluster.ranks import answers
from dinfer.messages import ListKv
from dinfer.model.decoder import Decoder
from dinfer.run.hang import Explaining
from dinfer.run.recorded import own_of, recorded_of
from dinfer.run.report import Reporting
from dinfer.run.reproduce import parameters
from dinfer.saved.replay.record import Own
from dinfer.saved.replay.replay import Replay
from dinfer.saved.write import Content, check_free, chosen_layers, write
from dinfer.trace.findings import with_findings

ANSWER_S = 5.0
"""for a rank of a run that has failed or hangs to say that it can be asked"""


class Saving(Explaining, Reporting):
    """Of one run."""

    def save(
        self,
        folder: str | Path,
        *,
        kv: bool | Sequence[int] = True,
        hidden: bool = True,
        prompt: bool = False,
    ) -> Path:
        """Save the run to a folder, which `dinfer.open` opens without a cluster or a checkpoint; where it is.

        First it waits until the run stands; one that hangs or has failed is saved as far as its ranks answer. There
        will be the plan, the trace, the verdict, token ids and the digests of all rows; with `kv` the values of all
        layers, or of those in a list; with `hidden` what has entered each rank, for replays; with `prompt` its text and
        that of new tokens (which a tokenizer makes of the ids, too). A saved run that is there is replaced.
        Raises SavedError where something else is, and RuntimeError for a run that is over.
        """
        layers = chosen_layers(kv, self.plan.shape.layers)
        check_free(Path(folder).expanduser().resolve())
        source, evidence, ranks = self.last_source(), self.evidence(), self._reachable()
        trace = with_findings(self.trace, self.findings(prompt=prompt))
        if not ranks:  # in decode, a rank that waits for another does not answer
            layers, hidden = (), False
        own = self._own(source, ranks) if hidden else {}
        return write(
            Content(source, ranks, trace, evidence, self._told(), layers, hidden, prompt, own), folder
        )

    def _own(self, source: Live, ranks: Sequence[int]) -> dict[int, Own]:
        return {rank: own_of(self, source, rank) for rank in ranks} if self.standing().stands else {}

    def _reachable(self) -> tuple[int, ...]:
        """The ranks that can be asked what they hold."""
        silent, exits = self._line.silent(), self._line.exits()
        there = [rank for rank in range(self.world_size) if exits[rank] is None and rank not in silent]
        if self._state() in ("paused", "done") and len(there) == self.world_size:
            return tuple(there)
        return tuple(sorted(answers(self._line, dict.fromkeys(there, ListKv()), ANSWER_S)))

    def _told(self) -> dict[str, object]:
        standing = self.standing()
        return {
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "state": standing.state,
            "positions": [list(stand.positions) for stand in standing.stands],
            "edited": list(self.edited),
            "faults": list(standing.faults),
            "parameters": parameters(self.config),
            "checkpoint": {"path": str(self.job.spec.path), "fingerprint": self._fingerprint},
        }


class Replaying(Reporting):
    """Part of a run."""

    def replay(
        self, rank: int, *, model_path: str = "", device: str = "", decoder: Decoder | None = None
    ) -> Replay:
        """One rank of this run alone, without its peers, in this process: what they sent to it comes from what it holds
        now. It begins before its first op, is stepped as a run is, and ends at the op at which the rank stands.

        `model_path`: where the checkpoint lies here, if not where it did; `device`: by default a GPU if the rank had
        one and there is one here, else the CPU; `decoder`: weights that are loaded already, such as those of another
        replay. The run itself is not changed. Raises PlanError for no such rank,
        RankFailed where it is gone, RecordError where the checkpoint is another one.
        """
        return Replay(recorded_of(self, rank), model_path=model_path, device=device, decoder=decoder)
