"""`dinfer explain` as a page of torch's debug server: the server is real, the ranks are records and dumps."""

import html
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.watching.test_given import DUMPS, hang

frontend = pytest.importorskip("torch.distributed.debug._frontend")
pytest.importorskip("jinja2")


@contextmanager
def served(folder: Path | None) -> Iterator[str]:
    """The address of a debug server with this page."""
    from dinfer.watching.debug_server import ExplainHandler

    server = frontend.FrontendServer(0, [ExplainHandler(folder)])
    try:
        yield f"http://localhost:{server._server.server_port}"
    finally:
        server._server.shutdown()
        server._server.server_close()
        server.join()


def page(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return html.unescape(answer.read().decode())


def test_the_page_says_why_the_ranks_of_a_watched_job_do_not_move(tmp_path: Path) -> None:
    hang(tmp_path)
    with served(tmp_path) as address:
        told = page(f"{address}/dinfer")
        assert "dinfer explain" in told
        assert "deadlock: rank 0 is in `all_reduce`" in told
        found = json.loads(page(f"{address}/dinfer_json").partition("<pre>")[2].partition("</pre>")[0])
    assert (found["verdict"]["kind"], found["verdict"]["ranks"]) == ("cycle", [0, 1])


def test_without_records_the_flight_recorders_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinfer.watching import debug_server

    dumps = json.loads((DUMPS / "never_sent.json").read_text())
    asked = []

    def fetch(endpoint: str, *, timeout: float) -> tuple[list[str], list[object]]:
        asked.append((endpoint, timeout))
        if endpoint == "dump_nccl_trace_json":
            return [], [frontend.Response(200, '{"entries": []}'), frontend.Response(503, "gone")]
        return [], [frontend.Response(200, json.dumps(dumps[str(rank)])) for rank in range(len(dumps))]

    monkeypatch.setattr(debug_server, "fetch_all", fetch)
    monkeypatch.delenv("DINFER_WATCH", raising=False)
    with served(None) as address:
        assert "missing send: rank 1" in page(f"{address}/dinfer")
    assert [endpoint for endpoint, _ in asked] == ["dump_nccl_trace_json", "fr_trace_json"]


def test_where_there_is_nothing_to_explain_the_page_says_so(tmp_path: Path) -> None:
    from dinfer.watching.debug_server import ExplainHandler

    assert ExplainHandler(tmp_path).dump() == "no rank has recorded an op yet"
    assert "No such file" in ExplainHandler(tmp_path / "none").dump()
    assert ExplainHandler(tmp_path).dump_filename() == "dinfer"
