"""Dumps of PyTorch's flight recorder: read without trust, and judged; torch's own analyzer is run beside."""

import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from dinfer.trace.export import TraceError
from dinfer.trace.flight import groups_of, is_dump, read_dumps
from dinfer.verdict.completed import findings_of_events
from dinfer.verdict.recorded import explain_events
from dinfer.verdict.verdict import Verdict

DUMPS = Path(__file__).parent / "flight"


def written(name: str, folder: Path, *, pickled: bool) -> list[Path]:
    """The dumps of that name, as torch writes them: a file for each rank."""
    paths = []
    for rank, dump in json.loads((DUMPS / f"{name}.json").read_text()).items():
        for entry in dump["entries"]:
            entry["process_group"] = tuple(entry["process_group"])
        path = folder / f"dump_{rank}"
        path.write_bytes(pickle.dumps(dump, 2) if pickled else json.dumps(dump).encode())
        paths.append(path)
    return paths


def judged(paths: list[Path]) -> Verdict:
    trace = read_dumps(paths)
    return explain_events(trace.events, groups=groups_of(trace))


def blamed_by_torch(folder: Path, caplog: pytest.LogCaptureFixture) -> set[int] | None:
    """The ranks that torch's analyzer misses in some collective; None where it gives up."""
    fr_trace = pytest.importorskip("torch.distributed.flight_recorder.fr_trace")
    with caplog.at_level(logging.INFO, "Flight Recorder"):
        try:
            fr_trace.main([str(folder), "-p", "dump_"])
        except AssertionError:
            return None
    found = re.findall(r"missing ranks: \{([\d, ]+)\}", caplog.text)
    return {int(rank) for ranks in found for rank in ranks.split(",")}


@pytest.mark.parametrize(
    ("name", "kind", "ranks", "theirs"),
    [
        ("healthy", "done", (), "gives up"),
        ("never_sent", "never sent", (1,), "gives up"),
        ("gather_against_recv", "cycle", (0, 1), "gives up"),
        ("gpu_error", "stuck", (12, 14), "names victims"),
        ("lock_gil", "stuck", (9, 14), "is right"),
    ],
)
def test_dumps_with_known_faults(
    name: str,
    kind: str,
    ranks: tuple[int, ...],
    theirs: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`theirs`: what torch's analyzer makes of the same dumps. Messages that are not batched, it cannot place."""
    paths = written(name, tmp_path, pickled=True)
    assert all(map(is_dump, paths))
    verdict = judged(paths)
    assert (verdict.kind, verdict.ranks) == (kind, ranks), verdict
    blamed = blamed_by_torch(tmp_path, caplog)
    said = "gives up" if blamed is None else "is right" if blamed == set(ranks) else "names victims"
    assert said == theirs, blamed


@pytest.mark.parametrize("name", ["healthy", "never_sent", "gather_against_recv", "gpu_error", "lock_gil"])
def test_dumps_as_json_are_judged_as_pickled_ones_are(name: str, tmp_path: Path) -> None:
    for form in ("json", "pickled"):
        (tmp_path / form).mkdir()
    plain, pickled = (
        judged(written(name, tmp_path / form, pickled=form == "pickled")) for form in ("json", "pickled")
    )
    assert (plain.kind, plain.ranks, plain.sentence) == (pickled.kind, pickled.ranks, pickled.sentence)


def test_the_message_that_went_astray_before_the_hang_is_found(tmp_path: Path) -> None:
    trace = read_dumps(written("never_sent", tmp_path, pickled=False))
    (one,) = findings_of_events(trace.events, groups_of(trace))
    assert (one.kind, one.ranks) == ("other shape", (1, 0))
    assert "[1, 128, 256]" in one.text
    assert "[128, 2, 2, 64]" in one.text
    healthy = read_dumps(written("healthy", tmp_path, pickled=False))
    assert findings_of_events(healthy.events, groups_of(healthy)) == []


def test_groups_have_the_names_that_people_gave_them(tmp_path: Path) -> None:
    trace = read_dumps(written("lock_gil", tmp_path, pickled=True))
    assert groups_of(trace)["TENSOR_MODEL_PARALLEL_GROUP 37"].ranks == (8, 9, 10, 11)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(_Evil()),
        pickle.dumps({"entries": [_Evil()]}),
        pickle.dumps({"entries": 3}),
        b"\x80\x04",
        b'{"entries": [',
        b'{"entries": [{}], "pg_config": {}}',
        b'{"entries": [], "pg_config": []}',
    ],
)
def test_what_is_no_dump_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "dump_0"
    path.write_bytes(data)
    with pytest.raises(TraceError, match="dump_0"):
        read_dumps([path])


def test_two_dumps_of_one_rank_are_refused(tmp_path: Path) -> None:
    first, second = written("healthy", tmp_path, pickled=False)
    other = tmp_path / "other_0"
    other.write_bytes(second.read_bytes())
    with pytest.raises(TraceError, match="one rank"):
        read_dumps([first, other])
