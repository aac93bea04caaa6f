"""Versions of Python, torch and other packages, compared with what the installed dinfer requires."""

import platform
import re
from collections.abc import Callable, Sequence
from importlib import metadata

from dinfer.doctor.report import Check

SHOWN = ("torch", "transformers", "ipyparallel")
"""packages with a line of their own; the others share one"""

VersionOf = Callable[[str], str]
"""name → installed version; raises PackageNotFoundError"""


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
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("Python", "ok", f"{version}  ({wanted})")
    fix = f"make a new venv with Python {wanted}"
    return Check("Python", "fail", f"{version}; dinfer needs {wanted}", fix)


def package_checks(requirements: Sequence[str], version_of: VersionOf) -> list[Check]:
    """One check for each of `SHOWN`, and one for all others. `requirements` as in a package's metadata."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requirements]
    needed = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    checks = {r.name: _package_check(r.name, str(r.specifier), version_of) for r in needed}
    others = [check for name, check in checks.items() if name not in SHOWN]
    return [*(checks[name] for name in SHOWN if name in checks), *_together(others)]


def _package_check(name: str, wanted: str, version_of: VersionOf) -> Check:
    from packaging.specifiers import SpecifierSet

    fix = f"pip install -U '{name}{wanted}'"
    try:
        version = version_of(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", f"not installed; dinfer needs {wanted}", fix)
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(name, "ok", f"{version}  ({wanted})")
    return Check(name, "fail", f"{version}; dinfer needs {wanted}", fix)


def _together(checks: Sequence[Check]) -> list[Check]:
    """One check for each failure, and one for all others."""
    failed = [check for check in checks if check.state == "fail"]
    good = len(checks) - len(failed)
    return [*failed, Check("other packages", "ok", f"{good} more, all as required")] if good else failed


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
    missing = (
        f"; not in this build of torch: {', '.join(absent)} (dinfer does not need them)" if absent else ""
    )
    return Check("backends", "ok", f"{', '.join(present)}{missing}")
