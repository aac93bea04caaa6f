"""Who or what made the first difference: every outcome of the decision."""

from __future__ import annotations

import pytest

from dinfer.session.reference.cause import Evidence, counts, kind_of

ALL, NONE = (0, 1, 2), ()


@pytest.mark.parametrize(
    ("evidence", "kind"),
    [
        (Evidence(True, NONE, ALL, True, 1), "equal"),
        (Evidence(False, NONE, ALL, True, 1), "equal"),
        # bit for bit
        (Evidence(True, (2,), (0, 1), False, 1), "wire"),
        (Evidence(True, (0, 2), (1,), False, 1), "wire"),
        (Evidence(True, (1,), (0, 2), False, 1), "wire"),
        (Evidence(True, (1,), (0, 2), False, 1, made_right=True), "wire"),
        (Evidence(True, ALL, NONE, True, 1, made_right=True), "wire"),
        (Evidence(True, (0,), NONE, True, 0, made_right=True), "wire"),
        (Evidence(True, ALL, NONE, True, 1), "compute"),
        (Evidence(True, ALL, NONE, True, 1, made_right=False), "compute"),
        (Evidence(True, ALL, NONE, False, 1, made_right=False), "compute"),
        (Evidence(True, (1,), (0,), False, 1, made_right=False), "compute"),
        # new tokens: every rank computes them for itself
        (Evidence(True, (2,), (0, 1), False, None), "compute"),
        (Evidence(True, ALL, NONE, True, None), "compute"),
        # rows in wrong places, however they came there
        (Evidence(True, ALL, NONE, True, 1, made_right=True, misplaced=True), "placement"),
        (Evidence(True, (2,), (0, 1), False, 1, misplaced=True), "placement"),
        (Evidence(False, (2,), (0, 1), False, 1, misplaced=True), "placement"),
        # other chunks or another dtype
        (Evidence(False, ALL, NONE, True, 1), "drift"),
        (Evidence(False, (2,), (0, 1), False, 1), "wire"),
        (Evidence(False, NONE, ALL, False, 1), "wire"),
        (Evidence(False, ALL, NONE, False, 1), "compute"),
        (Evidence(False, (2,), (0, 1), False, None), "compute"),
    ],
)
def test_kinds(evidence: Evidence, kind: str) -> None:
    assert kind_of(evidence) == kind
    assert counts(evidence) is (kind != "equal")
