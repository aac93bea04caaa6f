"""`dinfer plan` and `dinfer verify`: plans as text or JSON, with their proof."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

from typer import Argument, Exit, Option

from dinfer.cli.root import BAD_INPUT, app, stop
from dinfer.config import Config, ConfigError
from dinfer.display import takes_colour
from dinfer.files import FileError, as_text, read_bytes, read_stream
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan, parse_plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import Counterexample, Proof
from dinfer.plan.verify import verify as verify_plan
from dinfer.planner.machine import MeasuredMachine
from dinfer.run.measurement import choose, without_auto
from dinfer.severity import Severity
from dinfer.trace.export import FORMAT as TRACE_FORMAT
from dinfer.trace.export import TraceError
from dinfer.trace.flight import is_dump
from dinfer.verdict.drawing import cycle_text
from dinfer.verdict.matching import MESSAGES
from dinfer.verdict.pipelining import ScheduleError, is_schedule, parse_schedule, verify_schedule
from dinfer.verdict.rendezvous import rendezvous_verdict
from dinfer.watching.evidence import Evidence
from dinfer.watching.given import ExplainError, read

MAX_BYTES = 1 << 26
"""of a plan; one of the largest allowed has 50 MB"""


@app.command()
def plan(
    layers: Annotated[int, Option(help="decoder layers of the model")],
    tokens: Annotated[int, Option(help="length of the prompt")],
    world_size: Annotated[int, Option(help="number of ranks")] = 3,
    chunk_size: Annotated[str, Option(help="tokens per chunk, or auto")] = "128",
    sync_strategy: Annotated[str, Option(help="pairwise, ring or auto")] = "pairwise",
    schedule: Annotated[str, Option(help="pipelined, lockstep, batched or auto")] = "pipelined",
    layer_split: Annotated[
        str, Option(help="first layer of every stage but the first, such as 14,28; or auto")
    ] = "",
    measured: Annotated[
        str,
        Option(
            help="by what to choose what is auto: a file of dinfer run --json whose run had something auto, too; "
            "blocks are then sent by that run's codec"
        ),
    ] = "",
    as_json: Annotated[bool, Option("--json", help="print JSON")] = False,
) -> None:
    """Print every rank's lanes, one op per line, and the proof. Status 0: proved; 1: refuted; 2: invalid input."""
    sizes = {"world_size": world_size, "chunk_size": chunk_size}
    ways = {"sync_strategy": sync_strategy, "schedule": schedule}
    try:
        values, auto = without_auto({**sizes, **ways, "layer_split": layer_split})
        config = Config.of(values)
        shape = partition(
            layers=layers,
            tokens=tokens,
            world_size=world_size,
            chunk_size=config.chunk_size,
            layer_split=config.layer_split or None,
        )
        built, because = build(shape, config.schedule, config.sync_strategy), ""
        if measured and not auto:
            raise ConfigError(
                f"--measured is {measured}, but nothing is auto, so nothing is chosen by it: give --schedule auto, "
                "--chunk-size auto, --layer-split auto or --sync-strategy auto, or leave --measured out."
            )
        if auto:
            machine = _machine(measured, auto[0])
            chosen = choose(machine, config.with_(codec=machine.codec), shape, auto)
            sent = (
                ""
                if machine.codec == "none"
                else f"codec {machine.codec}: as the measured run sent its blocks.\n"
            )
            built, because = chosen.candidate.plan(layers), f"{chosen}\n{sent}"
    except (ConfigError, PlanError) as error:
        stop(error, BAD_INPUT)
    verdict = verify_plan(built)
    comment = "\n".join(f"# {line}" for line in f"{because}{_in_words(verdict)}".splitlines())
    _end(built, verdict, f"{built.text()}{comment}", as_json)


def _machine(path: str, auto: str) -> MeasuredMachine:
    """What a run has measured, from its result. Raises ConfigError. `auto`: the parameter that needs it."""
    how = f"dinfer run --{auto.replace('_', '-')} auto --json FILE"
    if not path:
        raise ConfigError(
            f"{auto} is auto, which is chosen by what layers and links take, but no measurement is given: give a "
            f"value, or --measured FILE, which {how} writes."
        )
    try:
        found = json.loads(as_text(read_bytes(path, MAX_BYTES)))
        return MeasuredMachine.of(found["machine"])
    except OSError as error:
        raise ConfigError(f"the measurement {path!r} cannot be read: {error.strerror}.") from None
    except (FileError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{path!r} holds no measurement of layers and links: give a file that {how} has written."
        ) from None


@app.command()
def verify(
    file: Annotated[
        str,
        Argument(
            help="a plan, as `dinfer plan` prints it; actions of torch.distributed.pipelining, a line a rank; a "
            "trace or watch folder; - reads standard input"
        ),
    ],
    as_json: Annotated[bool, Option("--json", help="print JSON")] = False,
) -> None:
    """Prove a plan, or print the shortest counterexample; say whether a schedule of a pipeline, or what ranks were
    recorded to do, would hang if sends waited for their recvs. Status 0: proved; 1: refuted; 2: invalid input."""
    played: PlayedText | None = None
    try:
        if file != "-" and _is_record(Path(file)):
            played = _verify_record(file)
        else:
            data = read_stream(sys.stdin.buffer, MAX_BYTES) if file == "-" else read_bytes(file, MAX_BYTES)
            text = as_text(data)
            if is_schedule(text):
                played = _verify_schedule(text)
            else:
                parsed = parse_plan(text)
                verdict = verify_plan(parsed)
    except OSError as error:
        stop(f"the plan {file!r} cannot be read: {error.strerror}.", BAD_INPUT)
    except FileError as error:
        stop(f"the plan {file!r} cannot be read: {error}.", BAD_INPUT)
    except (PlanError, ScheduleError, TraceError, ExplainError) as error:
        stop(error, BAD_INPUT)
    if played:
        _end_with(played, as_json)
    severity = Severity.OK if verdict.proved else Severity.ERROR
    _end(parsed, verdict, severity.marked(_in_words(verdict), colour=takes_colour(sys.stdout)), as_json)


class PlayedText(NamedTuple):
    """What came of playing an order of ops: in words, whether it comes to its end, and more for JSON."""

    text: str
    proved: bool
    more: dict[str, Any]


def _is_record(path: Path) -> bool:
    """Whether it is a trace, a flight recorder's dump, or a folder."""
    if path.is_dir() or path.suffix in (".html", ".htm") or is_dump(path):
        return True
    try:
        with path.open("rb") as file:
            return TRACE_FORMAT.encode() in file.readline(4096)
    except OSError:
        return False  # reading it says why


def _verify_record(path: str) -> PlayedText:
    """Whether the recorded order of ops would hang with sends that wait for their recvs."""
    played = [_played(found) for found in read([path])]
    return next((one for one in played if not one.proved), played[-1])


def _played(found: Evidence) -> PlayedText:
    verdict = rendezvous_verdict(found.trace.events, found.groups)
    ops = sum(event.kind in MESSAGES or event.call is not None for event in found.trace.events)
    text = (
        f"proved: {len(found.ranks)} ranks, {ops} ops: this order comes to its end, also if every send waits"
    )
    if verdict.is_hung:
        text = f"refuted: with sends that wait for their recvs: {verdict}"
    return PlayedText(text, not verdict.is_hung, {"kind": verdict.kind, "ranks": list(verdict.ranks)})


def _verify_schedule(text: str) -> PlayedText:
    proof = verify_schedule(parse_schedule(text))
    found = proof.verdict
    more = {"kind": found.kind, "ranks": list(found.ranks)} if found else {}
    return PlayedText(str(proof), proof.proved, more)


def _end_with(played: PlayedText, as_json: bool) -> NoReturn:
    if as_json:
        found = {"proved": played.proved, "verdict": played.text, **played.more}
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        severity = Severity.OK if played.proved else Severity.ERROR
        print(severity.marked(played.text, colour=takes_colour(sys.stdout)))
    raise Exit(0 if played.proved else 1)


def _in_words(verdict: Proof | Counterexample) -> str:
    """The verdict in words; a cycle also as a drawing."""
    drawn = cycle_text(verdict) if isinstance(verdict, Counterexample) else ""
    return f"{verdict}\n{drawn}".strip()


def _end(given: Plan, verdict: Proof | Counterexample, text: str, as_json: bool) -> NoReturn:
    """Print the text, or the plan and its verdict as JSON, and exit."""
    if not as_json:
        print(text)
        raise Exit(0 if verdict.proved else 1)
    lanes = [
        [{"lane": lane.name, "ops": [str(op) for op in lane.ops]} for lane in rank] for rank in given.lanes
    ]
    found = {"proved": verdict.proved, "verdict": str(verdict)}
    if isinstance(verdict, Counterexample):
        found |= {"flaw": verdict.flaw, "sends": verdict.sends, "steps": list(verdict.steps)}
        found["places"] = [
            {"rank": p.rank, "lane": given.lanes[p.rank][p.lane].name, "index": p.index}
            for p in verdict.places
        ]
    print(json.dumps({**found, "id": f"{given.id:016x}", "ranks": lanes}, ensure_ascii=False, indent=1))
    raise Exit(0 if verdict.proved else 1)
