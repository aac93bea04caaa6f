"""Progress of one rank in one line. Pure: plan and state in, text out."""

from dinfer.plan.plan import Plan
from dinfer.session.states import RankState


def progress_line(plan: Plan, rank: int, state: RankState) -> str:
    """For example `rank 1  prefill  chunk 3 of 8, layer 14  KV 120 of 288 blocks`."""
    if state.phase == "decode":
        return f"rank {rank}  decode"  # the tokens themselves are shown as they come
    if state.phase != "prefill" or state.stand is None:
        return f"rank {rank}  {state.phase}"
    stand, lanes = state.stand, plan.lanes[rank]
    if len(stand.positions) != len(lanes):
        return f"rank {rank}  {state.phase}"
    done = [op for lane, position in zip(lanes, stand.positions, strict=True) for op in lane.ops[:position]]
    layers = [op for op in done if op.kind == "layer"]
    blocks = len(layers) + sum(op.kind == "recv" and op.what == "kv" for op in done)
    at = (
        f"chunk {layers[-1].chunk + 1} of {len(plan.shape.chunks)}, layer {layers[-1].layer}"
        if layers
        else "waiting for hidden states"
    )
    return f"rank {rank}  prefill  {at}  KV {blocks} of {plan.shape.blocks} blocks"
