"""All messages between a session and its ranks, and how they are encoded.

A session (`dinfer.cluster`) sends commands; a rank (`dinfer.rank`), or the watcher process beside it, sends reports.
Each command names its answer: `class Freeze(Command[Stand])` is answered by a `Stand`, in a `Reply`, or by `Refused`.
The class name is the tag on the wire. Messages are msgpack; a tensor follows its message as a frame of its own, in
safetensors format. What is started from a command line or by ipyparallel gets its part as JSON (`RankLink`, `RankJob`).

    session ──Request(number, command)──▶ watcher ──▶ rank      ZeroMQ, then a socket pair
    session ◀──RankReport [, tensor frame]─── watcher ◀── rank      the watcher adds Status and Gone

Ranks that are threads of the session's process get and give the same objects, without encoding.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Raw, Struct

# -- parts of messages

CutPositions = tuple[tuple[int, ...], ...]
"""by rank, by lane: a number of ops"""

ChunkLayer = tuple[int, int]
"""chunk and layer"""

Digest2 = tuple[int, int]
"""of K and of V, 64 bits each"""

ChannelFields = tuple[str, int, int]
"""a `plan.graph.Channel`: communicator, source, target"""

StackLine = tuple[str, int, str, str]
"""file, line, function, source text"""

Figures = dict[str, list[list[float]]]
"""`kv.measure.per_head`: each figure as [2, kv_heads]"""

Phase = Literal["starting", "loading", "measuring", "prefill", "decode", "done"]


class DeviceMemory(NamedTuple):
    """Bytes of one GPU: those that a rank's tensors have, those that its torch keeps for tensors, and all of them."""

    allocated: int
    reserved: int
    total: int


class SpiedFrame(NamedTuple):
    """One frame that py-spy has seen. `line` is None for a C function, whose `file` is the library that it is in."""

    file: str
    line: int | None
    function: str
    text: str = ""


class ThreadStack(Struct, frozen=True):
    """One thread of a rank. `frames`: the innermost first; `at`: the number of the one that says most; `native`: it is
    in C code; `waits`: in the transport; `held`: by a debugger."""

    name: str
    cpu_s: float | None
    frames: tuple[StackLine, ...]
    at: int = 0
    native: bool = False
    waits: bool = False
    held: bool = False


class SpiedThread(Struct, frozen=True):
    """One thread as py-spy has seen it, the innermost frame first."""

    name: str
    holds_gil: bool
    frames: tuple[SpiedFrame, ...]


class EditedBlocks(Struct, frozen=True):
    """What a user had edited while a rank's lanes stood at `positions`."""

    positions: tuple[int, ...]
    kv: tuple[ChunkLayer, ...]
    hidden: tuple[ChunkLayer, ...]


class NotedBlock(Struct, frozen=True):
    """What a rank's ledger says of a block. `announced`: the digests in its header, where others came."""

    chunk: int
    layer: int
    announced: Digest2 | None = None
    edited: bool = False


class UnexpectedHeader(Struct, frozen=True):
    """The header of a transfer that was not the one that the plan expects. `here`: this rank's plan id."""

    value: tuple[str, int, int]
    tokens: int
    nbytes: int
    plan_id: int
    here: int


# -- answers: rank → session, inside a Reply


class Answer(Struct, frozen=True, tag=True):
    """What a command is answered by."""


class Ok(Answer, frozen=True):
    """The command has been carried out; there is nothing to tell."""


class Stand(Answer, frozen=True):
    """Where one rank stands, by lane: ops that have ended, whether the next has begun, how far it may go."""

    positions: tuple[int, ...]
    started: tuple[bool, ...]
    limits: tuple[int, ...]

    @property
    def at_limits(self) -> bool:
        return self.positions == self.limits


class StoreAddress(Answer, frozen=True):
    """Where the ranks' group meets."""

    address: str
    port: int


class LoadedModel(Answer, frozen=True):
    """The checkpoint is on this rank; `seconds`: how long that took."""

    device: str
    dtype: str
    seconds: float


class PreparedPrompt(Answer, frozen=True):
    """All lanes stand at limit 0 of this plan."""

    plan_id: int


class NewTokens(Answer, frozen=True):
    """All new tokens of this rank; `stopped`: why there can be no more; `remark`: why decode did not begin."""

    tokens: tuple[int, ...]
    stopped: Literal["", "end of text", "positions"] = ""
    remark: str = ""


class BegunTokens(Answer, frozen=True):
    """How many new tokens this rank has begun."""

    begun: int


class KvHash(Answer, frozen=True):
    """SHA-256 of the KV that this rank holds of the prompt."""

    sha256: str


class RankMeasured(Answer, frozen=True):
    """What layers take on this rank, alone and `in_run`, fields of `planner.costs.LayerTime`; and each link, fields of
    `planner.machine.LinkSpeed`, the same on every rank. Bytes are of one token. `codecs`: fields of
    `planner.machine.CodecCost`. `asked`: the command's `kernels`; `padded`: chunks take as long as the longest of their
    plan, as graphs do; `streams`: ops run on streams."""

    layers: tuple[tuple[int, int, float], ...]
    links: tuple[tuple[int, int, float, float, float, float], ...]
    hidden_bytes: int
    block_bytes: int
    codecs: tuple[tuple[str, float, float, float], ...] = ()
    in_run: tuple[tuple[int, int, float], ...] = ()
    asked: str = "exact"
    padded: bool = False
    streams: bool = False


class LeftGroup(Answer, frozen=True):
    """`free`: nothing of the prompt and the group is left blocked."""

    free: bool


class ThreadStacks(Answer, frozen=True):
    """Where a rank's threads stand in Python."""

    threads: tuple[ThreadStack, ...]


class StackDump(Answer, frozen=True):
    """What faulthandler has written of a rank that does not answer; "" for nothing. Sent by the watcher."""

    text: str


class SpiedThreads(Answer, frozen=True):
    """What py-spy has seen of a rank; empty where it is missing or may not look. Sent by the watcher."""

    threads: tuple[SpiedThread, ...]


class TensorData(Answer, frozen=True):
    """Tensors by name in safetensors format: `size` bytes, of which `data` are the first.

    `data` travels as a frame of its own. What is left is fetched by `ReadMore(number)`.
    """

    size: int = 0
    number: int = 0
    data: bytes = b""


class NotedKv(TensorData, frozen=True, kw_only=True):
    """The ledger's digests, int64 [blocks, 2], of these blocks."""

    blocks: tuple[NotedBlock, ...]


class AttentionData(TensorData, frozen=True, kw_only=True):
    """[heads, queries, keys]; `first_key`: the token of the first key."""

    first_key: int


class KvSpans(Answer, frozen=True):
    """By layer: how many spans (chunks, then new tokens) and how many rows a rank holds; `new_rows` of these are of new
    tokens."""

    spans: tuple[int, ...]
    rows: tuple[int, ...]
    new_rows: int


class KvLoss(Answer, frozen=True):
    """By tensor, "K" and "V", fields of CellDifference: what a lossy codec has changed."""

    loss: tuple[tuple[str, tuple[Any, ...]], ...]


class TensorSummary(Answer, frozen=True):
    """A tensor in a few figures for each head."""

    figures: Figures


class HiddenSpans(Answer, frozen=True):
    """By chunk, the first layer before which this rank has, or can compute, the hidden state."""

    first: dict[int, int]


class BlockWritten(Answer, frozen=True):
    """How many values of the block are not as they were."""

    changed: int


class RankNotes(Answer, frozen=True):
    """A rank's new tokens, and what its user has edited, in order."""

    tokens: tuple[int, ...]
    edits: tuple[EditedBlocks, ...]


class HiddenDigests(Answer, frozen=True):
    """Of the hidden states that a rank keeps: chunk, layer, digest. `tokens`: its new ones; after a decode that failed
    they are more than the session knows."""

    digests: tuple[tuple[int, int, int], ...]
    tokens: tuple[int, ...]


class ReferenceReport(Answer, frozen=True):
    """How what a rank holds, by these kernels, differs from transformers' own forward, and that forward's digests.

    `blocks`: chunk, layer, digests; `hidden` as in HiddenDigests; `choices`: fields of TokenChoice; `misplaced`: layer,
    then fields of Misplaced; `measured`: chunk, layer, tensor, then fields of CellDifference. With a lossy codec the
    reference's K and V of the prompt go through it too; `loss`: tensor, then fields of the CellDifference that this
    makes; `lost_choices`: as `choices`, without the codec.
    """

    exact: bool
    rows: int
    threads: int
    seconds: float
    device: str
    choices: tuple[tuple[int, int, int, float], ...]
    blocks: tuple[tuple[int, int, Digest2], ...]
    hidden: tuple[tuple[int, int, int], ...]
    misplaced: tuple[tuple[int, tuple[Any, ...]], ...]
    kernels: str
    measured: tuple[tuple[int, int, str, tuple[Any, ...]], ...]
    loss: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    lost_choices: tuple[tuple[int, int, int, float], ...] = ()


A = TypeVar("A", bound=Answer, covariant=True)


# -- commands: session → rank


class Command(Struct, Generic[A], frozen=True, tag=True):
    """What a session has a rank do. The type argument is the answer."""


class SetLimits(Command[Ok], frozen=True):
    """Let each lane go that far. `order` names this call in reports; `stopping`: breakpoints do not count."""

    cut: CutPositions
    order: int = 0
    stopping: bool = False


class Freeze(Command[Stand], frozen=True):
    """Start no further op; where the lanes stand."""


class GetStand(Command[Stand], frozen=True):
    """Where the lanes stand, without stopping them."""


class Release(Command[Ok], frozen=True):
    """Send a void header on these channels: a recv was posted there whose send will not come."""

    channels: tuple[ChannelFields, ...]


class Rewind(Command[Ok], frozen=True):
    """Go back to a cut that all lanes have passed."""

    cut: CutPositions


class SetBreakpoints(Command[Ok], frozen=True):
    """Look out for the conditions of these breakpoints, each a `Breakpoint.as_dict()`, and for no others."""

    breakpoints: tuple[dict[str, Any], ...]


class SetFaults(Command[Ok], frozen=True):
    """Have these faults strike, each a `Fault.as_dict()`, and no others."""

    faults: tuple[dict[str, Any], ...]


class WriteBlock(Command[BlockWritten], frozen=True):
    """Put these values in the place of a block's, as its user would by hand. `part`: "K", "V" or "", both; `data`: one
    tensor, [tokens, 1 or 2, kv_heads, head_dim], in safetensors format; `undo`: it is no edit, but takes one back."""

    chunk: int
    layer: int
    part: str
    data: bytes
    undo: bool = False


class OpenStore(Command[StoreAddress], frozen=True):
    """To rank 0: open the store at which all ranks meet. Port 0: any free one."""

    address: str
    port: int


class JoinGroup(Command[Ok], frozen=True):
    """Meet all other ranks at the store, within `timeout` seconds."""

    address: str
    port: int
    timeout: float
    backend: Literal["auto", "gloo", "nccl", "ipc"]


class UnloadModel(Command[Ok], frozen=True):
    """Give up prompt and weights, unless the weights are those named. Sent to all ranks before LoadModel."""

    path: str
    dtype: str
    device: str
    fingerprint: str
    """`model.checkpoint.Spec.fingerprint`, as the session has read it"""


class LoadModel(Command[LoadedModel], frozen=True):
    """Load a checkpoint, unless this very one is there, and on a GPU capture its layers for chunks of `chunk_size`
    tokens. Reports `Loading` meanwhile."""

    path: str
    dtype: str
    device: str
    fingerprint: str
    threads: int
    kernels: str = "exact"
    chunk_size: int = 1


class PreparePrompt(Command[PreparedPrompt], frozen=True):
    """Make a prompt ready. `config`: the fields of Config; `plan`: a plan's text, "" for the one that config gives."""

    config: dict[str, Any]
    ids: tuple[int, ...]
    plan: str = ""


class Holdings(Answer, frozen=True, kw_only=True):
    """What a rank holds of an earlier session: the commands by which it has loaded, met and prepared, None for what it
    does not have; the plan that it runs; what was armed last; the tokens that it has generated, and begun; how many of
    its events are overwritten; whether it is still preparing a prompt, or measures, and may wait for a rank that was
    never asked; and what was measured with these weights: with digests or without, up to which position."""

    load: LoadModel | None
    group: JoinGroup | None
    prompt: PreparePrompt | None
    plan_id: int
    breakpoints: tuple[dict[str, Any], ...]
    faults: tuple[dict[str, Any], ...]
    tokens: tuple[int, ...]
    begun: int
    lost_events: int
    preparing: bool = False
    measured: tuple[tuple[bool, int, RankMeasured], ...] = ()


class GetHeld(Command[Holdings], frozen=True):
    """What this rank still has of the session that held it before."""


class EndPrompt(Command[Ok], frozen=True):
    """The session is closed: give up the prompt, keep the weights."""


class ExpectDecode(Command[Ok], frozen=True):
    """Prefill is on its way to its end, and decode of up to `limit` new tokens follows: compute what one rank can of
    the first two as soon as that is possible, until the run is sent elsewhere or changed. Reports an early `TextPiece`
    for the first. Limit 0: decode does not follow, and what was computed is given up."""

    limit: int


class StartDecode(Command[NewTokens], frozen=True):
    """Generate tokens up to the limit, or to the end of the text. Reports `TextPiece` meanwhile."""


class LimitDecode(Command[BegunTokens], frozen=True):
    """Stop at that many new tokens; None: begin no further one until another limit comes."""

    limit: int | None = None


class StepBackDecode(Command[Ok], frozen=True):
    """Forget all but the first `tokens` new tokens."""

    tokens: int


class HashKv(Command[KvHash], frozen=True):
    """SHA-256 of the KV of the prompt's first `tokens` tokens."""

    tokens: int


class DrainChannels(Command[Ok], frozen=True):
    """Post the counterparts of ops that are blocked elsewhere, so that they end."""

    sends: tuple[ChannelFields, ...] = ()
    recvs: tuple[ChannelFields, ...] = ()


class LeaveGroup(Command[LeftGroup], frozen=True):
    """Give up prompt and group; weights stay."""


class MeasureRank(Command[RankMeasured], frozen=True):
    """To all ranks at once: time layers for chunks of these lengths within `tokens` tokens, and all links, with
    messages of `link_tokens` tokens' K and V, as runs with these `kernels` and this `backend` have them."""

    tokens: int
    lengths: tuple[int, ...]
    link_tokens: int
    digests: bool = True
    kernels: Literal["auto", "exact", "graph", "compiled"] = "exact"
    backend: Literal["gloo", "nccl", "ipc"] = "gloo"


class GetStacks(Command[ThreadStacks], frozen=True):
    """Where this rank's threads stand in Python."""


class Misbehave(Command[Ok], frozen=True, kw_only=True):
    """For the fault lab: do `act` (a name in `rank.faults.ACTS`) at the ops in `ops` (texts), or at all ops of kind
    `of`, of that `peer` where one is named. The other fields are what single acts need."""

    act: str
    ops: tuple[str, ...] = ()
    of: str = ""
    peer: int | None = None
    wire: tuple[float, ...] = ()
    """arguments of the broken transport"""
    seconds: float = 0.0
    spin: bool = False
    signal: str = ""
    command: tuple[str, ...] = ()


class Behave(Command[Ok], frozen=True):
    """For the fault lab: misbehave no more."""


# -- commands: what a rank holds, for `run.kv()`, `hidden`, `attention` and `save`


class ListKv(Command[KvSpans], frozen=True):
    """How much of each layer is here."""


class DigestKv(Command[TensorData], frozen=True):
    """Digests of blocks as they are now, int64 [layers, spans, 2]. A span is (start, stop), in rows."""

    layers: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class ReadNotedKv(Command[NotedKv], frozen=True):
    """What the ledger says of the blocks of these layers."""

    layers: tuple[int, ...]


class ReadNotedRows(Command[TensorData], frozen=True):
    """The ledger's row digests of a block; empty where it has none."""

    chunk: int
    layer: int


class DigestRows(Command[TensorData], frozen=True):
    """Digests of rows as they are now, int64 [rows, 2, kv_heads]."""

    layer: int
    start: int
    stop: int


class ReadRows(Command[TensorData], frozen=True):
    """These rows, [rows, 2, kv_heads, head_dim]."""

    layer: int
    places: tuple[int, ...]


class ReadKvPart(Command[TensorData], frozen=True):
    """K (0) or V (1) of these heads and rows, [heads, rows, head_dim]."""

    layer: int
    tensor: int
    heads: tuple[int, ...]
    places: tuple[int, ...]


class SummarizeKv(Command[TensorSummary], frozen=True):
    """K and V of these rows in figures."""

    layer: int
    start: int
    stop: int


class MeasureLoss(Command[KvLoss], frozen=True):
    """What the run's codec changes in the blocks of these layers and chunks that this rank has computed."""

    layers: tuple[int, ...]
    chunks: tuple[int, ...]


class ListHidden(Command[HiddenSpans], frozen=True):
    """Which hidden states can be had here."""


class ReadHidden(Command[TensorData], frozen=True):
    """The hidden state before a layer, [tokens, hidden_size]; computed anew where it is not kept."""

    chunk: int
    layer: int


class SummarizeHidden(Command[TensorSummary], frozen=True):
    """The same in figures, as of one head."""

    chunk: int
    layer: int


class ReadAttention(Command[AttentionData], frozen=True):
    """Attention weights of these heads, of all where none is named."""

    chunk: int
    layer: int
    heads: tuple[int, ...] = ()


class ReadBlocks(Command[TensorData], frozen=True):
    """Blocks of one layer, one after another, [tokens, 2, kv_heads, head_dim]."""

    layer: int
    chunks: tuple[int, ...]


class ReadFinalHidden(Command[TensorData], frozen=True):
    """The normed hidden state of the prompt's last token, [1, 1, hidden_size]; empty where it is not here."""


class ReadNotes(Command[RankNotes], frozen=True):
    """New tokens and edits of this rank."""


class ReadEdit(Command[TensorData], frozen=True):
    """A tensor as edit number `number` has left it."""

    number: int
    what: Literal["kv", "hidden"]
    chunk: int
    layer: int


class ReadMore(Command[TensorData], frozen=True):
    """More bytes of a `TensorData` answer, from byte `start` on."""

    number: int
    start: int


# -- commands: comparing with the reference


class DigestHidden(Command[HiddenDigests], frozen=True):
    """Digests of the hidden states that are here."""


class RunReference(Command[ReferenceReport], frozen=True):
    """Run transformers' own forward over the prompt's first `chunks` chunks, and compare. Reports `Comparing`
    meanwhile."""

    chunked: bool
    dtype: str
    chunks: int


class StopReference(Command[Ok], frozen=True):
    """Give up RunReference, which is then refused."""


# -- commands that are answered by no Reply, or by the watcher itself


class MeetAt(Command[Ok], frozen=True):
    """To a rank of `dinfer run`: the port that rank 0 has opened. No reply."""

    port: int


class RunChosen(Command[Ok], frozen=True):
    """To a rank of `dinfer run` that has measured: what the planner has chosen, by parameter of Config, and the plan's
    text, "" where the parameters say it all. No reply."""

    parameters: dict[str, Any]
    plan: str


class AllStands(Command[Ok], frozen=True):
    """Where all ranks stand, None where that is not known: answers a rank's `AskStands`. No reply."""

    question: int
    stands: tuple[Stand | None, ...]


class Beat(Command[Ok], frozen=True):
    """To the watcher: the session lives. `sent`: when, in nanoseconds of its clock. No reply but `ClockAnswer`."""

    sent: int = 0


class KillRank(Command[Ok], frozen=True):
    """To the watcher: kill the rank. No reply but `Gone`."""


class DumpStacks(Command[StackDump], frozen=True):
    """To the watcher: have the rank's signal handler write where its threads stand."""


class SpyOnRank(Command[SpiedThreads], frozen=True):
    """To the watcher: have py-spy look at the rank."""


# -- reports: rank, or watcher, → session


class RankReport(Struct, frozen=True, tag=True):
    """What a rank or its watcher tells its session."""


def _union(base: type) -> Any:
    """All types of message that derive from `base`, as msgspec takes them."""

    def derived(of: type) -> Iterator[type]:
        kind: type
        for kind in of.__subclasses__():
            yield kind
            yield from derived(kind)

    return reduce(or_, derived(base))


if TYPE_CHECKING:
    AnyAnswer = Answer
else:
    AnyAnswer = _union(Answer)


class Reply(RankReport, frozen=True):
    """The answer to request `number`."""

    number: int
    answer: AnyAnswer


class Refused(RankReport, frozen=True):
    """Request `number` has failed, or is unknown; `error` says why."""

    number: int
    error: str


class Status(RankReport, frozen=True):
    """From the watcher, at least ten times a second: where the rank stands and how its process is.

    `process`: its state letter; `wants_cpu`: for which share of the last seconds one thread was ready to run;
    `thread_cpu`: the share of a core that its busiest thread has used in them, None while that is not known;
    `memory`: bytes; `records`: events since the last Status (see `trace.recorder`).
    """

    phase: Phase
    decoded: int
    stand: Stand
    process: str | None = None
    cpu_s: float | None = None
    wants_cpu: float = 0.0
    thread_cpu: float | None = None
    memory: int | None = None
    device_memory: DeviceMemory | None = None
    records: bytes = b""


class ClockAnswer(RankReport, frozen=True):
    """From the watcher, to each Beat where its host has another clock than the session, of this name. `sent`: the
    Beat's; `received`, `answered`: nanoseconds of the host's clock."""

    clock: str
    sent: int
    received: int
    answered: int


class Gone(RankReport, frozen=True):
    """From the watcher, last of all: the rank's process has ended."""


class Lanes(RankReport, frozen=True):
    """A rank has a new prompt: the names of its recorder's lanes, and of its threads."""

    lanes: tuple[str, ...]
    threads: tuple[tuple[int | None, str], ...]


class Loading(RankReport, frozen=True):
    """A checkpoint is being loaded: bytes of weights, or layers captured as graphs, so far and of all."""

    done: int
    total: int
    what: Literal["weights", "graphs"] = "weights"


class Comparing(RankReport, frozen=True):
    """RunReference is under way: tokens that the reference has been fed, and all of them."""

    done: int
    total: int


class TextPiece(RankReport, frozen=True):
    """From rank 0: a piece of generated text. In a session `at` is the number of characters of new tokens before it: it
    takes the place of whatever was told from there on. `is_early`: of a first token that does not count yet."""

    text: str
    at: int = 0
    is_early: bool = False


class AskStands(RankReport, frozen=True):
    """Where do all ranks stand? Answered by AllStands with the same `question`."""

    question: int


class Failed(RankReport, frozen=True):
    """A rank cannot go on. `secondary`: since it lost a peer; `cause`: the original error; `op`, `lane`: where it was
    raised; `came`: the header because of which."""

    message: str
    error: str = ""
    secondary: bool = False
    traceback: str = ""
    log_trouble: str = ""
    cause: str = ""
    op: str = ""
    lane: str = ""
    came: UnexpectedHeader | None = None


class HandedOn(RankReport, frozen=True):
    """Another session has taken over this rank's engine: `to`, as people find it."""

    to: str


class Struck(RankReport, frozen=True):
    """For the fault lab: a rank misbehaves at `op` for the first time, at that monotonic time."""

    op: str
    at: float


class Note(RankReport, frozen=True):
    """Something that a run has to know, in the order in which it happens."""


class Edited(Note, frozen=True):
    """A user has edited these tensors by hand."""

    what: tuple[str, ...]


class FaultStruck(Note, frozen=True):
    """Fault `number` has changed so many values; `found` says it in words."""

    number: int
    changed: int
    found: str


class BreakpointHit(Note, frozen=True):
    """A breakpoint's condition holds at `op`, under that order: this rank has halted."""

    breakpoint: dict[str, Any]
    op: str
    found: str
    order: int


class BlockCorrupt(Note, frozen=True):
    """A block's bytes have changed: `found` is a `Corruption.as_dict()`. `order`: set where this rank has halted."""

    found: dict[str, Any]
    order: int | None = None


class FirstNonFinite(Note, frozen=True):
    """The first NaN or Inf in what this rank has made: `found` is a `NonFinite.as_dict()`."""

    found: dict[str, Any]


# -- reports of `dinfer run`, whose ranks run from start to end without commands


class StoreOpened(RankReport, frozen=True):
    """From rank 0: the port at which the ranks meet."""

    port: int


class MeasuredForRun(RankReport, frozen=True):
    """What this rank has measured; it waits for RunChosen."""

    found: RankMeasured


class BatchResult(RankReport, frozen=True):
    """The rank is done: what it measured."""

    host: str
    device: str
    threads: int
    dtype: str
    kernels: str
    kv_sha256: str
    tokens: tuple[int, ...]
    plan_id: int
    decode_s: float
    lost_events: int
    stopped: Literal["end of text", "positions", "max_new_tokens"]
    log_trouble: str


class ToldToEnd(RankReport, frozen=True):
    """The rank's launcher has told it to end."""


# -- what a rank is started with, as JSON


class OrphanRule(Struct, frozen=True):
    """What a watcher does once its session's connection has been closed for `patience_s` seconds: end its rank, and
    the processes `ends`, or pause it."""

    do: Literal["end", "pause"]
    patience_s: float
    ends: tuple[int, ...] = ()


class Holder(Struct, frozen=True):
    """The process whose session holds a rank, as people find it. `program`: such as `notebook a.ipynb`; `since`: in
    seconds since 1970; `key`: differs between any two processes."""

    program: str
    pid: int
    host: str
    since: float
    key: str

    def __str__(self) -> str:
        return f"{self.program} (pid {self.pid} on {self.host})"


class RankLink(Struct, frozen=True):
    """What a rank needs to reach its session: endpoint, and CurveZMQ keys. `launcher`: the process without which it
    does not go on; `joined`: another launcher started it, but it ends once it hears nothing from its session for long;
    `orphan`: a rule in place of both; `dump`: the file descriptor into which the rank dumps its stacks; `holder`: the
    session's process, for an engine that another session may join; `run_folder`: for a rank that has joined, the name
    of the run's folder in log_dir; `clock`: the name of the session's clock."""

    rank: int
    endpoint: str
    server_key: str
    public_key: str
    secret_key: str
    launcher: int = 0
    joined: bool = False
    orphan: OrphanRule | None = None
    dump: int | None = None
    holder: Holder | None = None
    run_folder: str = ""
    clock: str = ""


class RankJob(Struct, frozen=True):
    """What `dinfer.rank.worker` reads from its standard input. `config`: the fields of Config; `to_measure`: what to
    measure before the run, for the planner."""

    rank: int
    config: dict[str, Any]
    ids: tuple[int, ...]
    link: RankLink
    to_measure: MeasureRank | None = None


# -- encoding


class UnknownMessage(ValueError):
    """The message's type is unknown here, or its fields do not fit; the text names it."""


class Request(Struct, frozen=True):
    """A command on the wire; its Reply will have the same number."""

    number: int
    command: Raw


class _Tag(Struct):
    type: str


_requests = msgspec.msgpack.Decoder(Request)

_tags = msgspec.msgpack.Decoder(_Tag)

_commands = msgspec.msgpack.Decoder[Command[Any]](_union(Command))

_reports = msgspec.msgpack.Decoder[RankReport](_union(RankReport))


def pack_command(command: Command[Any], number: int) -> bytes:
    """A request as one frame."""
    encode = msgspec.msgpack.encode
    return encode(Request(number, Raw(encode(command))))


def unpack_request(frame: bytes) -> Request:
    """The request in a frame, its command still packed."""
    return _requests.decode(frame)


def unpack_command(packed: Raw | bytes) -> Command[Any]:
    """A request's command. Raises UnknownMessage."""
    try:
        command: Command[Any] = _commands.decode(packed)
    except msgspec.ValidationError as error:
        raise UnknownMessage(f"command {tag_of(packed)}: {error}") from None
    return command


def pack_report(report: RankReport) -> list[bytes]:
    """A report as one frame; with the bytes of tensors, as two."""
    encode, replace = msgspec.msgpack.encode, msgspec.structs.replace
    if isinstance(report, Reply) and isinstance(report.answer, TensorData) and (data := report.answer.data):
        return [encode(replace(report, answer=replace(report.answer, data=b""))), data]
    return [encode(report)]


def unpack_report(frames: Sequence[bytes]) -> RankReport:
    """The report in one frame or two. Raises UnknownMessage."""
    try:
        report: RankReport = _reports.decode(frames[0])
    except msgspec.ValidationError as error:
        raise UnknownMessage(f"report {tag_of(frames[0])}: {error}") from None
    if len(frames) > 1 and isinstance(report, Reply) and isinstance(report.answer, TensorData):
        msgspec.structs.force_setattr(report.answer, "data", frames[1])
    return report


def tag_of(packed: Raw | bytes) -> str:
    """The name of a packed message's class, without unpacking the rest."""
    return _tags.decode(packed).type


def size_of(message: Command[Any] | Answer) -> int:
    """Bytes of a command, or of an answer with its tensors, on the wire."""
    return len(msgspec.msgpack.encode(message))
