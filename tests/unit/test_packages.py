"""env/packages installs only what is missing. All commands are stubs here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "env" / "packages"
BASH = shutil.which("bash") or "bash"
COMMANDS = ("chromium", "fc-list", "ip", "mpirun", "mpicc", "ssh", "srun")
DAEMONS = ("sshd", "slurmctld", "slurmd", "munged")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder for commands; its apt-get writes down what it is asked for, and whether services may start."""
    may = f"may=yes; [[ -x {tmp_path}/policy-rc.d ]] && may=no"
    stub(tmp_path, "apt-get", f'{may}; echo "$@" >>{tmp_path}/asked; echo $may >{tmp_path}/may-start')
    for name in ("chmod", "rm"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    return tmp_path


def stub(world: Path, name: str, does: str) -> None:
    """A command."""
    (world / name).write_text(f"#!{BASH}\n{does}\n", encoding="utf-8")
    (world / name).chmod(0o755)


def packages(world: Path) -> tuple[str, list[str]]:
    """What the script says, and what apt-get was asked for."""
    ran = subprocess.run(
        [BASH, str(SCRIPT)],
        env={"PATH": str(world), "SBIN": str(world)},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    assert ran.stdout == ""
    asked = world / "asked"
    return ran.stderr, asked.read_text(encoding="utf-8").splitlines() if asked.exists() else []


def test_where_all_is_there_nothing_is_said_or_done(world: Path) -> None:
    for name in (*COMMANDS, *DAEMONS):
        stub(world, name, "echo a font")
    assert packages(world) == ("", [])


def test_what_is_missing_is_installed_by_root_and_named_to_others(world: Path) -> None:
    stub(world, "ip", "")
    stub(world, "fc-list", "echo a font")
    said, asked = packages(world)
    missing = "chromium openmpi-bin libopenmpi-dev openssh-client slurm-client openssh-server slurmctld slurmd munge"
    if os.geteuid() == 0:
        assert said == f"env/packages: installing {missing}\n"
        assert asked == ["update -qq", f"install -y -qq --no-install-recommends {missing}"]
    else:
        assert f"tests are skipped: {missing}. On Debian" in said
        assert asked == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as installing does")
def test_no_service_is_started_that_was_not_there(world: Path) -> None:
    for name in (*COMMANDS, *DAEMONS[1:]):
        stub(world, name, "echo a font")
    stub(world, "systemctl", f'echo "$@" >>{world}/units')
    assert packages(world)[1][-1].endswith(" openssh-server")
    assert (world / "may-start").read_text() == "no\n"
    assert not (world / "policy-rc.d").exists()
    assert (world / "units").read_text() == "disable -q ssh\n"


def test_without_apt_get_it_says_so(world: Path) -> None:
    (world / "apt-get").unlink()
    assert "missing, so tests are skipped: chromium " in packages(world)[0]
