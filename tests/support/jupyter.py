"""A real JupyterLab, or Notebook 7, on loopback and a notebook in it, as a browser sees them. Not a test."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from nbformat import v4
from playwright.sync_api import Locator, Page

from tests.support.runs import DEADLINE_S, is_alive, wait_for

ROOT = Path(__file__).parents[2]
APPS = {
    "jupyterlab": ("LabApp", "lab/workspaces/{name}/tree/{name}.ipynb"),
    "notebook": ("JupyterNotebookApp", "notebooks/{name}.ipynb"),
}
"""what can be started: the class that its settings are of, and where it shows a notebook"""
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}


class Lab:
    """A server of its own, with its folders in `home`; ends with everything it has started. `app` is one of APPS; it
    lacks the `disabled` extensions."""

    def __init__(self, home: Path, app: str = "jupyterlab", disabled: Sequence[str] = ()) -> None:
        self.home, self.token = home, secrets.token_hex(16)
        self._shared = ""
        """the id of the kernel that notebooks share"""
        self.app, (settings_of, self._place) = app, APPS[app]
        settings = home / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
        without = home / "config" / "labconfig"
        without.mkdir(parents=True)
        page = {"disabledExtensions": dict.fromkeys(disabled, True)}
        (without / "page_config.json").write_text(json.dumps(page))
        folders = {
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
            "IPYTHONDIR": "ipython",
        }
        environment = {**os.environ, **{name: str(home / folder) for name, folder in folders.items()}}
        environment["PYTHONPATH"] = str(ROOT)
        (home / "notebooks").mkdir()
        with (home / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", app, "--no-browser", "--allow-root"),
                    *("--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"),
                    f"--IdentityProvider.token={self.token}",
                    f"--ServerApp.root_dir={home / 'notebooks'}",
                    f"--{settings_of}.expose_app_in_browser=True",
                    "--LabApp.extension_manager=readonly",
                ],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def url(self) -> str:
        """Where the server listens, once it does."""
        said = self.home / "runtime" / f"jpserver-{self.process.pid}.json"

        def complete() -> bool:
            return said.exists() and said.read_text().rstrip().endswith("}")

        wait_for(lambda: self.process.poll() is not None or complete(), f"{self.app} listens")
        assert self.process.poll() is None, (self.home / "server.log").read_text()
        port = json.loads(said.read_text())["port"]
        wait_for(lambda: _listens(port), f"{self.app} answers")  # the file is there a little before that
        return f"http://127.0.0.1:{port}"

    def address(self, name: str) -> str:
        """Where a notebook of its folder is shown."""
        return f"{self.url()}/{self._place.format(name=name)}?token={self.token}"

    def share_kernel(self, name: str) -> None:
        """Have the notebook of that name, which nobody has opened yet, use one kernel with all for which this is
        called: one that has imported what takes seconds to import."""
        if not self._shared:
            self._shared = self._posted("kernels", {"name": "python3"})["id"]
        kernel = {"id": self._shared}
        self._posted(
            "sessions", {"path": f"{name}.ipynb", "name": name, "type": "notebook", "kernel": kernel}
        )

    def leave_kernel(self) -> None:
        """Whatever state that kernel is in: the next notebooks share another."""
        self._shared = ""

    def _posted(self, what: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url()}/api/{what}", json.dumps(body).encode())
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        """End the server, its kernels and what those have started."""
        server = psutil.Process(self.process.pid)
        processes = [server, *server.children(recursive=True)]
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)  # it ends its kernels before itself
        for process in filter(is_alive, processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@dataclass
class Notebook:
    """A notebook that is open in a page."""

    page: Page

    def run(self, cell: int) -> str:
        """Run a cell and wait for its end; what it printed. Fails the test with its error."""
        outputs = self.page.evaluate(
            """async (cell) => {
                const app = window.jupyterapp, notebook = app.shell.currentWidget.content;
                notebook.activeCellIndex = cell;
                await app.commands.execute("notebook:run-cell");
                return notebook.widgets[cell].model.outputs.toJSON();
            }""",
            cell,
        )
        errors = ["\n".join(output["traceback"]) for output in outputs if output["output_type"] == "error"]
        assert not errors, errors[0]
        return "".join("".join(output.get("text", "")) for output in outputs)

    def start(self, cell: int) -> None:
        """Have a cell run; returns at once."""
        self.page.evaluate(
            """(cell) => {
                const app = window.jupyterapp;
                app.shell.currentWidget.content.activeCellIndex = cell;
                app.commands.execute("notebook:run-cell");
            }""",
            cell,
        )

    def clean_up(self) -> None:
        """Leave nothing in the kernel, which other notebooks use after this one."""
        self.page.evaluate(
            """(code) => {
                const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                return kernel.requestExecute({ code }).done.then(() => {});
            }""",
            "import ipywidgets\nipywidgets.Widget.close_all()\n%reset -f",
        )

    def use_theme(self, theme: str) -> None:
        """Switch JupyterLab to `light` or `dark`."""
        name = f"JupyterLab {theme.title()}"
        self.page.evaluate(
            "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", name
        )
        light = "true" if theme == "light" else "false"
        self.page.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
        # Lab's splash fades for 0.2 s: another change meanwhile would have it removed twice, which is an error.
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")

    def output(self, cell: int) -> Locator:
        """What the page shows under a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-Cell-outputWrapper")

    def show(self, cell: int) -> None:
        """Scroll so that a cell's output is seen."""
        self.output(cell).scroll_into_view_if_needed()


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of these code cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    code = [v4.new_code_cell(cell, id=f"cell-{n}") for n, cell in enumerate(cells)]  # type: ignore[no-untyped-call]
    made = v4.new_notebook(cells=code, metadata={"kernelspec": kernel})  # type: ignore[no-untyped-call]
    path.write_text(json.dumps(made), encoding="utf-8")


def open_notebook(page: Page, lab: Lab, name: str, cells: list[str], *, fresh: bool = True) -> Notebook:
    """Open a new notebook of these cells; `fresh`: with a kernel of its own."""
    write_notebook(lab.home / "notebooks" / f"{name}.ipynb", cells)
    if not fresh:
        lab.share_kernel(name)
    return open_file(page, lab, name)


def open_file(page: Page, lab: Lab, name: str) -> Notebook:
    """Open a notebook of the lab's folder, with the side bar shut; returns once its kernel is idle."""
    page.goto(lab.address(name))
    page.wait_for_function(
        """() => {
            const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
            return kernel?.status === "idle";
        }"""
    )
    page.evaluate("window.jupyterapp.shell.collapseLeft()")
    return Notebook(page)
