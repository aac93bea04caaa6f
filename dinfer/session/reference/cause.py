"""Cause: of the first thing that differs from the reference, who or what made it so. Pure decisions, no tensors."""

from typing import Literal, NamedTuple

Kind = Literal["equal", "wire", "compute", "placement", "drift"]


class Evidence(NamedTuple):
    """What is known of one tensor of one block.

    `exact`: the reference should be equal bit for bit, so that every difference counts; else those beyond tolerance do.
    `differing`, `right`: the ranks that hold it and differ from the reference, and those that do not. `alike`: all that
    hold it hold the same bytes. `owner`: the rank that computed it for all; None: every rank did, for itself.
    `made_right`: whether the owner's bytes were the reference's when it had computed them; None: not known.
    `misplaced`: what is there belongs elsewhere.
    """

    exact: bool
    differing: tuple[int, ...]
    right: tuple[int, ...]
    alike: bool
    owner: int | None
    made_right: bool | None = None
    misplaced: bool = False


def counts(evidence: Evidence) -> bool:
    """Whether something is wrong there: it differs from the reference, or the ranks from one another."""
    return bool(evidence.differing) or evidence.misplaced or not evidence.alike


def kind_of(evidence: Evidence) -> Kind:
    """Which of the four it is, if `counts`.

    Rows that lie wrongly are that, however they came there. Bytes that somebody holds rightly, or that were right when
    they were computed, were changed on the wire or in memory. What nobody has right was computed so, unless another
    dtype or other chunks, too, may have made it: then, with all ranks alike, it is drift.
    """
    if not counts(evidence):
        return "equal"
    if evidence.misplaced:
        return "placement"
    if not evidence.exact and evidence.alike:
        return "drift"
    if evidence.made_right is not None:
        return "wire" if evidence.made_right else "compute"
    if evidence.owner is None or not (evidence.right or not evidence.differing):
        return "compute"
    return "wire"
