"""How sentences name recorded ops, and ranks that do the same. Pure: events and texts in, text out."""

import re
from collections.abc import Iterable, Mapping

from dinfer.trace.events import Event, block_text
from dinfer.verdict.matching import RecordedOp
from dinfer.verdict.where import rank_spans_text, ranks_text


def event_text(event: Event) -> str:
    """The op, as far as it is known, for example `recv kv c0 l3 <- 1` or `all_reduce`."""
    if event.peer is None:
        return event.name
    return f"{event.name} {'<-' if event.kind == 'recv' else '->'} {event.peer}"


def place_text(event: Event) -> str:
    """Tensor, group, tag and line of a call, as far as they are known: `([4] float32, group tp) at infer.py:31`."""
    if (call := event.call) is None:
        return ""
    group = "" if call.group in ("", "default") else f"group {call.group}"
    known = filter(None, (call.tensor, group, f"tag {call.tag}" if call.tag else ""))
    inside = f" ({', '.join(known)})" if call.tensor or group or call.tag else ""
    function = f" in {call.function}" if call.function and call.place else ""
    return f"{inside}{f' at {call.place}' if call.place else ''}{function}"


def full_text(event: Event) -> str:
    """The op with what is known of its call, the op between backticks."""
    return f"`{event_text(event)}`{place_text(event)}"


def left_out_text(rank: int, lonely: RecordedOp, instead: RecordedOp) -> str:
    """Of `LeftOut`, for example `rank 2 has left out a send of c5 to rank 1: rank 1's recv … has received …`."""
    mine, its = lonely.event, instead.event
    block = block_text("", mine.chunk, mine.layer).strip()
    way, got = ("to", "has received") if its.kind == "send" else ("from", "was received by")
    return (
        f"rank {rank} has left out a {its.kind} of {block} {way} rank {mine.rank}: rank {mine.rank}'s "
        f"{full_text(mine)} {got} rank {rank}'s {full_text(its)}, and so each one after it"
    )


def ranks_sentences(texts: Mapping[int, str]) -> list[str]:
    """What is said of these ranks, for example `ranks 0–2 raised KeyError: 'ring'`: once for those of which it is the
    same."""
    alike: dict[str, list[int]] = {}
    for rank, text in texts.items():
        alike.setdefault(text, []).append(rank)
    return [
        f"{ranks_text(ranks)} {_of_several(text) if len(ranks) > 1 else text}"
        for text, ranks in alike.items()
    ]


def _of_several(text: str) -> str:
    """What a rank does, said of several."""
    return _PLURAL.sub(_plural, text)


_PLURAL = re.compile(
    r"^(is|has|lost its)\b|(?<=[;,] )(it now waits)\b|(?<= and )(takes|waits|is)\b|(?<=waits in )its (handler)"
)
_PLURALS = {"is": "are", "has": "have", "lost its": "lost their", "it now waits": "they now wait"}


def _plural(found: "re.Match[str]") -> str:
    word = found[0]
    return _PLURALS.get(word) or (word.removesuffix("s") if word in ("takes", "waits") else word)


def merged_lines(lines: Iterable[str]) -> tuple[str, ...]:
    """Lines such as `rank 3: is in …, for 2.1 s`, in which ranks that do the same for about as long share one."""
    alike: dict[str, list[tuple[int, str]]] = {}
    for line in lines:
        rank, _, text = line.removeprefix("rank ").partition(": ")
        alike.setdefault(without_durations(text), []).append((int(rank), text))
    return tuple(
        f"{rank_spans_text(rank for rank, _ in found)}: "
        f"{_of_several(found[0][1]) if len(found) > 1 else found[0][1]}"
        for found in alike.values()
    )


def without_durations(text: str) -> str:
    """What a rank does, but not for how long: to compare."""
    return _DURATION.sub("", text)


_DURATION = re.compile(r", for [\d.]+ m?s|\(\d+(\.\d+)? s\)")


def nth(number: int) -> str:
    """1st, 2nd, 3rd, 4th, for a number from 0."""
    n = number + 1
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def size_text(event: Event) -> str:
    """Its bytes, where they are known."""
    return f"{event.bytes:,} bytes" if event.bytes else ""
