"""Distributed programs that are right, chosen by name: `torchrun --nproc-per-node 3 healthy.py NAME`.

No alarm may be raised for them, although ranks wait for each other, and some compute for long.
"""

import os
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

if "OMPI_COMM_WORLD_RANK" in os.environ:
    os.environ.update(RANK=os.environ["OMPI_COMM_WORLD_RANK"], WORLD_SIZE=os.environ["OMPI_COMM_WORLD_SIZE"])
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


def interleaved() -> None:
    """Two stages a rank, by PyTorch's own schedule."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(2 * SIZE)]
    stages = [PipelineStage(layers[n], n, 2 * SIZE, torch.device("cpu")) for n in (RANK, RANK + SIZE)]
    schedule = ScheduleInterleaved1F1B(stages, 2 * SIZE, torch.nn.functional.mse_loss)  # type: ignore[arg-type]
    batch, target = torch.randn(4 * SIZE, WIDTH), torch.zeros(4 * SIZE, WIDTH)
    for _ in range(2):
        found = schedule.step(
            *([batch] if RANK == 0 else []), target=target if RANK == SIZE - 1 else None, losses=[]
        )
    if RANK == SIZE - 1:
        for layer in layers:
            batch = layer(batch)
        torch.testing.assert_close(found, batch)


def tp_plan() -> None:
    """transformers splits the layers of a tiny Llama over the ranks, which generate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8 * SIZE, intermediate_size=16 * SIZE, num_hidden_layers=2, num_attention_heads=2 * SIZE,
        num_key_value_heads=SIZE, vocab_size=32 * SIZE, max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    whole: Any = LlamaForCausalLM(config)
    place = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(place, 0)
    if RANK == 0:
        whole.save_pretrained(place[0])
    dist.barrier()
    split: Any = LlamaForCausalLM.from_pretrained(place[0], tp_plan="auto")
    ids = torch.arange(8)[None]
    wanted = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert split.generate(ids, **wanted).tolist() == whole.generate(ids, **wanted).tolist()


def data_parallel() -> None:
    """Each rank generates for a prompt of its own; all begin alike, and the prompts are of several lengths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    system, user = list(range(20)), [(7 * RANK + n) % 64 for n in range(8 + RANK)]
    found = model.generate(
        torch.tensor([[*system, *user]]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    lengths = torch.tensor([found.shape[1]])
    dist.all_reduce(lengths)
    assert int(lengths) == sum(20 + 8 + rank + 6 for rank in range(SIZE))


def accelerated() -> None:
    """Data-parallel steps by accelerate, and its collectives of objects and tensors."""
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list, gather_object

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == SIZE
    model = torch.nn.Linear(WIDTH, 1)
    data: Any = torch.utils.data.DataLoader(torch.randn(8 * SIZE, WIDTH), batch_size=2)  # type: ignore[arg-type]
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01), data)
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.gather(loss.detach()[None]).shape == (SIZE,)
    assert gather_object([accelerator.process_index]) == list(range(SIZE))
    assert broadcast_object_list([accelerator.process_index])[0] == 0
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    NAME = sys.argv[1] if len(sys.argv) > 1 else "ring_attention"
    torch.set_num_threads(1)
    if NAME != "accelerated":  # which does so itself
        dist.init_process_group("gloo")
    globals()[NAME]()
    dist.barrier()
    dist.destroy_process_group()
    print("WELL", flush=True)
