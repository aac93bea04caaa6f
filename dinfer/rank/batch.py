"""One rank's run from loading to result, whoever started its process: meet, prefill, decode, tell."""

import logging
import os
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.kv.digests import block_digests, row_digests
from dinfer.messages import BatchResult, BlockCorrupt, TextPiece
from dinfer.model.decoder import Decoder
from dinfer.model.text import TextStream, load_tokenizer
from dinfer.rank.agreement import agree, facts_of
from dinfer.rank.control import Control
from dinfer.rank.failure import explained
from dinfer.rank.logs import OpLog, log_trouble
from dinfer.transport.gloo import Comm

log = logging.getLogger("dinfer")


def run_rank(
    rank: int,
    config: Config,
    ids: Sequence[int],
    control: Control,
    meet: Callable[[], Comm],
) -> BatchResult:
    """Load, `meet()` the other ranks, prefill, decode; this rank's part of the result.

    Raises OutOfMemory, with what to change, where memory runs out.
    """
    with explained(config, ids, device_of(rank, config)):
        return _run(rank, config, ids, control, meet)


def _run(
    rank: int,
    config: Config,
    ids: Sequence[int],
    control: Control,
    meet: Callable[[], Comm],
) -> BatchResult:
    torch.set_num_threads(config.threads)
    control.board.set_phase("loading")
    decoder = Decoder.load(config.model_path, config.dtype, device_of(rank, config))
    log.info("loaded %s on %s, %d threads", config.model_path, decoder.device, config.threads)
    warm_up(decoder, config, len(ids))
    comm = meet()
    on_op = OpLog(log, decoder.num_layers)
    engine = Engine(
        decoder, comm, config, board=control.board, memory=control.recorder_memory, on_op=on_op,
        on_corrupt=lambda found: control.report(BlockCorrupt(found.as_dict())),
    )  # fmt: skip
    agree(comm, facts_of(config, decoder.spec, ids, engine.plan_for(len(ids)).id))
    executor = engine.prepare(ids)
    assert engine.recorder is not None
    control.attach(rank, engine.recorder.lanes)
    comm.all_gather(b"r")  # prefill starts together, so that its time is not that of the slowest to load
    kv_sha256 = _prefill(engine, len(ids))
    tokens, decode_s = _decode(engine, control)
    comm.all_gather(b"d")  # nobody leaves while another still needs it
    engine.release()
    comm.close()
    return BatchResult(
        host=os.uname().nodename,
        device=str(decoder.device),
        threads=torch.get_num_threads(),
        dtype=str(decoder.dtype).removeprefix("torch."),
        kv_sha256=kv_sha256,
        tokens=tuple(tokens),
        plan_id=executor.plan.id,
        decode_s=decode_s,
        lost_events=engine.recorder.lost,
        log_trouble=log_trouble(log),
    )


def warm_up(decoder: Decoder, config: Config, tokens: int) -> None:
    """Let a GPU load its kernels now, so that the time of a prompt of `tokens` is not that of loading them."""
    started = perf_counter()
    chunk = max(1, min(config.chunk_size, tokens, decoder.max_positions))
    decoder.warm_up(chunk, tokens % chunk or chunk)
    if config.digests and decoder.device.type != "cpu":
        block_digests(row_digests(decoder.new_cache(chunk).block(0, 0, chunk)))
    if decoder.device.type != "cpu":
        log.info("kernels loaded in %.1f s", perf_counter() - started)


def device_of(rank: int, config: Config) -> str:
    """The device that the config gives to a rank."""
    return f"cuda:{config.gpu_ids[rank]}" if config.gpu_ids else "cpu"


def _prefill(engine: Engine, tokens: int) -> str:
    """Run what is left of prefill; the SHA-256 of this rank's KV."""
    started = perf_counter()
    engine.prefill_phase()
    blocks = engine.executor.plan.shape.blocks
    log.info("prefill done in %.3f s: %d blocks on this rank", perf_counter() - started, blocks)
    assert engine.cache is not None
    return engine.cache.sha256(tokens)


def _decode(engine: Engine, control: Control) -> tuple[list[int], float]:
    """New tokens and the seconds they took; rank 0 streams their text, in whole characters."""
    tokenizer = load_tokenizer(engine.config.model_path)
    stream = TextStream(tokenizer) if tokenizer else None

    def show(token: int) -> None:
        log.debug("token %d", token)
        if engine.rank == 0:
            control.report(TextPiece(stream.push(token) if stream else f"{token} "))

    started = perf_counter()
    tokens = engine.decode_phase(on_token=show)
    took = perf_counter() - started - engine.check_s
    if engine.rank == 0 and stream:
        control.report(TextPiece(stream.flush()))
    log.info("decode done in %.3f s: %d tokens", took, len(tokens))
    control.board.set_phase("done", len(tokens))
    return tokens, took
