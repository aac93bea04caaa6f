"""`dinfer profile ssh` and `slurm`: write an ipyparallel profile that starts engines on other hosts."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dinfer.cli.root import BAD_INPUT, FAILED, app, stop
from dinfer.config import ConfigError

profile = typer.Typer(no_args_is_help=True, help="Write a profile that starts engines on other hosts.")
app.add_typer(profile, name="profile")

Name = Annotated[str, Option(help="the profile's name, for dinfer.connect(profile=NAME)")]
Address = Annotated[
    str, Option(help="this machine's address at which engines meet it; default: the one towards the hosts")
]


@profile.command()
def ssh(
    hosts: Annotated[
        list[str], Argument(help="as ssh takes them: [USER@]HOST[:PORT]; rank 0 is on the first")
    ],
    name: Name = "ssh",
    engines: Annotated[
        int, Option(help="engines on each host; where it has several GPUs, each gets one")
    ] = 1,
    python: Annotated[
        list[str],
        Option(help="the hosts' Python, PATH, or HOST=PATH for one; default: the path of this one"),
    ] = [],  # noqa: B006 - typer needs a list
    folder: Annotated[str, Option(help="the engines' working folder; default: the user's home there")] = "",
    ssh_option: Annotated[
        list[str], Option("--ssh-option", help="as in ssh's config: IdentityFile=~/.ssh/lab")
    ] = [],  # noqa: B006
    address: Address = "",
) -> None:
    """Engines on hosts that ssh reaches. Status 1: not written; 2: a host is unknown, or an option is wrong."""
    from dinfer.cluster.ipyparallel.profiles import parse_hosts, write_ssh

    def write(profile_dir: Path) -> object:
        found = parse_hosts(hosts, engines, python)
        ssh_args = [word for option in ssh_option for word in ("-o", option)]
        return write_ssh(profile_dir, found, folder=folder, ssh_args=ssh_args, address=address)

    _write(name, write)


@profile.command()
def slurm(
    n: Annotated[int, Option("-n", help="number of engines, the tasks of one job")],
    name: Name = "slurm",
    python: Annotated[str, Option(help="the nodes' Python; default: the path of this one")] = "",
    folder: Annotated[str, Option(help="the engines' working folder; default: this one")] = "",
    option: Annotated[
        list[str],
        Option(help="of sbatch: --option=--partition=gpu --option=--nodes=3 --option=--gpus-per-task=1"),
    ] = [],  # noqa: B006
    address: Address = "",
) -> None:
    """Engines as a job of Slurm. Status 1: not written; 2: Slurm is not here, or an option is wrong."""
    from dinfer.cluster.ipyparallel.profiles import write_slurm

    def write(profile_dir: Path) -> object:
        return write_slurm(profile_dir, n, python=python, folder=folder, address=address, options=option)

    _write(name, write)


def _write(name: str, write: Callable[[Path], object]) -> None:
    """Write and say so, or say why not."""
    from IPython.paths import get_ipython_dir

    from dinfer.cluster.ipyparallel.errors import ClusterError

    if not name or not name.replace("-", "").replace("_", "").isalnum():
        stop(f"--name is {name!r}; it must consist of letters, digits, - and _.", BAD_INPUT)
    try:
        print(write(Path(get_ipython_dir(), f"profile_{name}")))
    except (ClusterError, ConfigError) as error:
        stop(error, BAD_INPUT)
    except OSError as error:
        stop(f"the profile could not be written to {error.filename}: {error.strerror}.", FAILED)
