"""Asks engines who they are, and refuses those that cannot take part."""

from collections.abc import Mapping
from typing import Any

from dinfer import __version__
from dinfer.session.clusters.calls import Calls, call_expression, source_expression, submit
from dinfer.session.clusters.facts import (
    VERSIONS,
    EngineFacts,
    facts_of,
    judge_versions,
)


def introduce(client: Any, engines: Mapping[int, int], controller: str, timeout: float) -> list[EngineFacts]:
    """`engines`: id by rank. `controller`: its address. Raises ClusterError, RankError.

    Versions come first: an engine that has another dinfer may not know the second question.
    """
    versions = _ask(client, engines, source_expression(VERSIONS, "versions"), timeout)
    judge_versions({engines[rank]: found for rank, found in versions.items()}, __version__)
    question = call_expression("dinfer.session.clusters.facts:own_facts", [controller])
    own = _ask(client, engines, question, timeout)
    return [facts_of(rank, engine_id, versions[rank], own[rank]) for rank, engine_id in engines.items()]


def _ask(client: Any, engines: Mapping[int, int], expression: str, timeout: float) -> dict[int, Any]:
    names = {rank: f"engine {engine_id}" for rank, engine_id in engines.items()}
    calls = Calls({r: submit(client, i, expression, r, names[r]) for r, i in engines.items()}, names)
    return dict(zip(engines, calls.result(timeout), strict=True))
