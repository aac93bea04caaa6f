"""Small inference engines in the styles that are public, and right: `torchrun --nproc-per-node 3 engines.py NAME`.

Each computes with weights of its own, so that a wrong order of messages would show in its tokens.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WIDTH, HEADS, DIM, LAYERS, CHUNK, CHUNKS, NEW = 32, 2, 16, 6, 4, 3, 4
OWN = range(RANK * LAYERS // SIZE, (RANK + 1) * LAYERS // SIZE)
FIRST, LAST = RANK == 0, RANK == SIZE - 1


class Layer:
    """Attention over all rows so far, by one matrix for each of q, k and v; the same on all ranks."""

    def __init__(self, layer_idx: int) -> None:
        made = torch.Generator().manual_seed(layer_idx)
        self.q, self.k, self.v = (torch.randn(WIDTH, WIDTH, generator=made) / WIDTH**0.5 for _ in range(3))

    def keys(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of new rows: [rows, heads, dim] each."""
        return (hidden @ self.k).view(-1, HEADS, DIM), (hidden @ self.v).view(-1, HEADS, DIM)

    def attend(self, hidden: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = (hidden @ self.q).view(-1, HEADS, DIM).transpose(0, 1)
        past = k.shape[0] - hidden.shape[0]
        seen = torch.ones(hidden.shape[0], k.shape[0], dtype=torch.bool).tril(past)
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k.transpose(0, 1), v.transpose(0, 1), seen
        )
        return hidden + found.transpose(0, 1).reshape(-1, WIDTH)


MODEL = [Layer(layer_idx) for layer_idx in range(LAYERS)]
TABLE = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(99))
PROMPT = torch.arange(CHUNK * CHUNKS) * 7 % 50


class Rows:
    """K and V of some layers."""

    def __init__(self) -> None:
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}

    def add(self, layer_idx: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for held, new in ((self.k, k), (self.v, v)):
            held[layer_idx] = torch.cat((held[layer_idx], new)) if layer_idx in held else new


def forward(rows: Rows, layers: range, hidden: torch.Tensor) -> torch.Tensor:
    for layer_idx in layers:
        rows.add(layer_idx, *MODEL[layer_idx].keys(hidden))
        hidden = MODEL[layer_idx].attend(hidden, rows.k[layer_idx], rows.v[layer_idx])
    return hidden


def token_of(hidden: torch.Tensor) -> int:
    return int((hidden[-1] @ TABLE.T).argmax())


def alone() -> list[int]:
    """The tokens that one process comes to."""
    rows, tokens = Rows(), list[int]()
    for chunk in range(CHUNKS):
        hidden = forward(rows, range(LAYERS), TABLE[PROMPT[chunk * CHUNK : (chunk + 1) * CHUNK]])
    tokens.append(token_of(hidden))
    while len(tokens) < NEW:
        tokens.append(token_of(forward(rows, range(LAYERS), TABLE[tokens[-1:]])))
    return tokens


def stage_loop() -> list[int]:
    """Hidden states go from stage to stage by send and recv; each layer's new K and V to all ranks, as soon as they are
    there; so each rank can decode by itself."""
    rows = Rows()
    hidden = torch.empty(CHUNK, WIDTH)
    for chunk in range(CHUNKS):
        if FIRST:
            hidden = TABLE[PROMPT[chunk * CHUNK : (chunk + 1) * CHUNK]]
        else:
            dist.recv(hidden, RANK - 1, tag=1)
        sent = []
        for layer_idx in OWN:
            k, v = MODEL[layer_idx].keys(hidden)
            for other in range(SIZE):
                if other != RANK:
                    sent += [dist.isend(k.contiguous(), other), dist.isend(v.contiguous(), other)]
            rows.add(layer_idx, k, v)
            hidden = MODEL[layer_idx].attend(hidden, rows.k[layer_idx], rows.v[layer_idx])
        if not LAST:
            dist.send(hidden, RANK + 1, tag=1)
        for owner in range(SIZE):
            for layer_idx in range(owner * LAYERS // SIZE, (owner + 1) * LAYERS // SIZE):
                if owner != RANK:
                    k, v = torch.empty(2, CHUNK, HEADS, DIM)
                    dist.recv(k, owner)
                    dist.recv(v, owner)
                    rows.add(layer_idx, k, v)
        for work in sent:
            work.wait()  # type: ignore[union-attr]
    first = torch.tensor([token_of(hidden)])
    dist.broadcast(first, SIZE - 1)
    tokens = [int(first)]
    while len(tokens) < NEW:
        tokens.append(token_of(forward(rows, range(LAYERS), TABLE[tokens[-1:]])))
    return tokens


def batched_pipeline() -> list[int]:
    """In each tick a stage's hidden state leaves and the next arrives, in one batch; tokens come back likewise."""
    rows, tokens = Rows(), list[int]()
    outgoing: torch.Tensor | None = None
    for tick in range(CHUNKS + SIZE - 1):
        chunk = tick - RANK
        incoming, ops = torch.empty(CHUNK, WIDTH), []
        if outgoing is not None and not LAST:
            ops.append(dist.P2POp(dist.isend, outgoing, RANK + 1))
        if not FIRST and 0 <= chunk < CHUNKS:
            ops.append(dist.P2POp(dist.irecv, incoming, RANK - 1))
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        outgoing = None
        if 0 <= chunk < CHUNKS:
            start = TABLE[PROMPT[chunk * CHUNK : (chunk + 1) * CHUNK]] if FIRST else incoming
            outgoing = forward(rows, OWN, start)
    if outgoing is not None and not LAST:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, outgoing, RANK + 1)]):
            work.wait()
    hidden = outgoing
    while True:
        token = (
            torch.tensor([token_of(hidden)])
            if LAST and hidden is not None
            else torch.empty(1, dtype=torch.int64)
        )
        dist.broadcast(token, SIZE - 1)
        tokens.append(int(token))
        if len(tokens) == NEW:
            return tokens
        hidden = TABLE[tokens[-1:]] if FIRST else torch.empty(1, WIDTH)
        if not FIRST:
            for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, hidden, RANK - 1)]):
                work.wait()
        hidden = forward(rows, OWN, hidden)
        if not LAST:
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, hidden, RANK + 1)]):
                work.wait()


def metadata_and_tensors() -> list[int]:
    """Requests and the shapes of tensors go as pickled objects over a group of their own, tensors over another; ranks
    wait for the next request for longer than a hang takes to be told."""
    control, data = dist.new_group(range(SIZE)), dist.new_group(range(SIZE))
    rows, tokens, ids, number = Rows(), list[int](), PROMPT, 0
    while True:
        if FIRST and number == 1:
            idle()
        request: list[Any] = [{"ids": ids.tolist(), "number": number} if FIRST else None]
        dist.broadcast_object_list(request, 0, group=control)
        if not request[0]["ids"]:
            return tokens
        hidden = TABLE[request[0]["ids"]] if FIRST else receive(control, data)["hidden"]
        hidden = forward(rows, OWN, hidden)
        if not LAST:
            send({"hidden": hidden, "step": number}, control, data)
        answer: list[Any] = [token_of(hidden) if LAST else None]
        dist.broadcast_object_list(answer, SIZE - 1, group=control)
        tokens.append(answer[0])
        number += 1
        ids = torch.tensor(tokens[-1:]) if len(tokens) < NEW else torch.empty(0, dtype=torch.int64)


def idle() -> None:
    """Nobody asks for anything for a while; the server looks whether somebody does."""
    import time

    until = time.monotonic() + float(os.environ.get("IDLE_S", "6"))
    while time.monotonic() < until:
        time.sleep(0.05)


def send(values: dict[str, Any], control: dist.ProcessGroup, data: dist.ProcessGroup) -> None:
    """A dict of tensors and other values to the next stage."""
    about = [
        (key, (value.shape, value.dtype) if torch.is_tensor(value) else value)
        for key, value in values.items()
    ]
    dist.send_object_list([about], RANK + 1, group=control)
    for value in values.values():
        if torch.is_tensor(value):
            dist.send(value, RANK + 1, group=data)


def receive(control: dist.ProcessGroup, data: dist.ProcessGroup) -> dict[str, Any]:
    about: list[Any] = [None]
    dist.recv_object_list(about, RANK - 1, group=control)
    values = {}
    for key, value in about[0]:
        if isinstance(value, tuple):
            values[key] = torch.empty(value[0], dtype=value[1])
            dist.recv(values[key], RANK - 1, group=data)
        else:
            values[key] = value
    return values


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = globals()[sys.argv[1]]()
    assert found == alone(), (found, alone())
    dist.barrier()
    dist.destroy_process_group()
    print("WELL", flush=True)
