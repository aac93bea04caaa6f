"""Traces as files: there and back; what is no trace says so."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinfer.trace.events import Event
from dinfer.trace.export import FORMAT, TraceError, write_whole
from dinfer.trace.read import read_jsonl
from dinfer.trace.trace import Trace
from tests.support.made_events import events, plausible

TRACE = Trace.merge(
    [[Event(0, "main", "layer", 1, 2, 2, 3, chunk=0, layer=1)] * 3], model="demo", prompt="你好"
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3),
)
ABOUT = st.dictionaries(st.sampled_from(["model", "note", "events", "format", "about"]), PLAIN)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(events(ranks=3), max_size=5), ABOUT)
def test_write_and_read(tmp_path: Path, made: list[Event], about: dict[str, object]) -> None:
    trace = Trace(tuple(plausible(made)), about)
    trace.export("jsonl", tmp_path / "trace.jsonl")
    assert read_jsonl(tmp_path / "trace.jsonl") == trace


def test_text_is_written_as_it_reads(tmp_path: Path) -> None:
    TRACE.export("jsonl", tmp_path / "trace.jsonl")
    lines = (tmp_path / "trace.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == (
        '{"format": "dinfer trace 1", "events": 3, "about": {"model": "demo", "prompt": "你好"}}'
    )
    assert json.loads(lines[1])["layer"] == 1
    assert len(lines) == 4


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("what was there before")
    TRACE.export("jsonl", str(path))
    assert read_jsonl(str(path)) == TRACE
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_stays_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    TRACE.export("jsonl", path)
    with pytest.raises(TypeError):
        Trace((), {"model": object()}).export("jsonl", path)
    assert read_jsonl(path) == TRACE


def test_another_programs_trace_needs_only_the_format(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    event = {"rank": 1, "lane": "stream 7", "kind": "all_gather", "ready": 1, "start": 1, "met": 2, "end": 3}
    path.write_text(json.dumps({"format": FORMAT}) + "\n" + json.dumps(event) + "\n")
    assert read_jsonl(path) == Trace((Event(1, "stream 7", "all_gather", 1, 1, 2, 3),))


def test_a_trace_that_was_cut_short_after_a_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    TRACE.export("jsonl", path)
    path.write_text(
        "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8"
    )
    with pytest.raises(TraceError) as caught:
        read_jsonl(path)
    assert str(caught.value) == f"{str(path)!r} holds 2 of 3 events: it was cut short."


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_trace_cut_short_anywhere(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "trace.jsonl"
    TRACE.export("jsonl", path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])  # all but the last line's end
    with pytest.raises(TraceError, match=r"trace\.jsonl"):
        read_jsonl(path)


FOREIGN = {
    "empty": b"",
    "text": b"hello\n",
    "binary": b"\x80\x02}q\x00(\xff\xfe",
    "a JSON list": b"[1, 2]\n",
    "a JSON number": b"1\n",
    "another JSON lines file": b'{"a": 1}\n{"a": 2}\n',
    "a version to come": b'{"format": "dinfer trace 2"}\n',
    "no event": b'{"format": "dinfer trace 1"}\n{"a": 1}\n',
    "a list for an event": b'{"format": "dinfer trace 1"}\n[1]\n',
    "half an event": b'{"format": "dinfer trace 1"}\n{"rank": 0}\n',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_trace_says_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(TraceError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{str(path)!r} is not a trace")
    if name == "a version to come":
        assert str(caught.value).endswith(": its first line does not say 'dinfer trace 1'.")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("header", "event", "words"),
    [
        ({}, {"layer": 10**6}, r"line 2: layer is 1000000; it must be from 0 to 99,999"),
        ({}, {"rank": -1}, r"line 2: rank is -1; it must be from 0"),
        ({}, {"layer": "1"}, r"line 2: Expected `int \| null`, got `str` - at `\$.layer`"),
        ({}, {"end": None}, r"line 2: Expected `int`, got `null` - at `\$.end`"),
        ({}, {"end": float("nan")}, r"line 2: JSON is malformed"),
        ({}, {"start": -5, "ready": -5}, r"line 2: its times are .*they must be nanoseconds, at least 0"),
        ({}, {"start": 9}, r"line 2: its times are .*it must be ready, start and end in this order"),
        ({}, {"bytes": 10**40}, r"line 2: .*bytes"),
        (
            {"layers": 10**9, "world_size": 3},
            {},
            r"line 1: it would have 1,000,000,000 layers, 1 chunks, 3 ranks",
        ),
        (
            {"tokens": 10**12, "chunk_size": 1},
            {},
            r"line 1: it would have 2 layers, 1,000,000,000,000 chunks",
        ),
        ({"chunks": [8, "8"]}, {}, r"line 1: chunks is \[8, '8'\]; it must be a list of whole numbers"),
        ({"chunks": [1] * 99, "layers": 10**9}, {}, r"line 1: it would have 1,000,000,000 layers, 99 chunks"),
        ({"predicted_s": "soon"}, {}, r"line 1: predicted_s is 'soon'; it must be a number of seconds"),
        ({"layers": "many"}, {}, r"line 1: layers is 'many'; it must be a whole number"),
        ({"world_size": True}, {}, r"line 1: world_size is True; it must be a whole number"),
    ],
)
def test_a_field_that_no_run_has_is_named_with_its_line(
    tmp_path: Path, header: dict[str, Any], event: dict[str, Any], words: str
) -> None:
    TRACE.export("jsonl", path := tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0]["about"] |= header
    lines[1] |= event
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    with pytest.raises(TraceError, match=words):
        read_jsonl(path)


def test_what_is_nested_too_deep_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"format": "dinfer trace 1", "about": ' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(TraceError, match=r"is not a trace, or a damaged one: line 1"):
        read_jsonl(path)


def test_a_trace_as_an_editor_saves_it(tmp_path: Path) -> None:
    TRACE.export("jsonl", path := tmp_path / "trace.jsonl")
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-8-sig"))
    assert read_jsonl(path) == TRACE


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """By its replacement with a file, root would take /dev/null from the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    try:
        write_whole(pipe, ["a", "b"])
        assert os.read(reader, 100) == b"ab"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]
