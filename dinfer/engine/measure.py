"""What layers and links take here, measured on the ranks. All ranks call these functions together.

`planner` fits and simulates; nothing is decided here.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.codec.choice import ABOUT, DTYPES, Codec
from dinfer.codec.coding import decode, encode
from dinfer.config import Config
from dinfer.engine.corruption import Alarm
from dinfer.engine.engine import Engine
from dinfer.engine.finite import FiniteCheck
from dinfer.engine.kernels import Graphs, Kernels
from dinfer.engine.link_times import time_links, time_stream_links
from dinfer.engine.prefill import Prefill
from dinfer.messages import MeasureRank
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Op
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.planner.costs import LayerTime
from dinfer.planner.machine import CodecCost, LinkSpeed
from dinfer.trace.events import Event
from dinfer.transport.gloo import Comm
from dinfer.transport.streams import StreamComm

ROUNDS = 3
"""timed runs of a layer for each shape, after one that warms up"""

MORE_CHUNKS = 3
"""than ranks, in a run that is timed: so many chunks for which all ranks compute at once, and one on top"""

CODEC_LAYERS = 6
"""from how many layers codecs get blocks"""

MOST_LAYERS = 8
"""of a rank on a GPU, that are timed one right after another"""


class Measured(NamedTuple):
    """What one rank has measured. `layers`: alone; `in_run`: among the other ops of a run. Bytes are of one token;
    `links` are the same on every rank."""

    layers: list[LayerTime]
    in_run: list[LayerTime]
    links: list[LinkSpeed]
    hidden_bytes: int
    block_bytes: int
    codecs: list[CodecCost]
    padded: bool = False
    """whether graphs run the layers, for which a chunk is as long as what was captured"""


GraphsOf = Callable[[int], Graphs | None]
"""the graphs for chunks of so many tokens; None where transformers' own kernels run"""


def measure(decoder: Decoder, comm: Comm, command: MeasureRank, kernels: Kernels) -> Measured:
    """All that the planner needs: layers on all ranks at the same time, by themselves and in short runs; then one link
    after another, and all; then codecs. With the kernels and on the backend of the runs that are asked about; `kernels`
    keeps the graphs that are captured for it."""
    comm.all_gather(b"m")
    device, lengths = decoder.device, command.lengths
    gpu_ids = (device.index or 0,) * comm.world_size if device.type == "cuda" else ()
    config = Config(
        world_size=comm.world_size,
        digests=command.digests,
        backend=command.backend,
        kernels=command.kernels if gpu_ids else "exact",
        gpu_ids=gpu_ids,
        log_dir="",
    )

    def graphs_of(length: int) -> Graphs | None:
        return kernels.prepare(decoder, config.with_(chunk_size=length))

    layers = time_layers(decoder, command.tokens, lengths, digests=command.digests, graphs_of=graphs_of)
    in_run = list[LayerTime]()
    if config.uses_streams or not gpu_ids:  # over gloo on a GPU, ops end when their kernels are launched
        for length in sorted({min(lengths), min(command.link_tokens, max(lengths))}):
            in_run += time_layers_in_run(
                decoder, comm, command.tokens, config.with_(chunk_size=length), graphs_of(length)
            )
    hidden, block = token_bytes(decoder)
    nbytes = block * command.link_tokens
    codecs = list[CodecCost]()
    if config.uses_streams:
        assert isinstance(comm, StreamComm), "the backend needs a transport with streams"
        links = time_stream_links(comm, device, nbytes)
    else:
        links, codecs = time_links(comm, nbytes), time_codecs(decoder, command.link_tokens)
    padded = graphs_of(lengths[0]) is not None
    return Measured(layers, in_run, links, hidden, block, codecs, padded)


def time_layers_in_run(
    decoder: Decoder, comm: Comm, tokens: int, config: Config, graphs: Graphs | None
) -> list[LayerTime]:
    """Times of a layer among the other ops of a run: from the end of one to the end of the next, so with what an op
    costs beside its kernels, and with sync on the same cores. Of each chunk the median; there are a few chunks more
    than ranks, so that all ranks compute at once, but no more than `tokens` tokens."""
    length = config.chunk_size
    count = max(1, min(comm.world_size + MORE_CHUNKS, tokens // length))
    engine, events = Engine(decoder, comm, config, graphs=graphs), list[Event]()
    for _ in range(2):  # the first warms up
        comm.all_gather(b"r")  # if another rank has failed, this one raises here, before it has lanes
        engine.prepare([0] * (count * length))
        try:
            comm.all_gather(b"s")
            engine.prefill_phase()
            comm.all_gather(b"e")
            assert engine.recorder is not None
            events = engine.recorder.events()
        finally:
            engine.release()
    return in_run_times(events, length)


def in_run_times(events: Sequence[Event], length: int) -> list[LayerTime]:
    """By chunk, the median of its layers' times: from the end of the layer before on this rank, where it follows at
    once, else from its own start."""
    layers = [one for one in events if one.kind == "layer" and one.chunk is not None]
    after = dict[int, list[float]]()
    alone = dict[int, list[float]]()
    for before, one in pairwise([None, *layers]):
        assert one is not None
        assert one.chunk is not None
        if before and before.chunk == one.chunk:
            after.setdefault(one.chunk, []).append((one.end - before.end) / 1e9)
        else:
            alone.setdefault(one.chunk, []).append((one.end - one.start) / 1e9)
    return [LayerTime(chunk * length, length, median(times)) for chunk, times in (after or alone).items()]


def time_layers(
    decoder: Decoder,
    tokens: int,
    lengths: Sequence[int],
    *,
    digests: bool = True,
    graphs_of: GraphsOf = lambda _: None,
) -> list[LayerTime]:
    """Medians of the time of a layer by graphs or by transformers' own kernels, with `digests` or without, for chunks
    of these lengths at the start, in the middle and at the end of `tokens` tokens. Nothing is sent. What the KV holds
    does not matter for the time."""
    found = list[LayerTime]()
    for length in sorted({min(length, tokens) for length in lengths}):
        shape = partition(layers=decoder.num_layers, tokens=tokens, world_size=1, chunk_size=length)
        plan = build(shape, "pipelined", "pairwise")
        graphs, cache = graphs_of(length), decoder.new_cache(tokens)
        with closing(FiniteCheck(0, shape, cache.device, lambda _: None, lambda _: None)) as finite:
            state = Prefill(
                decoder, cache, plan, 0, [0] * tokens,
                digests=digests, alarm=Alarm("record", None), finite=finite,
                graphs=graphs.layers if graphs else None,
            )  # fmt: skip
            whole = tokens // length - 1
            for chunk in sorted({0, whole // 2, whole}):
                time = _time_layers_on_gpu if decoder.device.type == "cuda" else _time_layer
                times = [time(state, chunk, n % decoder.num_layers) for n in range(ROUNDS + 1)]
                found.append(LayerTime(shape.chunks[chunk].start, length, median(times[1:])))
    return found


def _time_layer(state: Prefill, chunk: int, layer: int) -> float:
    state.hidden[chunk, layer] = state.embed(chunk)
    began = perf_counter()
    state.layer(Op("layer", chunk, layer))
    took = perf_counter() - began
    state.hidden.clear()
    return took


def _time_layers_on_gpu(state: Prefill, chunk: int, _: int) -> float:
    """Seconds of a layer by the device's clock, of several that are launched one right after another: a wait for each
    would take longer than a graph's kernels."""
    count = min(MOST_LAYERS, state.decoder.num_layers)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    entering = state.embed(chunk)
    began.record()
    for layer in range(count):
        state.hidden[chunk, layer] = entering
        state.layer(Op("layer", chunk, layer))
    ended.record()
    ended.synchronize()
    state.hidden.clear()
    return began.elapsed_time(ended) / 1e3 / count  # type: ignore[no-any-return]


def token_bytes(decoder: Decoder) -> tuple[int, int]:
    """Bytes of one token's hidden state, and of its K and V in one layer."""
    size = decoder.dtype.itemsize
    return decoder.hidden_size * size, 2 * decoder.kv_heads * decoder.head_dim * size


def time_codecs(decoder: Decoder, tokens: int) -> list[CodecCost]:
    """What each codec for KV of this dtype takes, by blocks of so many random tokens in the first layers."""
    blocks, dtype = (
        _blocks(decoder, min(tokens, decoder.max_positions)),
        str(decoder.dtype).removeprefix("torch."),
    )
    found = [CodecCost("none", 1.0, 0.0, 0.0)]
    for name in ABOUT:
        codec = Codec(name, name)
        if codec.is_none or DTYPES.get(name, dtype) != dtype:
            continue
        encoded, times = 0, list[tuple[float, float]]()
        for block in [blocks[0], *blocks]:  # the first warms up
            out, began = torch.empty_like(block), perf_counter()
            data = encode(codec, block)
            half = perf_counter()
            decode(codec, data, out)
            times.append((half - began, perf_counter() - half))
            encoded += data.nbytes
        per_token = [median(some) / len(blocks[0]) for some in zip(*times[1:], strict=True)]
        found.append(CodecCost(name, encoded / (len(times) * blocks[0].nbytes), *per_token))
    return found


def _blocks(decoder: Decoder, tokens: int) -> list[Tensor]:
    """K and V of random tokens in some layers, each [tokens, 2, kv_heads, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.spec.vocab_size, (tokens,), generator=generator).tolist()
    cache, hidden = decoder.new_cache(tokens), decoder.embed(ids)
    layers = range(min(CODEC_LAYERS, decoder.num_layers))
    for layer in layers:
        hidden = decoder.layer(layer, hidden, cache, 0)
    return [cache.block(layer, 0, tokens) for layer in layers]
