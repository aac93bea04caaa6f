"""Compares a replay with the run: each block with the rank's ledger, each new token with the run's."""

from dinfer.display import listed
from dinfer.engine.prefill import Prefill
from dinfer.kv.digests import as_numbers
from dinfer.plan.ops import Op
from dinfer.saved.replay.record import RankRecord, RecordError, not_repeated


class Differences:
    """`notes`: where the replay is not the run bit for bit, each said once."""

    def __init__(self, recorded: RankRecord) -> None:
        self._recorded = recorded
        self.notes = not_repeated(recorded)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def after_op(self, op: Op, state: Prefill) -> None:
        """Compare the blocks that this op has made."""
        state.coded.seal_all()
        for value in op.makes():
            key = value.chunk, value.layer
            noted, entry = self._recorded.noted.get(key), state.ledger.entries.get(key)
            if value.what != "kv" or noted is None or entry is None:
                continue
            if as_numbers(entry.digests) == noted.came or (noted.edited and op.kind == "layer"):
                continue
            block = f"block c{op.chunk} l{op.layer}"
            if op.kind == "layer":
                self.note(
                    f"{block} has other bytes here than in the run (another machine, version of torch, device or "
                    "number of threads, other weights, or a fault that was armed there)"
                )
            else:
                self.note(
                    f"{block} as it was recorded is not what rank {op.peer} had sent: it has changed since"
                )

    def after_token(self, number: int, token: int) -> None:
        """Compare the new token of that number, from 0. Raises RecordError if the run's is another one."""
        tokens = self._recorded.tokens
        if number == len(tokens):
            self.note(f"new token {number}, which was not recorded, is {token} here")
        elif token != tokens[number]:
            self.note(f"new token {number} is {token} here; in the run it was {tokens[number]}")
            raise RecordError(
                f"this replay of rank {self._recorded.rank} is not the run: {listed(self.notes)}"
            )
