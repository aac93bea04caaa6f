"""`%dinfer` on threads: verbs, their words, and what is said when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.error import UsageError

import dinfer
from dinfer.magics import line as magics
from dinfer.magics.line import VERBS, act, usage
from dinfer.magics.words import split
from dinfer.results import Moved, Where

PROMPT = "The code of Lima is 471. What is the code of Lima? The code of Lima is"


@pytest.fixture(scope="module")
def shell() -> Iterator[Any]:
    """What the magics need of a shell, with a session of two ranks made by them."""
    found: Any = SimpleNamespace(user_ns={})
    act(found, "connect threads -n 2")
    act(found, "load demo threads=1")
    yield found
    act(found, "close")


@pytest.fixture
def begun(shell: Any) -> Any:
    """The shell with a run that stands at its start."""
    act(shell, f'prefill "{PROMPT}" chunk_size=8 sync_strategy=ring')
    return shell


def test_verbs_are_listed_one_a_line() -> None:
    said = str(act(None, "")).splitlines()
    assert [line.split()[0] for line in said[1:]] == list(VERBS)
    assert all(len(line.split(None, 1)) == 2 and len(line) < 120 for line in said)
    assert str(act(None, "help")).splitlines() == said


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_explains_itself(name: str) -> None:
    said = usage(name)
    assert said.startswith(f"%dinfer {name}")
    assert str(act(None, f"{name} --help")) == str(act(None, f"help {name}")) == said
    assert VERBS[name].about in said


def test_an_unknown_verb_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"knows no 'setp'\. Did you mean step\?"):
        act(None, "setp layer")
    with pytest.raises(UsageError, match="Did you mean where"):
        act(None, "help wher")


def test_words() -> None:
    assert split(r"""load C:\models\x 'two words' when="slower than 5 ms" """) == [
        "load", r"C:\models\x", "two words", "when=slower than 5 ms",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="a quote is not closed"):
        act(None, "prefill don't")


def test_without_a_session_it_says_how_to_get_one() -> None:
    with pytest.raises(UsageError, match=r"no session yet: %dinfer connect"):
        act(SimpleNamespace(user_ns={"session": 7}), "where")


def test_the_newest_session_serves_where_none_is_called_session(shell: Any) -> None:
    other = SimpleNamespace(user_ns={"debugged": shell.user_ns["session"], "later": 7})
    assert str(act(other, "log")).endswith(shell.user_ns["session"].log[-1])


def test_a_run_by_verbs_is_the_run_by_calls(begun: Any) -> None:
    session = begun.user_ns["session"]
    run = act(begun, "run")
    assert run is session.run
    assert (run.config.chunk_size, run.config.sync_strategy, run.config.prompt) == (8, "ring", PROMPT)
    assert str(run).startswith("run of 21 tokens in 3 chunks, pipelined, ring: paused\nrank 0: 0 of")
    step = act(begun, "step layer -n 2")
    assert isinstance(step, Moved)
    assert session.run.last_call == 'run.step("layer", 2)'
    assert act(begun, "back").after == act(begun, "step op").before
    assert act(begun, "undo").startswith('undid run.step("op", 1)')
    assert act(begun, "play wave 0.01") is None
    assert session.run.standing().playing == 'run.play("wave", per_second=0.01)'
    act(begun, "to 1 3")
    assert "c1 l3" in str(act(begun, "where"))
    assert isinstance(act(begun, "pause"), Where)


def test_a_variable_s_text_is_taken_as_it_is(begun: Any) -> None:
    text = '--free What is Lima\'s  code and chunk_size=3?\n"yes"'
    begun.user_ns |= {"text": text, "size": 4, "way": "ring"}
    act(begun, "prefill $text chunk_size=$size sync_strategy=$way")
    config = begun.user_ns["session"].run.config
    assert (config.prompt, config.chunk_size, config.sync_strategy) == (text, 4, "ring")
    assert begun.user_ns["session"].run.standing().state == "paused"
    act(begun, "prefill 5 $ are left")
    assert begun.user_ns["session"].run.config.prompt == "5 $ are left"


def test_a_sweep_takes_a_variable_as_one_prompt_or_several(begun: Any) -> None:
    begun.user_ns |= {"text": "What is it? x=1", "texts": ["The code", "of Lima is"], "sizes": [4, 8]}
    swept = act(begun, "sweep $text $texts chunk_size=$sizes max_new_tokens=1")
    found = [(row["prompt"], row["chunk_size"]) for row in swept.rows]
    assert found == [
        (text, size) for text in ("What is it? x=1", "The code", "of Lima is") for size in ("4", "8")
    ]


def test_ipython_leaves_variables_to_it() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell: Any = InteractiveShell()  # type: ignore[no-untyped-call]
    magics.load_into(shell)
    shell.user_ns["text"] = "a  'word"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magics, "act", lambda _, line: said.append(line))
        shell.run_cell("%dinfer prefill $text {text}")
    assert said == ["prefill $text {text}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chunksize=4", "no parameter 'chunksize'. Did you mean chunk_size"),
        ("sync_stratagy=ring", "sync_strategy"),
    ],
)
def test_a_misspelt_parameter_is_no_prompt(begun: Any, words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        act(begun, f"prefill What is {words}")


def test_what_has_no_flag_may_be_named_too(begun: Any) -> None:
    act(begun, "to layer=3 chunk=1")
    there = begun.user_ns["session"].run.standing().stands
    act(begun, "step unit=chunk")
    act(begun, "to 1 layer=3")
    assert begun.user_ns["session"].run.standing().stands == there
    act(begun, "prefill prompt='a b' chunk_size=2")
    assert begun.user_ns["session"].run.config.prompt == "a b"


def test_breakpoints_by_words_and_flags(begun: Any) -> None:
    assert str(act(begun, "break layer=2 chunk=1")) == "#1: after layer 2, chunk 1"
    assert str(act(begun, "break --rank 1 op=recv when=digest differs")) == str(
        begun.user_ns["session"].run.breakpoints[2]
    )
    assert str(act(begun, "break when=slower than 9999 ms layer=3")).endswith("when slower than 9999 ms")
    assert len(act(begun, "breaks")) == 3
    assert act(begun, "resume") is None
    assert "stopped at #1" in str(act(begun, "wait 60"))
    assert [one.number for one in act(begun, "clear 1")] == [2, 3]
    assert len(act(begun, "clear")) == 0


def test_faults_by_words_and_flags(begun: Any) -> None:
    run = begun.user_ns["session"].run
    line = "inject bitflip rank=1 layer=2 chunk=1 tensor=K head=0 token=9 where=memory"
    assert str(act(begun, line)) == (
        "armed: #1 bitflip in K of block c1 l2 on rank 1, head 0, token 9, in memory"
    )
    assert run.last_call.startswith('run.inject("bitflip", rank=1, layer=2, chunk=1, tensor="K"')
    assert "swap_kv of block c0 l5 on rank 1" in str(
        act(begun, "inject --layer 5 --chunk 0 swap_kv --where compute")
    )
    assert str(act(begun, "inject repeat_row")) == "armed: #3 repeat_row in decode, on all ranks"
    assert len(act(begun, "faults")) == 3
    assert [one.number for one in act(begun, "faults clear 2")] == [1, 3]
    assert len(act(begun, "faults clear")) == 0
    assert str(act(begun, "faults")).startswith("no faults")


def test_decode_step_by_step_and_restart(begun: Any) -> None:
    assert act(begun, "decode 2").count == 2
    assert act(begun, "step token").count == 3
    assert act(begun, "back token -n 2").count == 1
    assert "0 of" in str(act(begun, "restart"))
    assert "stands before its first layer" in str(act(begun, "where"))


def test_bisect_and_a_slow_link(begun: Any) -> None:
    act(begun, "inject 'slow link' source=0 target=1 ms=2.5")
    assert begun.user_ns["session"].run.faults[1].fault.ms == 2.5
    act(begun, "resume")
    act(begun, "wait")
    assert not act(begun, "bisect rank=1 what=logits").found
    with pytest.raises(UsageError, match=r"there is no .nowhere"):
        act(begun, "bisect nowhere")


def test_compare(begun: Any) -> None:
    act(begun, "step layer -n 2")
    assert act(begun, "compare").equal
    assert act(begun, "compare reference --unchunked dtype=bfloat16").within_tolerance
    assert begun.user_ns["session"].run.last_call.endswith('chunked=False, dtype="bfloat16")')


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare", "prefill has not begun"),
        ("compare apples", "'apples' cannot be compared with"),
        ("step furlong", "'furlong' is not a unit to step by"),
        ("step -n 0", "n is 0; it must be a whole number, at least 1"),
        ("step -n two", "n is 'two'; it must be a whole number."),
        (
            "step -5",
            "'-5' is not a unit to step by; use one of op, layer, wave, chunk, token. The number of steps is n, ",
        ),
        ("back 0", "The number of steps is n, at least 1."),
        ("to x 1", "chunk is 'x'; it must be a whole number."),
        ("wait soon", "timeout is 'soon'; it must be a number."),
        ("clear first", "NUMBER is 'first'; it must be a whole number."),
        ("debug 1 --port=x", "port is 'x'; it must be a whole number."),
        ("diff ranks=0,", "--ranks"),
        ("save there kv=,", "--kv"),
        ("kv x", "layer is 'x'; it must be a whole number from 0 to 5."),
        ("inject nan layer=1 token=x", "token is 'x'; it must be a whole number from 0 to "),
        ("inject nan layer=1 chunk=0 dim=x", "dim is 'x'; it must be a whole number from 0 to "),
        ("inject bitflip layer=1 chunk=0 bit=x", "bit is 'x'; it must be a whole number from 0 to "),
        ("inject nan layer=x", "layer is 'x'; it must be a whole number from 0 to 5."),
        ("inject nan layer=1 chunk=0 head=x", "head is 'x'; it must be a whole number from 0 to "),
        ("to 99 1", "99"),
        ("to 1", "required: layer. The line is %dinfer to chunk layer"),
        ("break layer=99", "there is no layer 99: the layers are 0 to 5."),
        ("break layer=nonsense", "layer is 'nonsense'; it must be a whole number from 0 to 5."),
        ("break chunk=-1", "there is no chunk -1: the chunks are 0 to 2."),
        ("break rank=2", "there is no rank 2: the ranks are 0 to 1."),
        ("break when=maybe", "it must be one of 'nan'"),
        ("break colour=red", "unrecognized arguments: colour=red. The line is %dinfer break ["),
        ("step layer 2", "unrecognized arguments: 2. The line is %dinfer step [-n N] [unit]"),
        ("prefill x --chunk-size 2", "unrecognized arguments: --chunk-size 2. The line is %dinfer prefill "),
        ("clear 7", "there is no breakpoint #7"),
        ("inject bitflop", "Did you mean bitflip?"),
        ("inject nan layer=99", "layer is 99; the layers of this run go from 0 to 5"),
        ("inject", "required: kind"),
        ("faults clear 7", "there is no fault #7"),
        ("prefill x chunk_size=0", "chunk_size is 0; it must be at least 1"),
        ("load no/such/folder", "no/such/folder"),
        ("connect nowhere", "'nowhere' is no place for ranks"),
        ("debug 1", "rank 1 is a thread of this process"),
        ("debug 9", "the ranks are 0 to 1"),
    ],
)
def test_errors_are_one_message(begun: Any, line: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        act(begun, line)
    assert said in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__cause__ is None


def test_mistakes_in_dinfer_keep_their_traceback(begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "where", VERBS["to"])
    monkeypatch.setattr(type(begun.user_ns["session"].run), "run_to", None)
    with pytest.raises(TypeError):
        act(begun, "where 1 1")


def test_in_plain_ipython() -> None:
    lines = [
        "%load_ext dinfer",
        "%dinfer connect threads -n 2",
        "%dinfer load demo",
        "prompt = 'The code of Lima is'",
        "%dinfer prefill $prompt chunk_size=4",
        "moved = %dinfer step wave",
        "print('moved', moved.moved)",
        "%dinfer where",
        "%dinfer stop",
        "%dinfer close",
    ]
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert "moved True" in done.stdout, done.stdout + done.stderr
    assert "knows no 'stop'. Did you mean" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_kv_is_looked_at_and_compared(begun: Any) -> None:
    act(begun, "decode 1")
    assert "layer 5 (of rank 1), tokens: rank 1 holds" in str(act(begun, "kv 5 rank=1"))
    assert str(act(begun, "diff")).startswith("both ranks hold the same 6 × ")
    assert str(act(begun, "diff 5 chunk=1 ranks=0,1")) == "both ranks hold the same 1 × 1 blocks, bit for bit"
    with pytest.raises(UsageError, match="there is no layer 9"):
        act(begun, "kv 9")


def test_a_report_is_written_and_its_place_told(begun: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert str(act(begun, f'report "{path}"')) == f"report: {path}"
    page = path.read_text(encoding="utf-8")
    assert "The run is not at the end of its prefill" in page
    assert "Lima" not in page
    act(begun, f'report "{path}" --prompt')
    assert "Lima" in path.read_text(encoding="utf-8")


def test_a_sweep_is_a_table(shell: Any) -> None:
    found = act(shell, f'sweep "{PROMPT}" sync_strategy=pairwise,ring chunk_size=8 max_new_tokens=3')
    assert [(row["sync_strategy"], row["text"].strip()) for row in found.rows] == [
        ("pairwise", "471"),
        ("ring", "471"),
    ]


def test_a_run_is_saved_and_its_place_told(begun: Any, tmp_path: Path) -> None:
    act(begun, "step chunk")
    folder = tmp_path / "one"
    assert str(act(begun, f'save "{folder}" kv=0,2')) == f"saved: {folder}"
    saved = dinfer.open(folder)
    assert "values of layers 0, 2, hidden states" in str(saved)
    assert saved.source().subject.texts == ()
    act(begun, f'save "{folder}" kv=none --no-hidden --prompt')
    assert str(dinfer.open(folder)).splitlines()[1] == "ranks 0–1: only digests"
    act(begun, f'save "{folder}"')
    assert "values of layers 0–5" in str(dinfer.open(folder))
    with pytest.raises(UsageError, match="kv names layer 9"):
        act(begun, f'save "{folder}" kv=9')
