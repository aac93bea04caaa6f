"""Format: the names of files and tensors of a saved run, which its writer and its reader share."""

import re

from dinfer.errors import DinferError

FORMAT, VERSION = "dinfer-run", 1
RUN, DESCRIBED, PLAN, TRACE = "run.json", "FORMAT.md", "plan.txt", "trace.jsonl"
DIGESTS, HIDDEN = "digests.safetensors", "hidden.safetensors"
LEDGER_COLUMNS = 7
"""chunk, layer, edited; digests of K and V as they came, then as announced"""
_KV_FILE = re.compile(r"kv\.layer\d+\.safetensors")


class SavedError(DinferError, ValueError):
    """A folder that is no saved run, is damaged, or cannot be written; or something that one does not hold."""


def kv_file(layer: int) -> str:
    return f"kv.layer{layer}.safetensors"


def is_part(name: str) -> bool:
    """Whether a file of this name belongs to a saved run."""
    return name in (RUN, DESCRIBED, PLAN, TRACE, DIGESTS, HIDDEN) or bool(_KV_FILE.fullmatch(name))


def rows_name(rank: int, layer: int) -> str:
    """Of the rows' digests as they are."""
    return f"rank{rank}.layer{layer}.rows"


def came_name(rank: int, layer: int, chunk: int) -> str:
    """Of the rows' digests as the block had come, where that was otherwise."""
    return f"rank{rank}.layer{layer}.chunk{chunk}.came"


def ledger_name(rank: int) -> str:
    return f"rank{rank}.ledger"


def piece_name(rank: int, start: int) -> str:
    """Of values: the rows from one place on."""
    return f"rank{rank}.rows{start}"


def final_name(rank: int) -> str:
    return f"rank{rank}.final"


def edit_name(rank: int, number: int, what: str, chunk: int, layer: int) -> str:
    """Of a block ("kv") or a hidden state ("hidden") that the user has left otherwise."""
    return f"rank{rank}.edit{number}.{what}.chunk{chunk}.layer{layer}"


def hidden_name(rank: int, chunk: int, layer: int) -> str:
    return f"rank{rank}.chunk{chunk}.layer{layer}"
