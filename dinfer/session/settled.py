"""Settled: parameters that a session's runs share, since they belong to its ranks or to what these have loaded."""

from collections.abc import Mapping
from typing import Any

from dinfer.config import Config, ConfigError
from dinfer.model.checkpoint import Spec

SETTLED = ("model_path", "dtype", "gpu_ids", "threads", "backend", "world_size")
ANY = {"threads": 0, "backend": "auto"}
"""what leaves the choice to whoever loads"""


def without_settled(given: Mapping[str, Any], loaded: Config, spec: Spec) -> dict[str, Any]:
    """A run's parameters but for those that were settled before it. Raises ConfigError where one of these is another
    than was settled: a run cannot change it."""
    for name in SETTLED:
        if name not in given:
            continue
        bare = {"gpu_ids": (), "layer_split": ()}  # which the number of ranks would have to fit
        wanted = _value(loaded.with_(**(bare | {name: given[name]})), spec, name)
        if wanted not in (_value(loaded, spec, name), ANY.get(name)):
            raise ConfigError(_refusal(name, wanted, _value(loaded, spec, name), loaded))
    return {name: value for name, value in given.items() if name not in SETTLED}


def _value(config: Config, spec: Spec, name: str) -> Any:
    found = getattr(config, name)
    return spec.dtype if (name, found) == ("dtype", "auto") else found


def _refusal(name: str, wanted: Any, found: Any, loaded: Config) -> str:
    if name == "world_size":
        return (
            f"world_size is {wanted}, but this session has {found} ranks: dinfer.connect(n={wanted}) makes one of "
            f"{wanted}."
        )
    if name == "backend":
        return (
            f"backend is {wanted}, but the ranks have met by {found}: session.load(…, gpu_ids=…) sets the GPUs of all "
            "runs, and the backend with them."
        )
    path = "" if name == "model_path" else f"{loaded.model_path!r}, {name}="
    return (
        f"{name} is {wanted!r}, but the ranks were loaded with {found!r}, and a run cannot change that: "
        f"session.load({path}{wanted!r}) sets it for all runs."
    )
