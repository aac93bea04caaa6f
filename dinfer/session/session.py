"""Session: the ranks, the checkpoint on them, and one run after another, as a notebook holds them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from dinfer.arguments import leaving
from dinfer.cluster.ranks import Ranks, taken_over
from dinfer.cluster.recovery import meet, recover
from dinfer.config import Config, ConfigError, check_known, whole_numbers
from dinfer.display import Announced, Closing, Displayable, DisplayableText, Tidy, devices_text
from dinfer.errors import DinferError, NotPossible, excerpt
from dinfer.job import FIXED, OF_LOAD, Job, prepare_load, prepare_loaded, threads_per_rank, without_fixed
from dinfer.messages import GetHeld, Holdings, Loading, LoadModel, PreparePrompt, UnloadModel
from dinfer.model.checkpoint import Spec, ignored_generation
from dinfer.model.text import load_tokenizer
from dinfer.plan.custom import CustomSchedule
from dinfer.plan.partition import within
from dinfer.plan.plan import Plan
from dinfer.progress import rank_bars
from dinfer.rank.debugger import FIRST_PORT
from dinfer.run.failure import MEASURE_S, RankFailed
from dinfer.run.hang import Hung
from dinfer.run.left import LeftRun
from dinfer.run.measurement import (
    AUTO,
    AUTOS,
    TOKENS,
    Measurement,
    chosen_job,
    kernels_asked,
    measured,
    measured_before,
    predictable,
    to_measure,
    without_auto,
)
from dinfer.run.report import NO_VIEWS, Reporter, opening
from dinfer.run.run import Run
from dinfer.saved.saved import WriteReport
from dinfer.session.news import RunNews
from dinfer.session.ranks_watch import RanksWatch
from dinfer.session.reattach import are_in_one_group, loaded_of, run_of
from dinfer.session.runs import SessionRuns
from dinfer.session.sweep import Sweep, sweep
from dinfer.severity import Severity
from dinfer.trace.summary import summary
from dinfer.verdict.where import rank_spans_text
from dinfer.watching.live import EnginesWatch

Show = Callable[..., Any]
"""makes the panel of a run or a watch"""

LOOK_S = 0.05

PREPARE_S, LOAD_S = 120.0, 3600.0

GIVE_WAY_S, ALL_SAY_S = 5.0, 1.0

OF_PREFILL = ("plan", "paused", "keep")
"""parameters of `Session.prefill` that are not those of a run's config"""

OF_RUNS = frozenset({*OF_PREFILL, *(one.name for one in fields(Config))} - {*FIXED})
"""parameters of runs, which `Session.load` does not take"""

PAST = 32
"""how many runs that have ended have their figures in the reports of later ones"""


@dataclass(frozen=True, repr=False)
class Listening(Tidy, Displayable):
    """A rank that waits for a client of debugpy: `rank`, its `host`, and the `port` of 127.0.0.1 there."""

    rank: int
    host: str
    port: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} listens for a debugger at 127.0.0.1:{self.port} on {self.host}: attach from VS Code "
            f'("Attach to rank {self.rank}", which `dinfer vscode` writes, has port {FIRST_PORT + self.rank}) or any '
            "client of debugpy. While the rank stands at a breakpoint, the other ranks wait at a cut."
        )


class SessionOver(DinferError, RuntimeError):
    """This session has ended; the message says why, and what to do."""


class Session(Tidy, Announced, Closing):
    """Made by `dinfer.connect`: `world_size` ranks. `spec`: the checkpoint that is loaded, None before; `log`: what has
    happened, a line each; `runs`: the current run and the last ones before it. `show` makes the panels that `debugger`
    returns, `write` the reports of runs."""

    INTERNAL = frozenset(
        {"INTERNAL", "announce", "connected_by", "give_way", "leave", "ranks", "reattached", "severity"}
    )

    def __init__(self, ranks: Ranks, show: Show | None = None, write: WriteReport | None = None) -> None:
        self.ranks, self.world_size = ranks, ranks.world_size
        self.log: list[str] = []
        self.connected_by = f"dinfer.connect(n={ranks.world_size})"
        """the call that makes a session like this"""
        self.spec: Spec | None = None
        self._show, self._write = show, write
        self._ended = 0
        """how many runs have come to their end"""
        self._past: deque[tuple[Sequence[int], str, dict[str, Any]]] = deque(maxlen=PAST)
        """earlier runs whose prefill is complete, for reports: prompt, checkpoint and figures. Not the job, which has
        all ops of its plan"""
        self._run: Run | None = None
        self.runs = SessionRuns()
        self._config = Config(world_size=self.world_size, log_dir="", prompt_ids=(0,), backend="gloo")
        self._devices = ["cpu"] * self.world_size
        self._half_prepared = False  # ranks may wait for others that have refused a prompt or to measure
        self._bare = set(range(self.world_size))  # ranks without weights, or with only some of them
        self._news = RunNews()
        self._closing = threading.Event()
        self._measured: dict[bool, Measurement] = {}
        """of the checkpoint, of runs with digests and without"""
        self._watch = RanksWatch(ranks, write, show)
        found = ranks.ask(dict.fromkeys(range(self.world_size), GetHeld()), PREPARE_S)
        held = [found[rank] for rank in range(self.world_size)]
        self._half_prepared = any(one.preparing for one in held)
        self.reattached = self._reattach(held)
        """what this session goes on with of an earlier one, and what is lost, in words"""
        if not are_in_one_group(held) or (held[0].group and held[0].group.backend != self._config.backend):
            meet(ranks, self._config.backend)
        self._thread = threading.Thread(target=self._look, name="dinfer session", daemon=True)
        self._thread.start()

    # -- what a user does

    @leaving(OF_RUNS, "session.prefill")
    def load(
        self,
        model_path: str | Path = "demo",
        *,
        dtype: str = "auto",
        gpu_ids: Sequence[int] = (),
        threads: int = 0,
        kernels: str = "auto",
        backend: str = "auto",
    ) -> Self:
        """Load a checkpoint folder, or "demo", on every rank, for any number of runs; a progress bar for each rank.

        `gpu_ids`: the GPU of each rank, empty for the CPU; `threads`: CPU threads of each rank, 0 for an equal share of
        the cores; `kernels`: what runs the layers on a GPU, "exact", "graph", "compiled" or "auto", as for `prefill`;
        `backend`: how ranks exchange messages, "gloo", "nccl", "ipc" or "auto".
        Graphs are captured now, for chunks of the usual size, which takes seconds. Weights that are there already stay,
        unless the folder has changed. Raises ConfigError or ModelError before anything is loaded: too little memory, an
        unknown GPU, an unsupported model.
        """
        self._check_open()
        share = max(self.ranks.cores())
        values = {"model_path": model_path, "dtype": dtype, "gpu_ids": tuple(gpu_ids), "log_dir": ""}
        values.update(kernels=kernels, backend=self.ranks.backend if backend == "auto" else backend)
        config = Config.of({**values, "world_size": self.world_size, "prompt_ids": (0,)})
        config = config.with_(threads=threads or threads_per_rank(share))
        config, self.spec = prepare_load(config, range(share))
        self._end_run("a checkpoint was loaded since; session.prefill(…) begins a run of it")
        self._free_lanes()
        if config.backend != self._config.backend:
            meet(self.ranks, config.backend)
        self._config, self._measured = config, {}
        self._load(range(self.world_size))
        if ignored := ignored_generation(self.spec.path):
            print(ignored)
        return self

    def prefill(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        paused: bool = False,
        plan: Plan | str | CustomSchedule | None = None,
        keep: bool = False,
        **parameters: Any,
    ) -> Run:
        """A run of this prompt, text or token ids (also as `prompt_ids`), or the text of `prompt_file`; with
        `paused` it stands before its first op.
        The run before it is then over; if it has failed or hangs, and only lanes are blocked, they are freed, and a
        line says so. `runs` has it; it answers from the digests that were kept of it. `keep`: once this run is over,
        the values of its KV stay in a temporary folder.

        `parameters` are those of `dinfer run`: chunk_size, sync_strategy, schedule, layer_split, max_new_tokens, …;
        those that `load` fixes for all runs, such as dtype, are refused if they differ.
        Of schedule, chunk_size, layer_split, sync_strategy and codec any may be "auto": the planner takes the fastest
        by what `measure` has found (of codecs only none or lossless), and prints a sentence on each.
        `plan`: a plan of your own, its text, or a function of config and shape that makes it or its lanes (see
        `dinfer.plan.custom`); one that can hang is refused unless `unsafe=True`. Raises ConfigError, PlanError,
        NotPossible where no checkpoint is loaded, and ModelError where its folder has changed since.
        """
        self._check_open()
        if self.spec is None:
            raise NotPossible(
                'no checkpoint is loaded: session.load("/folder/of/a/checkpoint") first, or session.load("demo") for '
                "the built-in model (in magics: %dinfer load demo)."
            )
        check_known(parameters, OF_PREFILL)
        parameters, auto = without_auto(parameters)
        if auto and plan is not None:
            raise ConfigError(
                f"{auto[0]} is auto, but a plan is given, beside which nothing is chosen: leave one of them out."
            )
        own = without_fixed(parameters, self._config, self.spec)
        if prompt is None and "prompt_ids" in own:  # the name that it has in `dinfer run`
            prompt = whole_numbers("prompt_ids", own.pop("prompt_ids"))
        given: dict[str, Any] = {}
        if prompt is not None or "prompt_file" not in own:
            if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
                raise ConfigError(
                    f"prompt is {excerpt(prompt)}; it must be text, or a list of token ids such as [5, 17, 3]."
                )
            given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": tuple(prompt)}
        config = self._config.with_(**{"prompt_ids": (), **given, **own})
        job = prepare_loaded(config, self.spec, plan)
        if auto:
            known = self._measured.get(config.digests)
            if known is None or known.kernels != kernels_asked(config):
                self._measure(self.spec, config)
            choice = chosen_job(job, self._measured[config.digests], auto)
            print(choice.chosen)
            job, plan = choice.job, choice.plan
        job = predictable(job, self._measured.get(config.digests))
        text = "" if not plan else job.plan.text()
        self._end_run("another run has begun; session.debugger() shows it")
        run = self._new_run(job, text)
        run.keeps = keep
        about = f"{job.plan.schedule}, {job.plan.sync_strategy}{job.config.codec_text}"
        self._note(f"run: {len(job.ids)} tokens, {about}", run)
        if not paused:
            run.resume()
        return run

    def measure(self, *, digests: bool = True, again: bool = False) -> Measurement:
        """What a layer takes on each rank and what each link carries, as a table; some seconds, once for a checkpoint
        unless `again`. `digests`: of runs that compute them, or that have digests=False. The run before it is then
        over. Raises NotPossible where no checkpoint is loaded or a run is under way."""
        self._check_open()
        if self.spec is None:
            raise NotPossible("no checkpoint is loaded, so no layer can be measured: session.load(…) first.")
        config = self._config.with_(digests=digests)
        known = self._measured.get(digests)
        if again or known is None or known.kernels != kernels_asked(config):
            if self._run and self._run.standing().state in ("running", "decoding"):
                raise NotPossible(
                    "a run is under way, which would be measured with: run.pause() or run.wait() first."
                )
            self._measure(self.spec, config)
        return self._measured[digests]

    def sweep(self, prompts: str | Sequence[str | Sequence[int]] | Sequence[int], **parameters: Any) -> Sweep:
        """Run each prompt with every combination of these parameters, each a list or a single value; a table. Raises
        ConfigError for an unknown parameter or value, before the first run."""
        check_known(parameters, OF_PREFILL)
        for name, values in parameters.items():
            for value in values if isinstance(values, list) else [values]:
                if name not in OF_PREFILL and not (name in AUTOS and value == AUTO):
                    self._config.with_(**{name: value})
                elif name == "paused" and not isinstance(value, bool):
                    raise ConfigError(f"paused is {excerpt(value)}; it must be True or False.")
        return sweep(self.prefill, prompts, parameters)

    def debugger(self, *, detached: bool = False) -> Any:
        """The panel: the current run as a map, with buttons that step it. `detached`: in a browser's tab of its own, at
        the address that is returned, for browsers of this machine. Raises NotPossible before there is a run."""
        self._check_open()
        if self._show is None:
            raise NotPossible(NO_VIEWS)
        return self._show(self.run, detached=True) if detached else self._show(self.run)

    def listen_for_debugger(self, rank: int, port: int = 0) -> Listening:
        """Let VS Code, or another client of debugpy, attach to a rank, and say where; by default at port 5678 + rank.

        Raises PlanError for an unknown rank, RankError if the port is taken or debugpy is missing.
        """
        self._check_open()
        return Listening(within("rank", rank, self.world_size), *self.ranks.listen_for_debugger(rank, port))

    def watch(self, compare: bool = False) -> EnginesWatch:
        """From now on every call of torch.distributed in `%%px` cells is seen; a cell that hangs gets its verdict under
        it, and `session.recover()` frees the engines.

        `compare`: what `.compare("reference")` needs of transformers' models is taken, too. A second call returns the
        same; only one that asks for `compare` for the first time begins anew. Raises NotPossible for ranks in threads
        or on several hosts.
        """
        self._check_open()
        return self._watch.begin(compare=compare)

    def recover(self) -> DisplayableText:
        """After a failure: restart lost ranks and free stuck ones; a `%%px` cell that still runs is interrupted. Then
        `run.restart()` begins this run again, and `session.prefill(…)` another one. Where only lanes are blocked, these
        two free them by themselves."""
        self._check_open()
        if self._run and not self._run.closed:
            self._run.last_call = "session.recover()"
        return self._recover(kill=True)

    def _recover(self, *, kill: bool) -> DisplayableText:
        """See `recover`; without `kill`, raises RankRefused where a rank does not come free."""
        said, plan, stuck = list[str](), None, set(self._watch.stuck_ranks())

        def say(text: str) -> None:
            print(f"dinfer: {text}, which takes some seconds", flush=True)
            said.append(text)

        if self._run:
            plan = self._run.plan
            stuck.update(self._run.stuck_ranks())
            self._run.recovering(ended=False)
        self._half_prepared = True
        with self._watch.recovering():
            anew = recover(self.ranks, plan, self._config.backend, say, sorted(stuck), kill=kill)
        if anew:
            self._watch.began_anew()
        self._half_prepared = False
        self._bare |= set(anew)
        if self.spec and self._bare:
            self._load(sorted(self._bare))
        if self._run:
            self._run.recovering(ended=True)
        kept = "" if anew else " again; weights stayed where they were"
        text = DisplayableText("; ".join([*said, f"all ranks have met{kept}"]))
        self._note(text, self._run)
        return text

    @property
    def run(self) -> Run:
        """The current run. Raises NotPossible before there is one."""
        if self._run is None:
            raise NotPossible("there is no run yet: session.prefill(prompt, paused=True) makes one.")
        return self._run

    def close(self) -> None:
        """Leave the ranks: a cluster that dinfer started ends, one that was joined goes on."""
        if not self._closing.is_set():
            self._end_run("the session is closed; dinfer.connect(…) opens another", is_last=True)
            self._closing.set()
            self._thread.join(2)
            self._watch.close()
            self.ranks.close()

    def leave(self) -> None:
        """End this session and leave its ranks as they are, with checkpoint and run, for the next session of them."""
        if not self._closing.is_set():
            if self._run:
                with suppress(DinferError):  # it hangs, or has failed: the next session finds out
                    self._run.pause()
            self._closing.set()
            self._thread.join(2)
            self.ranks.leave()

    def __str__(self) -> str:
        config, devices = self._config, devices_text(self._devices)
        loaded = f"{config.model_path} on {devices}" if self.spec else "no checkpoint yet"
        return f"{self.ranks.describe()}; {loaded}; backend {config.backend}"

    # -- within

    def _check_open(self) -> None:
        """Raises SessionOver for a closed session, and if another session has joined the engines."""
        if self._closing.is_set():
            raise SessionOver("this session is closed: dinfer.connect(…) makes another.")
        if taken := taken_over(self.ranks.ranks):
            raise SessionOver(taken)

    def _load(self, ranks: Sequence[int]) -> None:
        config = self._config
        devices = {rank: f"cuda:{config.gpu_ids[rank]}" if config.gpu_ids else "cpu" for rank in ranks}
        assert self.spec
        path, dtype, read = config.model_path, config.dtype, self.spec.fingerprint
        requests = {
            rank: LoadModel(path, dtype, device, read, config.threads, config.kernels, config.chunk_size)
            for rank, device in devices.items()
        }
        self._bare |= set(ranks)  # also where it is refused half-way
        unload = {rank: UnloadModel(path, dtype, device, read) for rank, device in devices.items()}
        self.ranks.ask(unload, PREPARE_S, self._ensure_whole)
        for rank in ranks:
            self.ranks.ranks[rank].loading = None

        def loading(what: str, rank: int) -> Loading | None:
            said = self.ranks.ranks[rank].loading
            return said if said and said.what == what else None

        weights = rank_bars(ranks, partial(loading, "weights"), unit="B", unit_scale=True)
        graphs = rank_bars(ranks, partial(loading, "graphs"), ": graphs", unit=" layers")
        with weights as show_weights, graphs as show_graphs:

            def check() -> None:
                show_weights()
                show_graphs()
                self._ensure_whole()

            first = min(ranks)
            answers = self.ranks.ask({first: requests.pop(first)}, LOAD_S, check)
            self.ranks.share_weights()
            answers |= self.ranks.ask(requests, LOAD_S, check)
        self._bare -= answers.keys()
        for rank, answer in answers.items():
            self._devices[rank] = answer.device
        self._note(f"loaded {path} on {devices_text(self._devices)}, threads each: {config.threads}")

    def _new_run(self, job: Job, plan: str, left: LeftRun | None = None) -> Run:
        tokenizer = load_tokenizer(job.config.model_path)
        job = replace(job, loaded=self._config)
        self._run = run = Run(
            job, self.ranks, self._devices, tokenizer, lambda: self._prepare(job, plan), left
        )
        run.show, run.recover = self._show, self.recover
        as_loaded = {name: getattr(self._config, name) for name in OF_LOAD}
        run.load_again = partial(self.load, job.config.model_path, **as_loaded)
        run.calls.opening = lambda: opening(job, self.connected_by, plan, keep=run.keeps)
        run.runs = self.runs
        self.runs.add(run)
        if self._write:
            run.reporter = Reporter(self._write, [], lambda: self._figures_before(job))
        return run

    def _reattach(self, held: Sequence[Holdings]) -> str:
        """Go on with what the ranks hold of an earlier session; what that is, and what is lost, in words."""
        try:
            loaded = loaded_of(held, self._config)
        except DinferError as why:
            return f"what the ranks hold of an earlier session is lost: {why}"
        if loaded is None:
            return ""
        self._config, self.spec, self._devices = loaded
        self._measured = measured_before(held)
        self._bare = set()
        model = f"the ranks still hold {self._config.model_path}, so nothing has to be loaded"
        try:
            found = run_of(held, loaded.spec)
        except DinferError as why:
            return (
                f"{model}. The run of the earlier session is lost: {why}. session.prefill(…) begins another"
            )
        if found is None:
            return model
        job, left = found
        run = self._new_run(job, left.plan, left)
        counts = {
            "event": len(run.trace.events),
            "new token": len(run.tokens),
            "breakpoint": len(run.breakpoints),
            "armed fault": len(run.faults),
        }
        kept = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)
        oldest = f", the oldest {left.lost_events} events" * bool(left.lost_events)
        text = (
            f"{model}. Reattached to the run, which is session.run: {run.standing().state}"
            f"{', with ' * bool(kept)}{kept}. "
            f"Lost with the earlier session: its log, what could be undone, the figures of its earlier runs{oldest}"
        )
        self._note(text, run)
        return text

    def _prepare(self, job: Job, plan: str) -> dict[int, int]:
        """Make all ranks ready for a prompt, and the text of a plan of the user's own; the id of each rank's plan."""
        self._free_lanes()
        self._ensure_whole()
        command = PreparePrompt(asdict(job.config), tuple(job.ids), plan)
        requests = dict.fromkeys(range(self.world_size), command)
        self._half_prepared = True
        answers = self.ranks.ask(requests, PREPARE_S, self._ensure_whole)
        self._half_prepared = False
        return {rank: answer.plan_id for rank, answer in answers.items()}

    def _measure(self, spec: Spec, config: Config) -> None:
        """Measure, whatever the run before is doing, which is then over."""
        self._end_run("layers and links were measured; session.prefill(…) begins another run")
        self._free_lanes()
        self._ensure_whole()
        command = to_measure(min(TOKENS, spec.max_positions), config)
        requests = dict.fromkeys(range(self.world_size), command)
        self._half_prepared = True  # where one rank refuses, the others wait for it
        answers = self.ranks.ask(requests, MEASURE_S, self._ensure_whole)
        self._half_prepared = False
        self._measured[config.digests] = measured(answers, command.tokens)
        self._note("layers and links are measured")

    def _free_lanes(self) -> None:
        """Free what the last run or prompt has left blocked in transfers, and say so. Ranks that are lost or do not
        answer are left to `recover`, whose user knows that they are started again."""
        if not (self._half_prepared or (self._run and self._run.left_blocked())):
            return
        if not self.ranks.silent() and all(code is None for code in self.ranks.exits()):
            print(f"lanes that the run before had left blocked are freed: {self._recover(kill=False)}")

    def _ensure_whole(self) -> None:
        """Raises RankFailed if a rank is lost, SessionOver if another session has taken the ranks."""
        if taken := taken_over(self.ranks.ranks):
            raise SessionOver(taken)
        if gone := [rank for rank, code in enumerate(self.ranks.exits()) if code is not None]:
            lost = f"{rank_spans_text(gone)} {'are' if len(gone) > 1 else 'is'} gone"
            raise RankFailed(f"{lost}: session.recover() brings {'them' if len(gone) > 1 else 'it'} back.")

    def _end_run(self, why: str, *, is_last: bool = False) -> None:
        if run := self._run:
            if run.standing().state == "done" and not run.edited:
                self._ended += 1
                figures = {"name": f"run {self._ended} of this session", **summary(run.trace)}
                self._past.append((run.job.ids, run.job.config.model_path, figures))
            run.close(why, patient=not is_last)
            self.runs.trim()

    def _figures_before(self, job: Job) -> list[dict[str, Any]]:
        """The figures of earlier runs of the same prompt and checkpoint, oldest first."""
        wanted = job.ids, job.config.model_path
        return [figures for *past, figures in self._past if tuple(past) == wanted]

    def _note(self, text: str, run: Run | None = None) -> None:
        """Add a line to the log, and to that of the run that it is about."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        self.log.append(line)
        if run and run.reporter:
            run.reporter.log.append(line)

    def give_way(self, other: "Session") -> None:
        """Wait until this session has left its ranks, where another one of this process has taken them over."""
        if self._thread.is_alive() and self.ranks.identities() & other.ranks.identities():
            with self.ranks.changed:
                taken = self.ranks.changed.wait_for(lambda: taken_over(self.ranks.ranks), GIVE_WAY_S)
            if taken:
                self._thread.join(GIVE_WAY_S)

    def _look(self) -> None:
        """The session's thread: takes in what ranks report, also while no cell runs. It ends, and with it what reaches
        the ranks, once another session has taken them over."""
        while not self._closing.is_set():
            is_over = bool(taken_over(self.ranks.ranks))
            with self.ranks.changed:
                self.ranks.changed.wait(LOOK_S)
            if self._run:
                try:
                    self._look_after(self._run)
                except Exception as error:  # this thread is the only one that looks after the run
                    text = f"looking after the run raised {error!r}"
                    if not any(line.endswith(f" {text}") for line in self.log):  # else many times a second
                        self._note(text, self._run)
            if is_over:
                with self.ranks.changed:  # the others say so at the same time
                    self.ranks.changed.wait_for(lambda: all(s.handed_on for s in self.ranks.ranks), ALL_SAY_S)
                self.ranks.leave()
                return

    def _look_after(self, run: Run) -> None:
        try:
            run.look()
            run.check()
        except (RankFailed, Hung):
            pass  # shown by views, and raised by the next call
        except (RuntimeError, TimeoutError) as error:
            if str(error) != run.message and not run.closed:
                run.say(str(error), Severity.ERROR)
        while run.said:
            self._note(run.said.pop(0), run)
        for line in self._news.of(run, self.ranks.ranks):
            self._note(line, run)
