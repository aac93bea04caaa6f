"""What `--json` has: the keys that other programs read."""

import json
from dataclasses import replace

from dinfer.watching.evidence import Evidence
from dinfer.watching.written import as_dict
from tests.support.made_processes import op, process
from tests.unit.watching.test_evidence import crossed_sends, evidence


def lost() -> Evidence:
    """An async send for which nobody waited, of layer 3 and chunk 1."""
    never = op(0, "send", 1, 2, peer=1, is_async=True, waited_ns=0, layer=3, chunk=1)
    return evidence(
        process(0, never, ended="exit"), process(1, op(0, "recv", 1, 2, peer=0, layer=3), ended="exit"), now=9
    )


def test_of_one_job() -> None:
    found = crossed_sends(3)
    told = as_dict([found], [found.problem], found.problem, 143)
    assert told.keys() == {"verdict", "findings", "ranks", "links", "collectives", "notes", "exit_status"}
    assert found.problem
    assert told["verdict"] == {"kind": "cycle", "ranks": [0, 1], "text": found.problem.sentence}
    assert [rank["line"] for rank in told["ranks"]] == ["infer.py:10", "infer.py:10"]
    assert told["exit_status"] == 143
    json.dumps(told)


def test_a_finding_says_layer_chunk_and_line() -> None:
    (finding,) = as_dict([lost()], [None], None, 0)["findings"]
    assert finding.pop("text").startswith("rank 0 never waited for `send c1 l3 -> 1`")
    assert finding == {"kind": "never waited", "ranks": (0,), "layer": 3, "chunk": 1, "line": "infer.py:10"}


def test_of_several_jobs_each_has_its_verdict() -> None:
    hung, over = replace(crossed_sends(3), job="job 1 (a.py)"), replace(lost(), job="job 2 (b.py)")
    told = as_dict([hung, over], [hung.problem, None], hung.problem, None)
    assert [(one["job"], one["verdict"] and one["verdict"]["kind"]) for one in told["jobs"]] == [
        ("job 1 (a.py)", "cycle"),
        ("job 2 (b.py)", None),
    ]
    assert told["verdict"]["text"].startswith("job 1 (a.py): deadlock: ")
    assert {one["job"] for key in ("ranks", "findings") for one in told[key]} == {
        "job 1 (a.py)",
        "job 2 (b.py)",
    }
