"""Breaking: a user breaks something on purpose, to see whether, where and how it shows."""

from dinfer.messages import GetStand
from dinfer.plan.faults import KINDS, Fault, TokenSizes, fault_of
from dinfer.plan.ops import PlanError, Value
from dinfer.run.action import action
from dinfer.run.faults import Armed, Injected
from dinfer.run.state import RunState, state_of_lanes


class Breaking(RunState):
    """Of one run."""

    @action
    def inject(
        self,
        kind: str,
        *,
        rank: int | None = None,
        layer: int | None = None,
        chunk: int | None = None,
        tensor: str | None = None,
        head: int | None = None,
        token: int | None = None,
        dim: int | None = None,
        bit: int | None = None,
        where: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
    ) -> Injected:
        """Break something on purpose, now or when it comes to be; for a run that stands.

        One value of a block: "bitflip", "nan". One row, of a head and token: "zero". A block: "stale" (it holds the
        rows of the chunk before), "swap_kv", "permute" (its tokens, drawn by `seed`), "lost" (zeros: it never came),
        "head_shift", "cast" (through `dtype` and back), "append_twice" (its rows again behind it, once all of the
        layer is there; `rank` then holds more). "positions": the layer is told wrong ones. "repeat_row": decode
        appends each row twice, on all ranks.

        `where`: "memory": on `rank`, after the block was made or has come, at once if it is there; "wire": on its way
        to `rank`; "compute": on the rank that owns the layer, so that all ranks get it alike. By default the first of
        these that the kind allows, the rank that receives the block first, and the first value: K, head 0, the chunk's
        first token, dim 0, a bit in the middle of the mantissa. `token` is a position in the prompt and stands for its
        chunk.

        It strikes again whenever the block is made again, until it is disarmed: `run.faults.clear()`. Raises PlanError
        for what cannot be.
        """
        with self._lock:
            made = self._made()
            fault = fault_of(
                self._armed.next_number, kind, self.plan.shape, self._sizes(), rank=rank, layer=layer, chunk=chunk,
                tensor=tensor, head=head, token=token, dim=dim, bit=bit, where=where, dtype=dtype, seed=seed,
            )  # fmt: skip
            _check_in_time(fault, made)
            injected = self._armed.add(fault)
        self.look()
        return injected

    @property
    def faults(self) -> Armed:
        """Those that are armed, and what they have done; `run.faults.clear()` and `.remove(number)` disarm them."""
        return self._armed

    def _made(self) -> list[set[Value]]:
        """By rank, what it holds. Raises PlanError for a run that moves."""
        answers = self._ask_all(GetStand())
        stands = [answers[rank] for rank in range(self.world_size)]
        if state_of_lanes(self.plan, stands) == "running":
            raise PlanError(
                "the run is moving, so what a fault meets would be luck: run.pause() first, then run.inject(…)."
            )
        done = [
            [op for lane, n in zip(lanes, stand.positions, strict=True) for op in lane.ops[:n]]
            for lanes, stand in zip(self.plan.lanes, stands, strict=True)
        ]
        return [{value for op in ops for value in op.makes()} for ops in done]

    def _sizes(self) -> TokenSizes:
        spec, dtype = self.job.spec, self.config.dtype
        return TokenSizes(spec.kv_heads, spec.head_dim, spec.dtype if dtype == "auto" else dtype)


def _check_in_time(fault: Fault, made: list[set[Value]]) -> None:
    """Raises PlanError for a fault on the way to a block that is there already."""
    if fault.where == "memory" or fault.rank is None:
        return
    if Value("kv", fault.chunk, fault.layer) in made[fault.rank]:
        block = f"block c{fault.chunk} l{fault.layer}"
        came = "been computed" if fault.where == "compute" else f"arrived on rank {fault.rank}"
        also = ", or use where='memory'" if "memory" in KINDS[fault.kind].wheres else ""
        raise PlanError(
            f"{block} has {came} already: go back before it (run.step_back(…), or run.run_to(…) to a block before it)"
            f"{also}."
        )
