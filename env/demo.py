"""What `env/demo` does once there is a .venv: three engines and JupyterLab on the walkthrough, or its execution.

Everything lives in a new folder, copies of the notebooks too, so that neither a user's own clusters and settings nor
the notebooks here are touched. However it ends, short of SIGKILL, all processes that it has started are ended; the
folder stays.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MARK = "DINFER_DEMO"
"""an environment variable that all processes of one demo inherit, and by which they are found"""
RANKS = 3
START_S = 120.0
END_S = 10.0
CELL_S = 300
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
FOLDERS = {
    "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
}


class DemoError(Exception):
    """Something did not start; the message says what, and where to read more."""


def main() -> int:
    """The exit status: 130 after Ctrl-C, as shells have it, when it interrupts something."""
    arguments = options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)  # SIGINT too: a shell script's `&` has it ignored
    home = Path(tempfile.mkdtemp(prefix="dinfer-demo.")).resolve()
    try:
        with demo(home) as environment:
            return (
                headless(home, arguments.notebook)
                if arguments.headless
                else lab(home, environment, arguments)
            )
    except KeyboardInterrupt:
        return 130
    except DemoError as error:
        print(f"env/demo: {error}", file=sys.stderr)
        return 1


def options() -> Any:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="env/demo", description="The walkthrough, on three ranks of this machine."
    )
    parser.add_argument("--headless", action="store_true", help="run the walkthrough and write its report")
    parser.add_argument("--no-browser", action="store_true", help="only say the URL")
    parser.add_argument(
        "--chinese", dest="notebook", action="store_const", const="zh/00-walkthrough.ipynb",
        default="00-walkthrough.ipynb", help="the walkthrough in Chinese",
    )  # fmt: skip
    return parser.parse_args()


def interrupt(*_: object) -> None:
    """Ctrl-C ends it, and so do SIGTERM and a closed terminal."""
    raise KeyboardInterrupt


@contextmanager
def demo(home: Path) -> Iterator[dict[str, str]]:
    """The environment of a demo in that folder, with three engines; at its end nothing of it runs."""
    mark = secrets.token_hex(8)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ.update({name: str(home / folder) for name, folder in FOLDERS.items()}, PATH=path)
    os.environ[MARK] = mark
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(QUIET), encoding="utf-8")
    try:
        print(f"starting {RANKS} engines …", flush=True)
        ipcluster = started(home, "ipcluster", "-m", "ipyparallel.cluster", "start", f"-n={RANKS}")
        cluster = home / "ipython" / "profile_default" / "security" / "cluster-.json"
        wait_until(cluster.exists, ipcluster, "ipcluster", home)
        yield dict(os.environ)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # ending takes seconds and must not be broken off
        end(mark)


def started(home: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of its own session, so that a terminal's Ctrl-C reaches this one alone; output goes to a file."""
    with (home / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[bytes], name: str, home: Path
) -> None:
    """Raises DemoError where the process ends before that holds, or it takes too long."""
    deadline = time.monotonic() + START_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise DemoError(f"{name} did not start; what it said is in {home / name}.log.")
        time.sleep(0.1)


def lab(home: Path, environment: dict[str, str], arguments: Any) -> int:
    """JupyterLab on the walkthrough, until it ends or is ended."""
    token = secrets.token_hex(16)
    server = started(
        home, "jupyterlab", "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'notebooks'}",
        "--LabApp.extension_manager=readonly",
    )  # fmt: skip
    said = home / "runtime" / f"jpserver-{server.pid}.json"
    wait_until(lambda: answers(said, token), server, "jupyterlab", home)
    url = f"{address(said)}lab/tree/{arguments.notebook}?token={token}"
    print(f"\nThe walkthrough is open at\n\n    {url}\n\nNotebooks and reports are in {home / 'notebooks'}.")
    print("Ctrl-C ends it, and the engines.", flush=True)
    if not arguments.no_browser and has_browser(environment):
        webbrowser.open(url)
    return server.wait()


def address(said: Path) -> str:
    """Where the server listens, by the file that it writes; "" before that is whole."""
    with suppress(OSError, ValueError):
        url: str = json.loads(said.read_text(encoding="utf-8"))["url"]
        return url
    return ""


def answers(said: Path, token: str) -> bool:
    """Whether the server does what it is there for."""
    url = address(said)
    if not url:
        return False
    with suppress(OSError), urllib.request.urlopen(f"{url}api/status?token={token}", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def has_browser(environment: dict[str, str]) -> bool:
    """Whether there is a screen to show one on: a browser in this terminal would take the terminal."""
    return sys.platform == "darwin" or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def headless(home: Path, name: str) -> int:
    """Execute the walkthrough where its copy lies, and keep what it showed."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    path = home / "notebooks" / name
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    about = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook,
        timeout=CELL_S,
        kernel_name="python3",
        resources=about,
        on_cell_start=say_heading,
        extra_arguments=["--log-level=ERROR"],
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise DemoError(f"a cell of {name} failed:\n{error}") from error
    finally:
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
    print(f"\nnotebook: {path}\nreport:   {path.with_name('report.html')}")
    return 0


def say_heading(cell: Any, **_: object) -> None:
    """What the notebook has come to."""
    line = cell.source.partition("\n")[0]
    if cell.cell_type == "markdown" and line.startswith("#"):
        print(line.lstrip("# "), flush=True)


def end(mark: str) -> None:
    """End all that bear the mark: first politely, so that servers end their kernels and clusters their engines."""
    for process in marked(mark):
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + END_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=END_S)


def marked(mark: str) -> list[psutil.Process]:
    """The processes that live and bear this mark, but for this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_other = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if is_other and process.environ().get(MARK) == mark:
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
