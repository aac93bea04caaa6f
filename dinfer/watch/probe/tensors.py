"""Takes digests of rows of tensors: of KV as caches grow, of what enters and leaves layers, of what programs tap.

`caches`, `models`, `kv_methods`, `paged` and `taps` see these and tell it. Nothing is read back from a device, nothing
is done within a compiler or the capture of a CUDA graph, and no tensor is kept.
"""

import os
import sys
import threading
from types import FrameType
from typing import Any

from .callers import seen_from
from .captures import captures
from .labels import Label, labelled, module_layer
from .recorder import OpRecorder
from .records import NOTHING
from .rows import SMALL_BYTES, RowsWriter
from .taps import label_of, watching
from .writing import NumberedNames

COMPARE_VARIABLE = "DINFER_WATCH_COMPARE"
"""If it is 1, what a comparison with a reference needs is taken, too: sketches of KV, what enters and leaves decoder
layers of transformers' models, and the token ids that such models are fed."""

HIDDEN, OUTPUT, IDS = "hidden", "output", "ids of "
"""names of what is taken then: what enters a layer, what leaves it; and ids, with the model's checkpoint behind. Where
the model is given a mask or positions, each id has a second word: 1 if the token is attended to, no padding, and twice
its position plus 1, or 0 if positions are not given."""

EXIT_S = 2.0
"""for so long a process that ends waits for digests from a device"""


class TensorWatch:
    """Digests of rows in this process."""

    def __init__(self, recorder: OpRecorder, *, compares: bool = False) -> None:
        self._recorder = recorder
        self.compares = compares or os.environ.get(COMPARE_VARIABLE) == "1"
        self._restore: list[tuple[Any, str, Any]] = []
        self.is_off = False
        self._rows: RowsWriter | None = None
        self.clear()
        watching.append(self)

    def clear(self) -> None:
        """In a forked child: files of its own."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None
        self._opening = threading.RLock()
        self._lengths: dict[tuple[int, str, int], int] = {}

    def stop(self) -> None:
        """Watch no more."""
        if self in watching:
            watching.remove(self)
        for owner, name, before in reversed(self._restore):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._restore.clear()
        self.flush()
        self.clear()

    def flush(self) -> None:
        """Before the process ends: write what devices have still to deliver. Never raises."""
        try:
            missing = self._rows.flush(EXIT_S) if self._rows is not None else 0
            if missing:
                self._recorder.problem(f"{missing} digests did not come from the device within {EXIT_S:g} s")
        except Exception as error:
            self.switch_off("writing digests", error)

    def look(self) -> None:
        """From time to time: write what waits for that. Never raises."""
        try:
            if self._rows is not None:
                self._rows.digest_small(by_integers=True)
        except Exception as error:
            self.switch_off("writing digests", error)

    def switch_off(self, part: str, error: BaseException) -> None:
        """Take no more digests; ops are recorded as before."""
        self.is_off = True
        self._recorder.problem(f"{part} switched itself off: {type(error).__name__}: {error}")

    def replace(self, owner: Any, name: str, by: Any) -> None:
        """Put something in place until `stop`."""
        self._restore.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, by)

    # -- rows

    def tap(self, name: str, tensor: Any, k: Any, v: Any, label: Label, start: int | None) -> None:
        """What `dinfer.tap` says. Never raises."""
        if self.is_off or is_compiling():
            return
        try:
            values = [value for value in ((k, v) if tensor is None else (tensor,)) if value is not None]
            if values:
                self._take(name, 0, values, label, start, sys._getframe(2), by_token=tensor is None)
        except Exception as error:
            self._recorder.problem(f"tap {name!r} was not taken: {type(error).__name__}: {error}")

    def taken(
        self, cache: Any, k: Any, v: Any, layer: int | None, start: int | None, frame: FrameType | None
    ) -> None:
        """Rows were added to a cache. Never raises."""
        try:
            rows = self._writer()
            if rows is not None:
                self._take("kv", rows.number_of(cache), [k, v], (layer, None), start, frame, by_token=True)
        except Exception as error:
            self.switch_off("taking digests of KV", error)

    def problem(self, text: str) -> None:
        """Say once what is not taken."""
        self._recorder.problem(text)

    def paged(self, k: Any, v: Any, layer: int | None, positions: Any, requests: Any) -> None:
        """Rows were written to a paged cache: K and V [tokens, heads, width], each of a request at a position in it,
        both integers [tokens] on the same device; a position of -1: padding. Raises what torch raises."""
        import torch

        rows, records = self._writer(), self._recorder.records
        if rows is None or records is None or not k.numel() or is_compiling() or is_captured(torch, k):
            return
        from .digests import token_digests

        with torch.no_grad():
            digests = [token_digests(value.transpose(0, 1)) for value in (k, v)]
            words = torch.stack([*digests, positions.to(torch.int64), requests.to(torch.int64)], -1)[None]
        number = NOTHING if layer is None else layer
        if not rows.add("kv", k.transpose(0, 1)[None], words, 0, number, NOTHING, 0, records.ops.issued):
            self._full()

    def _full(self) -> None:
        self.is_off = True
        self._recorder.problem("the file of digests has reached its limit: later rows are missing")

    def taken_of_model(
        self, name: str, tensor: Any, cache: Any, layer: int | None, start: int | None
    ) -> None:
        """A tensor of a model was seen, the same as `cache` has it in rows. Never raises."""
        if self.is_off:
            return
        try:
            rows = self._writer()
            if rows is not None and tensor is not None:
                number = 0 if cache is None else rows.number_of(cache)
                self._take(name, number, [tensor], (layer, None), start, sys._getframe(2), by_token=False)
        except Exception as error:
            self.switch_off(f"taking {name!r} of transformers' models", error)

    def _take(
        self, name: str, cache: int, values: list[Any], label: Label, start: int | None, frame: FrameType | None,
        *, by_token: bool,
    ) -> None:  # fmt: skip
        import torch

        rows, records = self._writer(), self._recorder.records
        plain = _plain(torch)
        if rows is None or records is None or not all(type(value) in plain for value in values):
            return
        first = values[0]
        if first.device.type == "meta" or is_captured(torch, first) or not first.numel():
            return
        said = label_of(label, label_of(labelled(), (module_layer(), None)))
        place, layer, chunk, *_ = seen_from(frame, False, said[0] is None, said[1] is None)
        at = records.places.numbers.get(place) or records.places.number(place)
        layer = layer if said[0] is None else said[0]
        chunk = chunk if said[1] is None else said[1]
        key = (cache, name, layer)
        begin = self._lengths.get(key, 0) if start is None else start
        sketched = self.compares or not by_token
        if not sketched and _are_small(values):
            self._lengths[key] = begin + first.shape[-2]
            with torch.no_grad():
                copied = torch.stack([value.transpose(-3, -2) for value in values], -3)
            if not rows.add_small(name, first, copied, cache, layer, chunk, begin, records.ops.issued, at):
                self._full()
            return
        if torch.is_grad_enabled():
            with torch.no_grad():
                digests = _row_words(name, values, by_token, sketched=sketched)
        else:
            digests = _row_words(name, values, by_token, sketched=sketched)
        self._lengths[key] = begin + digests.shape[1]
        if not rows.add(name, first, digests, cache, layer, chunk, begin, records.ops.issued, at):
            self._full()

    def _writer(self) -> RowsWriter | None:
        if self._rows is None and not self.is_off:
            with self._opening:
                records = self._recorder.open()
                if self._rows is None and records is not None:
                    names = NumberedNames(records.lines, "tap", _tap_fields)
                    self._rows = RowsWriter(self._recorder.folder / f"{records.name}.kv", names)
        return self._rows


def _tap_fields(value: Any) -> dict[str, Any]:
    name, shape, dtype = value
    return {"name": name, "shape": list(shape), "dtype": str(dtype).rpartition(".")[2]}


def _row_words(name: str, values: list[Any], by_token: bool, *, sketched: bool) -> Any:
    """What is kept of rows: int64 [batch, rows, words]. `by_token`: they are of KV, [..., heads, tokens, width]."""
    import torch

    from .digests import row_sketches, together

    if name.startswith(IDS):
        ids = values[0].to(torch.int64)
        return ids if ids.dim() == 3 else ids[..., None]
    rows, dims = ([one.transpose(-3, -2) for one in values], 2) if by_token else (values, 1)
    alike = len({(one.shape, one.dtype) for one in values}) == 1
    # K and V as one: of a few tokens, the calls cost more than the work
    words = together(rows, dims) if alike else torch.cat([together([one], dims) for one in rows], -1)
    if words.dim() != 3:
        words = words.reshape(-1, words.shape[-2] if words.dim() > 1 else 1, len(values))
    if not sketched or not all(value.is_floating_point() for value in values):
        return words
    sketches = [row_sketches(one.flatten(-dims)) for one in rows]
    shape = words.shape[:2]
    return torch.cat(
        [words, *(one.contiguous().view(torch.int64).reshape(*shape, -1) for one in sketches)], -1
    )


def _are_small(values: list[Any]) -> bool:
    """Whether they are K and V of few tokens, [batch, heads, tokens, width], on a CPU."""
    first = values[0]
    if not first.is_cpu or first.dim() != 4 or first.nbytes > SMALL_BYTES:
        return False
    return all(one.shape == first.shape and one.dtype == first.dtype for one in values)


def _plain(torch: Any) -> tuple[Any, ...]:
    return (torch.Tensor, torch.nn.Parameter)


def is_compiling() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def is_captured(torch: Any, tensor: Any) -> bool:
    return tensor.device.type == "cuda" and (
        captures.is_capturing or bool(torch.cuda.is_current_stream_capturing())
    )
