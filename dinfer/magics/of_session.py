"""Verbs of a session: each parses its words, makes one call, and returns what that returns."""
# IPython's decorators have no types.
# mypy: allow-untyped-calls, allow-untyped-decorators

from typing import Any

from IPython.core.magic_arguments import argument, magic_arguments

import dinfer
from dinfer.magics.call import Call, Text
from dinfer.session.session import Session


def _layers(word: str) -> bool | list[int]:
    """Of which layers to save values."""
    return word == "all" if word in ("all", "none") else [int(one) for one in word.split(",")]


@magic_arguments()
@argument("where", nargs="?", default="ipyparallel", help="ipyparallel (the default) or threads")
@argument("-n", type=int, default=3, help="how many ranks")
@argument("--profile", default="default", help="the IPython profile of the cluster")
@argument("--cluster-id", help="which of its clusters")
def connect(call: Call) -> None:
    """Join the running cluster, or start one; the session is `session` from then on."""
    options = {} if call.words.where == "threads" else {"cluster_id": call.words.cluster_id}
    options |= {"profile": call.words.profile}
    call.shell.user_ns["session"] = dinfer.connect(call.words.where, call.words.n, **options)


@magic_arguments()
@argument("model_path", nargs="?", default="demo", help="folder of a checkpoint, or demo (the default)")
@argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
@argument("--gpu-ids", default="", help="the GPU of each rank, such as 0,1,2; none: the CPU")
@argument("--threads", type=int, default=0, help="CPU threads of each rank; 0: the cores shared out")
def load(call: Call) -> Session:
    """Load a checkpoint on every rank."""
    words = call.words
    gpu_ids = [int(word) for word in words.gpu_ids.split(",") if word.strip()]
    return call.session.load(words.model_path, dtype=words.dtype, gpu_ids=gpu_ids, threads=words.threads)


@magic_arguments()
@argument("prompt", nargs="+", help="the text, or $name for that of a variable, as it is")
@argument("--free", action="store_true", help="run at once, instead of standing before the first op")
@argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="chunk_size=8 schedule=lockstep …")
def prefill(call: Call) -> Any:
    """Make a run of this prompt, paused before its first op; parameters of `dinfer run` as key=value."""
    parameters = dict(word.split("=", 1) for word in call.words.set)
    prompt = " ".join(call.words.prompt)
    return call.session.prefill(prompt, paused=not call.words.free, **parameters)


@magic_arguments()
@argument(
    "prompts", nargs="+", help="texts, each between quotation marks, or $name for that, or all, of a variable"
)
@argument(
    "--set",
    nargs="+",
    default=[],
    metavar="KEY=VALUE,…",
    help="chunk_size=8,16 sync_strategy=pairwise,ring …",
)
def sweep(call: Call) -> Any:
    """Run every prompt with every combination of these parameters; a table."""
    chosen = dict(word.split("=", 1) for word in call.words.set)
    return call.session.sweep(call.words.prompts, **{name: some.split(",") for name, some in chosen.items()})


@magic_arguments()
def recover(call: Call) -> Any:
    """After a failure: bring lost ranks back and free those that are stuck."""
    return call.session.recover()


@magic_arguments()
@argument("-n", type=int, default=20, help="how many lines, the newest")
def log(call: Call) -> Text:
    """What has happened in this session."""
    return Text(call.session.log[-call.words.n :] if call.words.n > 0 else [])


@magic_arguments()
def panel(call: Call) -> Any:
    """Show the current run as a map with buttons."""
    return call.session.debugger()


@magic_arguments()
@argument("path", nargs="?", default="report.html", help="the file to write (report.html)")
@argument("--prompt", action="store_true", help="with the prompt and the text that came of it")
@argument("--environment", action="store_true", help="with this process's environment variables")
def report(call: Call) -> Text:
    """Write what is known of the current run to one HTML file."""
    words = call.words
    path = call.run.report(words.path, prompt=words.prompt, environment=words.environment)
    return Text([f"report: {path}"])


@magic_arguments()
@argument("folder", help="where to save it")
@argument("--kv", type=_layers, default=True, help="all (the default), none, or layers such as 0,1")
@argument("--no-hidden", action="store_true", help="without the hidden states that entered each rank")
@argument("--prompt", action="store_true", help="with the text of the prompt and of new tokens")
def save(call: Call) -> Text:
    """Save the current run to a folder, for dinfer.open."""
    words = call.words
    path = call.run.save(words.folder, kv=words.kv, hidden=not words.no_hidden, prompt=words.prompt)
    return Text([f"saved: {path}"])


@magic_arguments()
@argument("rank", type=int, help="the rank to attach to")
@argument("--port", type=int, default=0, help="where it listens; by default 5678 + rank")
def debug(call: Call) -> Any:
    """Let VS Code, or another client of debugpy, attach to a rank."""
    return call.session.listen_for_debugger(call.words.rank, call.words.port)


@magic_arguments()
def close(call: Call) -> None:
    """Part from the ranks."""
    call.session.close()
