"""A distributed program with one defect, chosen by name: `torchrun --nproc-per-node 2 defects.py NAME`.

Each rebuilds what real programs do wrong. It runs over gloo and hangs, crashes, or goes on with a wrong result.
"""

import ctypes
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1
BLOCK = torch.ones(8, 2)


def warm_up() -> None:
    """Every defect comes after ops that go well."""
    for layer in range(3):
        if RANK == 0:
            dist.send(BLOCK, 1)
        if RANK == 1:
            dist.recv(BLOCK, 0)
        dist.all_reduce(torch.ones(4) * layer)


def gather_against_recv() -> None:
    if RANK == 0:
        dist.all_gather([torch.empty(8, 2) for _ in range(LAST + 1)], BLOCK)
    else:
        dist.recv(BLOCK, 0)


def one_send_for_two_recvs() -> None:
    if RANK == 0:
        dist.send(BLOCK, 1)
        dist.barrier()
    elif RANK == 1:
        dist.recv(BLOCK, 0)
        dist.recv(BLOCK, 0)
        dist.barrier()
    else:
        dist.barrier()


def exception_then_barrier() -> None:
    try:
        if RANK == 1:
            raise ValueError("a shape that does not fit")
        dist.all_reduce(BLOCK)
        dist.all_reduce(BLOCK)
    except ValueError:
        dist.barrier(group=PAIR)


def both_send_first() -> None:
    if RANK < 2:
        dist.send(BLOCK, 1 - RANK)
        dist.recv(BLOCK, 1 - RANK)


def wrong_group_rank() -> None:
    """A message to rank 1 of the group, which is global rank 2, that the global rank 1 is meant to get."""
    if RANK == 0:
        dist.send(BLOCK, group=EDGES, group_dst=1)
    if RANK == 1:
        dist.recv(BLOCK, 0)


def micro_batches() -> None:
    for _ in range(3 + (RANK == 1)):
        if RANK == 0:
            dist.send(BLOCK, 1)
        if RANK == 1:
            dist.recv(BLOCK, 0)
    dist.all_reduce(BLOCK)


def group_on_one_rank() -> None:
    if RANK == 1:
        dist.new_group([0, 1])
    dist.all_reduce(BLOCK)


def other_size() -> None:
    if RANK == 0:
        dist.send(torch.ones(4, 2), 1)
    if RANK == 1:
        dist.recv(BLOCK, 0)
    dist.barrier()


def other_dtype() -> None:
    if RANK == 0:
        dist.send(torch.ones(8, 2, dtype=torch.int32), 1)
    if RANK == 1:
        dist.recv(BLOCK, 0)
    dist.barrier()


def never_waited() -> None:
    if RANK == 0:
        dist.isend(BLOCK, 1)
    if RANK == 1:
        dist.recv(BLOCK, 0)
    dist.barrier()


def crossed() -> None:
    """Two layers of equal size; the receiver takes the second first."""
    for layer in (0, 1) if RANK == 0 else (1, 0):
        if RANK == 0:
            dist.send(BLOCK * layer, 1)
        if RANK == 1:
            dist.recv(BLOCK, 0)
    dist.barrier()


def appended_twice() -> None:
    """A serving loop that adds one chunk's KV a second time on one rank."""
    import dinfer

    for chunk in range(3):
        k = torch.arange(4 * 2 * 8, dtype=torch.float32).reshape(1, 2, 4, 8) + chunk
        for _ in range(1 + (RANK == 1 and chunk == 1)):
            dinfer.tap("kv", layer=0, chunk=chunk, k=k, v=-k)
        dist.barrier()


def stops_in_python() -> None:
    if RANK == 1:
        time.sleep(1000)
    dist.all_reduce(BLOCK)


def stops_in_c() -> None:
    """With the interpreter's lock held, as a C extension may."""
    if RANK == 1:
        mutex = ctypes.create_string_buffer(128)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    dist.all_reduce(BLOCK)


def stops_by_signal() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(BLOCK)


def dies() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(BLOCK)


def raises() -> None:
    if RANK == 1:
        raise ValueError("a shape that does not fit")
    dist.all_reduce(BLOCK)


def slow() -> None:
    for _ in range(12):
        if RANK == 1:
            time.sleep(0.15)
        dist.all_reduce(BLOCK)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    PAIR = dist.new_group([0, 1])
    EDGES = dist.new_group([0, LAST])
    warm_up()
    print("DEFECT", flush=True)
    globals()[sys.argv[1]]()
    dist.destroy_process_group()
