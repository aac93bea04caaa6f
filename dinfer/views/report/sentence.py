"""The first sentence of a report: the most important facts of a run; it names or omits what is unknown."""

from collections.abc import Iterator, Sequence

from dinfer.trace.findings import Findings, RankFinding
from dinfer.trace.shares import LinkShare, Shares


def sentence(findings: Findings, found: Shares) -> str:
    """A sentence of parts joined by semicolons."""
    text = "; ".join(_parts(findings, found))
    return f"{text[:1].upper()}{text[1:]}."


def _parts(findings: Findings, found: Shares) -> Iterator[str]:
    if findings.failure:
        yield f"the run failed: {findings.failure.splitlines()[0].rstrip('.')}"
    elif findings.state in ("paused", "running", "starting"):
        yield "the run is not at the end of its prefill"
    if findings.faults:
        count = len(findings.faults)
        yield f"{count} {'fault was' if count == 1 else 'faults were'} armed on purpose"
    if findings.edited:
        yield "values were edited by hand"
    if findings.corrupt:
        count = len(findings.corrupt)
        yield f"changed bytes were found {'once' if count == 1 else f'{count} times'}"
    yield kv_part(findings)
    yield from _tokens_part(findings)
    if not findings.failure:  # the transfers in which a failed run stopped, and their time, are in no event
        yield exposed_part(found)


def kv_part(findings: Findings) -> str:
    """Whether the ranks hold the same KV, by comparison or else by digests."""
    if findings.kv:
        return _inside(findings.kv.sentence.rstrip("."))
    digests = [rank.kv_sha256 for rank in findings.ranks]
    if not digests or not all(digests):
        return "whether the ranks hold the same KV was not checked"
    if len(digests) == 1:
        return "there is only one rank"
    if len(set(digests)) == 1:
        return f"all {len(digests)} ranks hold the same KV"
    return f"{_others(findings.ranks, digests)} other KV than rank {findings.ranks[0].rank}"


def _tokens_part(findings: Findings) -> Iterator[str]:
    """Whether the ranks generated the same tokens; nothing without decode."""
    tokens = [rank.tokens for rank in findings.ranks]
    if not any(tokens) or None in tokens:
        return
    greedy = "greedy tokens" if findings.parameters.get("temperature") == 0 else "tokens"
    if len(set(tokens)) == 1:
        yield f"{greedy} agree"
    else:
        yield f"{greedy} differ between ranks"


def _others(ranks: Sequence[RankFinding], values: Sequence[object]) -> str:
    """The ranks whose value differs from the first rank's, and their verb."""
    others = [str(rank.rank) for rank, value in zip(ranks, values, strict=True) if value != values[0]]
    return f"rank {others[0]} holds" if len(others) == 1 else f"ranks {', '.join(others)} hold"


def exposed_part(found: Shares) -> str:
    """How much of prefill was exposed communication, and where most of it occurred."""
    if not found.ranks:
        return "the trace holds no prefill"
    if not found.links:
        return "nothing was sent between ranks"
    if found.exposed == 0:
        return "no communication of prefill was exposed"
    return f"{percent(found.exposed)} of prefill was exposed communication, most of it {_where(found)}"


def _inside(text: str) -> str:
    """A sentence as part of another: in lower case, unless it begins with an abbreviation."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _where(found: Shares) -> str:
    """Waiting or the wire, whichever is more over all ranks, as in their figure, and the link with most of it."""
    waits = found.wait_s > found.wire_s
    kind, seconds = ("waiting", _wait_s) if waits else ("on the wire", _wire_s)
    link = max(found.links, key=seconds)
    if not seconds(link):
        return kind
    name = f"link {link.source}→{link.target}"
    whom = f"for rank {link.late} on {name}" if link.late is not None else f"on {name}"
    alone = seconds(link) == sum(map(seconds, found.links))
    return f"{kind}{'' if alone else ', above all'} {whom if waits else f'of {name}'}"


def _wait_s(link: LinkShare) -> float:
    return link.wait_s


def _wire_s(link: LinkShare) -> float:
    return link.wire_s


def percent(part: float) -> str:
    """For example 7 %; below 1 %, with one decimal."""
    if 0 < part < 0.001:
        return "less than 0.1 %"
    return f"{100 * part:.1f} %" if 0 < part < 0.01 else f"{100 * part:.0f} %"
