"""The page: renders the report of runs and writes it. Its contents come from `facts`, `compared` and the figures.

The file is self-contained. Its Content-Security-Policy allows only the scripts in it, by their hashes, and the inline
styles and data images that plotly needs. Everything that comes from a run is escaped.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dinfer.files import WrittenPath, check_folder
from dinfer.plan.verify import verify
from dinfer.severity import Severity, style_variables
from dinfer.trace.export import write_whole
from dinfer.trace.findings import findings_of
from dinfer.trace.intervals import seconds
from dinfer.trace.read import ELEMENT, as_columns, script_json
from dinfer.trace.shares import pauses, shares
from dinfer.trace.summary import chunks_text, summary, verdict
from dinfer.trace.trace import Trace
from dinfer.verdict.kept import waits_html
from dinfer.version import __version__
from dinfer.views.cells import marked
from dinfer.views.figures.equal import make_equal
from dinfer.views.figures.plots import PLOTS
from dinfer.views.figures.style import html_config, template
from dinfer.views.report import facts
from dinfer.views.report.compared import compared
from dinfer.views.report.facts import parts_of, percent
from dinfer.views.still import map_svg

_HERE = Path(__file__).parent

REPORT_FIGURES = {name: draw for name, draw in PLOTS.items() if name != "sweep"}


COLOURS = (
    f":root {{ {style_variables(dark=False)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {style_variables(dark=True)} }} }}\n"
)

MOST_PLANNED = 200_000
"""events of the largest trace whose plan is made and proved again for its report; a run's own report knows the proof"""


class Told(NamedTuple):
    """A sentence on all runs of a report together, and the word of its severity."""

    severity: str
    text: str


def write_report(
    traces: Sequence[Trace], path: str | Path, names: Sequence[str] = (), between: Sequence[Told] = ()
) -> Path:
    """Write a report of one run, or several side by side; returns the path. `between`: what is known of the runs
    beside one another that their traces do not say. Raises OSError, and leaves no partial file."""
    check_folder(path)  # before anything is drawn
    write_whole(path, [report_html(traces, names, between)])
    return WrittenPath(Path(path).expanduser())


def report_html(
    traces: Sequence[Trace],
    names: Sequence[str] = (),
    between: Sequence[Told] = (),
    *,
    plotly: str | None = None,
) -> str:
    """The page as HTML. `names`: of the runs; `plotly`: its script, by default plotly's own."""
    called = list(names) or _names(traces)
    figures = _figures(traces)
    runs = [
        _run(trace, name, number, drawn)
        for number, (trace, name, drawn) in enumerate(zip(traces, called, figures, strict=True))
    ]
    scripts = [plotly if plotly is not None else get_plotlyjs(), _read("report.js")]
    templates = {"light": template(dark=False), "dark": template(dark=True)}
    several = len(runs) > 1
    title = " and ".join(called) if several else runs[0]["parts"][0]
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["percent"] = percent
    environment.globals["marks"] = {level.word: level.mark for level in Severity}
    return environment.get_template("report.html.j2").render(
        runs=runs,
        has_kv=any(not run["watched"] or run["findings"].kv for run in runs),
        title=title,
        groups=compared(traces) if several else (),
        between=between,
        verdict=_verdict(traces, called) if several else "",
        policy=policy(scripts),
        css=Markup(COLOURS + _read("report.css")),
        scripts=[Markup(script) for script in scripts],
        settings=Markup(script_json({"templates": templates, "config": html_config()})),
        element=ELEMENT,
        version=__version__,
    )


def _verdict(traces: Sequence[Trace], names: Sequence[str]) -> str:
    """Which of two runs was faster; of more, the fastest and the slowest."""
    found = [summary(trace) for trace in traces]
    first, last = 0, 1
    if len(found) > 2 and all(one["ended"] and one["prefill_s"] for one in found):
        first, *_, last = sorted(range(len(found)), key=lambda n: found[n]["prefill_s"])
    return verdict(found[first], found[last], (names[first], names[last]))


def _figures(traces: Sequence[Trace]) -> list[dict[str, go.Figure]]:
    """The figures of each run, by name; those of several runs have equal axes."""
    found = [{name: draw(trace) for name, draw in REPORT_FIGURES.items()} for trace in traces]
    for name in REPORT_FIGURES if len(traces) > 1 else ():
        make_equal([figures[name] for figures in found])
    return found


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


def _run(trace: Trace, name: str, number: int, drawn: dict[str, go.Figure]) -> dict[str, Any]:
    """What the template shows of one run."""
    findings, found = findings_of(trace), shares(trace)
    plan = facts.plan_of(trace, findings) if findings.positions or len(trace.events) <= MOST_PLANNED else None
    figures = {}
    for key, figure in drawn.items():
        values = json.loads(figure.to_json())
        values["layout"].pop("template", None)  # the page has a light and a dark one
        height, data = values["layout"]["height"], Markup(script_json(values))
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
        "collectives": facts.collective_table(trace),
        "ranks": findings.ranks and facts.rank_table(findings),
        "parameters": findings.parameters and facts.pairs(findings.parameters),
        "machine": findings.machine and facts.pairs({**findings.machine, **findings.versions}),
        "environment": findings.environment and facts.pairs(findings.environment),
        "differences": facts.difference_table(findings),
        "predicted": _is_over(trace) and facts.prediction_table(trace, findings),
        "others": others and facts.compared_table([(f"this run ({name})", summary(trace)), *others]),
    }
    return {
        "name": name,
        "number": number,
        "parts": parts_of(findings, found, trace.span),
        "watched": trace.is_watched,
        "span": trace.span,
        "about": _about(trace, findings.made),
        "severity": facts.severity(findings).word,
        "failure_severity": facts.failure_severity(findings).word,
        "kv_severity": facts.kv_severity(findings).word,
        "alarming": bool(
            findings.failure or findings.faults or findings.edited or findings.corrupt or findings.warnings
        ),
        "findings": findings,
        "shares": found,
        "paused_s": seconds(pauses(trace)),
        "figures": figures,
        "map": blocks,
        "waits": findings.waits and Markup(waits_html(findings.waits, findings.failure.partition("\n")[0])),
        "plan": facts.plan_text(plan) if plan else "",
        "proof": findings.proof or (str(verify(plan)) if plan and len(trace.events) <= MOST_PLANNED else ""),
        "tables": tables,
        "data": Markup(script_json(as_columns(trace))),
    }


def _predicted(trace: Trace) -> str:
    """The planner's prediction beside the prefill that was measured; "" without one, or where prefill has not ended."""
    predicted_s = trace.about.get("predicted_s")
    if not predicted_s or not _is_over(trace):
        return ""
    return f"{predicted_s:.3g} s of prefill, by the planner; it took {summary(trace)['prefill_s']:.3g} s"


def _is_over(trace: Trace) -> bool:
    """Whether prefill has ended, in a time that was measured."""
    found = summary(trace)
    return bool(found["ended"] and found["prefill_s"])


def _about(trace: Trace, made: str) -> list[tuple[str, str]]:
    """What was run, where it is known, by name."""
    about = trace.about
    ranks = about.get("world_size") or len(trace.ranks)
    chunks = chunks_text(about)
    found = {
        "command": shlex.join(map(str, about.get("command") or ())),
        "model": str(about.get("model") or ""),
        "prompt": f"{about['tokens']:,} tokens by {chunks}" if about.get("tokens") and chunks else "",
        "layers": f"{about['layers']} on {ranks} rank{'s' * (ranks != 1)}" if about.get("layers") else "",
        "schedule": str(about.get("schedule") or ""),
        "sync strategy": str(about.get("sync_strategy") or ""),
        "codec": str(about.get("codec") or ""),
        "predicted": _predicted(trace),
        "first token": f"{trace.ttft_s:.3g} s after the first op" if trace.ttft_s else "",
        "made": made,
        "clocks": trace.clocks,
        "dinfer": str(about.get("dinfer", "")),
    }
    return [(name, text) for name, text in found.items() if text]
