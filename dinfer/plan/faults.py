"""Faults: what a user breaks on purpose, in which block, and where: in compute, on the wire or in memory.

Here faults are described and checked against the plan, before any rank is called. `engine.faults` carries them out.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape

FaultPlace = Literal["memory", "wire", "compute"]

_BITS = {"float32": (32, 23), "bfloat16": (16, 7), "float16": (16, 10), "float64": (64, 52)}
"""by dtype: the bits of a value, and of its mantissa"""

CASTS: dict[str, tuple[str, ...]] = {
    "float64": ("float32", "bfloat16"),
    "float32": ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
    "bfloat16": ("float8_e4m3fn", "float8_e5m2"),
    "float16": ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
}
"""by dtype: the dtypes through which a cast loses bits; the first is the default"""


class FaultRule(NamedTuple):
    """Where a kind of fault may strike (the first is the default), and its parameters beside its block."""

    wheres: tuple[FaultPlace, ...] = ("memory", "wire", "compute")
    details: tuple[str, ...] = ()


KINDS: dict[str, FaultRule] = {
    "bitflip": FaultRule(details=("tensor", "head", "token", "dim", "bit")),
    "nan": FaultRule(details=("tensor", "head", "token", "dim")),
    "zero": FaultRule(details=("tensor", "head", "token")),
    "stale": FaultRule(details=("tensor",)),
    "swap_kv": FaultRule(),
    "permute": FaultRule(details=("tensor", "seed")),
    "lost": FaultRule(),
    "append_twice": FaultRule(("memory",)),
    "head_shift": FaultRule(details=("tensor",)),
    "positions": FaultRule(("compute",)),
    "cast": FaultRule(details=("tensor", "dtype")),
    "repeat_row": FaultRule(("compute",)),
}


SLOW: dict[str, tuple[str, ...]] = {
    "slow link": ("source", "target", "ms"),
    "slow rank": ("rank", "ms", "factor"),
}
"""kinds that change no byte but take time, and their parameters: see `plan.slowness`"""


class TokenSizes(NamedTuple):
    """The size of K or V of one token in one layer."""

    kv_heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True, repr=False)
class Fault:
    """One fault, checked against the plan.

    `token`: a position in the prompt; `tensor` None: K and V; `dim` None: the first; `bit`: 0 is the lowest, None the
    middle of the mantissa. A repeat_row has neither block nor rank: it strikes in decode, on all ranks.

    A "slow link" makes each message from `source` to `rank` take `ms` longer, a "slow rank" each layer op of `rank`, by
    `ms` or to `factor` times its time; these have no block.
    """

    number: int
    kind: str
    where: str
    rank: int | None = None
    chunk: int = -1
    layer: int = -1
    tensor: str | None = None
    head: int | None = None
    token: int | None = None
    dim: int | None = None
    bit: int | None = None
    dtype: str | None = None
    seed: int = 0
    source: int | None = None
    ms: float | None = None
    factor: float | None = None

    def is_at(self, chunk: int, layer: int) -> bool:
        """Whether it strikes that block."""
        return (self.chunk, self.layer) == (chunk, layer)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def call(self) -> str:
        """The call that arms it, for example `run.inject("bitflip", rank=2, chunk=1, layer=7, …)`."""
        if self.kind in SLOW:
            values = {**self.as_dict(), "target": self.rank}
            named = ((name, values[name]) for name in SLOW[self.kind])
            given = [f"{name}={value:g}" for name, value in named if value is not None]
            return f'run.inject("{self.kind}", {", ".join(given)})'
        block = () if self.kind == "repeat_row" else ("rank", "chunk", "layer")
        given = [f"{name}={getattr(self, name)!r}" for name in (*block, *KINDS[self.kind].details, "where")]
        return f"run.inject({', '.join([repr(self.kind), *(text for text in given if not text.endswith('=None'))])})"

    def __str__(self) -> str:
        """For example `#1 bitflip in K of block c1 l7 on rank 2, head 3, token 141, in memory`."""
        if self.kind == "repeat_row":
            return f"#{self.number} repeat_row in decode, on all ranks"
        if self.kind in SLOW:
            which = f"{self.source}→{self.rank}" if self.source is not None else str(self.rank)
            return f"#{self.number} {self.kind} {which}, {self.slowness}"
        parts = f" in {self.tensor or 'K and V'}" if "tensor" in KINDS[self.kind].details else ""
        details = [f"{name} {getattr(self, name)}" for name in ("head", "token", "dim", "bit")]
        details = [text for text in details if not text.endswith("None")]
        details += [f"through {self.dtype}"] * bool(self.dtype) + [f"seed {self.seed}"] * bool(self.seed)
        block = f"block c{self.chunk} l{self.layer} on rank {self.rank}"
        where = "on the wire" if self.where == "wire" else f"in {self.where}"
        return ", ".join([f"#{self.number} {self.kind}{parts} of {block}", *details, where])

    __repr__ = __str__

    @property
    def slowness(self) -> str:
        """What a slow link or rank does, for example `20 ms more for each message`."""
        if self.factor is not None:
            return f"each layer takes {self.factor:g} times as long"
        return f"{self.ms:g} ms more for each {'layer' if self.source is None else 'message'}"


def middle_bit(dtype: str) -> int:
    """The bit that a bitflip flips by default."""
    return _BITS[dtype][1] // 2


def fault_of(number: int, kind: str, shape: Shape, sizes: TokenSizes, **given: Any) -> Fault:
    """A fault from the arguments of `run.inject`, with defaults for those that are None.

    Raises PlanError; the message names the given value, the allowed ones and what to do.
    """
    if kind not in KINDS:
        kinds = [*KINDS, *SLOW]
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise PlanError(f"unknown kind of fault: {kind!r}.{meant} The kinds are {', '.join(kinds)}.")
    given = {name: value for name, value in given.items() if value is not None}
    rule = KINDS[kind]
    allowed = ("where",) if kind == "repeat_row" else ("rank", "layer", "chunk", "where", *rule.details)
    for wrong in (name for name in given if name not in allowed):
        why = "it strikes on all ranks, in decode" if kind == "repeat_row" else "it breaks a whole block"
        why = "it has no such parameter" if rule.details else why
        raise PlanError(f"{kind} takes no {wrong}: {why}. It takes {', '.join(allowed)}; leave {wrong} out.")
    where = given.get("where", rule.wheres[0])
    if where not in rule.wheres:
        listed = " or ".join(f"'{place}'" for place in rule.wheres)
        raise PlanError(f"where is {where!r}; {kind} takes where={listed} only.")
    if kind == "repeat_row":
        return Fault(number, kind, where)
    if "layer" not in given:
        raise PlanError(f"{kind} needs a layer: give layer=0 to {shape.layers - 1}.")
    layer = _within("layer", given["layer"], shape.layers)
    rank = _rank(where, shape, layer, given.get("rank"))
    chunk = _chunk(kind, shape, given)
    details = _details(rule.details, shape.chunks[chunk], sizes, given)
    if kind == "stale" and chunk == 0:
        raise PlanError(
            "stale leaves the rows of the previous chunk in place, and chunk 0 has none: use chunk=1 or later."
        )
    if kind == "permute" and len(shape.chunks[chunk]) == 1:
        raise PlanError(f"chunk {chunk} has one token, so there is nothing to permute: use a longer chunk.")
    if kind == "head_shift" and sizes.kv_heads == 1:
        raise PlanError("this model has one KV head, so heads cannot shift: use swap_kv or permute.")
    return Fault(number, kind, where, rank, chunk, layer, **details)


def _within(name: str, value: Any, count: int, of: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"{name} is {value!r}; it must be a whole number from 0 to {count - 1}.")
    if not 0 <= value < count:
        raise PlanError(f"{name} is {value}; {of or f'the {name}s of this run'} go from 0 to {count - 1}.")
    return value


def _rank(where: FaultPlace, shape: Shape, layer: int, rank: Any) -> int:
    """By default the owner for compute, else the rank that receives the block first."""
    owner, ranks = shape.owners[layer], shape.world_size
    if where == "wire" and ranks == 1:
        raise PlanError("a run of one rank sends no blocks: use where='memory' or 'compute'.")
    if rank is None:
        return owner if where == "compute" else (owner + 1) % ranks
    _within("rank", rank, ranks)
    if where == "wire" and rank == owner:
        raise PlanError(
            f"rank {rank} owns layer {layer}, so it receives none of its blocks: name a rank that receives "
            "them, or use where='memory' or 'compute'."
        )
    if where == "compute" and rank != owner:
        raise PlanError(
            f"rank {owner} computes layer {layer}, not rank {rank}: leave rank out, or use "
            "where='wire' or 'memory'."
        )
    return int(rank)


def _chunk(kind: str, shape: Shape, given: Mapping[str, Any]) -> int:
    chunks = shape.chunks
    if "token" in given:
        token = _within("token", given["token"], shape.tokens, "the prompt's tokens")
        chunk = shape.chunk_of(token)
        if "chunk" in given and _within("chunk", given["chunk"], len(chunks)) != chunk:
            rows = chunks[given["chunk"]]
            raise PlanError(
                f"token {token} is in chunk {chunk}, not in chunk {given['chunk']} (tokens {rows.start} to "
                f"{rows.stop - 1}): leave chunk out. (A token is a position in the prompt.)"
            )
        return chunk
    if "chunk" not in given:
        also = " or a token" if "token" in KINDS[kind].details else ""
        raise PlanError(f"{kind} needs a block: give chunk=0 to {len(chunks) - 1}{also}.")
    return _within("chunk", given["chunk"], len(chunks))


def _details(
    names: tuple[str, ...], rows: range, sizes: TokenSizes, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters of these names beside the fault's block, checked and with defaults."""
    found = dict[str, Any]()
    if "tensor" in names:
        tensor, one = given.get("tensor"), "head" in names
        if tensor not in (None, "K", "V"):
            both = "" if one else ", or left out for both"
            raise PlanError(f"tensor is {tensor!r}; it must be 'K' or 'V'{both}.")
        found["tensor"] = "K" if one and tensor is None else tensor
    if "head" in names:
        found["head"] = _within("head", given.get("head", 0), sizes.kv_heads, "this model's KV heads")
        found["token"] = given.get("token", rows.start)
    if "dim" in given:
        found["dim"] = _within("dim", given["dim"], sizes.head_dim, "the dims of a head")
    if "bit" in given:
        found["bit"] = _within("bit", given["bit"], _BITS[sizes.dtype][0], f"the bits of a {sizes.dtype}")
    if "seed" in given:
        found["seed"] = _within("seed", given["seed"], 2**63, "seeds")
    if "dtype" in names:
        lower = CASTS[sizes.dtype]
        found["dtype"] = given.get("dtype", lower[0])
        if found["dtype"] not in lower:
            raise PlanError(
                f"dtype is {found['dtype']!r}; for KV in {sizes.dtype} it must be one of {', '.join(lower)}."
            )
    return found
