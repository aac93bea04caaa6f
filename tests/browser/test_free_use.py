"""Free use: all that a person may do with a run, by panel and by cell in turn, in an order drawn from a seed, on a real
cluster in JupyterLab. After each action panel and cells say the same, and no exception but dinfer's own has been seen;
memory, descriptors, threads and the page stay bounded.

DINFER_FREE_S says how long, DINFER_FREE_SEED in which order, DINFER_FREE_SIZE how many tokens by what chunk, and
DINFER_FREE_LOG the file that has a line for each action."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import CDPSession, Page

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import Debugger
from tests.browser.test_soak import ASK
from tests.support.jupyter import Lab, Notebook
from tests.support.tiny import tiny_checkpoint

SECONDS = float(os.environ.get("DINFER_FREE_S", "120"))
SEED = int(os.environ.get("DINFER_FREE_SEED", "1"))
TOKENS, CHUNK = map(int, os.environ.get("DINFER_FREE_SIZE", "2700x16").split("x"))
pytestmark = [
    pytest.mark.browser,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(2 * SECONDS + 600),
]

LAYERS, RANKS = 6, 3
SETTLE_S = 180.0
"""how long an action may take on a busy machine: a reference of 8,000 tokens, or a rank that is brought back"""
MEASURE_EVERY = 12
"""actions"""

CONNECT, SHOW, NEXT, CLOSE = range(4)


def cells(model: Path) -> list[str]:
    return [
        f"""
%load_ext dinfer
import dinfer
MODEL, TOKENS, CHUNK = {str(model)!r}, {TOKENS}, {CHUNK}
session = dinfer.connect(n=3, start=False)
session.load(MODEL)
"""
        + HELPERS
        + "\nbegin()",
        "session.debugger()",
        "session.debugger()",
        "session.close()",
    ]


HELPERS = '''
import gc, io, json, os, random, signal, sys, threading, time, traceback
from contextlib import redirect_stdout
import psutil
from dinfer.errors import DinferError
from dinfer.run.state import MOVING
from dinfer.views.panel import desk
from dinfer.views.bins import BinSize, binned
from dinfer.views.cells import CellMap, marked

WORKERS = ("dinfer panel worker", "dinfer panel pauser", "dinfer panel editor")
foreign = []  # tracebacks of exceptions that are not dinfer's own

def note(error):
    if not isinstance(error, (DinferError, KeyboardInterrupt)):
        foreign.append("".join(traceback.format_exception(error)))

def watched(ask):
    def asked(self, action):
        def do():
            try:
                return action.do()
            except BaseException as error:
                note(error)
                raise
        ask(self, action._replace(do=do))
    return asked

desk.Worker.ask = watched(desk.Worker.ask)
threading.excepthook = lambda args: note(args.exc_value)
sys.unraisablehook = lambda args: note(args.exc_value or RuntimeError(str(args.err_msg)))

def begin(**given):
    """A run of a prompt of its own."""
    global run
    ids = random.Random(TOKENS).choices(range(2, 120), k=TOKENS)
    run = session.prefill(ids, **{"chunk_size": CHUNK, "max_new_tokens": 8, "paused": True, **given})

def act(code):
    """Run a cell; what it said, or the error, as JSON."""
    said, error = io.StringIO(), ""
    with redirect_stdout(said):
        try:
            try:
                print(repr(eval(code, globals())))
            except SyntaxError:
                exec(code, globals())
        except BaseException as found:
            note(found)
            error = f"{type(found).__name__}: {found}"
    print(json.dumps({"said": said.getvalue()[-600:], "error": error[:900]}))

def tell(geometry):
    """The run as cells see it."""
    standing = run.standing()
    states, drawn = marked(CellMap(run.plan).states(standing.stands), standing.marks), ""
    if geometry:
        drawn = binned(states, BinSize(geometry["perLayer"], geometry["perChunk"], geometry["perRank"])).tobytes().hex()
    at_work = any(one.name in WORKERS for one in threading.enumerate())
    print(json.dumps({
        "state": str(standing.state), "moving": standing.state in MOVING or bool(standing.playing) or at_work,
        "over": standing.over, "remedy": standing.remedy, "decoded": standing.decoded,
        "faults": len(run.faults), "stops": len(run.breakpoints),
        "positions": [sum(stand.positions) for stand in standing.stands], "drawn": drawn, "foreign": foreign,
        "call": run.last_call, "message": standing.message[:300],
    }))

def measure():
    """What this process holds."""
    gc.collect()
    me = psutil.Process()
    engines = [psutil.Process(facts.pid) for facts in session.ranks.cluster.facts]
    of = lambda number: {one.pid: number(one) for one in engines}
    print(json.dumps({
        "MB of the kernel": me.memory_info().rss / 1e6, "threads": me.num_threads(), "files": me.num_fds(),
        "MB of ranks": of(lambda one: one.memory_info().rss / 1e6),
        "threads of ranks": of(psutil.Process.num_threads),
        "files of ranks": of(psutil.Process.num_fds),
    }))

def strike(rank, name):
    os.kill(session.ranks.cluster.facts[rank].pid, getattr(signal, name))
'''


class Free:
    """The notebook in use: its panel, its kernel, and a log."""

    def __init__(self, page: Page, panel: Debugger, dice: random.Random, log: Path) -> None:
        self.page, self.panel, self.dice, self.log = page, panel, dice, log
        self.count, self.stopped = 0, set[int]()
        self.began = time.monotonic()

    def ask(self, code: str) -> Any:
        """Run code in the kernel; what it printed, as JSON."""
        said: str = self.page.evaluate(ASK, code)
        lines = [line for line in said.splitlines() if line.startswith("{")]
        assert lines, f"{code!r} printed {said!r}"
        return json.loads(lines[-1])

    def act(self, code: str) -> str:
        """A cell; what it said, or its error."""
        found = self.ask(f"act({code!r})")
        return str(found["error"] or found["said"])

    def press(self, action: str) -> str:
        """A button of the panel."""
        button = self.panel.root.locator(f'button[data-do="{action}"]').first
        if not button.is_visible() or not button.is_enabled():
            return "cannot be pressed"
        button.click()
        return "pressed"

    def submit(self, form: str, **values: str) -> str:
        """A form of the panel."""
        button = self.panel.root.locator(f'button[data-form="{form}"]')
        if button.get_attribute("aria-expanded") != "true":
            button.click()
        place = self.panel.root.locator("form.dinfer-verb")
        for name, value in values.items():
            field = place.locator(f'[name="{name}"]')
            if field.evaluate("(one) => one.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)
        submit = place.locator("button[type=submit]")
        if not submit.is_enabled():
            return "cannot be submitted"
        submit.click()
        return "submitted"

    def write(self, **what: object) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": round(time.monotonic() - self.began, 1), **what}) + "\n")

    def settled(self) -> dict[str, Any]:
        """Wait until nothing is at work and panel and cells say the same; that."""
        deadline, seen = time.monotonic() + SETTLE_S, ""
        while time.monotonic() < deadline:
            geometry = json.loads(self.panel.canvas.get_attribute("data-geometry") or "{}")
            told = self.ask(f"tell({geometry!r})")
            assert not told["foreign"], "\n".join(told["foreign"])
            seen = self.differs(told)
            if not seen:
                return dict(told)
            self.page.wait_for_timeout(100)
        self.panel.root.screenshot(path=self.log.with_suffix(".png"))
        raise AssertionError(f"panel and cells differ: {seen}\n{self.panel.root.inner_text()[:3000]}")

    def differs(self, told: dict[str, Any]) -> str:
        """In what the panel does not say what cells say; "" where it does."""
        root = self.panel.root
        working = root.locator(".dinfer-working").inner_text()
        if told["moving"] or working:
            return f"at work: {told['state']} {working} {told['call']}"
        shown = {
            "state": root.get_attribute("data-state"),
        }
        if shown["state"] != told["state"]:
            return f"state {shown['state']} in the panel, {told['state']} in cells"
        if told["over"]:
            return ""
        said = root.locator(".dinfer-state").inner_text()
        tokens = said.partition(" · ")[2].split()
        if int(tokens[0] if tokens else 0) != told["decoded"]:
            return f"{said!r} in the panel, {told['decoded']} new tokens in cells"
        stops = root.locator(".dinfer-stops .dinfer-list > div").count()
        if stops != told["stops"]:
            return f"{stops} breakpoints in the panel, {told['stops']} in cells"
        faults = self.panel.root.locator(".dinfer-faults:not([hidden]) > span").all_text_contents()
        listed = sum(len(text.splitlines()) for text in faults)
        if listed != told["faults"]:
            return f"{listed} faults in the panel, {told['faults']} in cells"
        if self.panel.canvas.is_visible() and self.panel.canvas.get_attribute("data-cells") != told["drawn"]:
            return f"the map is not what cells say at {told['positions']}"
        call = root.locator(".dinfer-last code").first.inner_text()
        return "" if call == told["call"] else f"last call {call!r} in the panel, {told['call']!r} in cells"

    # -- what a person may do

    def mended(self) -> str:
        """By the panel's button, or by calls, in turn."""
        return self.act("session.recover()") if self.dice.random() < 0.5 else self.press("mend")

    def struck(self, name: str) -> str:
        return self.act(f"strike({self.dice.randrange(RANKS)}, {name!r})")

    def looked(self) -> str:
        """The tabs and their figures, the strip of times, a block."""
        tab = self.dice.choice(["map", "KV", "communication", "runs"])
        self.panel.open(tab)
        if tab == "communication":
            figure = self.dice.choice(["latency", "distribution", "matrix", "gantt", "exposure"])
            self.panel.root.locator(f'[data-figure="{figure}"]').click()
        self.page.wait_for_timeout(500)
        self.panel.open("map")
        return tab

    def clicked(self) -> str:
        box = self.panel.canvas.bounding_box()
        assert box
        x, y = self.dice.uniform(0.2, 0.9) * box["width"], self.dice.uniform(0.2, 0.9) * box["height"]
        self.panel.canvas.click(position={"x": x, "y": y})
        self.panel.canvas.press("0")
        return f"{x:.0f}, {y:.0f}"

    def block(self) -> str:
        return f"layer={self.dice.randrange(LAYERS)}, chunk={self.dice.randrange(-(-TOKENS // CHUNK))}"


class Act(NamedTuple):
    """Something to do; `weight`: how often, beside the others."""

    name: str
    weight: float
    do: Callable[[Free], str]


UNITS = ("op", "layer", "wave", "chunk")
FAULTS = (
    "bitflip",
    "nan",
    "zero",
    "stale",
    "permute",
    "head_shift",
    "append_twice",
    "lost",
    "swap_kv",
    "cast",
)


def inject(free: Free) -> str:
    kind, rank = free.dice.choice(FAULTS), free.dice.randrange(RANKS)
    if free.dice.random() < 0.5:
        layer, chunk = free.block().replace("layer=", "").replace("chunk=", "").split(", ")
        return kind + ": " + free.submit("inject", kind=kind, rank=str(rank), layer=layer, chunk=chunk)
    return free.act(f"run.inject({kind!r}, rank={rank}, {free.block()})")


def stop_at(free: Free) -> str:
    when = free.dice.choice(["", "", ', when="nan"', ', when="slower than 5 ms"', ', when="digest differs"'])
    return free.act(f"run.break_at({free.block()}{when})")


def replaced(free: Free) -> str:
    """A new run, in a panel of its own; half of them run at once."""
    paused = free.dice.random() < 0.5
    return free.act(f"begin(paused={paused})")


ACTS = [
    Act("step", 6, lambda free: free.press(f"step:{free.dice.choice(UNITS)}")),
    Act("step in a cell", 4, lambda free: free.act(
        f"run.step({free.dice.choice(UNITS)!r}, {free.dice.randint(1, 4)})")),
    Act("back", 5, lambda free: free.press("step_back")),
    Act("back in a cell", 3, lambda free: free.act(f"run.step_back({free.dice.choice(UNITS)!r})")),
    Act("undo", 4, lambda free: free.press("undo")),
    Act("undo in a cell", 2, lambda free: free.act("run.undo()")),
    Act("resume", 4, lambda free: free.press("resume")),
    Act("resume and pause", 5, lambda free: free.press("resume") + "; " + free.press("pause")),
    Act("resume and pause in cells", 3, lambda free: free.act("run.resume(); time.sleep(0.3); run.pause()")),
    Act("play", 2, lambda free: free.act("run.play('wave', 10); time.sleep(1); run.pause()")),
    Act("run to", 3, lambda free: free.act(f"run.run_to({free.block()})")),
    Act("breakpoint", 4, stop_at),
    Act("no breakpoints", 3, lambda free: free.act("run.breakpoints.clear()")),
    Act("inject", 4, inject),
    Act("no faults", 3, lambda free: free.act("run.faults.clear()")),
    Act("decode", 3, lambda free: free.submit("decode", max_new_tokens=str(free.dice.randint(1, 4)))),
    Act("decode in a cell", 2, lambda free: free.act(f"run.decode({free.dice.randint(1, 4)})")),
    Act("compare ranks", 3, lambda free: free.press("diff")),
    Act("compare with the reference", 1, lambda free: free.act("run.compare('reference')")),
    Act("why", 2, lambda free: free.press("why")),
    Act("verdict", 2, lambda free: free.act("run.verdict()")),
    Act("where", 2, lambda free: free.act("run.where()")),
    Act("look", 4, lambda free: free.looked()),
    Act("click", 3, lambda free: free.clicked()),
    Act("report", 1, lambda free: free.submit("report", path="free/report.html")),
    Act("save", 1, lambda free: free.submit("save", folder="free/saved")),
    Act("restart", 3, lambda free: free.press("restart")),
    Act("restart in a cell", 2, lambda free: free.act("run.restart()")),
    Act("kill a rank", 0.7, lambda free: free.struck("SIGKILL")),
    Act("stop a rank", 0.7, lambda free: free.struck("SIGSTOP")),
    Act("hang", 0.7, lambda free: free.act(
        "begin(schedule='batched', chunk_size=CHUNK * 4, unsafe=True, paused=False)")),
    Act("another run", 1.5, replaced),
    Act("load again", 0.5, lambda free: free.act("session.load(MODEL); begin()")),
    Act("connect again", 0.5, lambda free: free.act(
        "session = dinfer.connect(n=3, start=False); run = session.run")),
]  # fmt: skip
NEW_PANEL = ("hang", "another run", "load again", "connect again")
MAY_GROW = {"MB of the kernel": 120.0, "threads": 3, "files": 6, "MB of the page": 25.0, "nodes": 3000}
"""between the middle third and the last: what runs that are kept, caches and JupyterLab's cells need"""
A_RANK_MAY_GROW = {"MB of ranks": 120.0, "threads of ranks": 3, "files of ranks": 6}
"""likewise, of each process that is a rank in both"""


@pytest.mark.usefixtures("ipcluster")
def test_panel_and_cells_agree_whatever_a_person_does(
    notebook: OpenNotebook, page: Page, lab: Lab, shot: Shot, tmp_path: Path, console_errors: list[str]
) -> None:
    model = tiny_checkpoint(lab.home / "free-model", layers=LAYERS, max_position_embeddings=16384)
    log = Path(os.environ.get("DINFER_FREE_LOG") or tmp_path / "free.jsonl")
    book = notebook(cells(model), fresh=True)
    book.run(CONNECT)
    book.run(SHOW)
    free = Free(page, Debugger(book, SHOW), random.Random(SEED), log)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    devtools.send("HeapProfiler.enable")
    taken = [measured(free, devtools)]
    while time.monotonic() - free.began < SECONDS:
        [act] = free.dice.choices(ACTS, [one.weight for one in ACTS])
        free.write(begins=act.name)
        said = act.do(free)
        if act.name in NEW_PANEL:
            free.panel = shown_anew(book)
        told = free.settled()
        free.count += 1
        where = {name: told[name] for name in ("state", "positions", "decoded")}
        free.write(did=act.name, said=said[:300], **where)
        assert not told["over"], told
        if told["remedy"]:
            said = free.mended()
            told = free.settled()
            if told["state"] not in ("paused", "done"):
                free.act("run.restart()")
                told = free.settled()
            free.write(did="mend", said=said[:300], state=told["state"])
            assert told["state"] in ("paused", "done"), told
        if act.name == "hang":  # its plan can only hang again
            free.act("begin()")
            free.panel = shown_anew(book)
            free.settled()
        if free.count % MEASURE_EVERY == 0:
            taken.append(measured(free, devtools))
    taken.append(measured(free, devtools))
    shot("free-use-light")
    assert not console_errors, console_errors
    middle, last = taken[len(taken) // 3 : 2 * len(taken) // 3], taken[2 * len(taken) // 3 :]
    for name, most in MAY_GROW.items():
        assert grown([one[name] for one in middle], [one[name] for one in last]) <= most, (
            name,
            [one[name] for one in taken],
        )
    for name, most in A_RANK_MAY_GROW.items():
        for pid in {
            pid for one in last for pid in one[name]
        }:  # a rank that was brought back is another process
            before, after = ([one[name][pid] for one in part if pid in one[name]] for part in (middle, last))
            assert grown(before, after) <= most, (name, pid, [one[name] for one in taken])
    book.run(CLOSE)


def grown(before: Sequence[float], after: Sequence[float]) -> float:
    """By how much all that were measured after are more than the most before; 0 where nothing was measured before."""
    return min(after) - max(before) if before else 0.0


def shown_anew(book: Notebook) -> Debugger:
    """The panel of the run that there is now."""
    book.run(NEXT)
    panel = Debugger(book, NEXT)
    panel.canvas.wait_for()
    return panel


def measured(free: Free, devtools: CDPSession) -> dict[str, Any]:
    """What kernel, ranks and page hold, after their garbage is collected."""
    found = free.ask("measure()")
    devtools.send("HeapProfiler.collectGarbage")
    metrics = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
    found |= {"MB of the page": metrics["JSHeapUsedSize"] / 1e6, "nodes": metrics["Nodes"]}
    free.write(actions=free.count, **found)
    return dict(found)
