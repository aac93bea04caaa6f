"""`dinfer dap` as a process: on standard input and output, and at a port."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.dap import Editor, connected
from tests.support.runs import free_ports

MODEL: dict[str, Any] = {"layers": 3}


def dap(*flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dinfer", "dap", *flags]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = dap()
    yield started
    started.kill()
    started.wait()
    for stream in streams(started):
        stream.close()


def streams(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    assert process.stdin
    assert process.stdout
    assert process.stderr
    return process.stdin, process.stdout, process.stderr


def launch(model: Path) -> dict[str, Any]:
    ids = list(range(3, 12))
    return {"model": str(model), "promptIds": ids, "where": "threads", "chunk_size": 4, "max_new_tokens": 2}


def test_an_editor_starts_it_and_speaks_by_pipes(process: subprocess.Popen[bytes], model: Path) -> None:
    writer, reader, _ = streams(process)
    editor = Editor(reader, writer)  # type: ignore[arg-type]  # a pipe is one
    assert editor.start(**launch(model))["reason"] == "entry"
    assert "3 ranks as threads" in editor.output()  # printed, but not onto the wire
    assert editor.go("continue")["description"] == "Prefill is done"
    editor.ask("disconnect", terminateDebuggee=True)
    editor.wait_until_ended()
    assert process.wait() == 0


def test_relative_paths_are_of_the_folder_that_the_editor_names(
    process: subprocess.Popen[bytes], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").symlink_to(model)
    writer, reader, _ = streams(process)
    editor = Editor(reader, writer)  # type: ignore[arg-type]
    editor.ask("initialize", adapterID="dinfer")
    given = {**launch(model), "model": "checkpoint"}
    refusal = editor.refused("launch", **given, cwd=str(tmp_path / "none"))
    assert "none' cannot be used: No such file or directory" in refusal
    assert editor.start(**given, cwd=str(tmp_path))["reason"] == "entry"
    editor.say('save("saved")')
    assert (tmp_path / "saved").is_dir()


def test_sigterm_ends_it_as_vs_code_does(process: subprocess.Popen[bytes], model: Path) -> None:
    writer, reader, _ = streams(process)
    editor = Editor(reader, writer)  # type: ignore[arg-type]
    editor.start(**launch(model))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    editor.wait_until_ended()


def test_a_port_serves_one_client_after_another(model: Path) -> None:
    port = free_ports(1)
    process = dap("--port", str(port))
    try:
        for _ in range(2):
            client = connected(port)
            with client, client.makefile("rb") as reader, client.makefile("wb") as writer:
                editor = Editor(reader, writer)
                assert editor.start(**launch(model))["reason"] == "entry"
                editor.ask("disconnect")
                editor.wait_until_ended()
        taken = dap("--port", str(port))
        said = taken.communicate()[1].decode()
        assert (taken.returncode, f"port {port} cannot be used" in said) == (2, True)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1].decode()
        assert f'"debugServer": {port}' in said
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()


def test_the_command_line_is_there_before_torch_is() -> None:
    code = "import sys, dinfer.cli, dinfer.cli.dap; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
