"""Findings: what is known of a run besides its events, as plain data in the trace's `about`.

None, or an empty value, means unknown; a report says so or leaves it out. The prompt, the generated text and
environment variables are included only if the user has asked for them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import msgspec

from dinfer.trace.trace import Trace

KEY = "findings"
"""the key in a trace's `about`"""

MarkKind = Literal["armed", "differs", "corrupt", "nonfinite", "nonfinite hidden"]

BlockState = Literal["same", "differs", "missing", "not compared"]


@dataclass(frozen=True)
class RankFinding:
    """One rank. `kv_sha256`: the SHA-256 of its KV of the prompt; `tokens`: the new tokens that it generated; `log`:
    its last lines."""

    rank: int
    device: str = ""
    host: str = ""
    dtype: str = ""
    threads: int = 0
    kv_sha256: str = ""
    tokens: tuple[int, ...] | None = None
    error: str = ""
    log: str = ""


@dataclass(frozen=True)
class KvFinding:
    """The result of comparing the KV of all ranks. `grid[rank][layer]`: their states; `differences`: the first of
    `count`, each a row of a table, all with the same keys; `blocks`: (rank, chunk, layer) of all that differ."""

    equal: bool
    sentence: str
    grid: tuple[tuple[BlockState, ...], ...] = ()
    differences: tuple[dict[str, Any], ...] = ()
    count: int = 0
    blocks: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class WaitsFinding:
    """Who waited for whom in a run that hung. `ranks`: those that are drawn, each with its number, name, what it does,
    whether it is to blame, and more about that; `waits`: who waits for whom, and for what; `lines`: of all ranks;
    `stacks`: by rank, as text."""

    ranks: tuple[tuple[int, str, str, bool, str], ...] = ()
    waits: tuple[tuple[int, int, str], ...] = ()
    lines: tuple[str, ...] = ()
    stacks: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Findings:
    """All findings. `made`: when the run was made, as text; `state`: a word, as `run.standing().state` (older reports
    say "running" of a run that hung); `failure`: why it failed, or does not move; `remedy`: the call that helped then;
    `positions[rank][lane]`: how many ops had ended; `others`: other runs of the same prompt, as `trace.summary.summary`
    returns them; `plan`: the plan's text, if the user has made the plan. `corrupt`: blocks whose bytes have changed on
    the wire or in memory; `nonfinite`: the first NaN or Inf; `marks`: what is known of single blocks: rank, chunk,
    layer, kind ("armed", "differs", "corrupt", "nonfinite": in K or V, "nonfinite hidden": in
    the hidden state after the block) and text. `commands`: how to repeat this run, by where to type it. `warnings`:
    what went wrong in a watched program though nothing stopped it. `predicted`: seconds by the planner, by figure, as
    `run.prediction` names them. `waits`: who waited for whom, of a run that hung."""

    made: str = ""
    state: str = ""
    failure: str = ""
    remedy: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    proved: bool | None = None
    proof: str = ""
    plan: str = ""
    positions: tuple[tuple[int, ...], ...] = ()
    ranks: tuple[RankFinding, ...] = ()
    kv: KvFinding | None = None
    message: str = ""
    breakpoints: tuple[str, ...] = ()
    hits: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    nonfinite: str = ""
    marks: tuple[tuple[int, int, int, MarkKind, str], ...] = ()
    log: tuple[str, ...] = ()
    commands: dict[str, str] = field(default_factory=dict)
    others: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    text: str | None = None
    chunk_texts: tuple[str, ...] = ()
    environment: dict[str, str] | None = None
    waits: WaitsFinding | None = None
    warnings: tuple[str, ...] = ()
    predicted: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values as JSON has them, with lists for tuples."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return plain

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From plain values; fields that a later version has added are ignored. Raises ValueError for a value of
        another type."""
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:  # which is a ValueError in newer versions only
            raise ValueError(str(error)) from None


def findings_of(trace: Trace) -> Findings:
    """The findings in a trace."""
    return Findings.of(trace.about.get(KEY, {}))


def with_findings(trace: Trace, findings: Findings) -> Trace:
    """The trace with these findings in place of its own."""
    return replace(trace, about={**trace.about, KEY: findings.as_dict()})
