"""Writes the probe as a zip for a Python path, so that programs are watched in environments without dinfer.

It holds the probe as the package `dinfer_probe`, and a `sitecustomize.py`, which Python imports at its start: it starts
the probe and then runs the environment's own `sitecustomize`. At the end of the path it puts a small `dinfer` with
`label` and `tap`, for programs that say more than they must, where dinfer itself is not installed.
"""

import os
import zipfile
from pathlib import Path

_PROBE = Path(__file__).parent / "probe"

_SITECUSTOMIZE = '''\
"""Starts dinfer's probe where DINFER_WATCH names a folder, then what would have been sitecustomize without it."""

import os
import sys

_own = os.path.dirname(os.path.abspath(__file__))

if os.environ.get("DINFER_WATCH"):
    sys.path.append(os.path.join(_own, "names"))
    try:
        if sys.version_info < (3, 10):
            raise RuntimeError("its Python is %d.%d, and the probe takes 3.10 or newer" % sys.version_info[:2])
        from dinfer_probe.start import start_from_environment

        start_from_environment()
    except Exception as error:
        print(f"dinfer: process {os.getpid()} is not watched: {type(error).__name__}: {error}", file=sys.stderr)


def _run_the_next():
    import importlib.machinery
    import importlib.util

    path = [entry for entry in sys.path if os.path.abspath(entry or ".") != _own]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_run_the_next()
'''

_NAMES = '''\
"""Stands in for dinfer in watched programs where it is not installed: what they say of layers, KV and tensors."""

from dinfer_probe.labels import label
from dinfer_probe.taps import tap

__all__ = ["label", "tap"]
'''


def write_zip(path: str | Path) -> Path:
    """Write the zip; put it first on PYTHONPATH. Returns its path. Raises OSError."""
    target = Path(path)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for module in sorted(_PROBE.glob("*.py")):
            file.writestr(_entry(f"dinfer_probe/{module.name}"), module.read_bytes())
        file.writestr(_entry("sitecustomize.py"), _SITECUSTOMIZE)
        file.writestr(_entry("names/dinfer/__init__.py"), _NAMES)
    return target


def _entry(name: str) -> zipfile.ZipInfo:
    """Without the time of writing, so that the same source gives the same bytes."""
    found = zipfile.ZipInfo(name)
    found.compress_type = zipfile.ZIP_DEFLATED
    return found


def watched_environment(zip_path: str | Path, folder: str | Path) -> dict[str, str]:
    """The environment variables with which a program, and all that it starts, is watched."""
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (str(zip_path), before)))
    return {"PYTHONPATH": path, "DINFER_WATCH": str(Path(folder).absolute())}
