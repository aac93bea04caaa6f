"""What ranks measure for the planner: links, and layers, over gloo's like, on streams and with graphs."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.config import Config
from dinfer.engine.kernels import Graphs, Kernels
from dinfer.engine.link_times import quiet_link
from dinfer.engine.measure import Measured, measure
from dinfer.messages import MeasureRank
from dinfer.model.decoder import Decoder
from dinfer.planner.costs import as_in_run, fit
from dinfer.transport.in_process import StreamOrder
from tests.support.twin import twin

seconds = st.floats(1e-6, 10)


def test_a_link_is_told_by_a_small_and_a_large_message() -> None:
    # 1 MB in a second, of which the last quarter was in buffers when its send had ended.
    assert quiet_link(0.01, 0.01 + 0.75, 1.02, 1_000_000) == pytest.approx((0.01, 1e6, 250_000))


@given(seconds, seconds, seconds)
def test_no_noise_makes_a_speed_negative(latency: float, sent: float, back: float) -> None:
    """Seen on a busy machine: a small message took longer than a large one."""
    _, speed, ahead = quiet_link(latency, sent, back, 8192)
    assert 0 < speed <= 8192 / back * 10 * 1.001
    assert 0 <= ahead <= 8192


class CpuGraphs(Kernels):
    """Graphs that are, on a CPU, the functions that would be captured."""

    def prepare(self, decoder: Decoder, config: Config, *_: object) -> Graphs | None:
        return self.capture("graph", decoder, config)


def measured(
    decoder: Decoder, command: MeasureRank, kernels: Kernels, order: StreamOrder = "pairs"
) -> list[Measured]:
    """What three ranks measure."""
    with twin(decoder, world_size=3, chunk_size=4, streams=order, backend=command.backend) as made:
        return made.all(lambda engine: measure(decoder, engine.comm, command, kernels))


@pytest.mark.parametrize("order", ["pairs", "serial"])
def test_on_streams_links_and_layers_are_measured_on_streams(small: Decoder, order: StreamOrder) -> None:
    """Also where all that a rank issues runs one after another, the worst case on CUDA."""
    found = measured(small, MeasureRank(16, (4, 8), 8, backend="nccl"), Kernels(), order)
    assert found[0].links == found[1].links == found[2].links
    assert [(one.source, one.target) for one in found[0].links] == list(permutations(range(3), 2))
    for link in found[0].links:
        assert link.latency_s > 0
        assert link.alone >= link.together > 0
        assert link.ahead == 0
    for one in found:
        assert not one.codecs, "codecs need gloo"
        assert {time.tokens for time in one.layers} == {4, 8}
        assert {time.tokens for time in one.in_run} == {4, 8}
        assert as_in_run(fit(one.layers), one.in_run).seconds(0, 8) > 0
        assert not one.padded


def test_with_graphs_those_are_timed(small: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()
    kernels = CpuGraphs()
    unbroken = type(kernels).capture

    def capture(self: Kernels, mode: str, decoder: Decoder, config: Config, *given: object) -> Graphs:
        found = unbroken(self, mode, decoder, config, *given)  # type: ignore[arg-type]
        ran.append(f"{mode} {config.chunk_size}")
        return found

    monkeypatch.setattr(CpuGraphs, "capture", capture)
    with twin(small, world_size=1, chunk_size=4) as made:
        (found,) = made.all(lambda engine: measure(small, engine.comm, MeasureRank(16, (4, 8), 8), kernels))
    assert found.padded
    assert set(ran) == {"graph 4", "graph 8"}
    assert {time.tokens for time in found.layers} == {4, 8}
    assert not found.links
