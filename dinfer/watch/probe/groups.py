"""What torch.distributed says of process groups: members, backends, and where ranks met."""

from typing import Any, NamedTuple

from .records import backend_for


class GroupFacts(NamedTuple):
    """What is known of a process group."""

    number: int
    ranks: tuple[int, ...]
    backend: str = ""
    cpu_backend: str = ""

    def backend_for(self, tensor: Any) -> str:
        """The backend that serves ops of this tensor."""
        if self.cpu_backend == self.backend or tensor is None:
            return self.backend
        return self.cpu_backend if tensor.is_cpu else backend_for(self.backend, tensor.device.type)


def facts_of(number: int, ranks: tuple[int, ...], backend: str) -> GroupFacts:
    """With what follows from the backend."""
    return GroupFacts(number, ranks, backend, backend_for(backend, "cpu"))


NO_GROUP = GroupFacts(0, ())


def store_of(c10d: Any) -> str:
    """Where the ranks of the default group met, such as `localhost:29500`; "" if unknown."""
    try:
        store = c10d._get_default_store()
        for _ in range(10):
            store = getattr(store, "underlying_store", store)
        host = getattr(store, "host", None)
        return str(getattr(store, "path", "")) if host is None else f"{host}:{store.port}"
    except Exception:
        return ""


def backend_of(c10d: Any, group: Any) -> str:
    """Its name; of a group that has several, each with its kind of device."""
    try:
        named = str(c10d.get_backend_config(group))
    except Exception:  # a group that torch.distributed has not made
        return str(c10d.get_backend(group))
    names = {one.partition(":")[2] or one for one in named.split(",")}
    return names.pop() if len(names) == 1 else named
