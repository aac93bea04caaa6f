"""The page: renders the report of runs and writes it. Its contents come from `sentence`, `facts` and the figures.

The file is self-contained. Its Content-Security-Policy allows only the scripts in it, by their hashes, and the inline
styles and data images that plotly needs. Everything that comes from a run is escaped.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dinfer.plan.plan import Plan
from dinfer.plan.verify import verify
from dinfer.trace.export import check_folder, write_whole
from dinfer.trace.findings import Findings, findings_of
from dinfer.trace.read import ELEMENT, as_columns, script_json
from dinfer.trace.shares import Shares, pauses, shares
from dinfer.trace.summary import summary, verdict
from dinfer.trace.trace import Trace
from dinfer.version import __version__
from dinfer.views.cells import marked
from dinfer.views.figures.exposure import exposure
from dinfer.views.figures.gantt import gantt
from dinfer.views.figures.latency import distribution, latency, layers
from dinfer.views.figures.matrix import matrix
from dinfer.views.figures.style import HTML_CONFIG, template
from dinfer.views.report import facts
from dinfer.views.report.facts import percent, sentence
from dinfer.views.still import map_svg

_HERE = Path(__file__).parent

REPORT_FIGURES: dict[str, Callable[..., go.Figure]] = {
    "exposure": exposure,
    "gantt": gantt,
    "latency": latency,
    "distribution": distribution,
    "matrix": matrix,
    "layers": layers,
}


class Figure(NamedTuple):
    """A figure: its element on the page, and its JSON without a template."""

    id: str
    height: int
    json: str


class RunPage(NamedTuple):
    """What the template shows of one run."""

    name: str
    number: int
    sentence: str
    headline: str
    findings: Findings
    shares: Shares
    paused_s: float
    figures: dict[str, Figure]
    map: Markup | None
    plan: str
    proof: str
    tables: dict[str, facts.FactTable | None]
    data: str


def write_report(traces: Sequence[Trace], path: str | Path, names: Sequence[str] = ()) -> Path:
    """Write a report of one run, or several side by side; returns the path. Raises OSError, and leaves no partial
    file."""
    check_folder(path)  # before anything is drawn
    write_whole(path, [report_html(traces, names)])
    return Path(path)


def report_html(traces: Sequence[Trace], names: Sequence[str] = (), *, plotly: str | None = None) -> str:
    """The page as HTML. `names`: of the runs; `plotly`: its script, by default plotly's own."""
    called = list(names) or _names(traces)
    runs = [
        _run(trace, name, number) for number, (trace, name) in enumerate(zip(traces, called, strict=True))
    ]
    scripts = [plotly if plotly is not None else get_plotlyjs(), _read("report.js")]
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["percent"] = percent
    return environment.get_template("report.html.j2").render(
        runs=runs,
        title=runs[0].sentence if len(runs) == 1 else " and ".join(called),
        comparison=_comparison(traces, called, runs),
        policy=policy(scripts),
        css=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        settings=Markup(script_json(_settings())),
        element=ELEMENT,
        version=__version__,
    )


def policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that allows nothing from outside, and only these scripts."""
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _settings() -> dict[str, Any]:
    return {"templates": {"light": template(dark=False), "dark": template(dark=True)}, "config": HTML_CONFIG}


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _names(traces: Sequence[Trace]) -> list[str]:
    """Names for runs: their strategies, if these differ."""
    strategies = [str(trace.about.get("sync_strategy") or "run") for trace in traces]
    if len(set(strategies)) == len(strategies):
        return strategies
    return [f"run {number}: {strategy}" for number, strategy in enumerate(strategies, 1)]


def _run(trace: Trace, name: str, number: int) -> RunPage:
    findings, found = findings_of(trace), shares(trace)
    plan = facts.plan_of(trace, findings)
    return RunPage(
        name=name,
        number=number,
        sentence=sentence(findings, found),
        headline=_headline(trace),
        findings=findings,
        shares=found,
        paused_s=sum(end - start for start, end in pauses(trace)) / 1e9,
        figures={key: _figure(f"run{number}-{key}", draw(trace)) for key, draw in REPORT_FIGURES.items()},
        map=_map(trace, findings, plan),
        plan=plan.text() if plan else "",
        proof=findings.proof or (str(verify(plan)) if plan else ""),
        tables=_tables(trace, findings, name),
        data=Markup(script_json(as_columns(trace))),
    )


def _headline(trace: Trace) -> str:
    """What was run, in one line."""
    about = trace.about
    words = [
        f"model {about['model']}" if "model" in about else "",
        f"{about['tokens']:,} prompt tokens by {about['chunk_size']}" if "tokens" in about else "",
        f"{about['layers']} layers on {about.get('world_size', len(trace.ranks))} ranks"
        if "layers" in about
        else "",
        " ".join(filter(None, (about.get("schedule"), about.get("sync_strategy")))),
        f"dinfer {about['dinfer']}" if "dinfer" in about else "",
        findings_of(trace).made,
    ]
    return " · ".join(filter(None, words))


def _figure(place: str, figure: go.Figure) -> Figure:
    drawn = json.loads(figure.to_json())
    drawn["layout"].pop("template", None)  # the page has a light and a dark one
    return Figure(place, drawn["layout"]["height"], Markup(script_json(drawn)))


def _map(trace: Trace, findings: Findings, plan: Plan | None) -> Markup | None:
    states = facts.map_states(trace, findings, plan)
    if states is None:
        return None
    labels = list(findings.chunk_texts) or [""] * states.shape[1]
    shown = marked(states, facts.marks_of(findings))
    return Markup(map_svg(shown, facts.owners_of(trace, plan), labels))


def _tables(trace: Trace, findings: Findings, name: str) -> dict[str, facts.FactTable | None]:
    others = [(str(one.get("name", "earlier")), one) for one in findings.others]
    return {
        "links": facts.link_table(trace),
        "layers": facts.layer_table(trace),
        "ranks": facts.rank_table(findings) if findings.ranks else None,
        "parameters": facts.pairs(findings.parameters) if findings.parameters else None,
        "machine": facts.pairs({**findings.machine, **findings.versions}) if findings.machine else None,
        "environment": facts.pairs(findings.environment) if findings.environment else None,
        "differences": facts.difference_table(findings),
        "others": facts.compared_table([(f"this run ({name})", summary(trace)), *others]) if others else None,
    }


def _comparison(
    traces: Sequence[Trace], names: Sequence[str], runs: Sequence[RunPage]
) -> dict[str, Any] | None:
    """Several runs side by side."""
    if len(traces) < 2:
        return None
    found = [summary(trace) for trace in traces]
    last = len(traces) - 1
    return {
        "sentence": verdict(found[0], found[last], (names[0], names[last])),
        "table": facts.compared_table(list(zip(names, found, strict=True))),
        "sentences": [(run.name, run.sentence) for run in runs],
    }
