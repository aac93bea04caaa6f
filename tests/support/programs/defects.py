"""A distributed program with one defect, chosen by name: `torchrun --nproc-per-node 2 defects.py NAME`.

Each rebuilds what real programs do wrong. It runs over gloo and hangs, crashes, or goes on with a wrong result. It may
also be run by `mpirun`, or be the text of a `%%px` cell, after which another calls one of its functions. A comment
"named" is on the lines of which the verdict or the finding has to name at least one.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

if "OMPI_COMM_WORLD_RANK" in os.environ:
    os.environ.update(RANK=os.environ["OMPI_COMM_WORLD_RANK"], WORLD_SIZE=os.environ["OMPI_COMM_WORLD_SIZE"])
RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1
BLOCK = torch.ones(8, 2)
PAIR: Any = None
EDGES: Any = None
KEPT: list[Any] = []


def begin() -> None:
    """Every defect comes after ops that go well."""
    global PAIR, EDGES
    PAIR = dist.new_group([0, 1])
    EDGES = dist.new_group([0, LAST])
    for layer in range(3):
        if RANK == 0:
            dist.send(BLOCK, 1)
        if RANK == 1:
            dist.recv(BLOCK, 0)
        dist.all_reduce(torch.ones(4) * layer)
    print("DEFECT", flush=True)


def gather_against_recv() -> None:
    if RANK == 0:
        dist.all_gather([torch.empty(8, 2) for _ in range(LAST + 1)], BLOCK)  # named
    else:
        dist.recv(BLOCK, 0)  # named


def one_send_for_two_recvs() -> None:
    if RANK == 0:
        dist.send(BLOCK, 1)
        dist.barrier()  # named
    elif RANK == 1:
        dist.recv(BLOCK, 0)
        dist.recv(BLOCK, 0)  # named
        dist.barrier()
    else:
        dist.barrier()


def exception_then_barrier() -> None:
    """The handler's barrier has a group of its own, so it waits for good."""
    try:
        if RANK == 1:
            raise ValueError("a shape that does not fit")  # named
        dist.all_reduce(BLOCK)
        dist.all_reduce(BLOCK)
    except ValueError:
        dist.barrier(group=PAIR)


def exception_then_barrier_of_all() -> None:
    """The handler's barrier meets the others' next collective."""
    try:
        if RANK == 1:
            raise ValueError("a shape that does not fit")  # named
        dist.all_reduce(BLOCK)
        dist.all_reduce(BLOCK)
    except ValueError:
        dist.barrier()


def both_send_first() -> None:
    if RANK < 2:
        dist.send(BLOCK, 1 - RANK)  # named
        dist.recv(BLOCK, 1 - RANK)


def wrong_group_rank() -> None:
    """A message to rank 1 of the group, which is global rank 2, that the global rank 1 is meant to get."""
    if RANK == 0:
        dist.send(BLOCK, group=EDGES, group_dst=1)  # named
    if RANK == 1:
        dist.recv(BLOCK, 0)  # named


def to_itself() -> None:
    """The number of a rank in its group, which is a rank's own number in the world."""
    if LAST == RANK:
        dist.send(BLOCK, dist.get_rank(EDGES) if LAST == 1 else LAST, group=EDGES)  # named
    if RANK == 0:
        dist.recv(BLOCK, LAST)


def micro_batches() -> None:
    for _ in range(3 + (RANK == 1)):
        if RANK == 0:
            dist.send(BLOCK, 1)
        if RANK == 1:
            dist.recv(BLOCK, 0)  # named
    dist.all_reduce(BLOCK)  # named


def group_on_one_rank() -> None:
    if RANK == 1:
        dist.new_group([0, 1])  # named
    dist.all_reduce(BLOCK)


def other_size() -> None:
    if RANK == 0:
        dist.send(torch.ones(4, 2), 1)  # named
    if RANK == 1:
        dist.recv(BLOCK, 0)
    dist.barrier()


def other_dtype() -> None:
    if RANK == 0:
        dist.send(torch.ones(8, 2, dtype=torch.int32), 1)  # named
    if RANK == 1:
        dist.recv(BLOCK, 0)
    dist.barrier()


def too_long() -> None:
    """A message that does not fit: gloo ends the receiver's process."""
    if RANK == 0:
        dist.send(torch.ones(16, 2), 1)
    if RANK == 1:
        dist.recv(BLOCK, 0)  # named
    dist.barrier()


def other_size_of_collective() -> None:
    dist.all_reduce(torch.ones(4096 * (1 + (RANK == 1))))  # named
    dist.barrier()


def other_collective() -> None:
    if RANK == 1:
        dist.broadcast(BLOCK, 0)  # named
    else:
        dist.all_reduce(BLOCK)  # named
    dist.barrier()


def other_order_of_groups() -> None:
    """Two groups with the same ranks, in another order."""
    for group in {0: (PAIR, None), 1: (None, PAIR)}.get(RANK, (None,)):
        dist.all_reduce(BLOCK, group=group)  # named


def never_waited() -> None:
    if RANK == 0:
        dist.isend(BLOCK, 1)  # named
    if RANK == 1:
        dist.recv(BLOCK, 0)
    dist.barrier()


def never_waited_but_kept() -> None:
    if RANK == 0:
        KEPT.append(dist.isend(BLOCK, 1))  # named
    if RANK == 1:
        dist.recv(BLOCK, 0)
    dist.barrier()


def crossed() -> None:
    """Two layers of equal size; the receiver takes the second first."""
    for layer in (0, 1) if RANK == 0 else (1, 0):
        if RANK == 0:
            dist.send(BLOCK * layer, 1)
        if RANK == 1:
            dist.recv(BLOCK, 0)  # named
    dist.barrier()


def crossed_k_and_v() -> None:
    """The receiver takes V, of another shape and as many bytes, for K."""
    shapes = [(8, 2), (2, 8)]
    for shape in shapes if RANK == 0 else shapes[::-1]:
        if RANK == 0:
            dist.send(torch.ones(shape), 1)
        if RANK == 1:
            dist.recv(torch.empty(shape), 0)  # named
    dist.barrier()


def appended_twice() -> None:
    """A serving loop that adds one chunk's KV a second time on one rank."""
    import dinfer

    for chunk in range(3):
        k = torch.arange(4 * 2 * 8, dtype=torch.float32).reshape(1, 2, 4, 8) + chunk
        for _ in range(1 + (RANK == 1 and chunk == 1)):
            dinfer.tap("kv", layer=0, chunk=chunk, k=k, v=-k)  # named
        dist.barrier()


def appended_twice_to_a_cache() -> None:
    """The same with a cache of transformers, of which nobody speaks to dinfer, and the first chunk."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for chunk in range(3):
        k = torch.arange(4 * 2 * 8, dtype=torch.float32).reshape(1, 2, 4, 8) + chunk
        for _ in range(1 + (RANK == 1 and chunk == 0)):
            cache.update(k, -k, 0)  # named
        dist.barrier()


def stale_cache() -> None:
    """A sync that hands out the block that its buffer held before: all ranks hold one chunk's rows as the next's."""
    from transformers import DynamicCache

    cache, buffer = DynamicCache(), torch.empty(2, 1, 2, 4, 8)
    for chunk in range(4):
        if RANK == 0 and chunk != 2:
            buffer[0] = torch.arange(4 * 2 * 8).reshape(1, 2, 4, 8) + chunk
            buffer[1] = -buffer[0]
        dist.broadcast(buffer, 0)
        cache.update(buffer[0].clone(), buffer[1].clone(), 0)  # named


def stale_rows() -> None:
    """One rank missed a layer's sync, and keeps the rows that its buffer held."""
    from transformers import DynamicCache

    cache, buffer = DynamicCache(), torch.zeros(2, 1, 2, 4, 8)
    for chunk in range(4):
        for layer in range(2):
            block = torch.arange(4 * 2 * 8).reshape(1, 2, 4, 8) + 10.0 * chunk + layer
            block = torch.stack((block, -block))
            dist.broadcast(block, 0)
            if not (RANK == 1 and (chunk, layer) == (2, 1)):
                buffer = block
            cache.update(buffer[0].clone(), buffer[1].clone(), layer)  # named


def stops_in_python() -> None:
    if RANK == 1:
        time.sleep(1000)  # named
    dist.all_reduce(BLOCK)


def stops_in_c() -> None:
    """With the interpreter's lock held, as a C extension may."""
    if RANK == 1:
        mutex = ctypes.create_string_buffer(128)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)  # named
    dist.all_reduce(BLOCK)


def stops_in_a_lock() -> None:
    """In C with the interpreter's lock given back: a lock that nobody opens."""
    if RANK == 1:
        lock = threading.Lock()
        with lock:
            lock.acquire()  # named
    dist.all_reduce(BLOCK)


def stops_by_signal() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(BLOCK)  # named


def dies() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(BLOCK)


def leaves() -> None:
    """One rank is done before the others are."""
    if RANK == 1:
        os._exit(0)
    dist.all_reduce(BLOCK)  # named


def raises() -> None:
    if RANK == 1:
        raise ValueError("a shape that does not fit")  # named
    dist.all_reduce(BLOCK)


def slow() -> None:
    for _ in range(12):
        if RANK == 1:
            time.sleep(0.15)
        dist.all_reduce(BLOCK)


def cut_link() -> None:
    """The wire between the ranks' hosts is cut: the command is in the environment."""
    if RANK == 0:
        subprocess.run(shlex.split(os.environ["CUT"]), check=True)
    if RANK == 0:
        dist.send(BLOCK, 1)  # named
    if RANK == 1:
        dist.recv(BLOCK, 0)  # named


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    begin()
    globals()[sys.argv[1]]()
    dist.destroy_process_group()
