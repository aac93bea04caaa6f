"""The adapter: each request of a client, answered from a table; what takes long is done on other threads.

The thread that reads never waits for ranks. Requests that move the run are answered at once and then carried out one
after another; those that look at ranks wait for one another, but not for a move, and a pause for neither.
"""

import itertools
import os
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from typing import Any, Literal, NamedTuple

from dinfer.dap.arguments import TargetArguments, attach_arguments, launch_arguments
from dinfer.dap.console import completions, is_condition, parsed
from dinfer.dap.output import OutputStream
from dinfer.dap.stack import DapFrame, rank_frames, thread_name
from dinfer.dap.stops import DapClient
from dinfer.dap.target import EXCEPTION_FILTERS, DebugTarget, SetBreakpoint
from dinfer.dap.variables import Children, DapVariable, met_condition, scopes_of
from dinfer.dap.wire import DapMessage, Wire, WireError
from dinfer.errors import DinferError, NotPossible
from dinfer.plan.cut import Unit
from dinfer.run.failure import RankFailed
from dinfer.run.hang import Hung
from dinfer.run.state import State

DapBody = dict[str, Any]

OnDapThread = Literal["reading", "moving", "looking", "aside"]

CAPABILITIES: DapBody = {
    "supportsConfigurationDoneRequest": True,
    "supportsFunctionBreakpoints": True,
    "supportsConditionalBreakpoints": True,
    "supportsHitConditionalBreakpoints": True,
    "supportsEvaluateForHovers": True,
    "supportsStepBack": True,
    "supportsSteppingGranularity": True,
    "supportsGotoTargetsRequest": True,
    "supportsRestartRequest": True,
    "supportsCompletionsRequest": True,
    "supportsExceptionInfoRequest": True,
    "supportTerminateDebuggee": True,
    "supportsLoadedSourcesRequest": True,
    "exceptionBreakpointFilters": [
        {"filter": name, "label": label, "default": False} for name, label in EXCEPTION_FILTERS.items()
    ],
}

UNITS_OF: dict[str, Unit] = {"stepIn": "op", "next": "layer", "stepOut": "chunk", "stepBack": "layer"}
"""the unit of each kind of step; with the granularity "instruction" all but stepOut are an op"""

NO_RUN = "there is no run yet: send launch or attach first."


class DapRequestError(DinferError, ValueError):
    """A request that cannot be answered; the message says why."""


class Deferred(NamedTuple):
    """The body of a response, and what to do once it is sent."""

    body: DapBody
    then: Callable[[], None]


class WorkQueue:
    """Carries out what it is given, one after another, on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"dinfer dap {name}", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._todo.put(work)

    def close(self) -> None:
        """End once what was given is done."""
        self._todo.put(None)

    def _work(self) -> None:
        while work := self._todo.get():
            work()


class DebugAdapter:
    """One client. `serve()` answers it until it hangs up or disconnects. `enters`: the process is the client's own, and
    works in the folder that it names."""

    def __init__(self, wire: Wire, *, enters: bool = False) -> None:
        self._wire, self._enters = wire, enters
        self._target: DebugTarget | None = None
        self._given = TargetArguments()
        self._moves, self._looks = WorkQueue("moves"), WorkQueue("looks")
        self._numbers = itertools.count(1)
        self._frames: dict[int, DapFrame] = {}
        self._children: dict[int, Children] = {}
        self._goals: dict[int, tuple[int, int]] = {}
        """by the id of a goto target, chunk and layer"""
        self._first_line = 1
        self._is_initialized = self._has_progress = self._leaves = False
        self._closing = threading.Lock()

    def serve(self) -> None:
        """Answer requests. At the end, however it comes, a run that was launched here ends; one that was joined
        stays."""
        with redirect_stdout(OutputStream(self._say)):
            try:
                while not self._leaves and (message := self._next()) is not None:
                    if message.get("type") == "request":
                        self._take(message)
            finally:
                self._close()
                self._moves.close()
                self._looks.close()

    # -- requests

    def _next(self) -> DapMessage | None:
        try:
            return self._wire.read()
        except WireError as error:
            self._say("stderr", f"dinfer dap: {error}")
            return None

    def _take(self, request: DapMessage) -> None:
        method, where = HANDLERS.get(str(request.get("command")), (None, "reading"))
        if method is None:
            self._refuse(request, f"dinfer dap does not know the request {request.get('command')!r}.")
            return
        answer = partial(self._answer, request, method)
        if where == "reading":
            answer()
        elif where == "aside":
            threading.Thread(target=answer, name="dinfer dap aside", daemon=True).start()
        else:
            (self._moves if where == "moving" else self._looks).put(answer)

    def _answer(
        self, request: DapMessage, method: Callable[["DebugAdapter", DapBody], DapBody | Deferred]
    ) -> None:
        try:
            found = method(self, request.get("arguments") or {})
        except (DinferError, OSError) as error:
            self._refuse(request, str(error))
        except Exception as error:  # a fault of dinfer's must not leave the client waiting
            self._refuse(request, f"dinfer dap: {type(error).__name__}: {error}")
            self._say("stderr", traceback.format_exc())
        else:
            body, then = found if isinstance(found, Deferred) else (found, None)
            self._respond(request, success=True, body=body)
            if then:
                then()

    def _respond(self, request: DapMessage, **more: Any) -> None:
        about = {"request_seq": request.get("seq", 0), "command": request.get("command", "")}
        self._wire.send({"type": "response", **about, **more})

    def _refuse(self, request: DapMessage, why: str) -> None:
        error = {"id": 1, "format": why, "showUser": True}
        self._respond(request, success=False, message=why, body={"error": error})

    def _say(self, category: str, text: str) -> None:
        """A text in the client's debug console."""
        if text:
            self._wire.event(
                "output", category=category, output=text if category == "stdout" else f"{text}\n"
            )

    def _ready(self) -> DebugTarget:
        if self._target is None:
            raise DapRequestError(NO_RUN)
        return self._target

    # -- beginning and ending

    def _initialize(self, arguments: DapBody) -> DapBody:
        self._first_line = 1 if arguments.get("linesStartAt1", True) else 0
        self._has_progress = bool(arguments.get("supportsProgressReporting"))
        self._is_initialized = True
        return CAPABILITIES

    def _launch(self, arguments: DapBody) -> Deferred:
        self._check_initialized()
        given = launch_arguments(arguments)
        title = f"Starting ranks and loading {given.model}"
        return self._open(given, "launch", title, DebugTarget.launched)

    def _attach(self, arguments: DapBody) -> Deferred:
        self._check_initialized()
        given = attach_arguments(arguments)
        return self._open(given, "attach", "Joining the ranks", DebugTarget.attached)

    def _check_initialized(self) -> None:
        if not self._is_initialized:
            raise DapRequestError("send initialize first.")

    def _open(
        self, given: TargetArguments, how: str, title: str, make: Callable[..., DebugTarget]
    ) -> Deferred:
        if self._target:
            raise DapRequestError("this client has a run already: disconnect first.")
        self._given = given
        if self._enters and given.cwd:
            _enter(given.cwd)
        if self._has_progress:
            self._wire.event("progressStart", progressId=how, title=title)
        try:
            target = make(given, DapClient(self._wire.event, self._say, self._over))
        finally:
            if self._has_progress:
                self._wire.event("progressEnd", progressId=how)
        with self._closing:
            self._target = target
        if self._leaves:  # the client has hung up meanwhile
            self._close()
        self._say("console", f"{target.session}\n{target.run}")
        return Deferred({}, lambda: self._wire.event("initialized"))

    def _configured(self, _: DapBody) -> Deferred:
        target = self._ready()
        if self._given.no_debug:
            return Deferred({}, lambda: self._moves.put(partial(self._run_through, target)))
        if target.is_ours and not self._given.stop_on_entry:
            target.stops.begin("continue")
            return Deferred({}, lambda: self._started(target, target.resume))
        return Deferred({}, target.stops.start)

    def _started(self, target: DebugTarget, action: Callable[[], None]) -> None:
        target.stops.start()
        self._moves.put(partial(self._carry_out, target, action))

    def _run_through(self, target: DebugTarget) -> None:
        """Without stops, to the end of the text."""
        status = 0
        try:
            target.run.resume()
            target.run.wait()
            target.resume()
        except DinferError as error:
            self._say("stderr", str(error))
            status = 1
        self._end(status)

    def _end(self, status: int) -> None:
        self._wire.event("exited", exitCode=status)
        self._wire.event("terminated")

    def _over(self, why: str) -> None:
        """Somebody else has ended the run."""
        self._say("stderr", f"the run is over: {why}")
        self._wire.event("terminated")

    def _restart(self, _: DapBody) -> Deferred:
        target = self._ready()

        def again() -> None:
            target.restart()
            if target.is_ours and not self._given.stop_on_entry:
                target.resume()

        goes_on = target.is_ours and not self._given.stop_on_entry
        return self._moving("continue" if goes_on else "entry", 0, again, mends=True)

    def _disconnect(self, arguments: DapBody) -> DapBody:
        self._leaves = True
        self._close(end=arguments.get("terminateDebuggee"))
        return {}

    def _close(self, *, end: bool | None = None) -> None:
        with self._closing:
            target, self._target = self._target, None
            self._leaves = True
        if target:
            target.close(end=target.is_ours if end is None else bool(end))

    # -- moving

    def _continue(self, arguments: DapBody) -> Deferred:
        target = self._ready()
        if target.run.standing().state == State.DONE and target.has_ended:
            return Deferred({"allThreadsContinued": True}, lambda: self._end(0))
        return self._moving("continue", _rank(arguments), target.resume)

    def _back(self, arguments: DapBody) -> Deferred:
        return self._moving("step", _rank(arguments), self._ready().back)

    def _step(self, command: str, arguments: DapBody) -> Deferred:
        target, unit = self._ready(), UNITS_OF[command]
        if arguments.get("granularity") == "instruction" and command != "stepOut":
            unit = "op"
        action = target.step_back if command == "stepBack" else target.step
        return self._moving("step", _rank(arguments), partial(action, unit))

    def _goto(self, arguments: DapBody) -> Deferred:
        target, goal = self._ready(), self._goals.get(arguments.get("targetId", 0))
        if goal is None:
            raise DapRequestError("there is no such place to go to: ask for gotoTargets first.")
        return self._moving("goto", _rank(arguments), partial(target.go_to, *goal))

    def _goto_targets(self, arguments: DapBody) -> DapBody:
        target = self._ready()
        rank, line = self._rank_of(arguments.get("source", {})), self._own_line(arguments.get("line", 0))
        found = target.listings[rank].op_at(line)
        if found is None or found[1].chunk < 0 or not 0 <= found[1].layer < target.run.plan.shape.layers:
            return {"targets": []}
        op = found[1]
        number = next(self._numbers)
        self._goals[number] = op.chunk, op.layer
        label = f"after c{op.chunk} l{op.layer} on every rank"
        return {"targets": [{"id": number, "label": label, "line": arguments.get("line", 0)}]}

    def _moving(self, reason: str, rank: int, action: Callable[[], None], *, mends: bool = False) -> Deferred:
        """The run moves from now on, for the client; `action` is carried out once it has been told so."""
        target = self._ready()
        if target.stops.is_moving and not mends:
            raise DapRequestError("the run moves: pause it first.")
        self._begin(target, reason, rank, mends=mends)
        work = partial(self._carry_out, target, action)
        return Deferred({"allThreadsContinued": True}, lambda: self._moves.put(work))

    def _begin(self, target: DebugTarget, reason: str, rank: int, *, mends: bool) -> None:
        target.stops.begin(reason, rank, mends=mends)
        self._frames.clear()
        self._children.clear()

    def _carry_out(self, target: DebugTarget, action: Callable[[], None]) -> None:
        try:
            action()
        except (RankFailed, Hung):
            pass  # the stop tells of it
        except (DinferError, OSError) as error:
            self._say("stderr", str(error))
        except Exception:  # a fault of dinfer's: the client must hear that nothing moves
            self._say("stderr", traceback.format_exc())
        finally:
            target.stops.done()

    def _pause(self, _: DapBody) -> DapBody:
        target = self._ready()
        with suppress(RankFailed, Hung):  # the stop tells of it
            target.pause()
        return {}

    # -- breakpoints

    def _set_functions(self, arguments: DapBody) -> DapBody:
        return {"breakpoints": _as_breakpoints(self._ready().set_functions(arguments.get("breakpoints", [])))}

    def _set_lines(self, arguments: DapBody) -> DapBody:
        target, source, asked = self._ready(), arguments.get("source", {}), arguments.get("breakpoints", [])
        try:
            rank = self._rank_of(source)
        except DapRequestError as error:
            return {"breakpoints": [{"verified": False, "message": str(error)} for _ in asked]}
        lines = [{**one, "line": self._own_line(one.get("line", 0))} for one in asked]
        found = _as_breakpoints(target.set_lines(rank, lines))
        return {
            "breakpoints": [
                {**one, "line": given.get("line")} for one, given in zip(found, asked, strict=True)
            ]
        }

    def _set_exceptions(self, arguments: DapBody) -> DapBody:
        wanted = [name for name in arguments.get("filters", []) if name in EXCEPTION_FILTERS]
        return {"breakpoints": _as_breakpoints(self._ready().set_exceptions(wanted))}

    # -- looking

    def _threads(self, _: DapBody) -> DapBody:
        if self._target is None:
            return {"threads": []}
        standing = self._target.run.standing()
        ranks = range(self._target.run.world_size)
        return {"threads": [{"id": rank + 1, "name": thread_name(standing, rank)} for rank in ranks]}

    def _stack(self, arguments: DapBody) -> DapBody:
        target, rank = self._ready(), _rank(arguments)
        if not 0 <= rank < target.run.world_size:
            raise DapRequestError(
                f"there is no thread {rank + 1}: ranks are threads 1 to {target.run.world_size}."
            )
        run = target.run
        frames = rank_frames(
            run.plan, run.standing(), target.listings[rank], target.chunk_labels, target.python_of(rank)
        )
        first = arguments.get("startFrame") or 0
        shown = frames[first : first + (arguments.get("levels") or len(frames))]
        return {"stackFrames": [self._as_frame(one) for one in shown], "totalFrames": len(frames)}

    def _as_frame(self, frame: DapFrame) -> DapBody:
        number = next(self._numbers)
        self._frames[number] = frame
        found: DapBody = {"id": number, "name": frame.name, "line": 0, "column": 0}
        if frame.kind == "label":
            found["presentationHint"] = "label"
        elif frame.kind == "lane":
            found["presentationHint"] = "subtle"
        if frame.line:
            found |= {"line": self._their_line(frame.line), "column": self._first_line}
            found["source"] = (
                {"name": frame.path.rpartition("/")[2], "path": frame.path}
                if frame.path
                else self._plan_source(frame.rank)
            )
        return found

    def _plan_source(self, rank: int) -> DapBody:
        return {"name": self._ready().listings[rank].name, "sourceReference": rank + 1, "origin": "plan"}

    def _sources(self, _: DapBody) -> DapBody:
        ranks = range(self._target.run.world_size) if self._target else ()
        return {"sources": [self._plan_source(rank) for rank in ranks]}

    def _source(self, arguments: DapBody) -> DapBody:
        source = arguments.get("source") or {"sourceReference": arguments.get("sourceReference")}
        # Without a MIME type: VS Code then tells the language, in which breakpoints can be set, by the name's suffix.
        return {"content": self._ready().listings[self._rank_of(source)].text}

    def _scopes(self, arguments: DapBody) -> DapBody:
        frame = self._frame(arguments)
        found = scopes_of(self._ready().run, frame) if frame.kind != "label" else []
        return {
            "scopes": [
                {"name": one.name, "variablesReference": self._kept(one.children), "expensive": one.slow}
                for one in found
            ]
        }

    def _variables(self, arguments: DapBody) -> DapBody:
        children = self._children.get(arguments.get("variablesReference", 0))
        if children is None:
            raise DapRequestError("these variables are of an earlier stop: the run has moved since.")
        found: Sequence[DapVariable] = children()
        first = arguments.get("start") or 0
        if arguments.get("filter") == "indexed" or first or arguments.get("count"):
            found = found[first : first + (arguments.get("count") or len(found))]
        return {"variables": list(map(self._as_variable, found))}

    def _as_variable(self, one: DapVariable) -> DapBody:
        found: DapBody = {"name": one.name, "value": one.value, "variablesReference": 0}
        if one.type:
            found["type"] = one.type
        if one.children:
            found["variablesReference"] = self._kept(one.children)
        if one.rows:
            found["indexedVariables"] = one.rows
        return found

    def _kept(self, children: Children) -> int:
        number = next(self._numbers)
        self._children[number] = children
        return number

    def _exception_info(self, _: DapBody) -> DapBody:
        run = self._ready().run
        standing = run.standing()
        stop = self._ready().stops.stop
        if standing.state in (State.HUNG, State.FAILED, State.LOST):
            verdict = run.verdict()
            error = self._ready().session.ranks.ranks[verdict.rank or 0].error
            stack = f"{error.traceback}\n{verdict}" if error else str(verdict)
            go_on = f"\nto go on: {standing.remedy}" * bool(standing.remedy)
            return {
                "exceptionId": f"{standing.state}: {verdict.kind}",
                "description": f"{verdict.sentence}{go_on}",
                "breakMode": "always",
                "details": {
                    "message": verdict.sentence,
                    "typeName": verdict.kind,
                    "stackTrace": stack,
                },
            }
        if stop is None:
            raise DapRequestError("the run has not stopped for an exception.")
        return {"exceptionId": stop.title, "description": stop.text, "breakMode": "always"}

    # -- the debug console

    def _evaluate(self, arguments: DapBody) -> DapBody | Deferred:
        target, text = self._ready(), str(arguments.get("expression", ""))
        if is_condition(text):
            return {
                "result": met_condition(target.run, self._frame(arguments), text),
                "variablesReference": 0,
            }
        call = parsed(text, target.run, target.session)
        if (call.moves or call.changes) and arguments.get("context") in ("watch", "hover", "variables"):
            what = "moves the run" if call.moves else "changes something"
            raise NotPossible(f"this {what}: say it in the debug console.")
        if not call.moves:
            return {"result": str(call.do()), "variablesReference": 0}
        if target.stops.is_moving:
            raise DapRequestError("the run moves: pause it first.")
        self._begin(target, "step", 0, mends=call.mends)
        self._wire.event("continued", threadId=1, allThreadsContinued=True)
        try:
            result = str(call.do())
        finally:
            target.stops.done()
        return {"result": result, "variablesReference": 0}

    def _completions(self, arguments: DapBody) -> DapBody:
        text = str(arguments.get("text", ""))
        return {
            "targets": [
                {"label": name} for name in completions(text[: arguments.get("column", 1 + len(text)) - 1])
            ]
        }

    # -- within

    def _frame(self, arguments: DapBody) -> DapFrame:
        number = arguments.get("frameId")
        if number is None:
            return DapFrame("", 0, "label")
        if number not in self._frames:
            raise DapRequestError("this frame is of an earlier stop: the run has moved since.")
        return self._frames[number]

    def _rank_of(self, source: DapBody) -> int:
        """The rank whose plan a source is. Raises DapRequestError for a file."""
        target = self._ready()
        number = source.get("sourceReference") or 0
        by_name = [one.rank for one in target.listings if one.name == source.get("name")]
        if not number and by_name and not str(source.get("path", "")).endswith(".py"):
            return by_name[0]
        if not 1 <= number <= target.run.world_size:
            raise DapRequestError(
                "dinfer stops after ops, not at lines of a file: set a function breakpoint, such as 'layer 5' or "
                "'chunk 1 layer 3', or one in the plan of a rank, which the call stack shows."
            )
        return int(number) - 1

    def _own_line(self, line: int) -> int:
        return line + 1 - self._first_line

    def _their_line(self, line: int) -> int:
        return line - 1 + self._first_line


def _enter(folder: str) -> None:
    """Relative paths, also those in the debug console, are of that folder."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise DapRequestError(f"cwd {folder!r} cannot be used: {error.strerror}. Give a folder.") from None


def _rank(arguments: DapBody) -> int:
    return int(arguments.get("threadId", 1)) - 1


def _as_breakpoints(found: Sequence[SetBreakpoint]) -> list[DapBody]:
    return [
        {"verified": False, "message": one.text}
        if one.number is None
        else {"id": one.number, "verified": True, "message": one.text}
        for one in found
    ]


def _stepping(command: str) -> Callable[[DebugAdapter, DapBody], Deferred]:
    return lambda adapter, arguments: adapter._step(command, arguments)


HANDLERS: dict[str, tuple[Callable[[DebugAdapter, DapBody], DapBody | Deferred] | None, OnDapThread]] = {
    "initialize": (DebugAdapter._initialize, "reading"),
    "launch": (DebugAdapter._launch, "moving"),
    "attach": (DebugAdapter._attach, "moving"),
    "configurationDone": (DebugAdapter._configured, "reading"),
    "restart": (DebugAdapter._restart, "reading"),
    "disconnect": (DebugAdapter._disconnect, "reading"),
    "setFunctionBreakpoints": (DebugAdapter._set_functions, "looking"),
    "setBreakpoints": (DebugAdapter._set_lines, "looking"),
    "setExceptionBreakpoints": (DebugAdapter._set_exceptions, "looking"),
    "continue": (DebugAdapter._continue, "reading"),
    "reverseContinue": (DebugAdapter._back, "reading"),
    **{command: (_stepping(command), "reading") for command in UNITS_OF},
    "pause": (DebugAdapter._pause, "aside"),
    "gotoTargets": (DebugAdapter._goto_targets, "looking"),
    "goto": (DebugAdapter._goto, "reading"),
    "threads": (DebugAdapter._threads, "reading"),
    "stackTrace": (DebugAdapter._stack, "looking"),
    "scopes": (DebugAdapter._scopes, "looking"),
    "variables": (DebugAdapter._variables, "looking"),
    "source": (DebugAdapter._source, "looking"),
    "loadedSources": (DebugAdapter._sources, "reading"),
    "exceptionInfo": (DebugAdapter._exception_info, "looking"),
    "evaluate": (DebugAdapter._evaluate, "looking"),
    "completions": (DebugAdapter._completions, "reading"),
}
"""by request, what answers it, and on which thread"""
