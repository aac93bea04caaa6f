"""Connect: a session whose ranks are engines of an ipyparallel cluster, or threads of this process."""

import threading
import weakref
from importlib import import_module
from typing import TYPE_CHECKING

from dinfer.arguments import nearest
from dinfer.cluster.ranks import DEFAULT_N, Ranks
from dinfer.config import MOST_RANKS, ConfigError
from dinfer.errors import excerpt
from dinfer.files import check_working_folder
from dinfer.history import call_text

if TYPE_CHECKING:
    from dinfer.cluster.ipyparallel.attach import ClusterPlace
    from dinfer.saved.saved import WriteReport
    from dinfer.session.session import Session, Show

_opened: "weakref.WeakSet[Session]" = weakref.WeakSet()
"""the sessions of this process"""


def connect(
    where: str | int = "ipyparallel",
    n: int | None = None,
    *,
    profile: str = "default",
    cluster_id: str | None = None,
    start: bool | None = None,
    take: bool = False,
    timeout: float = 60.0,
    patience: float = 60.0,
    place: "ClusterPlace | None" = None,
    show: "Show | None" = None,
    write: "WriteReport | None" = None,
) -> "Session":
    """A session with `n` ranks, `connect(n)` for short; it prints one line that describes them. By default, as many as
    a profile that `dinfer profile` has written starts, else 3.

    "ipyparallel": the engines of a running cluster (`ipcluster start -n 3`) of that profile; if there is none, and
    `start` is not False, a cluster is started, on the hosts of its profile if `dinfer profile` has written it. Engines
    that were started here end once this process has been gone for `patience` seconds. "threads": all ranks in this
    process. `place`: where to start the processes of a cluster.

    Where an earlier session has gone, after a kernel restart say, this one goes on with what it has left on the ranks:
    checkpoint, run, position, breakpoints, faults, events; a line says what. Engines that another living session holds
    are refused, and named, unless `take` says to take them over, which ends that session. Raises ConfigError or
    ClusterError, and NotPossible where this process's working folder has been deleted.
    """
    check_working_folder()
    if isinstance(where, int):
        n, where = where, "ipyparallel"
    if n is not None and not 1 <= n <= MOST_RANKS:
        raise ConfigError(
            f"n is {excerpt(n)}; it must be from 1 to {MOST_RANKS}: how many ranks the session has."
        )
    ranks: Ranks
    if where == "threads":
        for name, value, default in (
            ("profile", profile, "default"),
            ("cluster_id", cluster_id, None),
            ("start", start, None),
            ("take", take, False),
        ):
            if value != default:
                raise ConfigError(
                    f"{name} is {excerpt(value)}, but ranks that are threads have no cluster: leave {name} out."
                )
        from dinfer.cluster.threads import LocalRanks

        ranks = LocalRanks(n or DEFAULT_N)
    elif where == "ipyparallel":
        # This imports PyTorch while the engines start.
        threading.Thread(target=import_module, args=["dinfer.session.session"], name="dinfer import").start()
        from dinfer.cluster.engines import EngineRanks
        from dinfer.cluster.ipyparallel.attach import attach

        cluster = attach(n, profile=profile, cluster_id=cluster_id, start=start, timeout=timeout, place=place)
        try:
            ranks = EngineRanks(cluster, patience, take=take)
        except BaseException:
            cluster.close()
            raise
    else:
        places = ["ipyparallel", "threads"]
        raise ConfigError(
            f"{where!r} is no place for ranks; it must be one of {', '.join(places)}.{nearest(str(where), places)}"
        )
    from dinfer.session.session import Session

    try:
        session = Session(ranks, show, write)
    except BaseException:
        ranks.close()
        raise
    named = {"profile": profile} if profile != "default" else {}
    named |= {"cluster_id": cluster_id} if cluster_id else {}
    place_of_ranks = () if where == "ipyparallel" else (where,)
    session.connected_by = call_text("connect", place_of_ranks, {"n": ranks.world_size, **named}, "dinfer")
    try:
        for older in [*_opened]:
            older.give_way(session)
        session.announce()
        if session.reattached:
            print(session.reattached)
    except BaseException:  # an interrupt: nobody has the session to close it
        session.close()
        raise
    _opened.add(session)
    return session
