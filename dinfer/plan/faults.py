"""Faults: what a user breaks on purpose, and at which place in a block's life it breaks.

Here a fault is named and checked against the plan, so that whatever cannot be is refused before a rank hears of it;
breaking things is the rank's part.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape

FaultPlace = Literal["memory", "wire", "compute"]

WORDS: dict[str, str] = {"memory": "in memory", "wire": "on the wire", "compute": "in compute"}

_BITS = {"float32": (32, 23), "bfloat16": (16, 7), "float16": (16, 10), "float64": (64, 52)}
"""of a value, and of its mantissa"""

CASTS: dict[str, tuple[str, ...]] = {
    "float64": ("float32", "bfloat16"),
    "float32": ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
    "bfloat16": ("float8_e4m3fn", "float8_e5m2"),
    "float16": ("bfloat16", "float8_e4m3fn", "float8_e5m2"),
}
"""What loses bits of a dtype; the first is taken where none is named."""


class FaultRule(NamedTuple):
    """Where a kind may strike, first by default; and what it may be told beside its block."""

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


class TokenSizes(NamedTuple):
    """Of what one token holds in one layer."""

    kv_heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True, repr=False)
class Fault:
    """`token` is a position in the prompt, `tensor` None: K and V; `dim` None: the first; `bit` None: one in the middle
    of the mantissa, of which 0 is the lowest. A repeat_row has neither block nor rank: it happens in decode, on all."""

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

    def is_at(self, chunk: int, layer: int) -> bool:
        """Whether it is about that block."""
        return (self.chunk, self.layer) == (chunk, layer)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        return cls(**values)

    @property
    def call(self) -> str:
        """What arms it in a run, for example `run.inject("bitflip", rank=2, chunk=1, layer=7, …)`."""
        block = () if self.kind == "repeat_row" else ("rank", "chunk", "layer")
        given = [f"{name}={getattr(self, name)!r}" for name in (*block, *KINDS[self.kind].details, "where")]
        return f"run.inject({', '.join([repr(self.kind), *(text for text in given if not text.endswith('=None'))])})"

    def __str__(self) -> str:
        """For example `#1 bitflip in K of block c1 l7 on rank 2, head 3, token 141, in memory`."""
        if self.kind == "repeat_row":
            return f"#{self.number} repeat_row in decode, on all ranks"
        parts = f" in {self.tensor or 'K and V'}" if "tensor" in KINDS[self.kind].details else ""
        details = [f"{name} {getattr(self, name)}" for name in ("head", "token", "dim", "bit")]
        details = [text for text in details if not text.endswith("None")]
        details += [f"through {self.dtype}"] * bool(self.dtype) + [f"seed {self.seed}"] * bool(self.seed)
        block = f"block c{self.chunk} l{self.layer} on rank {self.rank}"
        return ", ".join([f"#{self.number} {self.kind}{parts} of {block}", *details, WORDS[self.where]])

    def __repr__(self) -> str:
        return str(self)


def fault_of(number: int, kind: str, shape: Shape, sizes: TokenSizes, **given: Any) -> Fault:
    """The fault that a user asks for, with what was left out (None) filled in. Raises PlanError, saying what was given,
    what is allowed and what to do."""
    said = {name: value for name, value in given.items() if value is not None}
    rule = _rule(kind)
    _check_names(kind, rule, said)
    where = _where(kind, rule, said.get("where"))
    if kind == "repeat_row":
        return Fault(number, kind, where)
    if "layer" not in said:
        raise PlanError(f"which layer is {kind} to break? Give layer=0 to {shape.layers - 1}.")
    layer = _within("layer", said["layer"], shape.layers)
    rank = _rank(where, shape, layer, said.get("rank"))
    chunk = _chunk(kind, shape, said)
    details = _details(rule, shape.chunks[chunk], sizes, said)
    _check_kind(kind, chunk, shape, sizes)
    return Fault(number, kind, where, rank, chunk, layer, **details)


def middle_bit(dtype: str) -> int:
    """The bit that is flipped where none is named."""
    return _BITS[dtype][1] // 2


def _rule(kind: str) -> FaultRule:
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise PlanError(f"{kind!r} is no kind of fault.{meant} The kinds are {', '.join(KINDS)}.")
    return KINDS[kind]


def _check_names(kind: str, rule: FaultRule, said: Mapping[str, Any]) -> None:
    allowed = ("where",) if kind == "repeat_row" else ("rank", "layer", "chunk", "where", *rule.details)
    if wrong := [name for name in said if name not in allowed]:
        why = (
            "it happens on all ranks alike, in decode" if kind == "repeat_row" else "it breaks a whole block"
        )
        why = why if not rule.details else "it has no use for that"
        raise PlanError(
            f"{kind} takes no {wrong[0]}: {why}. It takes {', '.join(allowed)}; leave {wrong[0]} out."
        )


def _where(kind: str, rule: FaultRule, where: Any) -> FaultPlace:
    for allowed in rule.wheres:
        if where in (None, allowed):
            return allowed
    listed = " or ".join(f"'{allowed}'" for allowed in rule.wheres)
    raise PlanError(f"where is {where!r}; {kind} happens with where={listed} only.")


def _within(name: str, value: Any, count: int, of: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"{name} is {value!r}; it must be a whole number from 0 to {count - 1}.")
    if not 0 <= value < count:
        raise PlanError(f"{name} is {value}; {of or f'the {name}s of this run'} go from 0 to {count - 1}.")
    return value


def _rank(where: FaultPlace, shape: Shape, layer: int, rank: Any) -> int:
    """By default the owner in compute, and else who receives the block first."""
    owner, ranks = shape.owners[layer], shape.world_size
    if where == "wire" and ranks == 1:
        raise PlanError("there is one rank, so no block goes over a wire: use where='memory' or 'compute'.")
    if rank is None:
        return owner if where == "compute" else (owner + 1) % ranks
    _within("rank", rank, ranks)
    if where == "wire" and rank == owner:
        raise PlanError(
            f"rank {rank} owns layer {layer}, so its blocks never come to it over a wire: name a rank that receives "
            "them, or use where='memory' or 'compute'."
        )
    if where == "compute" and rank != owner:
        raise PlanError(
            f"layer {layer} is computed by rank {owner} alone, not by rank {rank}: leave rank out, or use "
            "where='wire' or 'memory'."
        )
    return int(rank)


def _chunk(kind: str, shape: Shape, said: Mapping[str, Any]) -> int:
    chunks = shape.chunks
    if "token" in said:
        token = _within("token", said["token"], shape.tokens, "the prompt's tokens")
        chunk = token // shape.chunk_size
        if "chunk" in said and _within("chunk", said["chunk"], len(chunks)) != chunk:
            rows = chunks[said["chunk"]]
            raise PlanError(
                f"token {token} is not in chunk {said['chunk']}, which holds tokens {rows.start} to {rows.stop - 1}, "
                f"but in chunk {chunk}: leave chunk out. (A token is given by its position in the prompt.)"
            )
        return chunk
    if "chunk" not in said:
        also = " or a token" if "token" in KINDS[kind].details else ""
        raise PlanError(f"which block is {kind} to break? Give chunk=0 to {len(chunks) - 1}{also}.")
    return _within("chunk", said["chunk"], len(chunks))


def _details(rule: FaultRule, rows: range, sizes: TokenSizes, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the kind takes beside its block, checked; by default the first."""
    found = dict[str, Any]()
    if "tensor" in rule.details:
        found["tensor"] = _tensor(said.get("tensor"), one="head" in rule.details)
    if "head" in rule.details:
        found["head"] = _within("head", said.get("head", 0), sizes.kv_heads, "this model's KV heads")
        found["token"] = said.get("token", rows.start)
    if "dim" in said:
        found["dim"] = _within("dim", said["dim"], sizes.head_dim, "the dims of a head")
    if "bit" in said:
        found["bit"] = _within("bit", said["bit"], _BITS[sizes.dtype][0], f"the bits of a {sizes.dtype}")
    if "seed" in said:
        found["seed"] = _within("seed", said["seed"], 2**63, "seeds")
    if "dtype" in rule.details:
        found["dtype"] = _lower(said.get("dtype"), sizes.dtype)
    return found


def _tensor(tensor: Any, *, one: bool) -> str | None:
    if tensor not in (None, "K", "V"):
        both = "" if one else ", or left out for both"
        raise PlanError(f"tensor is {tensor!r}; it must be 'K' or 'V'{both}.")
    return "K" if one and tensor is None else tensor


def _lower(dtype: Any, own: str) -> str:
    if dtype not in (None, *CASTS[own]):
        raise PlanError(f"dtype is {dtype!r}; {own} loses bits through {', '.join(CASTS[own])}.")
    return CASTS[own][0] if dtype is None else str(dtype)


def _check_kind(kind: str, chunk: int, shape: Shape, sizes: TokenSizes) -> None:
    """What one kind cannot do where others can."""
    if kind == "stale" and chunk == 0:
        raise PlanError(
            "no chunk is before chunk 0 whose rows could be left in its place: use chunk=1 or later."
        )
    if kind == "permute" and len(shape.chunks[chunk]) == 1:
        raise PlanError(
            f"chunk {chunk} has one token, which cannot change places with another: use a longer chunk."
        )
    if kind == "head_shift" and sizes.kv_heads == 1:
        raise PlanError("this model has one KV head, so heads cannot shift: use swap_kv or permute.")
