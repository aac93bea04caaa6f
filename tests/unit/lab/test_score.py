"""Scoring: what counts as right, what the scoreboard and the JSON say, also of a lab that was broken off."""

from __future__ import annotations

import json
import re

from dinfer.lab.faults import Cell, Expected
from dinfer.lab.score import Result, Score

CELL = Cell("exception", 1, 3, 0, "ring", "lockstep")
WANTED = Expected("exception", 1, "layer c0 l3")
RIGHT = Result(CELL, WANTED, "exception", 1, "rank 1 raised boom at `layer c0 l3`", 0.25, 1.0)
WRONG = Result(CELL, WANTED, "dead", 2, "rank 2 is gone", 6.0)
NOTHING = Result(CELL, WANTED, "", None, "", None)
DEATH = Result(CELL._replace(fault="SIGKILL"), Expected("dead", 1), "dead", 1, "rank 1 is gone", 1.5)


def test_a_lab_in_which_all_is_right() -> None:
    score = Score(7, 1, [RIGHT], clean_runs=2)
    assert score.all_right
    head, *rows, clean = score.table().splitlines()
    assert re.split("  +", head) == ["fault", "cells", "correct", "in time", "median s", "max s"]
    assert [row.split() for row in rows] == [
        [name, "1", "1", "1", "0.25", "0.25"] for name in ("exception", "all")
    ]
    assert clean == "clean runs: 2, false alarms: 0"


def test_what_is_wrong_is_told() -> None:
    score = Score(7, 5, [RIGHT, WRONG, NOTHING, DEATH], 1, ["rank 0 is stuck"])
    assert not score.all_right
    *_, total, clean, left, alarm, first, second = score.table().splitlines()
    assert total.split() == ["all", "4", "2", "1", "1.50", "6.00"]
    assert clean == "clean runs: 1, false alarms: 1"
    assert left == "not done: 1 of 5 cells"
    assert alarm == "false alarm: rank 0 is stuck"
    place = "exception, rank 1, c0 l3, ring, lockstep: not exception, rank 1 at `layer c0 l3`"
    assert first == f"wrong: {place}, but dead, rank 2: rank 2 is gone after 6.00 s"
    assert second == f"wrong: {place}, but nothing"


def test_one_wrong_one_alarm_or_one_left_out_is_not_all_right() -> None:
    assert not Score(0, 1, [WRONG]).all_right
    assert not Score(0, 2, [RIGHT]).all_right
    assert not Score(0, 1, [RIGHT], 1, ["an alarm"]).all_right


def test_a_death_is_to_be_told_within_a_second_and_all_else_within_five() -> None:
    assert (DEATH.correct, DEATH.in_time) == (True, False)
    assert (RIGHT.in_time, NOTHING.in_time) == (True, False)


def test_the_json() -> None:
    said = json.loads(json.dumps(Score(7, 1, [RIGHT], 1, links="transport").as_dict()))
    assert said == {
        "cells": [
            {
                "fault": "exception", "rank": 1, "layer": 3, "chunk": 0, "strategy": "ring", "schedule": "lockstep",
                "expected": {"kind": "exception", "rank": 1, "op": "layer c0 l3"},
                "named": {"kind": "exception", "rank": 1, "sentence": "rank 1 raised boom at `layer c0 l3`"},
                "correct": True, "seconds": 0.25, "in_time": True, "recovered_s": 1.0,
            }
        ],
        "planned": 1, "clean_runs": 1, "false_alarms": 0, "alarms": [], "links": "transport", "seed": 7,
    }  # fmt: skip
