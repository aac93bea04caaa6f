"""One rank's run from loading to result, whoever started its process: meet, prefill, decode, report."""

import logging
import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Literal

import torch

from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.engine.finite import largest_values
from dinfer.engine.kernels import Graphs, Kernels, kernels_of
from dinfer.engine.measure import measure
from dinfer.kv.digests import block_digests, row_digests
from dinfer.messages import (
    BatchResult,
    BlockCorrupt,
    FirstNonFinite,
    MeasuredForRun,
    MeasureRank,
    RankMeasured,
    RunChosen,
    TextPiece,
)
from dinfer.model.decoder import Decoder
from dinfer.model.text import TextStream, load_tokenizer
from dinfer.plan.plan import parse_plan
from dinfer.rank.agreement import agree, facts_of
from dinfer.rank.control import Control
from dinfer.rank.failure import explained
from dinfer.rank.logs import OpLog, log_trouble
from dinfer.trace.trace import Trace
from dinfer.transport.gloo import Comm

log = logging.getLogger("dinfer")


def run_rank(
    rank: int,
    config: Config,
    ids: Sequence[int],
    control: Control,
    meet: Callable[[], Comm],
    to_measure: MeasureRank | None = None,
) -> BatchResult:
    """Load, `meet()` the other ranks, prefill, decode; this rank's part of the result. `to_measure`: what to measure
    first, so that the planner can choose; `control` must await RunChosen then.

    Raises OutOfMemory, with what to change, where memory runs out.
    """
    device, board = device_of(rank, config), control.board
    with explained(config, ids, device):
        torch.set_num_threads(config.threads)
        board.set_phase("loading")
        decoder = Decoder.load(config.model_path, config.dtype, device)
        log.info("loaded %s on %s, %d threads", config.model_path, decoder.device, config.threads)
        kernels = Kernels()
        graphs = kernels.prepare(decoder, config)
        warm_up(decoder, config, len(ids), graphs)
        comm, own = meet(), ""
        if to_measure:  # who measures nothing would wait for another message
            facts = facts_of(config, decoder.spec, ids, 0, kernels_of(graphs))
            agree(comm, {**facts, "to be measured": str(to_measure)})
            config, own = _chosen(decoder, comm, control, config, to_measure, kernels)
            graphs = kernels.prepare(decoder, config)
        engine = Engine(
            decoder, comm, config, graphs=graphs, board=board, memory=control.recorder_memory,
            on_op=OpLog(log, decoder.num_layers),
            on_corrupt=lambda found: control.report(BlockCorrupt(found.as_dict())),
            on_nonfinite=lambda found: control.report(FirstNonFinite(found.as_dict())),
        )  # fmt: skip
        plan = parse_plan(own) if own else engine.plan_for(len(ids))
        agree(comm, facts_of(config, decoder.spec, ids, plan.id, kernels_of(graphs)))
        plan = engine.prepare(ids, plan=plan).plan
        recorder = engine.recorder
        assert recorder is not None
        control.attach(rank, recorder.lanes)
        comm.all_gather(b"r")  # prefill starts together, so that its time is not that of the slowest to load

        tokens, decode_s = _generate(engine, control)
        assert engine.cache is not None
        kv_sha256 = engine.cache.sha256(len(ids))
        comm.all_gather(b"d")  # nobody leaves while another still needs it
        ran = engine.kernels
        engine.release()
        comm.close()
        return BatchResult(
            host=os.uname().nodename,
            device=str(decoder.device),
            threads=torch.get_num_threads(),
            dtype=str(decoder.dtype).removeprefix("torch."),
            kernels=ran,
            kv_sha256=kv_sha256,
            tokens=tuple(tokens),
            plan_id=plan.id,
            decode_s=decode_s,
            lost_events=recorder.lost,
            log_trouble=log_trouble(log),
            stopped=_stopped(tokens, engine),
        )


def measured(decoder: Decoder, comm: Comm, command: MeasureRank, kernels: Kernels) -> RankMeasured:
    """What layers and links take here; all ranks do this together. Graphs that are captured for it are given up."""
    try:
        found = measure(decoder, comm, command, kernels)
    finally:
        if command.kernels != "exact":
            kernels.drop()
    return RankMeasured(
        tuple(found.layers), tuple(found.links), found.hidden_bytes, found.block_bytes, tuple(found.codecs),
        tuple(found.in_run), command.kernels, found.padded, command.backend != "gloo",
    )  # fmt: skip


def _chosen(
    decoder: Decoder,
    comm: Comm,
    control: Control,
    config: Config,
    command: MeasureRank,
    kernels: Kernels,
) -> tuple[Config, str]:
    """Measure, and wait for what the planner chooses by it: the config with its choices, and the plan's text, "" where
    the config says it all. All ranks do this together."""
    control.board.set_phase("measuring")
    control.report(MeasuredForRun(measured(decoder, comm, command, kernels)))
    chosen = control.wait_for(RunChosen, config.start_timeout)
    log.info("chosen: %s", chosen.parameters)
    return config.with_(**chosen.parameters), chosen.plan


def warm_up(decoder: Decoder, config: Config, tokens: int, graphs: Graphs | None) -> None:
    """Let a GPU load its kernels now, so that the time of a prompt of `tokens` is not that of loading them. (With
    graphs, capturing them has.)"""
    if graphs:
        return
    started = perf_counter()
    chunk = max(1, min(config.chunk_size, tokens, decoder.max_positions))
    decoder.warm_up(chunk, tokens % chunk or chunk)
    if decoder.device.type != "cpu":
        block = decoder.new_cache(chunk).block(0, 0, chunk)
        if config.digests:
            block_digests(row_digests(block))
        hidden = torch.zeros((1, chunk, decoder.hidden_size), dtype=decoder.dtype, device=decoder.device)
        largest_values(hidden, block, torch.empty((chunk, 3), device=decoder.device))
        log.info("kernels loaded in %.1f s", perf_counter() - started)


def device_of(rank: int, config: Config) -> str:
    """The device that the config gives to a rank."""
    return f"cuda:{config.gpu_ids[rank]}" if config.gpu_ids else "cpu"


def _stopped(tokens: Sequence[int], engine: Engine) -> Literal["end of text", "positions", "max_new_tokens"]:
    """Why there are no more new tokens."""
    if tokens and tokens[-1] in engine.decoder.eos_ids:
        return "end of text"
    return "positions" if len(tokens) < engine.config.max_new_tokens else "max_new_tokens"


def _generate(engine: Engine, control: Control) -> tuple[list[int], float]:
    """Prefill and decode: new tokens, and the seconds of computing and comparing them, without what their first step
    waited for blocks; rank 0 streams their text, in whole characters."""
    tokenizer = load_tokenizer(engine.config.model_path)
    stream = TextStream(tokenizer) if tokenizer else None

    def show(token: int) -> None:
        log.debug("token %d", token)
        if engine.rank == 0:
            control.report(TextPiece(stream.push(token) if stream else f"{token} "))

    tokens = engine.generate_phase(on_token=show)
    assert engine.recorder is not None
    events = engine.recorder.events()
    took = sum(event.busy for event in events if event.what == "token") / 1e9
    figures = Trace.merge([events]).rank_figures(engine.rank)
    log.info(
        "prefill done in %.3f s: %d blocks on this rank", figures.prefill_s, engine.prompt.plan.shape.blocks
    )
    if engine.rank == 0 and stream:
        control.report(TextPiece(stream.flush()))
    log.info("decode done in %.3f s: %d tokens", took, len(tokens))
    control.board.set_phase("done", len(tokens))
    return tokens, took
