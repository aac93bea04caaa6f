"""The process of one rank in `dinfer run`: takes its job from standard input and reports through Control.

`python -m dinfer.rank.worker`; the job is a RankJob as JSON.
"""

import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import msgspec

from dinfer.config import Config
from dinfer.messages import MeetAt, RankJob, RunChosen, StoreOpened
from dinfer.rank.batch import run_rank
from dinfer.rank.control import Control
from dinfer.rank.debugger import listen_for_debugger
from dinfer.rank.failure import describe
from dinfer.rank.logs import LogFile, make_log_folder
from dinfer.transport.connect import open_comm
from dinfer.transport.gloo import Comm, join_store, open_store

log = logging.getLogger("dinfer")


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=RankJob)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which ends the ranks
    config, rank = Config.of(job.config), job.rank
    log_to(Path(config.log_dir), rank, config.log_level)
    control = Control(job.link, awaited=(MeetAt, RunChosen))
    try:
        listen_for_debugger(rank)
        store = None
        if rank == 0:
            store, port = open_store(config.master_addr, config.master_port)
            control.report(StoreOpened(port))

        def meet() -> Comm:
            found = store
            if found is None:
                port = control.wait_for(MeetAt, config.start_timeout).port
                found = join_store(config.master_addr, port, config.start_timeout)
            return open_comm(config.backend, rank, config.world_size, found, config.start_timeout)

        result = run_rank(rank, config, job.ids, control, meet, job.to_measure)
    except BaseException as error:  # whatever it is, the launcher must hear why this process ends
        log.error("this rank failed\n%s", traceback.format_exc())
        control.report(describe(error))
        control.close()
        os._exit(1)  # lanes may be blocked in the transport, which only the end of the process undoes
    control.report(result)
    control.close()
    return 0


def log_to(folder: Path, rank: int, level: str) -> None:
    make_log_folder(folder)
    handler = LogFile(folder / f"rank{rank}.log")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d rank {rank} %(levelname)s %(message)s", "%H:%M:%S")
    )
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    threading.excepthook = lambda args: log.error("thread %s failed", args.thread, exc_info=args.exc_value)


if __name__ == "__main__":
    sys.exit(main())
