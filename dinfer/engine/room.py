"""Room: how large a KV cache must be."""

from dinfer.engine.faults import Faults
from dinfer.model.decoder import Decoder


def capacity(decoder: Decoder, tokens: int, new: int, faults: Faults | None = None) -> int:
    """Rows for a prompt of `tokens` and `new` tokens after it, as far as the model's positions go; and for those that
    faults add, which have no positions of their own."""
    rows = tokens + new * (2 if faults and faults.repeats else 1)
    return min(rows, decoder.max_positions) + (faults.room if faults else 0)
