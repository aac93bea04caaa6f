"""Distributed programs that are right, chosen by name: `torchrun --nproc-per-node 3 healthy.py NAME`.

No alarm may be raised for them, although ranks wait for each other, and some compute for long.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WIDTH = 64


def one_f_one_b() -> None:
    """A pipeline of stages: warm-up forwards, then a forward and a backward in turn, then the last backwards."""
    batches, warm_up = 6, SIZE - 1 - RANK
    weight = torch.eye(WIDTH)
    pending: list[torch.Tensor] = []
    sends: list[dist.Work] = []

    def forward(micro_batch: int) -> None:
        state = torch.ones(4, WIDTH) * micro_batch
        if RANK > 0:
            dist.recv(state, RANK - 1)
        state = state @ weight
        pending.append(state)
        if RANK < SIZE - 1 and (work := dist.isend(state, RANK + 1)):
            sends.append(work)

    def backward(micro_batch: int) -> None:
        gradient = torch.ones(4, WIDTH) * micro_batch
        if RANK < SIZE - 1:
            dist.recv(gradient, RANK + 1)
        pending.pop(0)
        if RANK > 0 and (work := dist.isend(gradient @ weight, RANK - 1)):
            sends.append(work)

    for micro_batch in range(warm_up):
        forward(micro_batch)
    for micro_batch in range(batches - warm_up):
        forward(warm_up + micro_batch)
        backward(micro_batch)
    for micro_batch in range(batches - warm_up, batches):
        backward(micro_batch)
    for work in sends:
        work.wait()


def ring_attention() -> None:
    """K and V go round, in batches of a send and a recv."""
    query, block = torch.randn(8, WIDTH), torch.randn(2, 8, WIDTH)
    for _ in range(3):
        for _ in range(SIZE - 1):
            arrived = torch.empty_like(block)
            ops = [
                dist.P2POp(dist.isend, block, (RANK + 1) % SIZE),
                dist.P2POp(dist.irecv, arrived, (RANK - 1) % SIZE),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            torch.softmax(query @ block[0].T, -1) @ block[1]
            block = arrived
        dist.barrier()


def tensor_parallel() -> None:
    """Functional collectives, as compiled and DTensor code has them."""
    import torch.distributed._functional_collectives as functional

    weight = torch.ones(WIDTH, WIDTH) / WIDTH
    state = torch.ones(4, WIDTH)
    for _ in range(10):
        state = functional.all_reduce(state @ weight, "avg", dist.group.WORLD)
    gathered = functional.all_gather_tensor(state, 0, dist.group.WORLD)
    assert gathered.sum() > 0
    assert gathered.shape == (4 * SIZE, WIDTH)


def long_computation() -> None:
    """One rank computes for longer than a hang takes to be told, and the others wait."""
    if RANK == 1:
        until = time.monotonic() + 9
        while time.monotonic() < until:
            torch.ones(WIDTH, WIDTH) @ torch.ones(WIDTH, WIDTH)
    dist.all_reduce(torch.ones(4))
    if RANK == 0:
        until = time.monotonic() + 7
        while time.monotonic() < until:
            pass
        dist.send(torch.ones(4), 1)
    if RANK == 1:
        dist.recv(torch.ones(4), 0)


def objects_beside_tensors() -> None:
    """As serving engines do: metadata as pickled objects on one group, tensors on another."""
    control = dist.new_group(list(range(SIZE)))
    for step in range(3):
        told: list[object] = [{"shape": (4 + step, WIDTH)} if RANK == 0 else None]
        dist.broadcast_object_list(told, 0, group=control)
        shape = told[0]["shape"]  # type: ignore[index]
        tensor = torch.ones(shape)
        if RANK == 0:
            for other in range(1, SIZE):
                dist.send(tensor, other)
        else:
            dist.recv(tensor, 0)
        gathered: list[object] = [None] * SIZE
        dist.all_gather_object(gathered, {"rank": RANK}, group=control)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    globals()[sys.argv[1] if len(sys.argv) > 1 else "ring_attention"]()
    dist.barrier()
    dist.destroy_process_group()
    print("WELL", flush=True)
