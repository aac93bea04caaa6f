"""Versions of Python, torch and other packages, compared with what the installed dinfer requires."""

import platform
import re
from collections.abc import Callable, Sequence
from importlib import metadata

from dinfer.doctor.report import Check

SHOWN = ("torch", "transformers", "ipyparallel")
"""packages with a line of their own; the others share one"""


def version_checks() -> list[Check]:
    """Python and every package that the metadata of the installed dinfer requires, extras aside."""
    try:
        asked = metadata.requires("dinfer") or []
        python = metadata.metadata("dinfer")["Requires-Python"]
    except metadata.PackageNotFoundError:
        found = "dinfer is not installed as a package, so its requirements are unknown"
        return [Check("versions", "unchecked", found, "pip install -e . in dinfer's folder")]
    return [python_check(platform.python_version(), python), *package_checks(asked, metadata.version)]


def python_check(version: str, wanted: str) -> Check:
    """`wanted` is a version specifier, such as >=3.11."""
    return _version_check("Python", version, wanted, f"make a new venv with Python {wanted}")


def package_checks(requirements: Sequence[str], version_of: Callable[[str], str]) -> list[Check]:
    """One check for each of `SHOWN` and for each failure, and one for all others. `requirements` as in a package's
    metadata; `version_of`: name → installed version; raises PackageNotFoundError."""
    from packaging.requirements import Requirement

    checks = {}
    for needed in map(Requirement, requirements):
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            name, wanted = needed.name, str(needed.specifier)
            fix = f"pip install -U '{name}{wanted}'"
            try:
                checks[name] = _version_check(name, version_of(name), wanted, fix)
            except metadata.PackageNotFoundError:
                checks[name] = Check(name, "fail", f"not installed; dinfer needs {wanted}", fix)
    shown = [checks.pop(name) for name in SHOWN if name in checks]
    failed = [check for check in checks.values() if check.state == "fail"]
    if good := len(checks) - len(failed):
        failed.append(Check("other packages", "ok", f"{good} more, all as required"))
    return shown + failed


def _version_check(name: str, version: str, wanted: str, fix: str) -> Check:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(name, "ok", f"{version}  ({wanted})")
    return Check(name, "fail", f"{version}; dinfer needs {wanted}", fix)


def backend_check() -> Check:
    """Whether torch can be imported, and with which backends of torch.distributed it was built."""
    try:
        import torch
    except (ImportError, OSError) as error:
        found = f"torch cannot be imported: {error}"
        return Check("backends", "fail", found, "pip install --force-reinstall torch")
    return judge_backends(torch.__config__.show())


def judge_backends(build: str) -> Check:
    """`build`: what `torch.__config__.show()` returns; only dinfer.transport may import torch.distributed."""
    settings = dict(re.findall(r"\bUSE_(GLOO|NCCL|MPI)=(\w+)", build))
    present = [name.lower() for name in ("GLOO", "NCCL", "MPI") if settings.get(name, "0") in ("1", "ON")]
    absent = [name for name in ("gloo", "nccl", "mpi") if name not in present]
    if "GLOO" not in settings:
        return Check("backends", "unchecked", "torch does not report which backends it was built with")
    if "gloo" not in present:
        found = "this build of torch has no gloo, which the ranks need to communicate"
        return Check("backends", "fail", found, "install a build from pytorch.org: pip install -U torch")
    found = ", ".join(present)
    if absent:
        found += f"; not in this build of torch: {', '.join(absent)} (dinfer does not need them)"
    return Check("backends", "ok", found)
