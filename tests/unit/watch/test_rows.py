"""Digests of KV as caches of transformers grow, and of what programs tap."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, StaticCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

import dinfer
from dinfer.watch.probe import kv_methods, models, tensors
from dinfer.watch.probe.captures import captures
from dinfer.watch.probe.digests import last_dim_digests, row_sketches, token_digests
from dinfer.watch.probe.models import TransformersModels
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.records import RecordsError
from dinfer.watch.probe.rows import (
    MOST_SMALL,
    SMALL_BYTES,
    RowsReader,
    RowsTaken,
    RowsWriter,
    read_rows,
)
from dinfer.watch.probe.start import Probe
from dinfer.watch.probe.writing import NumberedNames, Records
from dinfer.watching import folders
from dinfer.watching.folders import Watched
from tests.support.runs import wait_for

Taken = Callable[[], list[RowsTaken]]
CONFIG = Qwen3Config(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Taken]:
    """Watches this process; returns what reads the rows."""
    probe = Probe(tmp_path)

    def found() -> list[RowsTaken]:
        (process,) = read(tmp_path)
        assert process.problems == []
        probe._tensors.flush()
        return read_rows(tmp_path, process)

    yield found
    probe.stop()


def kv(tokens: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, [batch, 2, tokens, 4]."""
    return torch.randn(batch, 2, tokens, 4), torch.randn(batch, 2, tokens, 4)


def expected(k: torch.Tensor, v: torch.Tensor) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The digests of each sequence's rows, each token by itself."""
    mask = 2**64 - 1
    return tuple(
        tuple(
            (int(token_digests(k[b, :, t : t + 1])) & mask, int(token_digests(v[b, :, t : t + 1])) & mask)
            for t in range(k.shape[2])
        )
        for b in range(k.shape[0])
    )


def dynamic() -> Cache:
    """A cache that grows."""
    return DynamicCache(config=CONFIG)


def static() -> Cache:
    """A cache of fixed size."""
    return StaticCache(config=CONFIG, max_cache_len=32)


def sliding() -> Cache:
    """A cache whose layers keep the last 4 tokens."""
    config = Qwen3Config(
        **{
            **CONFIG.to_dict(),
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] * 2,
        }
    )
    return DynamicCache(config=config)


class OwnCache(DynamicCache):
    """As users write them."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **options: Any) -> Any:
        return super().update(key_states, value_states, layer_idx, *args, **options)


@pytest.mark.parametrize("make", [dynamic, static, sliding, OwnCache])
def test_rows_of_caches_are_taken_as_they_grow(taken: Taken, make: Callable[[], Cache]) -> None:
    cache = make()
    first, second = kv(6, batch=2), kv(3, batch=2)
    cache.update(*first, 1)
    cache.update(*second, 1)
    rows = taken()
    assert [(row.name, row.layer, row.start, row.dtype, row.shape) for row in rows] == [
        ("kv", 1, 0, "float32", (2, 2, 6, 4)),
        ("kv", 1, 6, "float32", (2, 2, 3, 4)),
    ]
    assert [row.digests for row in rows] == [expected(*first), expected(*second)]
    assert rows[0].cache == rows[1].cache == 1


def test_a_subclass_made_while_watched(taken: Taken) -> None:
    class Late(DynamicCache):
        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **options: Any
        ) -> Any:
            return super().update(key_states, value_states, layer_idx, *args, **options)

    Late().update(*kv(2), 0)
    assert [(row.layer, row.start, len(row.digests[0])) for row in taken()] == [(0, 0, 2)]


class Registered:
    """A base of which every class has to say its name."""

    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, name: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        Registered.names.append(name)


def test_a_subclass_whose_other_base_looks_after_its_subclasses(taken: Taken) -> None:
    class Both(DynamicCache, Registered, name="both"):
        pass

    class OfLayers(DynamicLayer, Registered, name="of layers"):  # type: ignore[no-untyped-call]
        pass

    assert Registered.names[-2:] == ["both", "of layers"]
    Both().update(*kv(2), 0)
    assert [(row.layer, row.start, len(row.digests[0])) for row in taken()] == [(0, 0, 2)]


class Calling(torch.nn.Module):
    """A module that does something of its own when it is called."""

    calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        Calling.calls += 1
        return super().__call__(*args, **options)


class CallingModel(Qwen3Model, Calling):  # type: ignore[no-untyped-call]
    pass


class CallingLayer(GradientCheckpointingLayer, Calling):  # type: ignore[no-untyped-call]
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def test_a_model_and_a_layer_whose_other_base_is_called_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tensors.COMPARE_VARIABLE, "1")
    kinds: tuple[Any, ...] = (PreTrainedModel, GradientCheckpointingLayer)
    before = [vars(kind).get("__call__") for kind in kinds]
    probe = Probe(tmp_path)
    try:
        Calling.calls = 0
        with torch.no_grad():
            CallingModel(CONFIG)(torch.zeros(1, 3, dtype=torch.int64))
        assert Calling.calls == 1
        CallingLayer()(torch.zeros(1))
        assert Calling.calls == 2
        assert all("__call__" in vars(kind) for kind in kinds)
    finally:
        probe.stop()
    assert [vars(kind).get("__call__") for kind in kinds] == before


def test_a_layer_that_is_appended_twice_shows(taken: Taken) -> None:
    cache, both = dynamic(), kv(2)
    for _ in range(2):
        cache.update(*both, 0)
    first, second = taken()
    assert (first.start, second.start) == (0, 2)
    assert first.digests == second.digests


def test_few_rows_are_written_soon_and_in_their_order(taken: Taken, tmp_path: Path) -> None:
    cache = dynamic()
    given = [kv(tokens) for tokens in (1, 2, SMALL_BYTES, 1, 1)]  # the third are many
    for both in given:
        cache.update(*both, 1)
    (process,) = read(tmp_path)
    wait_for(lambda: len(read_rows(tmp_path, process)) == 5, "the probe's thread has written them")
    rows = taken()
    assert [row.start for row in rows] == [0, 1, 3, 3 + SMALL_BYTES, 4 + SMALL_BYTES]
    assert [len(row.digests[0]) for row in rows] == [1, 2, SMALL_BYTES, 1, 1]
    for number in (0, 1, 3, 4):
        assert rows[number].digests == expected(*given[number])
    assert [row.at_ns for row in rows] == sorted(row.at_ns for row in rows)


def test_so_many_few_rows_are_written_at_once(taken: Taken, tmp_path: Path) -> None:
    cache = dynamic()
    kept = []
    for _ in range(MOST_SMALL):
        k, v = kv(1)
        kept += [weakref.ref(k), weakref.ref(v)]
        cache.update(k, v, 0)
    del k, v
    (process,) = read(tmp_path)
    assert len(read_rows(tmp_path, process)) == MOST_SMALL
    assert [one() for one in kept[2:]] == [None] * (2 * MOST_SMALL - 2)
    assert len(taken()) == MOST_SMALL


def test_rows_after_a_crop_are_where_they_are(taken: Taken) -> None:
    cache = dynamic()
    cache.update(*kv(5), 0)
    cache.layers[0].crop(-2)  # type: ignore[union-attr]  # of every layer that grows
    cache.update(*kv(1), 0)
    assert [row.start for row in taken()] == [0, 3]


def test_a_model_run_in_chunks(taken: Taken) -> None:
    model, cache = Qwen3Model(CONFIG), dynamic()
    for chunk in range(2):
        with torch.no_grad():
            model(torch.full((1, 3), chunk), past_key_values=cache)
    assert [(row.layer, row.chunk, row.start) for row in taken()] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 3),
        (1, 1, 3),
    ]
    held: Any = cache.layers[1]
    assert taken()[1].digests[0] + taken()[3].digests[0] == expected(held.keys, held.values)[0]


def test_a_compiled_model_is_left_alone(tmp_path: Path) -> None:
    model, ids = Qwen3Model(CONFIG), torch.zeros(1, 2, dtype=torch.int64)
    plain = model(ids, past_key_values=dynamic()).last_hidden_state
    probe = Probe(tmp_path)
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(ids, past_key_values=dynamic()).last_hidden_state
    finally:
        probe.stop()
    assert torch.equal(found, plain)
    assert list(tmp_path.glob("*.kv")) == []


def test_what_programs_tap(taken: Taken) -> None:
    k, v = kv(3)
    logits = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    dinfer.tap("kv", k=k, v=v, layer=4, chunk=1)
    dinfer.tap("kv", k=k[0], v=v[0], layer=4, chunk=2)
    with dinfer.label(layer=7):
        dinfer.tap("logits", logits, start=9)
    first, second, third = taken()
    assert (first.layer, first.chunk, first.start, first.digests) == (4, 1, 0, expected(k, v))
    assert (second.chunk, second.start, second.digests) == (2, 3, first.digests)
    assert (third.name, third.layer, third.start, third.dtype) == ("logits", 7, 9, "bfloat16")
    assert [len(sequence) for sequence in third.digests] == [5, 5]
    assert third.digests[1][4] == (int(last_dim_digests(logits[1, 4])) & (2**64 - 1),)


def test_a_tap_without_a_watch_does_nothing(tmp_path: Path) -> None:
    dinfer.tap("kv", k=object(), v=None)
    assert list(tmp_path.iterdir()) == []


def test_a_tap_of_what_is_no_tensor_says_so_and_goes_on(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    try:
        for _ in range(2):
            dinfer.tap("kv", k=torch.zeros(3), v=torch.zeros(3), layer=0)
        dinfer.tap("hidden", torch.zeros(2, 3))
    finally:
        probe.stop()
    (process,) = read(tmp_path)
    assert len(process.problems) == 1
    assert "tap 'kv' was not taken" in process.problems[0]
    assert [row.name for row in read_rows(tmp_path, process)] == ["hidden"]


@pytest.fixture
def engine() -> Iterator[ModuleType]:
    """A module of the user's, with a store of its own."""
    module = ModuleType("own_engine")
    exec(
        "class Store:\n    def put(self, number, pair, *, at=0):\n        return pair\n",
        module.__dict__,
    )
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("own_engine", None)
    sys.modules["own_engine"] = module
    yield module
    del sys.modules["own_engine"]


def test_a_method_named_on_the_command_line(
    tmp_path: Path, engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        "method": "own_engine:Store.put",
        "k": "pair[0]",
        "v": "result[1]",
        "layer": "number + 1",
        "start": "at",
    }
    monkeypatch.setenv(kv_methods.KV_VARIABLE, json.dumps([asked]))
    k, v = kv(2)
    probe = Probe(tmp_path)
    try:
        assert engine.Store().put(3, (k, v), at=6) == (k, v)
    finally:
        probe.stop()
    (process,) = read(tmp_path)
    (row,) = read_rows(tmp_path, process)
    assert (row.layer, row.start, row.digests) == (4, 6, expected(k, v))
    assert engine.Store.put.__name__ == "put"
    assert not hasattr(engine.Store.put, "__wrapped__")


def test_an_expression_that_fails_says_so(
    tmp_path: Path, engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"method": "own_engine:Store.put", "k": "keys", "v": "pair[1]"}
    monkeypatch.setenv(kv_methods.KV_VARIABLE, json.dumps([asked]))
    probe = Probe(tmp_path)
    try:
        for _ in range(2):
            engine.Store().put(3, kv(1))
    finally:
        probe.stop()
    (process,) = read(tmp_path)
    assert process.problems == [
        "--kv own_engine:Store.put takes nothing: NameError: name 'keys' is not defined"
    ]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    dinfer.tap("hidden", torch.zeros(2, 3))
    probe.stop()
    (process,) = read(tmp_path)
    path = tmp_path / f"{process.name}.kv"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:70])  # being written
    assert len(read_rows(tmp_path, process)) == 1
    path.write_bytes(whole + b"x" * 80)
    with pytest.raises(RecordsError, match=f"damaged at byte {len(whole)}") as caught:
        read_rows(tmp_path, process)
    assert str(path) in str(caught.value)


def test_sketches_say_how_far_rows_are_apart() -> None:
    one = torch.randn(3, 4096, generator=torch.manual_seed(1))
    other = one + 0.01 * torch.randn(3, 4096, generator=torch.manual_seed(2))
    apart = (row_sketches(one) - row_sketches(other)).square().mean(-1).sqrt()
    assert torch.all((apart / (one - other).norm(dim=-1)).log().abs() < 0.5)
    assert torch.equal(row_sketches(one), row_sketches(one.clone()))


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Taken]:
    """Watches this process for a comparison."""
    monkeypatch.setenv(tensors.COMPARE_VARIABLE, "1")
    probe = Probe(tmp_path)

    def found() -> list[RowsTaken]:
        (process,) = read(tmp_path)
        assert process.problems == []
        probe._tensors.flush()
        return read_rows(tmp_path, process)

    yield found
    probe.stop()


def test_a_model_for_a_comparison(compared: Taken) -> None:
    model, cache = Qwen3Model(CONFIG), dynamic()
    model.config._name_or_path = "/models/own"
    for start in (0, 3):
        with torch.no_grad():
            left = model(torch.arange(start, start + 3)[None], past_key_values=cache).last_hidden_state
    assert left.shape == (1, 3, 8)
    rows = compared()
    assert [(row.name, row.layer, row.start) for row in rows][:4] == [
        ("ids of /models/own", None, 0), ("kv", 0, 0), ("hidden", 0, 0), ("output", 0, 0),
    ]  # fmt: skip
    ids = [row for row in rows if row.name.startswith("ids")]
    assert [row.digests for row in ids] == [(((0,), (1,), (2,)),), (((3,), (4,), (5,)),)]
    kept = {(row.name, row.layer, row.start): row for row in rows}
    assert kept["output", 0, 3].digests == kept["hidden", 1, 3].digests
    assert {row.cache for row in rows} == {1}
    assert {len(row.sketches) for row in rows if row.name == "kv"} == {3 * 2 * 16}
    assert {len(row.sketches) for row in rows if row.name in ("hidden", "output")} == {3 * 16}


@pytest.mark.parametrize("is_off", [True, False])
def test_ids_are_left_alone_where_nothing_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_off: bool
) -> None:
    """What is done while a graph is captured becomes part of it."""
    probe, ids = Probe(tmp_path), torch.arange(3)[None]
    mask = {"attention_mask": torch.ones(1, 3)}
    try:
        watch = probe._tensors
        seen = TransformersModels(watch, probe._imports)
        assert seen._placed_ids(torch, ids, (), mask).shape == (1, 3, 2)
        watch.is_off = is_off
        monkeypatch.setattr(models, "is_captured", lambda *_: not is_off)
        assert seen._placed_ids(torch, ids, (), mask) is ids
    finally:
        probe.stop()


def test_rows_say_which_line_added_them(taken: Taken) -> None:
    """Of few rows, which are digested later, and of many, and of what is tapped."""
    cache, few, many = dynamic(), kv(2), kv(4096)
    before = sys._getframe().f_lineno
    cache.update(*few, 0)
    cache.update(*many, 0)
    dinfer.tap("kv", layer=1, k=few[0], v=few[1])
    name = "test_rows_say_which_line_added_them"
    found = [(one.file, one.line, one.function) for one in taken()]
    assert found == [(__file__, before + count, name) for count in (1, 2, 3)]


class Delivery:
    """An event on a device: it has come once it is told so."""

    def __init__(self) -> None:
        self.has_come = False

    def query(self) -> bool:
        return self.has_come


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RowsWriter]:
    """Rows of one digest that a device has still to deliver."""
    written = Records(tmp_path, "none")
    made = RowsWriter(
        tmp_path / f"{written.name}.kv", NumberedNames(written.lines, "tap", tensors._tap_fields)
    )
    about = made._about("kv", torch.ones(1), 0, 0, 0, 0, 0, 0)
    made._waiting.append((Delivery(), torch.ones(1, 1, 1, dtype=torch.int64), about))
    yield made
    made.close()


def test_a_device_that_delivers_nothing_is_not_waited_for(writer: RowsWriter, tmp_path: Path) -> None:
    assert writer.flush(0.01) == 1
    (process,) = read(tmp_path)
    assert read_rows(tmp_path, process) == []
    writer._waiting[0][0].has_come = True
    assert writer.flush() == 0
    assert len(read_rows(tmp_path, process)) == 1


def test_rows_ask_nothing_while_any_thread_captures_a_graph(writer: RowsWriter) -> None:
    def ask() -> None:
        raise AssertionError("asking would spoil the graph")

    writer._waiting[0][0].query = ask
    captures.beginning(lambda: None)()
    try:
        assert writer.flush() == 1
    finally:
        captures.ending(lambda: None)()
    with pytest.raises(AssertionError, match="spoil"):
        writer.flush()


def test_a_process_that_ends_at_once_has_written_its_rows(tmp_path: Path) -> None:
    """As forked workers always end."""
    probe = Probe(tmp_path)
    child = os.fork()
    if child == 0:
        dynamic().update(*kv(1), 0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    probe.stop()
    process = next(one for one in read(tmp_path) if one.pid == child)
    assert [(row.layer, row.start) for row in read_rows(tmp_path, process)] == [(0, 0)]


def test_nothing_is_left_open_once_it_stops(tmp_path: Path) -> None:
    def opened() -> set[str]:
        return {os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if one.isdecimal()
                and os.path.exists(f"/proc/self/fd/{one}")}  # fmt: skip

    before = opened()
    probe = Probe(tmp_path)
    dinfer.tap("hidden", torch.zeros(2, 3))
    assert {Path(one).suffix for one in opened() - before} == {".jsonl", ".ops", ".kv", ".dump"}
    child = os.fork()
    if child == 0:
        mine = opened() - before
        dinfer.tap("hidden", torch.zeros(2, 3))
        names = {Path(one).suffix: Path(one).name for one in opened() - before}
        is_right = {Path(one).suffix for one in mine} == {".dump"} and len(opened() - before) == 4
        os._exit(0 if is_right and all(f"-{os.getpid()}." in name for name in names.values()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    probe.stop()
    assert opened() - before == set()


def test_rows_are_read_on_from_where_reading_stopped(taken: Taken, tmp_path: Path) -> None:
    """A run of hours has many: whoever follows it reads each once."""
    reader: RowsReader | None = None
    cache, found = dynamic(), list[RowsTaken]()
    for _ in range(3):
        cache.update(*kv(2), layer_idx=0)
        taken()  # they are written by now
        (process,) = read(tmp_path)
        reader = reader or RowsReader(tmp_path, process.name)
        new = [*reader.more(process)]
        assert len(new) == 1
        assert [*reader.more(process)] == []
        found += new
    assert found == taken()
    assert reader is not None
    again, parts = RowsReader(tmp_path, process.name), list[RowsTaken]()
    while some := [*again.more(process, 1)]:
        assert len(some) == 1
        parts += some
    assert parts == found


def test_rows_whose_name_is_not_known_yet_wait(tmp_path: Path, taken: Taken) -> None:
    dynamic().update(*kv(2), layer_idx=0)
    taken()  # they are written by now
    (process,) = read(tmp_path)
    names, process.taps = process.taps, {}
    reader = RowsReader(tmp_path, process.name)
    assert [*reader.more(process, waits=True)] == []
    process.taps = names
    assert [*reader.more(process, waits=True)] == taken()


def test_a_row_that_is_being_written_is_read_once_it_is_there(tmp_path: Path, taken: Taken) -> None:
    dynamic().update(*kv(2), layer_idx=0)
    taken()  # they are written by now
    (process,) = read(tmp_path)
    path = tmp_path / f"{process.name}.kv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    reader = RowsReader(tmp_path, process.name)
    assert [*reader.more(process)] == []
    path.write_bytes(whole)
    assert [*reader.more(process)] == taken()


def test_looks_read_rows_as_they_come(tmp_path: Path) -> None:
    """So that little is left to read at the end: what was read is not read again."""
    probe = Probe(tmp_path)
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        cache, watched = dynamic(), Watched([tmp_path])
        cache.update(*kv(2), layer_idx=0)
        probe._tensors.flush()
        watched.look(recent=True)
        (path,) = tmp_path.glob("*.kv")
        path.write_bytes(bytes(path.stat().st_size))  # as if it were damaged now
        (found,) = watched.look(recent=True)
        first = watched.kv(found)
        assert watched.unreadable == []
        assert [len(one.rows) for one in first.layers[0].values()] == [2]
        cache.update(*kv(3), layer_idx=0)
        probe._tensors.flush()
        (found,) = watched.look(recent=True)
        assert [len(one.rows) for one in watched.kv(found).layers[0].values()] == [5]
        assert [len(one.rows) for one in first.layers[0].values()] == [2]
    finally:
        torch.distributed.destroy_process_group()
        probe.stop()


def test_a_panel_reads_no_more_than_a_look_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that it has seen already, it makes nothing anew; and who reads all lets looks read meanwhile."""
    monkeypatch.setattr(folders, "ROWS_A_LOOK", 1)
    probe = Probe(tmp_path)
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        cache, watched = dynamic(), Watched([tmp_path])
        for _ in range(6):
            cache.update(*kv(2), layer_idx=0)
        probe._tensors.flush()
        (found,) = watched.look(recent=True)
        first = watched.kv_so_far(found)
        assert ([len(one.rows) for one in first.layers[0].values()], first.is_behind) == ([4], True)
        is_locked: list[bool] = []
        pause = SimpleNamespace(sleep=lambda _: is_locked.append(watched._reading_rows.locked()))
        monkeypatch.setattr(folders, "time", pause)
        assert [len(one.rows) for one in watched.kv(found).layers[0].values()] == [12]
        assert is_locked == [False] * 4
        last = watched.kv_so_far(found)
        assert ([len(one.rows) for one in last.layers[0].values()], last.is_behind) == ([12], False)
        assert watched.kv_so_far(found) is last
        assert last.diff() == last.diff() == []
    finally:
        torch.distributed.destroy_process_group()
        probe.stop()
