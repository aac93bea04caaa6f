"""Records the ops of this process: what is known of one when it is issued, waited for and over.

Nothing here may disturb the user's program. What fails is said once in the files, and recording stops there and then;
no lock is held while torch or user code runs; of tensors only shapes, sizes and addresses are kept.
"""

import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .callers import place_of, seen_from, thread_name
from .groups import NO_GROUP, GroupFacts, backend_of, facts_of, store_of
from .labels import changed, labelled, module_layer
from .raised import message_of, raised_at
from .records import (
    KINDS,
    MOST_SEGMENTS,
    NOTHING,
    SEGMENT_RECORDS,
    TAGGED,
    UNNUMBERED,
)
from .writing import Records

KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
MAKING = ("init_group", "new_group")

MOST_CHANNELS = MOST_SEGMENTS * SEGMENT_RECORDS
"""A program may give each message a tag of its own. A tag that comes back when so many others have come is counted
anew; the ops that had it before are gone by then."""

MOST_PROBLEMS = 50
MOST_ERRORS = 500
MOST_RAISED = 100

_PLAIN = (str, int, float, bool, type(None))
_ARGUMENTS = BaseException.__dict__["args"].__get__
"""of an exception, without running its class's code"""


ChannelKey = tuple[Any, ...]
"""What ops are numbered in: (kind,) for groups that are made, (group, backend) for collectives, and for messages
(group, backend, kind, peer, tag)."""


class AnySource:
    """Of a recv from any rank: its group, and whether no other recv of that was open beside it."""

    __slots__ = ("group", "is_alone")

    def __init__(self, group: GroupFacts, is_alone: bool) -> None:
        self.group, self.is_alone = group, is_alone


class PendingOp:
    """An op that is not known to be over."""

    __slots__ = (
        "any_source",
        "base",
        "blocking",
        "channel",
        "commit",
        "nbytes",
        "number",
        "on_device",
    )

    def __init__(
        self, base: int, commit: int, blocking: bool, on_device: bool, nbytes: int, channel: ChannelKey, number: int,
        any_source: AnySource | None,
    ) -> None:  # fmt: skip
        self.base, self.commit = base, commit
        """where its record is"""
        self.blocking = blocking
        self.on_device, self.nbytes = on_device, nbytes
        self.channel, self.number = channel, number
        self.any_source = any_source

    @property
    def seq(self) -> int:
        """The op's number in the process."""
        return self.commit - 1

    @property
    def is_collective(self) -> bool:
        """Or else a message."""
        return len(self.channel) < 3

    @property
    def queue(self) -> ChannelKey:
        """On a device, what ends in the order of issue: a group's collectives, or the messages between two ranks."""
        return self.channel if self.is_collective else (*self.channel[:2], self.channel[3])


class OpRecorder:
    """What this process records into a folder, from its first op on. A forked child starts anew, in its own files."""

    def __init__(
        self,
        folder: Path,
        hook: str = "none",
        on_open: Callable[[], None] | None = None,
        on_fork: Callable[[], None] | None = None,
        on_off: Callable[[], None] | None = None,
    ) -> None:
        """`on_off`: called when recording has switched itself off; must not raise."""
        self.folder, self.hook, self._on_open = folder, hook, on_open
        self.torch, self.on_fork, self._on_off = "", on_fork, on_off
        self.records: Records | None = None
        self._reset()
        changed.append(self._set_now)
        weak = weakref.ref(self)  # what is registered for forks stays for good

        def after_fork() -> None:
            recorder = weak()
            if recorder is not None:
                recorder._let_go()
                recorder._reset()
                if recorder.on_fork:
                    recorder.on_fork()

        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=after_fork)

    def _reset(self) -> None:
        self.is_off = False
        self._opening = threading.RLock()
        self.placing = threading.RLock()
        """for a hook that changes how ops are seen; what another thread had locked at a fork, the child has not"""
        self._threads = threading.local()
        self._groups: dict[int, tuple[weakref.ref[Any], GroupFacts]] = {}
        self._made_groups = itertools.count(1)
        # Reentrant: a signal's handler may issue an op while its thread is here.
        self._knowing_groups, self._numbering = threading.RLock(), threading.RLock()
        self._counts: dict[ChannelKey, itertools.count[int]] = {}
        self._open_any_source: dict[int, list[AnySource]] = {}
        """by the group's number"""
        self._rank: tuple[int, int, str] | None = None
        self._problems: set[str] = set()
        self._errors = self._raised = 0

    def close(self) -> None:
        """Record no more, and let go of the files."""
        self.is_off = True
        if self._set_now in changed:
            changed.remove(self._set_now)
        self._let_go()

    def turn_off(self) -> None:
        """Record no more: of ops under way, too, the ends stay unknown. Never raises."""
        self.is_off = True
        if self._on_off:
            self._on_off()

    def _let_go(self) -> None:
        records, self.records = self.records, None
        if records is not None:
            records.close()

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
            self.turn_off()
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
        try:
            records = None if self.is_off else self.open()
            if records is not None:
                records.lines.write("meant", rank=rank)
        except Exception as error:
            self.switch_off("saying the rank", error)

    def say_hook(self, hook: str, torch: str) -> None:
        """How ops are seen from now on."""
        self.hook, self.torch = hook, torch
        if self.records is not None:
            self.records.lines.write("hook", name=hook, torch=torch)

    def problem(self, text: str) -> None:
        """Say once what the probe cannot do. Never raises."""
        if text in self._problems or len(self._problems) >= MOST_PROBLEMS:
            return
        self._problems.add(text)
        try:
            records = self.open()
            if records is not None:
                records.lines.write("problem", text=text[:1000])
        except Exception:
            self.turn_off()

    def switch_off(self, part: str, error: BaseException) -> None:
        """A bug of the probe, or a disk that is full: the user's program goes on, unwatched."""
        self.problem(f"{part} switched itself off: {type(error).__name__}: {error}")
        self.turn_off()

    def _set_now(self, layer: int | None, chunk: int | None) -> None:
        try:
            records = self.records
            if records is not None:
                records.ops.set_now(_kept_number(layer), _kept_number(chunk))
        except Exception as error:
            self.switch_off("following labels", error)

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
        placeholder: Any = None,
        sized: Sequence[Any] = (),
    ) -> PendingOp | None:
        """An op is about to be issued. `peer`: its rank in the group; NOTHING: none. `is_async`: None where only the
        frames of its callers tell. `placeholder`: a tensor that says no more than the device, where there is no other.
        `sized`: the tensors of which the bytes count, where these are others.
        Returns None if it is not recorded, as that of tensors without memory is not. Never raises."""
        if self.is_off:
            return None
        try:
            records = self.records or self.open()
            if records is None:
                return None
            layer, chunk = labelled()
            if layer is None:
                layer = module_layer()
            is_message = kind == "send" or kind == "recv"
            place, found_layer, found_chunk, blocking, in_cpp, async_op = seen_from(
                frame, is_async is None, layer is None, chunk is None
            )
            if is_async is None:
                is_async = not blocking if is_message else async_op is True
            is_async = is_async and not in_cpp
            nbytes, form, on_device, backend = 0, 0, False, group.backend
            first = tensors[0] if tensors else placeholder
            if first is not None:
                if first.is_cpu:
                    device, backend = "cpu", group.cpu_backend
                elif first.is_meta:
                    return None
                else:
                    device, on_device, backend = first.device.type, True, group.backend_for(first)
                look = (first.shape, first.dtype, device) if tensors else ((), "", device)
                form = records.forms.numbers.get(look) or records.forms.number(look)
                for tensor in sized or tensors:
                    try:
                        nbytes += tensor.nbytes
                    except Exception:  # a sparse tensor does not say
                        continue
            number_of_group, ranks = group.number, group.ranks
            if 0 <= peer < len(ranks):
                peer = ranks[peer]
            any_source: AnySource | None = None
            if is_message:
                channel: ChannelKey = (number_of_group, backend, kind, peer, tag if backend in TAGGED else 0)
            else:
                channel = (kind,) if kind in MAKING else (number_of_group, backend)
            if kind == "recv" and (peer == NOTHING or self._open_any_source):
                number, any_source = self._number_of_recv(group, channel)
            else:
                count = self._counts.get(channel)
                number = self._next_number(channel) if count is None else next(count)
            try:
                thread: int = self._threads.number
            except AttributeError:  # kept with the thread: its ident will be another's once it has ended
                thread = self._threads.number = records.threads.number(thread_name())
                self._threads.handled = None
            base, commit = records.ops.begin(
                time.monotonic_ns(), KIND_NUMBERS[kind], is_async, number_of_group, peer, tag,
                records.places.numbers.get(place) or records.places.number(place), form, thread, nbytes,
                found_layer if layer is None else _kept_number(layer),
                found_chunk if chunk is None else _kept_number(chunk), number,
            )  # fmt: skip
            raised = sys.exc_info()[1]
            if raised is not None:
                self._handles(raised)
            elif self._threads.handled is not None:
                self._threads.handled = None
            return PendingOp(base, commit, not is_async, on_device, nbytes, channel, number, any_source)
        except Exception as error:
            self.switch_off("recording ops", error)
            return None

    def waiting(self, pending: PendingOp, frame: FrameType | None) -> None:
        """The caller begins to wait for the op; one that waits at once has waited since it was issued. Never raises."""
        try:
            records = self.records
            if records is not None and not pending.blocking:
                place = records.places.number(place_of(frame))
                records.ops.waiting(pending.base, pending.commit, time.monotonic_ns(), place)
        except Exception as error:
            self.switch_off("recording waits", error)

    def followed(self, pending: PendingOp) -> None:
        """Somebody has taken the op's future. Never raises."""
        try:
            if self.records is not None:
                self.records.ops.set_followed(pending.base, pending.commit)
        except Exception as error:
            self.switch_off("recording futures", error)

    def done(self, pending: PendingOp, error: BaseException | None = None, work: Any = None) -> None:
        """The op is over, or has failed. `work`: its Work, by which a recv from any rank knows from which. Never
        raises."""
        try:
            records = self.records
            if records is None:
                return
            if error is not None and self._errors < MOST_ERRORS:
                self._errors += 1
                text = f"{type(error).__name__}: {error}"
                records.lines.write("error", seq=pending.seq, text=text[:1000])
            if pending.any_source is not None:
                found, pending.any_source = pending.any_source, None
                self._has_received(records, pending, found, None if error else work)
            records.ops.done(pending.base, pending.commit, time.monotonic_ns(), error is not None)
        except Exception as failure:
            self.switch_off("recording ends", failure)

    def not_issued(self, pending: PendingOp, error: BaseException) -> None:
        """The op failed before it was issued: the next one has its number. Never raises."""
        try:
            if pending.number != UNNUMBERED:
                number = self._next_number(pending.channel)
                is_last = number == pending.number + 1
                self._counts[pending.channel] = itertools.count(pending.number if is_last else number)
            if self.records is not None:
                self.records.ops.set_number(pending.base, pending.commit, UNNUMBERED)
        except Exception as failure:
            self.switch_off("numbering ops", failure)
        self.done(pending, error)

    def is_over(self, pending: PendingOp) -> bool:
        """Whether the op's end is recorded."""
        return self.records is None or self.records.ops.is_done(pending.base, pending.commit)

    # -- numbers

    def _next_number(self, channel: ChannelKey) -> int:
        count = self._counts.get(channel)
        if count is None:
            with self._numbering:
                count = self._counts.setdefault(channel, itertools.count())
                if len(self._counts) > MOST_CHANNELS:
                    self._counts.pop(next(iter(self._counts)))
        return next(count)

    def _number_of_recv(self, group: GroupFacts, channel: ChannelKey) -> tuple[int, AnySource | None]:
        """Of a recv from any rank, the number is known once it is over. Until then no other recv of the group has one:
        who can say which of them gets which message."""
        with self._numbering:
            are_open = self._open_any_source.get(group.number, [])
            for other in are_open:
                other.is_alone = False
            if channel[3] == NOTHING:
                found = AnySource(group, not are_open)
                self._open_any_source[group.number] = [*are_open, found]
                return UNNUMBERED, found
            number = self._next_number(channel)
            return (UNNUMBERED if are_open else number), None

    def _has_received(self, records: Records, pending: PendingOp, found: AnySource, work: Any) -> None:
        """A recv from any rank is over: from which one it has received, and its number, if it was the only recv."""
        try:
            source = work._source_rank() if work is not None else -1
        except RuntimeError:  # it has failed
            source = -1
        group = found.group
        with self._numbering:
            are_open = [other for other in self._open_any_source.pop(group.number, ()) if other is not found]
            if are_open:
                self._open_any_source[group.number] = are_open
        if source >= 0:
            peer = group.ranks[source] if source < len(group.ranks) else source
            number = self._next_number((*pending.channel[:3], peer, pending.channel[4]))
            records.ops.set_number(
                pending.base, pending.commit, number if found.is_alone else UNNUMBERED, peer
            )

    # -- groups

    def group_of(self, group: Any) -> GroupFacts:
        """What is known of a process group. Never raises."""
        found = self._groups.get(id(group))
        if found is not None and found[0]() is group:
            return found[1]
        try:
            with self._knowing_groups:
                found = self._groups.get(id(group))
                return found[1] if found is not None and found[0]() is group else self._new_group(group)
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
            return facts_of(0, tuple(range(group.size())), "")
        ranks = tuple(sorted(members, key=lambda rank: members[rank]))
        backend = backend_of(c10d, group)
        description = str(getattr(group, "group_desc", "")).replace("undefined", "")
        made = next(self._made_groups)  # another group may have had the same id before
        number = records.groups.number((made, str(group.group_name), ranks, backend, description))
        facts = facts_of(number, ranks, backend)
        self._groups[id(group)] = (weakref.ref(group), facts)
        self._say_rank(c10d)
        return facts

    def future_group(self, ranks: tuple[int, ...], backend: str) -> GroupFacts:
        """A group that is only being made; its name is `(new)`. Never raises."""
        try:
            records = self.open()
            if records is None:
                return NO_GROUP
            return facts_of(records.groups.number((0, "(new)", ranks, backend, "")), ranks, backend)
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
        now = (c10d.get_rank(), c10d.get_world_size(), store_of(c10d))
        if now != self._rank:
            self._rank = now
            self.records.lines.write("rank", rank=now[0], world_size=now[1], store=now[2])

    # -- exceptions

    def _handles(self, error: BaseException) -> None:
        """This thread issues an op while it handles an exception. Said once of each: it is known by its arguments,
        which are held if they are plain, until the thread issues an op that handles none. (Its id may be another's
        later; whoever held the exception, or its attributes, would hold tensors.) Others are known by where they were
        raised."""
        if self._raised >= MOST_RAISED:
            return
        arguments: tuple[Any, ...] = _ARGUMENTS(error)
        which: tuple[str, int] | None = None
        if not arguments or not all(type(one) in _PLAIN for one in arguments):
            arguments, which = (), raised_at(error)
        before = self._threads.handled
        if before and before[:2] == (id(error), which) and before[2] is arguments:
            return
        self._threads.handled = id(error), which, arguments
        self._raised += 1
        self.raised(error, "handled")

    def raised(self, error: BaseException, what: str, thread: str = "") -> None:
        """Say that an exception ended a thread (`exception`) or a notebook's cell (`cell_raised`), or is being handled
        while ops are issued (`handled`)."""
        is_handled = what == "handled"
        records = self.open()
        if records is None:
            return
        file, line = raised_at(error)
        records.lines.write(
            what,
            type=type(error).__name__,
            message=message_of(error, is_handled),
            file=file,
            line=line,
            thread=thread or thread_name()[1],
            at_ns=time.monotonic_ns(),
            seq=records.ops.issued - is_handled,
        )


def _kept_number(number: int | None) -> int:
    """A layer or chunk as the record has room for it: NOTHING for none, and for one of more than 32 bits."""
    return number if number is not None and -(2**31) <= number < 2**31 else NOTHING
