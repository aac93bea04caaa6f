"""The command line: what it prints, its exit statuses, and one message for each mistake."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

from dinfer.cli import app
from dinfer.cli.desk import open_page
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.planner.costs import LayerCost
from dinfer.planner.machine import Links, LinkSpeed, MeasuredMachine
from dinfer.trace.simulated import paper_trace
from dinfer.version import __version__
from tests.support.runs import DEADLINE_S, wait_for
from tests.support.tiny import tiny_checkpoint

SIZES = ("--layers", "5", "--tokens", "10", "--chunk-size", "4")
PROVED, REFUTED, BAD_INPUT = 0, 1, 2


class Answer(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str


def dinfer(*arguments: object, stdin: str = "") -> Answer:
    """Run a command in this process."""
    result = CliRunner().invoke(app, list(map(str, arguments)), input=stdin)
    return Answer(result.exit_code, result.stdout, result.stderr)


def edited(plan: str, old: str, new: str) -> str:
    """A plan's text with one thing changed; fails where there is no such thing."""
    assert old in plan
    return plan.replace(old, new, 1)


def test_the_version() -> None:
    assert dinfer("--version") == Answer(0, f"dinfer {__version__}\n", "")


# -- plan and verify


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_a_plan_is_printed_with_its_proof_and_verifies(schedule: str, strategy: str) -> None:
    plan = dinfer("plan", *SIZES, "--schedule", schedule, "--sync-strategy", strategy)
    assert plan.status == PROVED
    assert plan.out.startswith("dinfer plan 1\nlayers 5, tokens 10, chunk_size 4\n")
    proof = plan.out.splitlines()[-1].removeprefix("# ")
    assert proof.startswith("proved: 3 ranks")
    assert dinfer("verify", "-", stdin=plan.out) == Answer(PROVED, f"{proof}\n", "")


def test_a_plan_goes_through_a_pipe_into_verify() -> None:
    command = (
        f"{sys.executable} -m dinfer.cli plan {' '.join(SIZES)} | {sys.executable} -m dinfer.cli verify -"
    )
    piped = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=250, check=False)
    assert (piped.returncode, piped.stderr) == (PROVED, "")
    assert piped.stdout.startswith("proved: 3 ranks")


def test_a_plan_in_a_file_verifies(tmp_path: Path) -> None:
    (tmp_path / "a.plan").write_text(dinfer("plan", *SIZES).out, encoding="utf-8")
    assert dinfer("verify", tmp_path / "a.plan").status == PROVED


def test_a_refuted_schedule_has_status_1_and_its_cycle() -> None:
    plan = dinfer("plan", *SIZES, "--schedule", "batched")
    assert plan.status == REFUTED
    assert "# refuted: " in plan.out
    verdict = dinfer("verify", "-", stdin=plan.out)
    assert verdict.status == REFUTED
    assert verdict.out.startswith("✖ error: ")
    lines = verdict.out.removeprefix("✖ error: ").splitlines()
    assert "\n".join(f"# {line}" for line in lines) in plan.out
    assert (lines[1][:2], lines[-1][:2]) == ("┌▶", "└─")


def test_json_holds_plan_and_verdict() -> None:
    plan = dinfer("plan", *SIZES, "--world-size", "2", "--json")
    found = json.loads(plan.out)
    assert (plan.status, found["proved"]) == (PROVED, True)
    assert found["verdict"].startswith("proved: 2 ranks")
    lanes = [{lane["lane"]: lane["ops"] for lane in rank} for rank in found["ranks"]]
    assert "layer c0 l0" in lanes[0]["compute"]
    assert "layer c0 l4" in lanes[1]["compute"]
    text = dinfer("plan", *SIZES, "--world-size", "2").out
    assert json.loads(dinfer("verify", "-", "--json", stdin=text).out) == found


def test_json_of_a_refutation_names_the_places() -> None:
    plan = dinfer("plan", *SIZES, "--schedule", "batched").out
    verdict = dinfer("verify", "-", "--json", stdin=plan)
    found = json.loads(verdict.out)
    assert (verdict.status, found["proved"], found["flaw"], found["sends"]) == (
        1,
        False,
        "cycle",
        "rendezvous",
    )
    assert len(found["steps"]) == len(found["places"]) > 1
    for step, place in zip(found["steps"], found["places"], strict=True):
        lane = next(lane for lane in found["ranks"][place["rank"]] if lane["lane"] == place["lane"])
        assert lane["ops"][place["index"]].startswith("send kv")
        assert step.startswith(f"rank {place['rank']} sends")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  send kv c1 l0 -> 1, 4 tokens\n", "", "refuted (mismatch): "),
        ("  recv kv c2 l2 <- 0, 2 tokens\n", "", "has no recv on rank 1 to meet"),
        ("send kv c1 l0 -> 1, 4 tokens", "send kv c1 l0 -> 1, 3 tokens", "refuted (size): "),
        ("send kv c1 l0 -> 1, 4 tokens", "send kv c1 l9 -> 1, 4 tokens", "layer 9 is out of range"),
        ("  norm c2 l5\n", "", "needs final, which no op on rank 1 makes"),
    ],
)
def test_an_edited_plan_is_refuted_in_its_own_words(old: str, new: str, words: str) -> None:
    plan = dinfer("plan", *SIZES, "--world-size", "2", "--schedule", "lockstep").out
    verdict = dinfer("verify", "-", stdin=edited(plan, old, new))
    assert verdict.status == REFUTED
    assert words in verdict.out
    assert verdict.err == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this is not a plan: it is empty"),
        ("hello\n", "this is not a plan: it starts with 'hello'"),
        ("dinfer plan 1\n", "the plan's header is incomplete"),
    ],
)
def test_what_is_not_a_plan_has_status_2(text: str, words: str) -> None:
    answer = dinfer("verify", "-", stdin=text)
    assert (answer.status, answer.out) == (BAD_INPUT, "")
    assert words in answer.err


def test_a_line_that_is_no_op_is_named_by_its_number() -> None:
    plan = dinfer("plan", *SIZES).out
    answer = dinfer("verify", "-", stdin=edited(plan, "  embed c0", "  embrace c0"))
    assert answer.status == BAD_INPUT
    assert answer.err.startswith("dinfer: ✖ error: line 6: 'embrace c0' is not an op.")


def test_a_plan_file_that_is_not_there_has_status_2(tmp_path: Path) -> None:
    answer = dinfer("verify", tmp_path / "none.plan")
    assert (answer.status, answer.err.count("dinfer: ")) == (BAD_INPUT, 1)
    assert "none.plan" in answer.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--schedule", "pipelind"), "Did you mean pipelined?"),
        (("--sync-strategy", "rng"), "Did you mean ring?"),
        (("--world-size", "6"), "6"),
        (("--chunk-size", "0"), "chunk_size is 0"),
        (("--tokens", "0"), "tokens is 0"),
        (("--layer-split", "3"), "layer_split"),
    ],
)
def test_a_plan_that_cannot_be_made_has_status_2(flags: Sequence[str], words: str) -> None:
    answer = dinfer("plan", *SIZES, *flags)
    assert (answer.status, answer.out) == (BAD_INPUT, "")
    assert words in answer.err


# -- run: mistakes, before any rank starts


MODEL = {"layers": 4, "max_position_embeddings": 32}


def mistake(folder: Path, *arguments: object) -> str:
    """The one message with which `dinfer run` refuses; it starts nothing and leaves nothing."""
    answer = dinfer("run", "--log-dir", folder / "logs", *arguments)
    assert (answer.status, answer.out) == (BAD_INPUT, "")
    assert answer.err.startswith("dinfer: ✖ error: ")
    assert answer.err.count("dinfer: ") == 1
    assert not (folder / "logs").exists()
    return answer.err.removeprefix("dinfer: ✖ error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "the prompt is empty"),
        (("--prompt-ids", ",".join(["1"] * 33)), "32 positions: shorten the prompt"),
        (("--prompt-ids", "1,2", "--world-size", "5"), "use at most 4 ranks"),
        (("--prompt-ids", "1,2", "--schedule", "piplined"), "Did you mean pipelined?"),
        (("--prompt-ids", "1,2", "--sync-strategy", "pairwize"), "Did you mean pairwise?"),
        (("--prompt-ids", "1,2", "--threads", "auto"), "threads is 'auto'; it must be a whole number."),
        (("--prompt-ids", "1,2", "--sync-strategy", "Auto"), "sync_strategy is 'Auto'; it must be one of"),
        (("--prompt-ids", "1,2", "--chunk-size", "four"), "chunk_size is 'four'; it must be a whole number."),
        (("--prompt-ids", "1,2", "--prompt", "x"), "prompt and prompt_ids are given"),
        (("--prompt-file", "/nowhere/prompt.txt"), "prompt_file '/nowhere/prompt.txt' cannot be read"),
        (("--prompt-ids", "1,2", "--schedule", "batched"), "rank 0 sends"),
        (("--prompt-ids", "1,2", "--config", "/nowhere/run.toml"), "'/nowhere/run.toml' cannot be read"),
    ],
)
def test_a_mistake_is_told_before_ranks_start(
    model: Path, tmp_path: Path, flags: Sequence[str], words: str
) -> None:
    assert words in mistake(tmp_path, "--model", model, "--chunk-size", "4", *flags)


MEASURED = MeasuredMachine(
    (LayerCost(1e-4, 0, 1e-4), LayerCost(2e-4, 0, 2e-4)),
    Links((LinkSpeed(0, 1, 1e-5, 1e9, 1e9), LinkSpeed(1, 0, 1e-5, 1e9, 1e9))),
    64,
    128,
)


def test_plan_chooses_by_what_a_run_has_measured(tmp_path: Path) -> None:
    """Rank 1 takes twice as long for a layer, so it gets fewer."""
    (tmp_path / "found.json").write_text(json.dumps({"machine": MEASURED.as_dict()}), encoding="utf-8")
    sizes = ("--layers", 6, "--tokens", 64, "--world-size", 2, "--chunk-size", 16)
    asked = ("--layer-split", "auto", "--measured", tmp_path / "found.json")
    answer = dinfer("plan", *sizes, *asked)
    assert answer.status == PROVED
    assert answer.out.startswith("dinfer plan 1\n")
    assert "# layer_split 4: stages of 4, 2 layers take" in answer.out
    assert dinfer("verify", "-", stdin=answer.out).status == PROVED
    found = json.loads(dinfer("plan", *sizes, *asked, "--json").out)
    assert "layer c0 l3" in {lane["lane"]: lane["ops"] for lane in found["ranks"][0]}["compute"]


def test_plan_without_a_measurement_says_where_one_comes_from(tmp_path: Path) -> None:
    (tmp_path / "bare.json").write_text('{"machine": null}', encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    told = dinfer("plan", *SIZES, "--chunk-size", "auto")
    assert told == Answer(
        BAD_INPUT,
        "",
        "dinfer: ✖ error: chunk_size is auto, which is chosen by what layers and links take, but no measurement is "
        "given: give a value, or --measured FILE, which dinfer run --chunk-size auto --json FILE writes.\n",
    )
    for name in ("bare.json", "list.json"):
        told = dinfer("plan", *SIZES, "--chunk-size", "auto", "--measured", tmp_path / name)
        assert f"{name}' holds no measurement of layers and links: give a file that dinfer run" in told.err
    (tmp_path / "found.json").write_text(json.dumps({"machine": MEASURED.as_dict()}), encoding="utf-8")
    told = dinfer("plan", *SIZES, "--schedule", "auto", "--measured", tmp_path / "found.json")
    assert "2 ranks were measured, but the plan has 3" in told.err


def test_plan_refuses_a_measurement_by_which_nothing_is_chosen() -> None:
    told = dinfer("plan", *SIZES, "--measured", "/no/such/file")
    assert told.status == BAD_INPUT
    assert "--measured is /no/such/file, but nothing is auto" in told.err


def test_plan_chooses_for_the_codec_of_the_measured_run(tmp_path: Path) -> None:
    """Blocks of a quarter of the size take less of a slow link."""
    slow = Links(tuple(LinkSpeed(*pair, 1e-5, 1e6, 1e6) for pair in ((0, 1), (1, 0))))
    sizes = ("--layers", 6, "--tokens", 64, "--world-size", 2, "--chunk-size", 16)
    told = {}
    for codec in ("none", "int8"):
        path = tmp_path / f"{codec}.json"
        machine = replace(MEASURED, links=slow, codec=codec, block_bytes=2048)
        path.write_text(json.dumps({"machine": machine.as_dict()}), encoding="utf-8")
        told[codec] = dinfer("plan", *sizes, "--schedule", "auto", "--measured", path).out
    assert "codec" not in told["none"]
    assert "# codec int8: as the measured run sent its blocks.\n" in told["int8"]
    taken = {codec: re.search(r"instead of ([\d.]+) s, so", text) for codec, text in told.items()}
    assert all(taken.values()), told
    assert len({found[1] for found in taken.values() if found}) == 2


def test_a_config_file_is_judged_like_flags(model: Path, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text("prompt_ids = [1, 2]\nchunk_siz = 4\n")
    assert "unknown parameter 'chunk_siz'. Did you mean chunk_size?" in mistake(
        tmp_path, "--model", model, "--config", toml
    )
    toml.write_text("prompt_ids = \n")
    assert "is not valid TOML" in mistake(tmp_path, "--model", model, "--config", toml)
    toml.write_text('schedule = "lockstp"\nprompt_ids = [1, 2]\n')
    assert "Did you mean lockstep?" in mistake(tmp_path, "--model", model, "--config", toml)


def test_a_damaged_checkpoint_is_told_before_ranks_start(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=3)
    config = json.loads((folder / "config.json").read_text())
    run = (tmp_path, "--prompt-ids", "1,2", "--model")
    assert "nowhere does not exist" in mistake(*run, tmp_path / "nowhere")
    assert "has no config.json" in mistake(*run, tmp_path)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "mamba" in mistake(*run, folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is truncated" in mistake(*run, folder)
    weights.unlink()
    assert "has no weights" in mistake(*run, folder)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        (("run", "--chunk-siz", "4"), "--chunk-size"),
        (("run", "--chunksize", "4"), "--chunk-size"),
        (("run", "--modell", "demo"), "--model"),
        (("plan", "--layer", "3"), "--layers"),
        (("bench", "--compar", "pairwise,ring"), "--compare"),
        (("rnu",), "run"),
        (("docter",), "doctor"),
    ],
)
def test_an_unknown_flag_or_command_is_answered_with_the_nearest(given: Sequence[str], nearest: str) -> None:
    answer = dinfer(*given)
    wrong = given[-2] if given[-2:-1] and given[-2].startswith("--") else given[-1]
    assert answer.status == BAD_INPUT
    words = rf"No such (option:?|command) '?{wrong}\b.*\W{nearest}\b"  # typer 0.16 breaks lines in it
    assert re.search(words, answer.err, re.DOTALL), answer.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tokens", "512,2048"), "tokens is 512,2048; several values need --compare pairwise,ring"),
        (("--chunk-size", "0"), "chunk_size is '0'; it must be at least 1."),
        (("--tokens", "many"), "tokens is 'many'; it must be whole numbers"),
        (("--plot", "x.html"), "plot needs --compare"),
        (("--compare", "pairwise,rng"), "compare is 'pairwise,rng'; it must be two of pairwise, ring"),
        (("--compare", "pairwise,ring", "--repeats", "1"), "--compare needs at least 2"),
        (("digests", "--tokens", "512,1024"), "bench digests takes one number, at least 1"),
        (("links", "--rate", "fast"), "rate is 'fast'; it must be a number with mbit or gbit"),
        (("links", "--rate", "0.1mbit"), "from 1mbit to 100gbit"),
        (("links", "--rate", ","), "rate is empty"),
        (("links", "--hosts", "1"), "hosts is 1; links need at least 2"),
        (("links", "--tokens", "512,1024"), "bench links takes one number, at least 1"),
        (("planner", "--world-size", "1"), "bench planner needs at least 2 ranks"),
        (("cores", "--world-size", "1"), "bench cores needs at least 2 ranks"),
        (("cores", "--tokens", "128"), "bench cores needs at least two chunks"),
        (("digests", "--repeats", "0"), "repeats is 0; it must be at least 1"),
        (("digests", "--world-size", "0"), "world_size is 0; it must be at least 1"),
        (("--compare", "pairwise,ring", "--plot", "x.pdf"), "plot is 'x.pdf'; it must end in .html"),
    ],
)
def test_a_benchmark_that_cannot_be_made_is_told_before_it_starts(flags: Sequence[str], words: str) -> None:
    answer = dinfer("bench", *flags)
    assert (answer.status, answer.out) == (BAD_INPUT, "")
    assert words in answer.err


@pytest.mark.parametrize("command", [("run", "--prompt", "a"), ("bench",)])
def test_a_bug_keeps_its_traceback(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("dinfer.config.Config.of", fail)
    with pytest.raises(ValueError, match="a bug"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_mistake_is_told_without_importing_torch(tmp_path: Path) -> None:
    """So that it takes a fraction of a second."""
    script = (
        "import sys, dinfer.cli\n"
        "try: dinfer.cli.main()\n"
        "except SystemExit as end: status = end.code\n"
        "print(status, sorted({'torch', 'transformers', 'zmq'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script, "run", "--model", str(tmp_path), "--prompt", "x"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
    assert ran.stdout == "2 []\n"


def test_every_parameter_is_a_flag_of_run() -> None:
    from dataclasses import fields

    from dinfer.config import Config

    shown = dinfer("run", "--help").out
    assert dinfer("run", "--help").status == 0
    for item in fields(Config):
        assert f"--{item.name.replace('_', '-')}"[:20] in shown


def help_texts(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """What --help shows of a command, its parameters and its own commands."""
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
    for other, sub in getattr(command, "commands", {}).items():
        yield from help_texts(sub, f"{name} {other}")


def test_no_word_of_help_is_taken_for_markup() -> None:
    """Typer shows help as rich markup, in which `[default: 3]` is a style, and is not shown."""
    from rich.text import Text
    from typer.main import get_command

    lost = [
        (name, text)
        for name, text in help_texts(get_command(app), "dinfer")
        if Text.from_markup(text).plain != text
    ]
    assert lost == []


def test_help_of_run_says_defaults_and_what_is_allowed() -> None:
    from dataclasses import fields
    from typing import get_args, get_type_hints

    from dinfer.config import Config

    shown = " ".join(dinfer("run", "--help").out.replace("│", " ").split())
    kinds = get_type_hints(Config)
    for item in fields(Config):
        for allowed in get_args(kinds[item.name]):
            if isinstance(allowed, str):
                assert allowed in shown, item.name
    assert shown.count("auto: the fastest by what the ranks measure first") == 4
    assert "auto: of none and lossless, the fastest by what the ranks measure first" in shown
    for said in ("default: 128", "default: pairwise", "default: auto", "default: 60.0"):
        assert said in shown


def test_a_terminal_that_lacks_a_character_does_not_end_the_command() -> None:
    """Python would raise: "✓🙂" is not in GBK, nor "中" in ASCII."""
    script = "import dinfer.cli, sys; dinfer.cli.app = lambda: print('中✓🙂'); dinfer.cli.main()"
    for encoding, shown in (("gbk", "中\\u2713\\U0001f642"), ("utf-8", "中✓🙂")):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, timeout=250, check=True, env=environment
        )
        assert ran.stdout.decode(encoding) == f"{shown}\n"


# -- standard output that is closed, full or left; a working folder that is gone

CLOSED_PIPE = 141


def shell(command: str, folder: Path | None = None) -> Answer:
    """Run a command as a shell does; `dinfer` is the command line."""
    function = f'dinfer() {{ "{sys.executable}" -m dinfer.cli "$@"; }}\n'
    folders = filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
    ran = subprocess.run(
        ["bash", "-c", function + command],
        capture_output=True, text=True, timeout=250, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )  # fmt: skip
    return Answer(ran.returncode, ran.stdout, ran.stderr)


@pytest.mark.parametrize(
    "command",
    [
        "plan --layers 36 --tokens 4000",  # more than a buffer
        "plan --layers 2 --tokens 3 --world-size 1",
        "plan --layers 36 --tokens 4000 --json",
    ],
)
def test_a_pipe_that_nobody_reads_any_more_is_no_error(command: str) -> None:
    found = shell(f"dinfer {command} | true; echo ${{PIPESTATUS[0]}}")
    assert found == Answer(0, f"{CLOSED_PIPE}\n", "")


def test_the_first_line_of_a_plan() -> None:
    found = shell("dinfer plan --layers 36 --tokens 4000 | head -1; echo ${PIPESTATUS[0]}")
    assert found == Answer(0, f"dinfer plan 1\n{CLOSED_PIPE}\n", "")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("plan --layers 2 --tokens 3 --world-size 1", PROVED),
        ("plan --layers 36 --tokens 40 --schedule batched", REFUTED),
        ("plan --layers 0 --tokens 3", BAD_INPUT),
    ],
)
def test_closed_streams_change_no_status(command: str, status: int) -> None:
    assert shell(f"dinfer {command} >&-").status == status
    assert shell(f"dinfer {command} >&- 2>&-").status == status
    assert shell(f"dinfer {command} <&- >&- 2>&-").status == status


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("layers", [2, 80])
def test_a_full_device_is_named(layers: int) -> None:
    found = shell(f"dinfer plan --layers {layers} --tokens 4000 --world-size 2 > /dev/full")
    assert found.status == 1
    assert found.err.startswith("dinfer: standard output cannot be written: No space left")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        *("plan --layers 2 --tokens 3", "verify x", "run --prompt x", "report x"),
        *("doctor", "clean", "vscode", "lab", "bench"),
    ],
)
def test_a_working_folder_that_was_deleted_is_named(tmp_path: Path, command: str) -> None:
    found = shell(f"mkdir gone && cd gone && rmdir ../gone && dinfer {command}", tmp_path)
    assert (found.status, found.out) == (BAD_INPUT, "")
    assert found.err.startswith("dinfer: the working folder")
    assert found.err.count("\n") == 1


# -- report


def test_a_trace_becomes_a_report_and_two_are_compared(tmp_path: Path) -> None:
    for strategy in ("pairwise", "ring"):
        plan = build(partition(layers=4, tokens=16, world_size=2, chunk_size=8), "pipelined", strategy)
        paper_trace(plan).export("jsonl", tmp_path / f"{strategy}.jsonl")
    one, two = tmp_path / "one.html", tmp_path / "two.html"
    assert dinfer("report", tmp_path / "ring.jsonl", "-o", one) == Answer(0, f"report: {one}\n", "")
    assert "not checked" in one.read_text(encoding="utf-8")
    assert dinfer("report", tmp_path / "pairwise.jsonl", one, "-o", two).status == 0
    assert re.search(r'<h1 id="verdict">(pairwise|one) took', two.read_text(encoding="utf-8"))
    saved = tmp_path / "saved"  # the folder of a saved run has its trace
    saved.mkdir()
    (tmp_path / "ring.jsonl").rename(saved / "trace.jsonl")
    assert dinfer("report", tmp_path / "pairwise.jsonl", saved, "-o", two, "--overwrite").status == 0
    assert re.search(r'<h1 id="verdict">(pairwise|saved) took', two.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["r.pdf", "out.json", "R.Html", "r.htm", "bare"])
def test_a_report_is_written_under_a_name_of_html_only(name: str, tmp_path: Path) -> None:
    plan = build(partition(layers=4, tokens=16, world_size=2, chunk_size=8), "pipelined", "ring")
    trace, path = paper_trace(plan).export("jsonl", tmp_path / "a.jsonl"), tmp_path / name
    found = dinfer("report", trace, "-o", path)
    if path.suffix in (".pdf", ".json"):
        assert (found.status, found.out) == (BAD_INPUT, "")
        assert f"a report is an HTML page, and {name!r} ends in {path.suffix}" in found.err
        assert not path.exists()
    else:
        assert found == Answer(0, f"report: {path}\n", "")


def test_a_report_replaces_nothing_unless_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = build(partition(layers=4, tokens=16, world_size=2, chunk_size=8), "pipelined", "ring")
    paper_trace(plan).export("jsonl", tmp_path / "a.jsonl")
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    assert dinfer("report", "a.jsonl") == Answer(0, "report: report-2.html\n", "")
    refused = dinfer("report", "a.jsonl", "-o", "report.html")
    assert (refused.status, refused.out) == (BAD_INPUT, "")
    assert "exists" in refused.err
    assert "--overwrite" in refused.err
    assert Path("report.html").read_text(encoding="utf-8") == "mine"
    assert dinfer("report", "a.jsonl", "-o", "report.html", "--overwrite").status == 0
    assert Path("report.html").stat().st_size > 1000


def test_what_is_no_trace_becomes_no_report(tmp_path: Path) -> None:
    (tmp_path / "no.jsonl").write_text("no\n")
    (tmp_path / "no.html").write_text("<p>no</p>")
    for given, words in (
        ("no.jsonl", "is not a trace"),
        ("no.html", "holds no trace"),
        ("none", "cannot be read"),
    ):
        answer = dinfer("report", tmp_path / given, "-o", tmp_path / "report.html")
        assert (answer.status, answer.out) == (BAD_INPUT, "")
        assert words in answer.err
    assert not (tmp_path / "report.html").exists()


# -- files that are written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("report", "run.jsonl", "-o", "run.jsonl"),
            "--output and the trace 'run.jsonl' are one file, run.jsonl",
        ),
        (
            ("report", "run.jsonl", "-o", "p.txt/x.html"),
            "--output is 'p.txt/x.html', but '{here}/p.txt' is no folder",
        ),
        (("report", "run.jsonl", "-o", "."), "--output is '.', which is a folder; give a file"),
        (
            ("run", "--prompt-file", "p.txt", "--json", "p.txt"),
            "--json and --prompt-file are one file, p.txt",
        ),
        (("run", "--prompt", "x", "--json", "a", "--trace", "./a"), "--trace and --json are one file, ./a"),
        (
            ("run", "--prompt", "x", "--json", "p.txt/new/a"),
            "--json is 'p.txt/new/a', but '{here}/p.txt' is no",
        ),
        (("bench", "--json", "p.txt/new/a"), "--json is 'p.txt/new/a', but '{here}/p.txt' is no"),
        (("lab", "--json", "p.txt/new/a"), "--json is 'p.txt/new/a', but '{here}/p.txt' is no"),
    ],
)
def test_outputs_are_checked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a prompt")
    (tmp_path / "run.jsonl").write_text("a trace")
    answer = dinfer(*arguments)
    assert (answer.status, answer.out) == (BAD_INPUT, "")
    assert words.format(here=tmp_path) in answer.err
    assert (tmp_path / "p.txt").read_text() == "a prompt"
    assert (tmp_path / "run.jsonl").read_text() == "a trace"


# -- desk


class BlockingBrowser:
    """Opens a page and waits until it is loaded."""

    def __init__(self, name: str) -> None:
        self.name, self.pages = name, list[str]()

    def open(self, address: str) -> bool:
        with urlopen(address, timeout=DEADLINE_S) as page:
            self.pages.append(page.read().decode())
        return True


def test_the_desk_answers_a_browser_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = build(partition(layers=4, tokens=16, world_size=2, chunk_size=8), "pipelined", "ring")
    paper_trace(plan).export("jsonl", tmp_path / "a.jsonl")
    browser = BlockingBrowser("/usr/bin/firefox")

    async def until_it_is_seen() -> None:
        await asyncio.to_thread(wait_for, lambda: browser.pages, "the browser has the page")

    monkeypatch.setattr("webbrowser.get", lambda: browser)
    monkeypatch.setattr("webbrowser.open", browser.open)
    monkeypatch.setattr("dinfer.views.served.app.serve_forever", until_it_is_seen)
    done = dinfer("desk", tmp_path / "a.jsonl")
    assert done.status == 0, done
    assert "a.jsonl" in browser.pages[0]


@pytest.mark.parametrize("name", ["w3m", "/usr/bin/www-browser"])
def test_no_browser_is_opened_in_the_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = BlockingBrowser(name)
    monkeypatch.setattr("webbrowser.get", lambda: browser)
    open_page("http://127.0.0.1:1/")
    assert browser.pages == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (
            ("watch", "--", "no-such-program"),
            127,
            "the command 'no-such-program' was not found: it is not on the path",
        ),
        (
            ("watch", "--folder", "file", "--", "true"),
            BAD_INPUT,
            "--folder is 'file', which is a file: give another",
        ),
        (("vscode", "--config", "no.toml"), BAD_INPUT, "config file 'no.toml' cannot be read"),
        (("vscode", "--config", "file"), BAD_INPUT, "unknown parameter 'chunk'. Did you mean chunk_size?"),
        (("bench", "--world-size", "0"), BAD_INPUT, "world_size is 0; it must be at least 1"),
    ],
)
def test_what_is_given_is_looked_at_before_anything_begins(
    arguments: tuple[str, ...], status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("chunk = 3\n", encoding="utf-8")
    answer = dinfer(*arguments)
    assert (answer.status, answer.out) == (status, "")
    assert said in answer.err
    assert "shards" not in answer.err  # of a checkpoint that is made
    assert not Path(".vscode").exists()


def test_a_command_beside_this_python_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `.venv/bin/dinfer` is called, and nobody has activated the environment."""
    from dinfer.watching.command import found

    python = Path(sys.executable)
    monkeypatch.setenv("PATH", os.devnull)
    assert found([python.name, "-c", "1"]) == [str(python.parent / python.name), "-c", "1"]
    assert found(["no-such-program"]) == ["no-such-program"]
