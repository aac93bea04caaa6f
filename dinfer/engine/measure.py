"""What layers and links take here, measured on the ranks. All ranks call these functions together.

`planner` fits and simulates; nothing is decided here.
"""

import threading
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
from dinfer.engine.prefill import Prefill
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Op, Value
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.planner.costs import LayerTime
from dinfer.planner.machine import CodecCost, LinkSpeed
from dinfer.trace.events import Event
from dinfer.transport.gloo import Comm
from dinfer.transport.header import Header

ROUNDS = 3
"""timed runs of a layer for each shape, after one that warms up"""

MORE_CHUNKS = 3
"""than ranks, in a run that is timed: so many chunks for which all ranks compute at once, and one on top"""

CODEC_LAYERS = 6
"""from how many layers codecs get blocks"""

PINGS, MESSAGES = 10, 3

TOGETHER_S = 0.3
"""seconds in which all links are kept busy, at least"""

LARGEST = 1 << 20
"""bytes of a message, at most"""


class Measured(NamedTuple):
    """What one rank has measured. `layers`: alone; `in_run`: among the other ops of a run. Bytes are of one token;
    `links` are the same on every rank."""

    layers: list[LayerTime]
    in_run: list[LayerTime]
    links: list[LinkSpeed]
    hidden_bytes: int
    block_bytes: int
    codecs: list[CodecCost]


def measure(
    decoder: Decoder,
    comm: Comm,
    tokens: int,
    lengths: Sequence[int],
    link_tokens: int,
    *,
    digests: bool = True,
) -> Measured:
    """All that the planner needs: layers on all ranks at the same time, by themselves and in short runs; then one link
    after another, and all, by blocks of `link_tokens` tokens; then codecs."""
    comm.all_gather(b"m")
    layers = time_layers(decoder, tokens, lengths, digests=digests)
    in_run = [
        time
        for length in sorted({min(lengths), min(link_tokens, max(lengths))})
        for time in time_layers_in_run(decoder, comm, tokens, length, digests=digests)
    ]
    hidden, block = token_bytes(decoder)
    links = time_links(comm, block * link_tokens)
    return Measured(layers, in_run, links, hidden, block, time_codecs(decoder, link_tokens))


def time_layers_in_run(
    decoder: Decoder, comm: Comm, tokens: int, length: int, *, digests: bool
) -> list[LayerTime]:
    """Times of a layer among the other ops of a run: from the end of one to the end of the next, so with what an op
    costs beside its kernels, and with sync on the same cores. Of each chunk of `length` tokens the median; there are
    a few chunks more than ranks, so that all ranks compute at once, but no more than `tokens` tokens."""
    count = max(1, min(comm.world_size + MORE_CHUNKS, tokens // length))
    config = Config(
        world_size=comm.world_size, chunk_size=length, digests=digests, backend="gloo", log_dir=""
    )
    engine, events = Engine(decoder, comm, config), list[Event]()
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
) -> list[LayerTime]:
    """Medians of the time of a layer by transformers' own kernels, with `digests` or without, for chunks of these
    lengths at the start, in the middle and at the end of `tokens` tokens. Nothing is sent. What the KV holds does not
    matter for the time."""
    found = list[LayerTime]()
    for length in sorted({min(length, tokens) for length in lengths}):
        shape = partition(layers=decoder.num_layers, tokens=tokens, world_size=1, chunk_size=length)
        plan = build(shape, "pipelined", "pairwise")
        cache = decoder.new_cache(tokens)
        with closing(FiniteCheck(0, shape, cache.device, lambda _: None, lambda _: None)) as finite:
            state = Prefill(
                decoder, cache, plan, 0, [0] * tokens,
                digests=digests, alarm=Alarm("record", None), finite=finite,
            )  # fmt: skip
            whole = tokens // length - 1
            for chunk in sorted({0, whole // 2, whole}):
                times = [
                    _time_layer(state, chunk, n % decoder.num_layers, decoder.device)
                    for n in range(ROUNDS + 1)
                ]
                found.append(LayerTime(shape.chunks[chunk].start, length, median(times[1:])))
    return found


def _time_layer(state: Prefill, chunk: int, layer: int, device: torch.device) -> float:
    state.hidden[chunk, layer] = state.embed(chunk)
    _settle(device)
    began = perf_counter()
    state.layer(Op("layer", chunk, layer))
    _settle(device)
    took = perf_counter() - began
    state.hidden.clear()
    return took


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def time_links(comm: Comm, nbytes: int) -> list[LinkSpeed]:
    """What every link carries, in messages of `nbytes` bytes or 1 MiB if that is less; the same list on every rank,
    empty for one rank."""
    size = min(nbytes, LARGEST)
    pairs = [(a, b) for a in range(comm.world_size) for b in range(comm.world_size) if a != b]
    if not pairs:
        return []
    alone = dict[tuple[int, int], tuple[float, float, float]]()
    for pair in pairs:
        comm.all_gather(b"l")  # the others are quiet
        if comm.rank in pair:
            alone[pair] = _alone(comm, *pair, size)
    comm.all_gather(b"t")
    together = _together(comm, pairs, size)
    # The source has measured a link alone, the target what came when all were busy.
    sent = _all(comm, [number for pair in pairs for number in alone.get(pair, (0.0, 0.0, 0.0))])
    came = _all(comm, [together.get(pair, 0.0) for pair in pairs])
    found = list[LinkSpeed]()
    for n, (source, target) in enumerate(pairs):
        latency, speed, ahead = sent[source][3 * n : 3 * n + 3]
        busy = size / max(came[target][n] - latency, came[target][n] / 10)
        found.append(LinkSpeed(source, target, latency, speed, min(busy, speed), ahead))
    return found


def _all(comm: Comm, numbers: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, by rank; what the receiver of a link has measured counts."""
    data = torch.tensor(numbers, dtype=torch.float64).numpy().tobytes()
    return [torch.frombuffer(bytearray(part), dtype=torch.float64).tolist() for part in comm.all_gather(data)]


def _header(nbytes: int, *, last: bool = True) -> bytes:
    return Header(0, Value("kv", 0, 0), int(last), "float32", nbytes).pack()


def _send(comm: Comm, target: int, payload: Tensor, *, last: bool = True) -> None:
    comm.send(Channel("kv", comm.rank, target), _header(payload.nbytes, last=last), payload)


def _recv(comm: Comm, source: int, into: Tensor) -> bool:
    """Receive a message; whether it was the last."""
    channel = Channel("kv", source, comm.rank)
    header = Header.unpack(comm.recv_header(channel))
    comm.recv_payload(channel, into)
    return bool(header.tokens)


def _alone(comm: Comm, source: int, target: int, size: int) -> tuple[float, float, float]:
    """Of a quiet link, for its source: seconds of a small message, bytes per second, and how many bytes are still on
    their way when a send ends. The target answers each message by a small one, so that one clock measures all."""
    small, payload = torch.zeros(8, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    def there_and_back(message: Tensor) -> tuple[float, float]:
        """Seconds until the send has ended, and until the answer is there."""
        began = perf_counter()
        if comm.rank == target:
            _recv(comm, source, message)
            _send(comm, source, small)
            return 1.0, 1.0
        _send(comm, target, message)
        sent = perf_counter() - began
        _recv(comm, target, small)
        return sent, perf_counter() - began

    latency = median([there_and_back(small)[1] / 2 for _ in range(PINGS)][1:])
    both = [there_and_back(payload) for _ in range(MESSAGES + 1)][1:]
    return quiet_link(latency, median(sent for sent, _ in both), median(back for _, back in both), size)


def quiet_link(latency: float, sent: float, back: float, size: int) -> tuple[float, float, float]:
    """Latency, bytes per second and bytes ahead, from seconds: of a small message, until the send of one of `size`
    bytes had ended, and until its answer was there. Where all cores are busy, a small message may have taken as long
    as a large one."""
    moving = max(back - 2 * latency, back / 10)
    speed = size / moving
    return latency, speed, min(max(0.0, (back - latency - sent) * speed), size)


def _together(comm: Comm, pairs: Sequence[tuple[int, int]], size: int) -> dict[tuple[int, int], float]:
    """Seconds of a message that this rank receives over each link while all are busy, by link."""
    found: dict[tuple[int, int], float] = {}
    errors = list[BaseException]()

    def sender(target: int) -> None:
        payload, began = torch.zeros(size, dtype=torch.uint8), perf_counter()
        for n in range(1 << 30):
            last = n >= MESSAGES and perf_counter() - began > TOGETHER_S
            _send(comm, target, payload, last=last)
            if last:
                return

    def receiver(source: int) -> None:
        into, times = torch.empty(size, dtype=torch.uint8), list[float]()
        while True:
            last = _recv(comm, source, into)
            times.append(perf_counter())
            if last:
                break
        found[source, comm.rank] = (times[-1] - times[0]) / (len(times) - 1)

    def run(call: Callable[[int], None], peer: int) -> None:
        try:
            call(peer)
        except BaseException as error:  # raised below, on the thread that asked
            errors.append(error)

    calls = [(sender, b) for a, b in pairs if a == comm.rank] + [
        (receiver, a) for a, b in pairs if b == comm.rank
    ]
    threads = [threading.Thread(target=run, args=call, name="dinfer links", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
