"""dinfer inside an application: a rank's engine, loaded once, for as many prompts as the application has.

The application is one program that runs on every rank, started by torchrun or mpirun. Nothing watches over the ranks
here: an error is raised where it happens, and its launcher ends the others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinfer.config import Config, ConfigError
from dinfer.engine.engine import Engine
from dinfer.engine.kernels import Kernels, kernels_of
from dinfer.job import choose_backend, threads_per_rank
from dinfer.launch.environment import launched_as
from dinfer.launch.meet import meet
from dinfer.model.decoder import Decoder
from dinfer.rank.agreement import agree, facts_of
from dinfer.rank.batch import device_of, warm_up
from dinfer.transport.connect import open_comm


@contextmanager
def open_engine(config: Config) -> Iterator[Engine]:
    """This process's rank, with the checkpoint loaded and the other ranks met; closed at the end of the block.

    All ranks must make the same calls of it, in the same order. `config.world_size` is the launcher's. Raises
    ConfigError where no launcher has started this process, ModelError for a checkpoint that cannot be run, and
    RanksDisagree where the ranks were not started alike.
    """
    launched = launched_as(os.environ)
    if launched is None:
        raise ConfigError(
            "open_engine works in a process that torchrun or mpirun has started: torchrun … app.py"
        )
    threads = config.threads or threads_per_rank(launched.world_size)
    config = choose_backend(config.with_(world_size=launched.world_size, threads=threads))
    torch.set_num_threads(threads)
    decoder = Decoder.load(config.model_path, config.dtype, device_of(launched.rank, config))
    graphs = Kernels().prepare(decoder, config)
    warm_up(decoder, config, config.chunk_size, graphs)
    store, _ = meet(config, launched)
    comm = open_comm(config.backend, launched.rank, launched.world_size, store, config.start_timeout)
    engine = Engine(decoder, comm, config, graphs=graphs)
    try:
        agree(comm, facts_of(config, decoder.spec, (), engine.plan_for(1).id, kernels_of(graphs)))
        yield engine
        comm.all_gather(b"d")  # nobody leaves while another still needs it
    finally:
        engine.release()
        comm.close()
