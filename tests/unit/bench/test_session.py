"""What `dinfer bench session` says of its figures."""

from __future__ import annotations

from dinfer.bench.session import table

RESULT = {
    "machine": "a machine, 2 cores",
    "n": 3,
    "repeats": 3,
    "step": {"step": 0.0125, "layer": 0.0015, "latency": 0.011, "round_trip": 0.010, "ratio": 1.1},
    "events": {"per_second": 2298.4, "heard": 425, "ops": 425, "news": 0.0011, "longest": 0.0288},
    "recording": {
        "on": 2.010,
        "off": 2.0,
        "layer": 0.0643,
        "cost": 0.005,
        "lowest": -0.01,
        "highest": 0.02,
        "cpu_cost": 0.0081,
        "watcher_share": 0.0058,
    },
    "death": {"seconds": [0.05, 0.08, 0.06], "median": 0.06, "recovered": [8.0, 9.0, 7.0]},
}


def test_the_table_names_every_figure_with_its_target() -> None:
    assert table(RESULT).splitlines() == [
        "a machine, 2 cores; 3 engines, one thread each",
        "step: 12.5 ms, of which the layer 1.5 ms: 11.0 ms over it; an empty round trip to the engines 10.0 ms: "
        "1.10 × (target: at most 4)",
        "events: 2,298 a second heard at full speed, 425 of 425; news of a rank every 1.1 ms, at worst after 28.8 ms",
        "recorder and watcher: prefill 2.010 s with, 2.000 s without, layers of 64.3 ms: +0.50%, -1.00% to "
        "+2.00% in pairs; CPU time +0.81%, of which watchers 0.58% (target: at most 1 %)",
        "from kill to name: 60.0 ms, at worst 80.0 ms of 3 (target: at most 1 s); recovered in 8.0 s",
    ]
