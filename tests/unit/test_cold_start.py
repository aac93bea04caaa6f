"""What is imported when: `%load_ext dinfer` and a session without a model bring no more than they need."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sympy", "plotly", "pandas", "ipywidgets")
LOAD_EXT = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "dinfer")
shell.run_line_magic("dinfer", "help")
"""


def cold(code: str) -> tuple[str, set[str]]:
    """What a new process prints for this code, and which heavy modules it then has."""
    ask = f"\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + ask], check=True, capture_output=True, text=True)
    *said, heavy = done.stdout.splitlines()
    return "\n".join(said), set(heavy.split())


@pytest.mark.parametrize("code", ["import dinfer", LOAD_EXT, "import dinfer.cluster.engines"])
def test_nothing_heavy_is_imported(code: str) -> None:
    assert cold(code)[1] == set()


def test_a_session_leaves_transformers_to_its_engines() -> None:
    assert cold("import dinfer.session.session")[1] == {"torch"}


def test_the_first_session_says_why_it_takes_long() -> None:
    said, _ = cold(
        'import dinfer\nwith dinfer.connect("threads", n=1): dinfer.connect("threads", n=1).close()'
    )
    first, *others = said.splitlines()
    assert first == "dinfer: importing PyTorch, which takes some seconds in a new kernel"
    assert [line.partition(" ")[0] for line in others] == ["1", "1"]  # 1 rank as a thread …
