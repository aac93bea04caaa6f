"""What an editor shows under Variables: where a rank stands, hidden states and KV in figures, the run.

A `DapVariable` is a node of a tree whose children are made when they are asked for: a block's values are fetched only
once somebody unfolds it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinfer.dap.stack import DapFrame, ops_here
from dinfer.errors import DinferError, NotPossible
from dinfer.kv.digests import as_numbers, block_digests, mixed_sum, row_digests
from dinfer.kv.source import HeldSpans, LiveSource
from dinfer.plan.breakpoints import parse_when
from dinfer.plan.ops import NothingYet
from dinfer.run.run import Run
from dinfer.verdict.where import ranks_text

FEW = 8
"""values of a row that are shown"""

Children = Callable[[], "Sequence[DapVariable]"]


@dataclass(frozen=True)
class DapVariable:
    """`children`: None where there are none; `rows`: how many of them are numbered and may be fetched by the page."""

    name: str
    value: str
    children: Children | None = None
    rows: int = 0
    type: str = ""


@dataclass(frozen=True)
class DapScope:
    """A heading under Variables; `slow`: its values are fetched from ranks."""

    name: str
    children: Children
    slow: bool = False


def scopes_of(run: Run, frame: DapFrame) -> list[DapScope]:
    """The scopes of a frame."""
    found = [DapScope("Position", partial(_position, run, frame.rank))]
    if frame.chunk is not None and frame.layer is not None and frame.kind in ("op", "layer", "lane"):
        chunk, layer = frame.chunk, frame.layer
        hidden = partial(_hidden_states, run, chunk, layer)
        found.append(DapScope(f"Hidden state of c{chunk} l{layer}", hidden, slow=True))
    if frame.kind == "chunk" and frame.chunk is not None:
        name, kv = f"KV of chunk {frame.chunk}, by layer", partial(_kv_of_chunk, run, frame.rank, frame.chunk)
        found.append(DapScope(name, kv, slow=True))
    elif frame.layer is not None:
        name, kv = f"KV of layer {frame.layer}, by chunk", partial(_kv_of_layer, run, frame.rank, frame.layer)
        found.append(DapScope(name, kv, slow=True))
    elif frame.kind == "decode":
        found.append(DapScope("KV, by layer", partial(_kv_by_layer, run, frame.rank), slow=True))
    return [*found, DapScope("Run", partial(_run_variables, run))]


# -- where a rank stands


def _position(run: Run, rank: int) -> list[DapVariable]:
    standing, lanes = run.standing(), run.plan.lanes[rank]
    if not standing.stands:
        return [DapVariable("state", "not ready yet")]
    stand = standing.stands[rank]
    here = ops_here(lanes, stand)
    done, total = sum(stand.positions), sum(len(lane.ops) for lane in lanes)
    found = [
        DapVariable("op", f"{here[0].op} ({here[0].state})" if here else "none"),
        DapVariable("ops done", f"{done} of {total}"),
    ]
    if took := standing.took[rank] if rank < len(standing.took) else "":
        found.append(DapVariable("last op", took.replace("`", "")))

    def by_lane() -> list[DapVariable]:
        lines = []
        for lane, at, started in zip(lanes, stand.positions, stand.started, strict=True):
            op = f", {'in' if started else 'next'} {lane.ops[at]}" if at < len(lane.ops) else ""
            lines.append(DapVariable(lane.name, f"{at} of {len(lane.ops)}{op}"))
        return lines

    found.append(DapVariable("lanes", f"{len(lanes)}", by_lane))
    found.append(DapVariable("device", standing.devices[rank]))
    if memory := standing.memory[rank] if rank < len(standing.memory) else None:
        found.append(DapVariable("memory", f"{memory / (1 << 20):,.0f} MiB"))
    if not standing.alive[rank]:
        found.insert(0, DapVariable("process", "gone"))
    return found


def _run_variables(run: Run) -> list[DapVariable]:
    standing = run.standing()
    found = [DapVariable("state", str(standing.state))]
    texts = {
        "message": standing.message,
        "to go on": standing.remedy,
        "new text": repr(standing.text) if standing.decoded else "",
        "new tokens": str(list(run.tokens)) if standing.decoded else "",
        "not finite": standing.nonfinite,
        "edited by hand": ", ".join(run.edited),
    }
    found += [DapVariable(name, text) for name, text in texts.items() if text]
    shape = run.plan.shape
    found += [
        DapVariable("prompt", shape.tokens_text),
        DapVariable("schedule", run.plan.schedule),
        DapVariable("sync_strategy", run.plan.sync_strategy),
        DapVariable("model", run.config.model_path),
    ]
    lists = {
        "breakpoints": [str(one) for one in run.breakpoints],
        "armed faults": list(standing.faults),
        "marked blocks": [one.text for one in standing.marks],
    }
    for name, lines in lists.items():
        if lines:
            found.append(DapVariable(name, str(len(lines)), partial(_lines, lines)))
    return found


def _lines(lines: Sequence[str]) -> list[DapVariable]:
    return [DapVariable(f"[{n}]", line) for n, line in enumerate(lines)]


# -- tensors


def figures(values: Tensor) -> dict[str, str]:
    """Shape, dtype, mean, std, min, max, and how many values are NaN, Inf and zero. The figures leave NaN and Inf
    out."""
    flat = values.detach().flatten().double()
    finite = flat[torch.isfinite(flat)]
    found = {"shape": str(list(values.shape)), "dtype": str(values.dtype).removeprefix("torch.")}
    if len(finite):
        numbers = {
            "mean": finite.mean(),
            "std": finite.std(correction=0),
            "min": finite.min(),
            "max": finite.max(),
            "absmax": finite.abs().max(),
        }
        found |= {name: f"{float(number):.6g}" for name, number in numbers.items()}
    counts = {"NaN": flat.isnan().sum(), "Inf": flat.isinf().sum(), "zeros": (flat == 0).sum()}
    return found | {name: f"{int(count):,} of {len(flat):,}" for name, count in counts.items()}


def summary_of(values: Tensor) -> str:
    """The figures in one line; NaN and Inf first if there are any."""
    found = figures(values)
    broken = [f"{found[name].partition(' ')[0]} {name}" for name in ("NaN", "Inf") if found[name][0] != "0"]
    numbers = [f"{name} {found[name]}" for name in ("mean", "std", "min", "max") if name in found]
    return ", ".join([*broken, f"{found['dtype']} {found['shape']}", *numbers])


def _tensor_children(
    values: Tensor, digest: int, first_token: int, texts: Sequence[str]
) -> list[DapVariable]:
    """The figures, the digest, and the rows of a tensor whose first dimension is tokens."""
    found = [DapVariable(name, value) for name, value in figures(values).items()]
    found.append(DapVariable("digest", f"{digest:016x}"))
    rows = partial(_rows, values, first_token, texts)
    return [*found, DapVariable("values", f"{len(values)} tokens", rows, rows=len(values))]


def _rows(values: Tensor, first: int, texts: Sequence[str]) -> list[DapVariable]:
    found = []
    for n, row in enumerate(values):
        flat = row.flatten()
        shown = "  ".join(f"{float(value):.4g}" for value in flat[:FEW]) + "  …" * (len(flat) > FEW)
        token = first + n
        text = f" {texts[token]!r}" if token < len(texts) and texts[token].strip() else ""
        found.append(DapVariable(f"[{n}]", shown, type=f"token {token}{text}"))
    return found


# -- hidden states


def _hidden_states(run: Run, chunk: int, layer: int) -> list[DapVariable]:
    source = run.live()
    shape = source.subject.plan.shape
    found = []
    for at, name in ((layer, f"before layer {layer}"), (layer + 1, f"after layer {layer}")):
        rank = shape.owners[layer]  # which has made the second, too, wherever it is sent
        found.append(_guarded(name, partial(_hidden_state, source, rank, chunk, at, name)))
    return found


def hidden_values(source: LiveSource, rank: int, chunk: int, layer: int) -> Tensor:
    """The hidden state of a chunk before a layer, [tokens, hidden_size]. Raises NothingYet."""
    first = source.hidden_first(rank).get(chunk)
    computed = layer == 0 or source.held([rank])[0].spans[layer - 1] > chunk
    if first is None or first > layer or not (first == layer or computed):
        raise NothingYet("not computed yet")
    return source.hidden(rank, chunk, layer)


def _hidden_state(source: LiveSource, rank: int, chunk: int, layer: int, name: str) -> DapVariable:
    values = hidden_values(source, rank, chunk, layer)
    digest = mixed_sum(row_digests(values.unsqueeze(1)), first=0)
    rows = source.subject.spans[chunk]
    children = partial(_tensor_children, values, _unsigned(digest), rows.start, source.subject.texts)
    return DapVariable(name, f"{summary_of(values)} (rank {rank})", children)


# -- KV


def _kv_of_layer(run: Run, rank: int, layer: int) -> list[DapVariable]:
    source = run.live()
    count = len(source.subject.spans)
    names = [
        "new tokens" if source.subject.chunk_of(span) is None else f"chunk {span}" for span in range(count)
    ]
    return _blocks(source, rank, [(span, layer, name) for span, name in enumerate(names)])


def _kv_of_chunk(run: Run, rank: int, chunk: int) -> list[DapVariable]:
    source = run.live()
    layers = range(source.subject.plan.shape.layers)
    return _blocks(source, rank, [(chunk, layer, f"layer {layer}") for layer in layers])


def _kv_by_layer(run: Run, rank: int) -> list[DapVariable]:
    layers = range(run.plan.shape.layers)
    return [DapVariable(f"layer {layer}", "", partial(_kv_of_layer, run, rank, layer)) for layer in layers]


def _blocks(source: LiveSource, rank: int, wanted: Sequence[tuple[int, int, str]]) -> list[DapVariable]:
    """A line for each block: whether this rank has it, and whether other ranks hold the same. Each is a span of the
    source's subject, a layer and a name."""
    living, held = _held(source, rank)
    layers = sorted({layer for _, layer, _ in wanted})
    spans = sorted({span for span, _, _ in wanted})
    rows = [source.subject.spans[span] for span in spans]
    having = [other for other in living if any(held[other].spans[layer] > spans[0] for layer in layers)]
    digests = dict(zip(having, source.digests(having, layers, rows), strict=True)) if having else {}
    found = []
    for span, layer, name in wanted:
        if held[rank].spans[layer] <= span:
            found.append(DapVariable(name, "not here yet"))
            continue
        at = layers.index(layer), spans.index(span)
        by_rank = {
            other: as_numbers(digests[other][at]) for other in having if held[other].spans[layer] > span
        }
        rows_of = source.subject.spans[span]
        text = f"{_agreement(rank, by_rank)}; tokens {rows_of.start}–{rows_of.stop - 1}"
        found.append(DapVariable(name, text, partial(_block, source, rank, layer, span, by_rank)))
    return found


def _held(source: LiveSource, rank: int) -> tuple[list[int], dict[int, HeldSpans]]:
    """The ranks that answer, and what each holds; raises as the source does if `rank` does not."""
    mine = source.held([rank])[0]
    found = {rank: mine}
    for other in source.ranks:
        if other != rank:
            try:
                found[other] = source.held([other])[0]
            except DinferError:  # it is gone, or does not answer
                continue
    return sorted(found), found


def _agreement(rank: int, by_rank: dict[int, tuple[int, int]]) -> str:
    """Which ranks hold the same bytes as this one."""
    others = [other for other in by_rank if other != rank]
    differ = [other for other in others if by_rank[other] != by_rank[rank]]
    if differ:
        return f"DIFFERS from {ranks_text(differ)}"
    if others:
        return f"equal on {ranks_text(by_rank)}"
    return "on this rank alone"


def _block(
    source: LiveSource, rank: int, layer: int, span: int, by_rank: dict[int, tuple[int, int]]
) -> list[DapVariable]:
    """K and V of a block, in figures; and its digests on each rank."""
    places = source.subject.spans[span]
    values = source.values(rank, layer, places)
    digests = as_numbers(block_digests(row_digests(values)))
    found = []
    for n, name in enumerate("KV"):
        part = values[:, n]
        children = partial(_tensor_children, part, digests[n], places.start, source.subject.texts)
        found.append(DapVariable(name, summary_of(part), children))
    lines = [
        DapVariable(f"rank {other}", f"K {k:016x}, V {v:016x}") for other, (k, v) in sorted(by_rank.items())
    ]
    return [*found, DapVariable("digests", _agreement(rank, by_rank), lambda: lines)]


def _unsigned(digest: Tensor) -> int:
    return int(digest.flatten()[0]) & ((1 << 64) - 1)


def _guarded(name: str, make: Callable[[], DapVariable]) -> DapVariable:
    """The variable, or why there is none."""
    try:
        return make()
    except DinferError as error:
        return DapVariable(name, str(error).partition("\n")[0])


# -- conditions


def met_condition(run: Run, frame: DapFrame, text: str) -> str:
    """Whether a breakpoint's condition holds of what the frame's block holds: K and V on the frame's rank, and the
    hidden state after the layer. Raises NotPossible for a condition that only a run can meet."""
    kind, bound = parse_when(text)
    if kind not in ("nan", "inf", "absmax"):
        raise NotPossible(f"{text!r} is met while a run moves: set a breakpoint, such as 'layer if {text}'.")
    if frame.chunk is None or frame.layer is None:
        raise NotPossible(f"{text!r} is about a block: select the frame of an op or a layer first.")
    source, lines = run.live(), list[str]()
    for name, values in _made(source, frame.rank, frame.chunk, frame.layer):
        found = figures(values)
        if kind == "absmax":
            holds = float(found.get("absmax", "nan")) > bound
            about = f"absmax {found.get('absmax', 'nan')}"
        else:
            about = f"{found['NaN' if kind == 'nan' else 'Inf']} values"
            holds = not about.startswith("0 of")
        lines.append(f"{holds}: {name}, {about}")
    return "\n".join(lines) or f"c{frame.chunk} l{frame.layer} is not computed yet"


def _made(source: LiveSource, rank: int, chunk: int, layer: int) -> Iterator[tuple[str, Tensor]]:
    """What is there of a block: each tensor with its name."""
    if source.held([rank])[0].spans[layer] > chunk:
        values = source.values(rank, layer, source.subject.spans[chunk])
        yield from (
            (f"{name} of c{chunk} l{layer} on rank {rank}", values[:, n]) for n, name in enumerate("KV")
        )
    shape = source.subject.plan.shape
    owner = shape.owners[layer]
    with suppress(NothingYet):
        yield f"hidden state after c{chunk} l{layer}", hidden_values(source, owner, chunk, layer + 1)
