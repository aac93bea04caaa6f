"""Format: the files of a saved run, the names of the tensors in them, and a description of both for FORMAT.md."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from dinfer.errors import DinferError
from dinfer.plan.plan import Plan
from dinfer.trace.export import FORMAT as TRACE_FORMAT

FORMAT, VERSION = "dinfer-run", 1

RUN, DESCRIBED, PLAN, TRACE = "run.json", "FORMAT.md", "plan.txt", "trace.jsonl"

DIGESTS, HIDDEN = "digests.safetensors", "hidden.safetensors"

LEDGER_COLUMNS = 7
"""chunk, layer, edited; digests of K and V as they came, then as announced"""


class SavedError(DinferError, ValueError):
    """A folder is no saved run, is damaged, cannot be written, or lacks something that was asked for."""


def damaged(path: Path, what: str) -> SavedError:
    """The error of a folder or a file in which something is wrong."""
    return SavedError(f"{str(path)!r} is damaged: {what}")


def is_part(name: str) -> bool:
    """Whether a saved run may have a file of this name."""
    known = (RUN, DESCRIBED, PLAN, TRACE, DIGESTS, HIDDEN)
    return name in known or re.fullmatch(r"kv\.layer\d+\.safetensors", name) is not None


# names of files and tensors, of numbers in the order in which they stand there: DESCRIPTION says what they are
kv_file = "kv.layer{}.safetensors".format
rows_name = "rank{}.layer{}.rows".format
came_name = "rank{}.layer{}.chunk{}.came".format
ledger_name = "rank{}.ledger".format
piece_name = "rank{}.rows{}".format
final_name = "rank{}.final".format
edit_name = "rank{}.edit{}.{}.chunk{}.layer{}".format
hidden_name = "rank{}.chunk{}.layer{}".format


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_holder(plan: Plan, ranks: Sequence[int], layer: int) -> int:
    """The rank whose rows and values of a layer are always saved: its owner, if that is one of these ranks."""
    owner = plan.shape.owners[layer]
    return owner if owner in ranks else ranks[0]


def pieces(spans: Sequence[range], rows: int) -> list[range]:
    """The places of a layer with so many rows: those of each span, then those after the last."""
    parts = [*spans, range(spans[-1].stop, max(rows, spans[-1].stop))]
    return [range(part.start, min(part.stop, rows)) for part in parts if part.start < min(part.stop, rows)]


DESCRIPTION = f"""# A saved run of dinfer, version {VERSION}

`dinfer.open("folder")` opens it, without a cluster or a checkpoint. Everything is text, JSON or safetensors.
Another program may write one, too: what may be left out is said below.

*Ranks* and *layers* count from 0. A *chunk* is a run of prompt tokens, as `{PLAN}` says. The *spans* are the
chunks and then, where there are new tokens, all of those but the last, which has no K and V. A *block* is K and
V of one layer for one chunk. A *row* is K or V of one token and one KV head. A *place* is an index in a layer's
cache: the token's, and more of them where rows were appended twice.

## {RUN}

* `format`, `version`: "{FORMAT}" and {VERSION}. `made`, `dinfer`: when, and by which version of dinfer, as
  text.
* `ids`, `tokens`: token ids of the prompt, and of the new tokens.
* `texts`: the text of each of them in whole characters; null: not saved. (A tokenizer makes it of the ids.)
* `kv`: `heads`, `head_dim`, `dtype` (such as "bfloat16"), and `layers`, those whose values are here.
* `hidden`: whether `{HIDDEN}` is here.
* `checkpoint`: `path`, and `fingerprint`, any text: only runs where it is equal are compared.
* `parameters`: what the run was given, but for its prompt. May be left out.
* `state`: "paused", "done", "hung", "failed", "lost" or "taken over"; in folders of earlier versions, "running" and
  "decoding" mean that it hung. May be left out.
* `standing`: by rank, where it stood, in words; "" at its end.
* `positions`: by rank and lane of the plan, how many ops were done. May be left out.
* `edited`, `faults`: what was changed by hand, and which faults were armed, in words. May be left out.
* `ranks`: of each rank that answered its `rank` and, by layer, `spans`, how many of the spans it held,
  counted from the first, and `rows`, how many places.
* `own`: by rank, what else a replay of it alone needs: its `device`; the new `tokens` that it made; by lane of
  the plan, whether the next op had `begun`; whether a `final` state had come to it; its user's `edits`, each the
  `positions` of its lanes and [chunk, layer] of `kv` and `hidden`; the `faults` that struck there, with the
  fields of `Fault` in dinfer/plan/faults.py. May be left out; so may `positions`: nothing can be replayed then.
* `evidence`: what was known of the ranks when it was saved, from which `verdict()` is made: `signs`, by
  rank, with the fields of `Signs` in dinfer/verdict/signs.py; `sizes`, the bytes of one token's K and V of a
  layer and of its hidden state; `stacks`, by rank, as text; `ahead_s`, 0 will do; `told`, the verdict's
  sentence. May be left out.
* `files`: the SHA-256 of files, in hex. Those that are not named are not checked.

## {PLAN} and {TRACE}

The plan, as `dinfer plan` prints it. The trace, as JSON lines: the first says `format` ("{TRACE_FORMAT}"), how
many `events` follow, and `about` the run what is known beside, findings among it. Then a line for each event,
with `rank`, `lane`, `kind`, `ready`, `start`, `met` and `end`, in nanoseconds, and as far as they are known
`what`, `chunk`, `layer`, `peer`, `tokens`, `bytes`, `index` (on its lane): see dinfer/trace/events.py.

## {DIGESTS}

The digest of a row is 64 bits, here as int64. The row's bytes are read as little-endian signed integers of 8
bytes, or of 4, 2 or 1, the largest that they divide into. The n-th of them, counted from 1, has n ×
0x9e3779b97f4a7c15 added and is then mixed: x ^= x >> 30, x *= 0xbf58476d1ce4e5b9, x ^= x >> 27, x *=
0x94d049bb133111eb, x ^= x >> 31. Their sum is the digest. All of it is modulo 2^64, and >> shifts in zeros. The
digest of a block's K, or V, is made in the same way of its rows' digests, token by token and head by head.

* `rank0.layer5.rows`, int64 [places, 2, heads]: of the rows as they are; K, then V. A rank without it holds the
  same as the layer's *first holder*: the rank that owns the layer or, where that is not in `ranks`, the first
  that is.
* `rank0.ledger`, int64 [blocks, {LEDGER_COLUMNS}]: what the rank had noted of a block when it was computed or
  came: chunk, layer, 1 if it was edited by hand since, the digests of K and V as they came, and as who computed
  it had announced them. May be left out.
* `rank0.layer5.chunk1.came`, int64 [tokens, 2, heads]: of the block's rows as it came, where they have changed
  since. May be left out.

## kv.layer5.safetensors

A file for each layer of `kv.layers`.

* `rank0.rows8`, of the run's dtype, [places, 2, heads, head_dim]: the rows from place 8 to the end of the span
  that begins there, or as many as the rank holds of it; behind the last span, all that there are. A rank
  without it holds the same there as the layer's first holder.

## {HIDDEN}

* `rank1.chunk2.layer4`, [tokens, hidden_size]: of chunk 2, what entered rank 1, whose first layer is 4.
* `rank0.final`, [1, 1, hidden_size]: the normed state of the prompt's last token, where it came from another rank.
* `rank1.edit0.kv.chunk1.layer4`, [tokens, 2, heads, head_dim], `rank1.edit0.hidden.chunk1.layer4`, [1, tokens,
  hidden_size]: what the user of rank 1 had left.
"""
