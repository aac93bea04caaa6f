"""The part of `env/demo` after .venv exists: three engines, and JupyterLab on the walkthrough or its execution.

All files, including copies of the notebooks, are in a new folder, so that the user's clusters and settings and the
notebooks here stay unchanged. Unless killed by SIGKILL, it ends all processes that it has started; the folder stays.
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
"""an environment variable that all processes of one demo inherit, by which `marked` finds them"""
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
    """A process did not start; the message names it and its log."""


def main() -> int:
    """Run the demo. Returns the exit status: 130 after Ctrl-C, as in shells."""
    arguments = options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)  # SIGINT too: in a shell script, `&` makes a process ignore it
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
    """The parsed command line."""
    parser = argparse.ArgumentParser(
        prog="env/demo", description="The walkthrough, on three ranks of this machine."
    )
    parser.add_argument("--headless", action="store_true", help="run the walkthrough and write its report")
    parser.add_argument("--no-browser", action="store_true", help="only print the URL")
    parser.add_argument(
        "--chinese", dest="notebook", action="store_const", const="zh/00-walkthrough.ipynb",
        default="00-walkthrough.ipynb", help="the walkthrough in Chinese",
    )  # fmt: skip
    return parser.parse_args()


def interrupt(*_: object) -> None:
    """Handle SIGTERM and SIGHUP like Ctrl-C."""
    raise KeyboardInterrupt


@contextmanager
def demo(home: Path) -> Iterator[dict[str, str]]:
    """Start three engines in that folder; yields the demo's environment. Ends all of the demo's processes."""
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
            signal.signal(number, signal.SIG_IGN)  # ending takes seconds and must not be interrupted
        end(mark)


def started(home: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a process that logs to a file, in a session of its own, so that Ctrl-C reaches this process alone."""
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
    """Wait until the condition holds. Raises DemoError if the process ends first or after START_S seconds."""
    deadline = time.monotonic() + START_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise DemoError(f"{name} did not start; its log is {home / name}.log.")
        time.sleep(0.1)


def lab(home: Path, environment: dict[str, str], arguments: Any) -> int:
    """Run JupyterLab on the walkthrough until it ends. Returns its exit status."""
    token = secrets.token_hex(16)
    server = started(
        home, "jupyterlab", "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'notebooks'}",
        "--LabApp.extension_manager=readonly",
    )  # fmt: skip
    info = home / "runtime" / f"jpserver-{server.pid}.json"
    wait_until(lambda: answers(info, token), server, "jupyterlab", home)
    url = f"{address(info)}lab/tree/{arguments.notebook}?token={token}"
    print(f"\nThe walkthrough is open at\n\n    {url}\n\nNotebooks and reports are in {home / 'notebooks'}.")
    print("Ctrl-C ends it, and the engines.", flush=True)
    if not arguments.no_browser and has_browser(environment):
        webbrowser.open(url)
    return server.wait()


def address(info: Path) -> str:
    """The server's URL from the file that it writes; "" before that is complete."""
    with suppress(OSError, ValueError):
        url: str = json.loads(info.read_text(encoding="utf-8"))["url"]
        return url
    return ""


def answers(info: Path, token: str) -> bool:
    """Whether the server answers requests."""
    url = address(info)
    if not url:
        return False
    with suppress(OSError), urllib.request.urlopen(f"{url}api/status?token={token}", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def has_browser(environment: dict[str, str]) -> bool:
    """Whether there is a screen for a browser. (A browser in this terminal would take over the terminal.)"""
    return sys.platform == "darwin" or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def headless(home: Path, name: str) -> int:
    """Execute the copy of the walkthrough and save it with its outputs."""
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
    """Print a notebook's heading when its execution reaches it."""
    line = cell.source.partition("\n")[0]
    if cell.cell_type == "markdown" and line.startswith("#"):
        print(line.lstrip("# "), flush=True)


def end(mark: str) -> None:
    """End the marked processes: first by SIGTERM, so that servers end their kernels and clusters their engines."""
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
    """The running processes with this mark, except this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_other = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if is_other and process.environ().get(MARK) == mark:
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
