"""Replaying a run: one of its ranks alone, in this process, up to where it stands or has failed."""

from dinfer.model.decoder import Decoder
from dinfer.session.replaying.live import recorded_of
from dinfer.session.replaying.replay import Replay
from dinfer.session.runs.reporting import Reporting


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
