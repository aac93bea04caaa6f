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
    facts = {
        "a machine": ["2 cores", "3 engines"],
        "step": ["12.5 ms", "1.5 ms", "11.0 ms", "10.0 ms", "1.10 ×", "at most 4"],
        "events": ["2,298", "425 of 425", "1.1 ms", "28.8 ms"],
        "recorder and watcher": [
            "2.010 s",
            "2.000 s",
            "64.3 ms",
            "+0.50%, -1.00% to +2.00%",
            "+0.81%",
            "0.58%",
        ],
        "from kill": ["60.0 ms", "80.0 ms", "at most 1 s", "8.0 s"],
    }
    for line, (start, numbers) in zip(table(RESULT).splitlines(), facts.items(), strict=True):
        assert line.startswith(start)
        assert [number for number in numbers if number not in line] == []
