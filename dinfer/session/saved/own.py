"""Own: what ranks know of their own doings, which a replay needs beside KV and hidden states, to and from a folder."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dinfer.engine.edits import Edit
from dinfer.engine.ledger import Key
from dinfer.plan.faults import Fault
from dinfer.session.replaying.recorded import Own
from dinfer.session.saved.format import edit_name, final_name


def own_values(own: Own) -> dict[str, Any]:
    """As plain values."""
    return {
        "device": own.device,
        "tokens": list(own.tokens),
        "begun": list(own.begun),
        "final": own.final is not None,
        "edits": [
            {
                "positions": list(edit.positions),
                "kv": [list(key) for key in edit.kv],
                "hidden": [list(key) for key in edit.hidden],
            }
            for edit in own.edits
        ],
        "faults": [fault.as_dict() for fault in own.faults],
    }


def own_tensors(rank: int, own: Own) -> dict[str, Tensor]:
    """By their names in the file."""
    found = {} if own.final is None else {final_name(rank): own.final}
    for number, edit in enumerate(own.edits):
        for what, tensors in (("kv", edit.kv), ("hidden", edit.hidden)):
            found |= {edit_name(rank, number, what, *key): tensor for key, tensor in tensors.items()}
    return found


def own_from(values: Mapping[str, Any], rank: int, tensor: Callable[[str], Tensor]) -> Own:
    """From these values; `tensor` gives one by its name."""

    def edited(number: int, what: str, keys: list[list[int]]) -> dict[Key, Tensor]:
        return {(chunk, layer): tensor(edit_name(rank, number, what, chunk, layer)) for chunk, layer in keys}

    return Own(
        device=values["device"],
        tokens=tuple(values["tokens"]),
        begun=tuple(values["begun"]),
        final=tensor(final_name(rank)) if values["final"] else None,
        edits=tuple(
            Edit(tuple(one["positions"]), edited(n, "kv", one["kv"]), edited(n, "hidden", one["hidden"]))
            for n, one in enumerate(values["edits"])
        ),
        faults=tuple(map(Fault.of, values["faults"])),
    )
