"""The fixtures that tests of several folders share: checkpoints, decoders, sessions on threads and on a cluster.

A module says what its `model` and `session` are with constants of its own:

    MODEL = {"layers": 4, "tokenizer": True}    # arguments of `tiny_checkpoint`, or "demo"; default: {}
    RANKS = 2                                   # default: 3
    LOAD = {"gpu_ids": (0, 0)}                  # more arguments of `session.load`; default: {}

Its tests then share one session. A module whose tests leave a session unusable has `session = fresh_session`, and each
of its tests gets one of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.engine.ops import HANDLERS, Outcome
from dinfer.model.decoder import Decoder
from dinfer.session.session import Session
from dinfer.verdict import waits
from tests.support.expected import lane_threads, panel_threads
from tests.support.ipclusters import IPython, stock_cluster, within
from tests.support.parrot import SAYING, parrot_checkpoint
from tests.support.runs import Fault, Run, run_arguments, wait_for
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint

Checkpoint = Callable[..., Path]
"""checkpoint(**arguments of `tiny_checkpoint`): the folder of such a checkpoint"""

Decoders = dict[str, Decoder]

Start = Callable[..., Run]
"""start(model, fault=None, environment={}, **flags): `dinfer run` with these flags, broken by that fault"""


# -- checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Writes tiny checkpoints, each once. Tests must not change them."""
    written: dict[str, Path] = {}

    def written_once(**parameters: Any) -> Path:
        key = repr(sorted(parameters.items()))
        if key not in written:
            written[key] = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", **parameters)
        return written[key]

    return written_once


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Path:
    """The folder of the module's checkpoint: of its constant MODEL."""
    wanted: Mapping[str, Any] | str = getattr(request.module, "MODEL", {})
    return Path(wanted) if isinstance(wanted, str) else checkpoint(**wanted)


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, three layers, and one thing to say."""
    return parrot_checkpoint(tmp_path_factory.mktemp("parrot"), SAYING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint of one layer that the test may damage."""
    return tiny_checkpoint(tmp_path / "model", layers=1)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Other weights of the same sizes as those of `folder`."""
    return tiny_checkpoint(tmp_path / "other", layers=1, seed=1)


@pytest.fixture(scope="session")
def decoders(checkpoint: Checkpoint) -> Decoders:
    """Random decoders by name: 7 layers of each family, and a `small` one of 3."""
    made = {family: Decoder.load(checkpoint(family=family)) for family in ("qwen3", "llama")}
    return {**made, "small": Decoder.load(checkpoint(layers=3, tokenizer=True, max_position_embeddings=64))}


@pytest.fixture
def small(decoders: Decoders) -> Decoder:
    """Three layers, 64 positions and a tokenizer, for tests that are not about architectures."""
    return decoders["small"]


@pytest.fixture(scope="session")
def llama(checkpoint: Checkpoint) -> Decoder:
    """Three layers, without a tokenizer."""
    return Decoder.load(checkpoint(family="llama", layers=3))


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def decoder(request: pytest.FixtureRequest, decoders: Decoders) -> Decoder:
    """A decoder of 7 random layers, of each family in turn."""
    return decoders[request.param]


# -- sessions


def new_session(request: pytest.FixtureRequest, model: Path) -> AbstractContextManager[Session]:
    """A session on threads as the module's RANKS and LOAD say, with the checkpoint loaded."""
    ranks, load = getattr(request.module, "RANKS", 3), getattr(request.module, "LOAD", {})
    return session_on_threads(ranks, model, **load)


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest, model: Path) -> Iterator[Session]:
    """The module's session with its `model` loaded: on threads, or, in a module marked `cluster`, on `ipclusters`."""
    if request.node.get_closest_marker("cluster"):
        with within(request.getfixturevalue("daemonized")), dinfer.connect(n=3, start=False) as session:
            yield session.load(str(model), threads=1)
    else:
        with new_session(request, model) as session:
            yield session


@pytest.fixture
def fresh_session(request: pytest.FixtureRequest, model: Path) -> Iterator[Session]:
    """The same on threads, for one test alone."""
    with new_session(request, model) as session:
        yield session


@pytest.fixture(scope="session")
def daemonized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IPython]:
    """`ipcluster start -n 3` for all modules that have a session on it.

    In the background: in the foreground `ipcluster` watches the engines that it has started, and ends all once the last
    of them is gone, whoever has taken their places.
    """
    with stock_cluster(tmp_path_factory.mktemp("daemonized"), 3, "--daemonize") as place:
        yield place


@pytest.fixture(scope="session")
def foreground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IPython]:
    """`ipcluster start -n 3`, as it comes."""
    with stock_cluster(tmp_path_factory.mktemp("foreground")) as place:
        yield place


@pytest.fixture(scope="module")
def engines(foreground: IPython) -> Iterator[IPython]:
    """The same cluster, for this process and for kernels that are started meanwhile. Tests leave its engines alive."""
    with within(foreground):
        yield foreground


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts runs in the test's folder, and ends them whatever happens."""
    runs: list[Run] = []

    def started(
        model: Path, fault: Fault | None = None, environment: dict[str, str] | None = None, **flags: object
    ) -> Run:
        more = {**(environment or {}), **(fault.environment(tmp_path) if fault else {})}
        runs.append(Run(tmp_path, run_arguments(model, **flags), more))
        return runs[-1]

    yield started
    for run in runs:
        run.end()


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Rank 1 waits in `layer c1 l3` until this is set; a rank counts as stuck after two seconds."""
    opened, unbroken = threading.Event(), HANDLERS["layer"]

    def wait(state: Any, op: Any, comm: Any) -> Outcome:
        if state.rank == 1 and str(op) == "layer c1 l3":
            opened.wait()
        return unbroken(state, op, comm)

    monkeypatch.setitem(HANDLERS, "layer", wait)
    monkeypatch.setattr(waits, "STUCK_S", 2.0)
    yield opened
    opened.set()


# -- what tests leave behind


@pytest.fixture(scope="module", autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """After every module all lanes have ended, those of sessions that its tests share too, and all panels' threads."""
    yield
    wait_for(lambda: not lane_threads() + panel_threads(), "threads of lanes and panels end")
