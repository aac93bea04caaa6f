"""Which cluster to join, which of its engines to use, and the line that says so. Pure."""

from collections.abc import Sequence

from dinfer.cluster.ipyparallel.errors import ClusterError, TooFewEngines
from dinfer.cluster.ipyparallel.known import Known, Owner


def choose_cluster(running: Sequence[tuple[Known, Owner]]) -> Known | None:
    """This process's own, else the one that a user started, else one whose client is gone; None: none to join.

    One that dinfer started for a client that lives is left to it. Raises ClusterError where it is not clear which.
    """
    by_owner = {owner: [known for known, of in running if of == owner] for owner in ("me", "user", "nobody")}
    users = by_owner["user"]
    stock = [known for known in users if not known.cluster_id]
    if not by_owner["me"] and not stock and len(users) > 1:
        ids = ", ".join(repr(known.cluster_id) for known in users)
        raise ClusterError(
            f"several clusters run in this profile: {ids}. Say which: cluster_id={users[0].cluster_id!r}."
        )
    return next(iter([*by_owner["me"], *stock, *users, *by_owner["nobody"]]), None)


def choose_engines(ids: Sequence[int], n: int | None, cluster: Known) -> list[int]:
    """The engines of ranks 0, 1, …: the first n, in the order of their ids. Raises ClusterError, TooFewEngines."""
    n = len(ids) if n is None else n
    if n < 1 and ids:
        raise ClusterError(f"n is {n}; it must be at least 1.")
    if n <= len(ids) and ids:
        return sorted(ids)[:n]
    named = f" ({', '.join(map(str, sorted(ids)))})" if ids else ""
    have = f"{len(ids)} engine{'' if len(ids) == 1 else 's'}{named}" if ids else "no engine"
    more = f"ipcluster engines -n {max(n, 1) - len(ids)} {cluster.flags}".rstrip()
    fewer = f", or ask for n={len(ids)}" if ids else ""
    raise TooFewEngines(
        f"{cluster.name} has {have}, but {max(n, 1)} are asked for. Add some with `{more}`{fewer}, "
        "or have a cluster of your own started with start=True."
    )


def describe(
    cluster: Known, launcher: str, *, started: bool, engines: Sequence[tuple[int, str]], unused: Sequence[int]
) -> str:
    """One line: which cluster, which ranks, where. `engines`: id and host by rank."""
    how = "started" if started else "joined"
    by = f" ({launcher} engines)" if launcher else ""
    ids = [engine_id for engine_id, _ in engines]
    ranks = "rank 0" if len(ids) == 1 else f"ranks 0–{len(ids) - 1}"
    hosts = list(dict.fromkeys(host for _, host in engines))
    where = hosts[0] if len(hosts) == 1 else ", ".join(host for _, host in engines)
    notes = []
    if ids != list(range(len(ids))):
        notes.append(f"these are engines {', '.join(map(str, ids))}: ranks follow the order of engine ids")
    if unused:
        one = len(unused) == 1
        names = ", ".join(map(str, unused))
        notes.append(f"engine{'' if one else 's'} {names} {'is' if one else 'are'} not used")
    return f"{how} {cluster.name}{by}: {ranks} on {where}" + "".join(f"; {note}" for note in notes)
