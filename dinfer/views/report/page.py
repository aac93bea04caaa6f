"""The page: renders the report of runs and writes it. Its contents come from `sentence`, `facts` and the figures.

The file is self-contained. Its Content-Security-Policy allows only the scripts in it, by their hashes, and the inline
styles and data images that plotly needs. Everything that comes from a run is escaped.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dinfer.display import WrittenPath
from dinfer.plan.verify import verify
from dinfer.trace.export import check_folder, write_whole
from dinfer.trace.findings import findings_of
from dinfer.trace.intervals import seconds
from dinfer.trace.read import ELEMENT, as_columns, script_json
from dinfer.trace.shares import pauses, shares
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


def write_report(traces: Sequence[Trace], path: str | Path, names: Sequence[str] = ()) -> Path:
    """Write a report of one run, or several side by side; returns the path. Raises OSError, and leaves no partial
    file."""
    check_folder(path)  # before anything is drawn
    write_whole(path, [report_html(traces, names)])
    return WrittenPath(path)


def report_html(traces: Sequence[Trace], names: Sequence[str] = (), *, plotly: str | None = None) -> str:
    """The page as HTML. `names`: of the runs; `plotly`: its script, by default plotly's own."""
    called = list(names) or _names(traces)
    runs = [_run(*run, number) for number, run in enumerate(zip(traces, called, strict=True))]
    scripts = [plotly if plotly is not None else get_plotlyjs(), _read("report.js")]
    templates = {"light": template(dark=False), "dark": template(dark=True)}
    comparison = None
    if len(runs) > 1:
        found = [summary(trace) for trace in traces]
        comparison = {
            "sentence": verdict(found[0], found[-1], (called[0], called[-1])),
            "table": facts.compared_table(list(zip(called, found, strict=True))),
            "sentences": [(run["name"], run["sentence"]) for run in runs],
        }
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
        title=runs[0]["sentence"] if len(runs) == 1 else " and ".join(called),
        comparison=comparison,
        policy=policy(scripts),
        css=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        settings=Markup(script_json({"templates": templates, "config": HTML_CONFIG})),
        element=ELEMENT,
        version=__version__,
    )


def policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that allows nothing from outside, and only these scripts."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _names(traces: Sequence[Trace]) -> list[str]:
    """Names for runs: their strategies, if these differ."""
    strategies = [str(trace.about.get("sync_strategy") or "run") for trace in traces]
    if len(set(strategies)) == len(strategies):
        return strategies
    return [f"run {number}: {strategy}" for number, strategy in enumerate(strategies, 1)]


def _run(trace: Trace, name: str, number: int) -> dict[str, Any]:
    """What the template shows of one run."""
    findings, found, about = findings_of(trace), shares(trace), trace.about
    plan = facts.plan_of(trace, findings)
    ranks = about.get("world_size") or len(trace.ranks)
    has_chunks = about.get("tokens") and about.get("chunk_size")
    headline = [
        f"model {about['model']}" if about.get("model") else "",
        f"{about['tokens']:,} prompt tokens by {about['chunk_size']}" if has_chunks else "",
        f"{about['layers']} layers on {ranks} ranks" if about.get("layers") else "",
        " ".join(filter(None, (about.get("schedule"), about.get("sync_strategy")))),
        f"dinfer {about['dinfer']}" if "dinfer" in about else "",
        findings.made,
    ]
    figures = {}
    for key, draw in REPORT_FIGURES.items():
        drawn = json.loads(draw(trace).to_json())
        drawn["layout"].pop("template", None)  # the page has a light and a dark one
        height, data = drawn["layout"]["height"], Markup(script_json(drawn))
        figures[key] = {"id": f"run{number}-{key}", "height": height, "json": data}
    states, blocks = facts.map_states(trace, findings, plan), None
    if states is not None:
        labels = list(findings.chunk_texts) or [""] * states.shape[1]
        shown = marked(states, facts.marks_of(findings, states.shape))
        blocks = Markup(map_svg(shown, facts.owners_of(trace, plan), labels))
    others = [(str(one.get("name", "earlier")), one) for one in findings.others if facts.is_summary(one)]
    tables = {
        "links": facts.link_table(trace),
        "layers": facts.layer_table(trace),
        "ranks": findings.ranks and facts.rank_table(findings),
        "parameters": findings.parameters and facts.pairs(findings.parameters),
        "machine": findings.machine and facts.pairs({**findings.machine, **findings.versions}),
        "environment": findings.environment and facts.pairs(findings.environment),
        "differences": facts.difference_table(findings),
        "others": others and facts.compared_table([(f"this run ({name})", summary(trace)), *others]),
    }
    return {
        "name": name,
        "number": number,
        "sentence": sentence(findings, found),
        "headline": " · ".join(filter(None, headline)),
        "findings": findings,
        "shares": found,
        "paused_s": seconds(pauses(trace)),
        "figures": figures,
        "map": blocks,
        "plan": plan.text() if plan else "",
        "proof": findings.proof or (str(verify(plan)) if plan else ""),
        "tables": tables,
        "data": Markup(script_json(as_columns(trace))),
    }
