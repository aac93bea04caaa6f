"""Who or what made the first difference: every outcome of the decision."""

from __future__ import annotations

import pytest

from dinfer.kv.reference.judge import TensorEvidence

ALL, NONE = (0, 1, 2), ()


@pytest.mark.parametrize(
    ("evidence", "kind"),
    [
        (TensorEvidence(True, NONE, ALL, True, 1), "equal"),
        (TensorEvidence(False, NONE, ALL, True, 1), "equal"),
        # bit for bit
        (TensorEvidence(True, (2,), (0, 1), False, 1), "wire"),
        (TensorEvidence(True, (0, 2), (1,), False, 1), "wire"),
        (TensorEvidence(True, (1,), (0, 2), False, 1), "wire"),
        (TensorEvidence(True, (1,), (0, 2), False, 1, made_right=True), "wire"),
        (TensorEvidence(True, ALL, NONE, True, 1, made_right=True), "wire"),
        (TensorEvidence(True, (0,), NONE, True, 0, made_right=True), "wire"),
        (TensorEvidence(True, ALL, NONE, True, 1), "compute"),
        (TensorEvidence(True, ALL, NONE, True, 1, made_right=False), "compute"),
        (TensorEvidence(True, ALL, NONE, False, 1, made_right=False), "compute"),
        (TensorEvidence(True, (1,), (0,), False, 1, made_right=False), "compute"),
        # new tokens: every rank computes them for itself
        (TensorEvidence(True, (2,), (0, 1), False, None), "compute"),
        (TensorEvidence(True, ALL, NONE, True, None), "compute"),
        # rows in wrong places, however they came there
        (TensorEvidence(True, ALL, NONE, True, 1, made_right=True, misplaced=True), "placement"),
        (TensorEvidence(True, (2,), (0, 1), False, 1, misplaced=True), "placement"),
        (TensorEvidence(False, (2,), (0, 1), False, 1, misplaced=True), "placement"),
        # other chunks or another dtype
        (TensorEvidence(False, ALL, NONE, True, 1), "drift"),
        (TensorEvidence(False, (2,), (0, 1), False, 1), "wire"),
        (TensorEvidence(False, NONE, ALL, False, 1), "wire"),
        (TensorEvidence(False, ALL, NONE, False, 1), "compute"),
        (TensorEvidence(False, (2,), (0, 1), False, None), "compute"),
    ],
)
def test_kinds(evidence: TensorEvidence, kind: str) -> None:
    assert evidence.kind == kind
