"""Digests of a watched process on a GPU: making what they need waits for nothing that the device has still to do.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

import pytest
import torch

from dinfer.watch.probe import digests
from dinfer.watch.probe.digests import row_sketches, token_digests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]

CYCLES = 4_000_000_000
"""of a kernel that does nothing, for about two seconds"""


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been made yet, but the kernel that mixes."""
    token_digests(torch.ones(2, 3, 8, device="cuda"))
    row_sketches(torch.ones(2, 8, device="cuda"))
    torch.cuda.synchronize()
    monkeypatch.setattr(digests, "_constants", {})


def test_the_first_digests_wait_for_no_stream() -> None:
    values = torch.randn(2, 3, 8)
    on_device, busy = values.cuda(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
        found, sketch = token_digests(on_device), row_sketches(on_device)
        assert not busy.query()  # the host has come here while the kernel before runs on
    torch.cuda.synchronize()
    assert torch.equal(found.cpu(), token_digests(values))
    assert torch.allclose(sketch.cpu(), row_sketches(values), atol=1e-4)


def test_another_stream_waits_for_what_is_made_on_a_busy_one() -> None:
    values = torch.randn(2, 3, 8)
    on_device = values.cuda()
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
        token_digests(on_device)
    with torch.cuda.stream(other):
        found = token_digests(on_device)
    assert not busy.query()
    torch.cuda.synchronize()
    assert torch.equal(found.cpu(), token_digests(values))


def test_a_graph_that_is_captured_has_what_it_needs_of_its_own() -> None:
    values = torch.randn(2, 3, 8)
    on_device, graph = values.cuda(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = token_digests(on_device)
    assert digests._constants == {}
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found.cpu(), token_digests(values))


@pytest.mark.parametrize("width", [1, 3, 8, 2050])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_equal_bytes_have_equal_digests_on_cpu_and_gpu(dtype: torch.dtype, width: int) -> None:
    data = torch.randint(0, 256, (2, 4, 16, width * dtype.itemsize), dtype=torch.uint8).view(dtype)
    assert torch.equal(token_digests(data.cuda()).cpu(), token_digests(data))
    assert torch.equal(digests.last_dim_digests(data.cuda()).cpu(), digests.last_dim_digests(data))
