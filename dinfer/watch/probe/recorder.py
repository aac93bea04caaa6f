"""Records the ops of this process: what is known of one when it is issued, waited for and over.

Nothing here may disturb the user's program. What fails is said once in the files, and recording stops there and then;
no lock is held while torch or user code runs; of tensors only shapes, sizes and addresses are kept.
"""

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from .callers import caller, thread_name, whose
from .labels import changed, labelled, module_layer
from .records import KINDS, NOTHING
from .writing import Records, Ticket

KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
MOST_PROBLEMS = 50
MOST_ERRORS = 500
MOST_RAISED = 100


class GroupFacts(NamedTuple):
    """What is known of a process group."""

    number: int
    ranks: tuple[int, ...]


NO_GROUP = GroupFacts(0, ())


class PendingOp(NamedTuple):
    """An op that is not known to be over."""

    ticket: Ticket
    blocking: bool
    place: tuple[str, int, str]
    on_device: bool
    lane: tuple[int, int]
    """what ends in the order of issue: the group's number; for sends and receives the peer, else NOTHING"""
    nbytes: int
    peer_unknown: bool
    """a receive from any rank"""


class OpRecorder:
    """What this process records into a folder, from its first op on. A forked child starts anew, in its own files."""

    def __init__(
        self,
        folder: Path,
        hook: str = "none",
        on_open: Callable[[], None] | None = None,
        on_fork: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.hook, self._on_open = folder, hook, on_open
        self.torch, self.on_fork = "", on_fork
        self._reset()
        changed.append(self._set_now)
        weak = weakref.ref(self)  # what is registered for forks stays for good

        def after_fork() -> None:
            recorder = weak()
            if recorder is not None:
                recorder._reset()
                if recorder.on_fork:
                    recorder.on_fork()

        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=after_fork)

    def _reset(self) -> None:
        self.records: Records | None = None
        self.is_off = False
        self._opening = threading.RLock()
        self._threads = threading.local()
        self._groups: dict[int, tuple[weakref.ref[Any], GroupFacts]] = {}
        self._ranks: dict[int, tuple[int, ...]] = {}
        self._rank: tuple[int, int] | None = None
        self._problems = self._errors = self._raised = 0
        self._last_raised: int = 0

    def close(self) -> None:
        """Record no more."""
        self.is_off = True
        if self._set_now in changed:
            changed.remove(self._set_now)

    # -- files

    def open(self) -> Records | None:
        """The files, made at the first use; None where they cannot be."""
        if self.records is None and not self.is_off:
            with self._opening:
                if self.records is None:
                    self._open()
        return self.records

    def _open(self) -> None:
        rank = os.environ.get("RANK", "")
        try:
            self.records = Records(
                self.folder,
                self.hook,
                torch=self.torch,
                expected_rank=int(rank) if rank.isdecimal() else None,
            )
        except OSError as error:
            self.is_off = True
            print(
                f"dinfer: process {os.getpid()} is not watched: {self.folder}: {error.strerror}",
                file=sys.stderr,
            )
            return
        if self._on_open:
            self._on_open()

    def meant_to_be(self, rank: int) -> None:
        """Which rank this process asks to be. Where it is not in the environment, nothing else tells whose failure to
        join it is."""
        records = self.open()
        if records is not None:
            records.lines.write("meant", rank=rank)

    def say_hook(self, hook: str, torch: str) -> None:
        """How ops are seen from now on."""
        self.hook, self.torch = hook, torch
        if self.records is not None:
            self.records.lines.write("hook", name=hook, torch=torch)

    def problem(self, text: str) -> None:
        """Say what the probe cannot do. Never raises."""
        self._problems += 1
        if self._problems > MOST_PROBLEMS:
            return
        try:
            records = self.open()
            if records is not None:
                records.lines.write("problem", text=text[:1000])
        except Exception:
            self.is_off = True

    def switch_off(self, part: str, error: BaseException) -> None:
        """A bug of the probe, or a disk that is full: the user's program goes on, unwatched."""
        self.problem(f"{part} switched itself off: {type(error).__name__}: {error}")
        self.is_off = True

    def _set_now(self, layer: int | None, chunk: int | None) -> None:
        if self.records is not None:
            self.records.ops.set_now(NOTHING if layer is None else layer, NOTHING if chunk is None else chunk)

    # -- ops

    def issued(
        self,
        kind: str,
        group: GroupFacts,
        peer: int,
        tag: int,
        tensors: Sequence[Any],
        is_async: bool | None,
        frame: FrameType | None,
    ) -> PendingOp | None:
        """An op is about to be issued. `peer`: its rank in the group; NOTHING: none. `is_async`: None where only the
        frames of its callers tell. Returns None if it is not recorded. Never raises."""
        if self.is_off:
            return None
        try:
            records = self.open()
            if records is None:
                return None
            layer, chunk = labelled()
            if layer is None:
                layer = module_layer()
            called = caller(frame, is_async is None, layer is None, chunk is None)
            if is_async is None:
                is_async = called.async_op is True if kind not in ("send", "recv") else not called.blocking
            is_async = is_async and not called.in_cpp
            nbytes, form, on_device = 0, 0, False
            if tensors:
                first = tensors[0]
                form = records.forms.number((first.shape, first.dtype))
                on_device = not first.is_cpu
                for tensor in tensors:
                    nbytes += tensor.nbytes
            if peer != NOTHING and group.ranks:
                peer = group.ranks[peer] if 0 <= peer < len(group.ranks) else peer
            ticket = records.ops.begin(
                time.monotonic_ns(), KIND_NUMBERS[kind], is_async, group.number, peer, tag,
                records.places.number(called.place), form, self._thread_number(records), nbytes,
                called.layer if layer is None else layer, called.chunk if chunk is None else chunk,
            )  # fmt: skip
            raised = sys.exc_info()[1]
            if raised is not None:
                self.raised(raised, "handled")
            lane = (group.number, peer if kind in ("send", "recv") else NOTHING)
            from_any = kind == "recv" and peer == NOTHING
            return PendingOp(ticket, not is_async, called.place, on_device, lane, nbytes, from_any)
        except Exception as error:
            self.switch_off("recording ops", error)
            return None

    def _thread_number(self, records: Records) -> int:
        """Kept with the thread: its ident will be another's once it has ended."""
        found: int | None = getattr(self._threads, "number", None)
        if found is None:
            found = self._threads.number = records.threads.number(thread_name())
        return found

    def waiting(self, pending: PendingOp, frame: FrameType | None) -> None:
        """The caller begins to wait for the op. Never raises."""
        try:
            if self.records is not None:
                place = pending.place if pending.blocking else caller(frame, False, False, False).place
                self.records.ops.waiting(
                    pending.ticket, time.monotonic_ns(), self.records.places.number(place)
                )
        except Exception as error:
            self.switch_off("recording waits", error)

    def done(self, pending: PendingOp, error: BaseException | None = None) -> None:
        """The op is over, or has failed. Never raises."""
        try:
            if self.records is None:
                return
            if error is not None and self._errors < MOST_ERRORS:
                self._errors += 1
                text = f"{type(error).__name__}: {error}"
                self.records.lines.write("error", seq=pending.ticket.commit - 1, text=text[:1000])
            self.records.ops.done(pending.ticket, time.monotonic_ns(), error is not None)
        except Exception as failure:
            self.switch_off("recording ends", failure)

    def is_over(self, pending: PendingOp) -> bool:
        """Whether the op's end is recorded."""
        return self.records is None or self.records.ops.is_done(pending.ticket)

    def found_peer(self, pending: PendingOp, work: Any) -> None:
        """A receive from any rank is over: say from which one. Never raises."""
        try:
            if self.records is not None:
                source = work._source_rank()
                ranks = self._ranks.get(pending.lane[0], ())
                self.records.ops.set_peer(pending.ticket, ranks[source] if source < len(ranks) else source)
        except RuntimeError:  # it has failed
            pass
        except Exception as failure:
            self.switch_off("knowing the sender", failure)

    # -- groups

    def group_of(self, group: Any) -> GroupFacts:
        """What is known of a process group. Never raises."""
        found = self._groups.get(id(group))
        if found is not None and found[0]() is group:
            return found[1]
        try:
            return self._new_group(group)
        except Exception as error:
            self.switch_off("knowing groups", error)
            return NO_GROUP

    def _new_group(self, group: Any) -> GroupFacts:
        records = self.open()
        if records is None:
            return NO_GROUP
        c10d = sys.modules["torch.distributed.distributed_c10d"]
        members = c10d._world.pg_group_ranks.get(group)
        if members is None:  # being made, or not made by torch.distributed
            return GroupFacts(0, tuple(range(group.size())))
        ranks = tuple(sorted(members, key=lambda rank: members[rank]))
        backend = _backend(c10d, group)
        description = str(getattr(group, "group_desc", "")).replace("undefined", "")
        number = records.groups.number((id(group), str(group.group_name), ranks, backend, description))
        facts = GroupFacts(number, ranks)
        self._ranks[number] = ranks
        self._groups[id(group)] = (weakref.ref(group), facts)
        self._say_rank(c10d)
        return facts

    def future_group(self, ranks: tuple[int, ...], backend: str) -> GroupFacts:
        """A group that is only being made; its name is `(new)`. Never raises."""
        try:
            records = self.open()
            if records is None:
                return NO_GROUP
            return GroupFacts(records.groups.number((0, "(new)", ranks, backend, "")), ranks)
        except Exception as error:
            self.switch_off("knowing groups", error)
            return NO_GROUP

    def find_groups(self) -> None:
        """Say which groups there are by now, also those that no op has used. Never raises."""
        try:
            c10d = sys.modules.get("torch.distributed.distributed_c10d")
            world = getattr(c10d, "_world", None)
            if c10d is None or world is None or not c10d.is_initialized():
                return
            for group in list(world.pg_map):
                self.group_of(group)
        except Exception as error:
            self.switch_off("knowing groups", error)

    def _say_rank(self, c10d: Any) -> None:
        if self.records is None or not c10d.is_initialized():
            return
        now = (c10d.get_rank(), c10d.get_world_size())
        if now != self._rank:
            self._rank = now
            self.records.lines.write("rank", rank=now[0], world_size=now[1])

    # -- exceptions

    def raised(self, error: BaseException, what: str, thread: str = "") -> None:
        """Say that an exception ended a thread (`exception`), or is being handled while ops are issued (`handled`)."""
        if self._raised >= MOST_RAISED or (what == "handled" and self._last_raised == id(error)):
            return
        records = self.open()
        if records is None:
            return
        self._raised += 1
        self._last_raised = id(error)
        file, line = raised_at(error)
        records.lines.write(
            what,
            type=type(error).__name__,
            message=str(error)[:2000],
            file=file,
            line=line,
            thread=thread or thread_name()[1],
            at_ns=time.monotonic_ns(),
            seq=records.ops.issued - (what == "handled"),
        )


def _backend(c10d: Any, group: Any) -> str:
    """Its name; for a group with one for each kind of device, all, or the CPU's where there is no other device."""
    name = str(c10d.get_backend(group))
    if name != "undefined":
        return name
    named = str(c10d.get_backend_config(group))
    by_device = dict(one.split(":", 1) for one in named.split(",") if ":" in one)
    torch = sys.modules["torch"]
    return by_device.get("cpu", named) if not torch.cuda.is_available() else named


def raised_at(error: BaseException) -> tuple[str, int]:
    """File and line of the innermost frame of the user's code; where there is none, of the innermost of all."""
    best, found = -1, ("", 0)
    step = error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        rank = 3 - whose(file)
        if rank >= best:
            best, found = rank, (file, step.tb_lineno)
        step = step.tb_next
    return found
