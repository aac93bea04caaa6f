"""Worker: the process of one rank in `dinfer run`. It reads its job from standard input and reports through its Control.

`python -m dinfer.engine.worker`; the job is one JSON object: rank, config, ids, link, paused.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from time import perf_counter
from typing import Any

from dinfer.config import Config
from dinfer.engine.control import Control

log = logging.getLogger("dinfer")


def main() -> int:
    job = json.loads(sys.stdin.read())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started the ranks; it ends them
    config = Config.of(job["config"])
    _log_to(Path(config.log_dir), job["rank"], config.log_level)
    control = Control(job["link"])
    try:
        result = _run(job, config, control)
    except BaseException as error:
        log.error("this rank failed\n%s", traceback.format_exc())
        control.report("error", **describe(error))
        control.close()
        os._exit(1)  # lanes may be blocked in the transport, which nothing but the end of the process undoes
    control.report("result", **result)
    control.close()
    return 0


def describe(error: BaseException) -> dict[str, Any]:
    """What a session needs to tell causes from consequences: `secondary` is what a lost peer does to the others."""
    from dinfer.engine.comm import CommError

    cause = error.__cause__ if error.__cause__ is not None else error
    return {
        "message": str(error)
        if type(error).__module__.startswith("dinfer")
        else f"{type(error).__name__}: {error}",
        "error": type(cause).__name__,
        "secondary": isinstance(error, CommError) or isinstance(cause, CommError),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _run(job: dict[str, Any], config: Config, control: Control) -> dict[str, Any]:
    import torch

    from dinfer.engine.comm import GlooComm, join_store, open_store
    from dinfer.engine.engine import Engine
    from dinfer.engine.oplog import OpLog
    from dinfer.model.decoder import Decoder
    from dinfer.model.text import TextStream, load_tokenizer

    rank = job["rank"]
    torch.set_num_threads(config.threads)
    control.board.set_phase("loading")
    store = None
    if rank == 0:
        store, port = open_store(config.master_addr, config.master_port)
        control.report("store", port=port)
    device = f"cuda:{config.gpu_ids[rank]}" if config.gpu_ids else "cpu"
    decoder = Decoder.load(config.model_path, config.dtype, device)
    log.info("loaded %s on %s, %d threads", config.model_path, decoder.device, config.threads)
    if store is None:
        store = join_store(
            config.master_addr, control.told("meet", config.start_timeout)["port"], config.start_timeout
        )
    comm = GlooComm(rank, config.world_size, store, config.start_timeout)
    engine = Engine(
        decoder,
        comm,
        config,
        board=control.board,
        memory=control.recorder_memory,
        on_op=OpLog(log, decoder.num_layers),
    )
    executor = engine.prepare(job["ids"])
    assert engine.recorder is not None
    control.attach(executor, engine.recorder.lanes)
    comm.all_gather(b"r")  # prefill starts together, so that its time is not that of the slowest to load
    started = perf_counter()
    if job["paused"]:
        control.board.set_phase("prefill")
        control.report("ready")
        _stepped(executor, control)
    prefill = engine.prefill_phase()
    log.info(
        "prefill done in %.3f s: %d blocks on this rank",
        perf_counter() - started,
        engine.executor.plan.shape.blocks,
    )
    assert engine.cache is not None
    kv_sha256 = engine.cache.sha256(len(job["ids"]))
    stream = TextStream(tokenizer) if (tokenizer := load_tokenizer(config.model_path)) else None
    started = perf_counter()

    def show(token: int) -> None:
        log.debug("token %d", token)
        if rank == 0:
            control.report("text", text=stream.push(token) if stream else f"{token} ")

    tokens = engine.decode_phase(prefill.hidden_states, on_token=show)
    if rank == 0 and stream:
        control.report("text", text=stream.flush())
    decode_s = perf_counter() - started
    log.info("decode done in %.3f s: %d tokens", decode_s, len(tokens))
    control.board.set_phase("done", len(tokens))
    comm.all_gather(b"d")  # nobody leaves while another still needs it
    engine.release()
    comm.close()
    return {
        "host": os.uname().nodename,
        "device": str(decoder.device),
        "threads": torch.get_num_threads(),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "kv_sha256": kv_sha256,
        "tokens": tokens,
        "plan_id": f"{executor.plan.id:016x}",
        "decode_s": decode_s,
        "lost_events": engine.recorder.lost,
    }


def _stepped(executor: Any, control: Control) -> None:
    """Leave the lanes to the session's commands until it says `decode`. Raises OpFailed."""
    while True:
        with contextlib.suppress(TimeoutError):
            control.told("decode", timeout=0.1)
            return
        executor.wait(lambda: True)  # raises if a lane has failed meanwhile


def _log_to(folder: Path, rank: int, level: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank{rank}.log", mode="w", encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d rank {rank} %(levelname)s %(message)s", "%H:%M:%S")
    )
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    threading.excepthook = lambda args: log.error("thread %s failed", args.thread, exc_info=args.exc_value)


if __name__ == "__main__":
    sys.exit(main())
