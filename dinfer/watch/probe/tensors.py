"""Takes digests of KV as caches grow, and of what programs tap: transformers' caches without being asked, others where
`--kv` or `dinfer.tap` says.

The outermost `update` of a cache counts: a subclass may call its parent's, and a cache calls its layer's. Nothing is
read back from a device, nothing is done within a compiler or the capture of a CUDA graph, and no tensor is kept.
"""

import inspect
import json
import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType, ModuleType
from typing import Any

from .callers import seen_from
from .captures import captures
from .imports import ImportWatch
from .labels import Label, labelled, module_layer
from .recorder import OpRecorder
from .records import NOTHING
from .rows import SMALL_BYTES, RowsWriter
from .taps import label_of, watching
from .writing import NumberedNames

KV_VARIABLE = "DINFER_WATCH_KV"
"""JSON: a list of objects `method` (`package.module:Class.method`), `k`, `v`, `layer`, and `start` if need be: Python
expressions of the method's arguments, `self` and `result`, which are evaluated once it has returned."""


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

    def __init__(self, recorder: OpRecorder, imports: ImportWatch, *, compares: bool = False) -> None:
        self._recorder = recorder
        self.compares = compares or os.environ.get(COMPARE_VARIABLE) == "1"
        self._within = threading.local()
        self._restore: list[tuple[Any, str, Any]] = []
        self.is_off = False
        self._rows: RowsWriter | None = None
        self.clear()
        watching.append(self)
        imports.add("transformers.cache_utils", self._found_caches)
        if self.compares:
            imports.add("transformers.modeling_utils", self._found_models)
        for asked in _asked(recorder):
            _Method(self, asked, imports)

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
        if self.is_off or _is_compiling():
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
        if rows is None or records is None or not k.numel() or _is_compiling() or _is_captured(torch, k):
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

    def layer_called(self, layer: int, call: Callable[..., Any], args: tuple[Any, ...], options: Any) -> Any:
        """Call a decoder layer; what enters and leaves it is taken."""
        entered = args[0] if args else options.get("hidden_states")
        cache = options.get("past_key_values", options.get("past_key_value"))
        start = None if cache is None else _length(cache, layer)
        if cache is None and getattr(self._within, "is_model", False):
            start = 0  # the model is fed all tokens; layers that are called one by one may have a store of their own
        result = call()
        left = result[0] if isinstance(result, tuple) and result else result
        for name, tensor in ((HIDDEN, entered), (OUTPUT, left)):
            self._taken_of_model(name, tensor, cache, layer, start)
        return result

    def _taken_of_model(
        self, name: str, tensor: Any, cache: Any, layer: int | None, start: int | None
    ) -> None:
        """Never raises."""
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
        if first.device.type == "meta" or _is_captured(torch, first) or not first.numel():
            return
        said = label_of(label, label_of(labelled(), (module_layer(), None)))
        _, layer, chunk, *_ = seen_from(frame, False, said[0] is None, said[1] is None)
        layer = layer if said[0] is None else said[0]
        chunk = chunk if said[1] is None else said[1]
        key = (cache, name, layer)
        begin = self._lengths.get(key, 0) if start is None else start
        sketched = self.compares or not by_token
        if not sketched and _are_small(values):
            self._lengths[key] = begin + first.shape[-2]
            with torch.no_grad():
                copied = torch.stack([value.transpose(-3, -2) for value in values], -3)
            if not rows.add_small(name, first, copied, cache, layer, chunk, begin, records.ops.issued):
                self._full()
            return
        if torch.is_grad_enabled():
            with torch.no_grad():
                digests = _row_words(name, values, by_token, sketched=sketched)
        else:
            digests = _row_words(name, values, by_token, sketched=sketched)
        self._lengths[key] = begin + digests.shape[1]
        if not rows.add(name, first, digests, cache, layer, chunk, begin, records.ops.issued):
            self._full()

    def _writer(self) -> RowsWriter | None:
        if self._rows is None and not self.is_off:
            with self._opening:
                records = self._recorder.open()
                if self._rows is None and records is not None:
                    names = NumberedNames(records.lines, "tap", _tap_fields)
                    self._rows = RowsWriter(self._recorder.folder / f"{records.name}.kv", names)
        return self._rows

    # -- transformers

    def _found_caches(self, module: ModuleType) -> None:
        try:
            for kind in (getattr(module, "Cache", None), getattr(module, "CacheLayerMixin", None)):
                if kind is not None:
                    self._watch_class(kind)
        except Exception as error:
            self.switch_off("finding caches of transformers", error)

    def _found_models(self, module: ModuleType) -> None:
        try:
            kind: Any = getattr(module, "PreTrainedModel", None)
            if kind is not None:
                self.replace(kind, "__call__", self._calling_model(kind.__call__, calling(kind)))
        except Exception as error:
            self.switch_off("finding models of transformers", error)

    def _calling_model(self, compiled: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        within, is_compiling = self._within, torch.compiler.is_compiling

        @wraps(compiled)
        def called(model: Any, *args: Any, **options: Any) -> Any:
            if is_compiling():
                return compiled(model, *args, **options)
            if getattr(within, "is_model", False):
                return call(model, *args, **options)
            ids = args[0] if args else options.get("input_ids")
            within.is_model = True
            try:
                if type(ids) is torch.Tensor and not ids.is_floating_point() and ids.dim() == 2:
                    cache = options.get("past_key_values")
                    start = 0 if cache is None else _length(cache, 0)
                    placed = self._placed_ids(torch, ids, args, options)
                    self._taken_of_model(f"{IDS}{_checkpoint(model)}", placed, cache, None, start)
                return call(model, *args, **options)
            finally:
                within.is_model = False

        return called

    def _placed_ids(self, torch: Any, ids: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Ids [batch, tokens], with mask and positions [batch, tokens, 2]. Never raises."""
        try:
            if self.is_off or _is_captured(torch, ids):  # a capture would keep what is done here
                return ids
            mask: Any = args[1] if len(args) > 1 else options.get("attention_mask")
            positions: Any = args[2] if len(args) > 2 else options.get("position_ids")
            if mask is None and positions is None:
                return ids
            words = torch.ones_like(ids, dtype=torch.int64)
            if type(mask) is torch.Tensor and mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
                words = (mask[:, mask.shape[1] - ids.shape[1] :] != 0).to(torch.int64)
            elif mask is not None:
                self.problem('a mask that has not the form [batch, tokens]: compare("reference") ignores it')
            if type(positions) is torch.Tensor and positions.dim() == 2:
                words = words + 2 * (positions.to(torch.int64) + 1)
            elif positions is not None:
                self.problem(
                    'positions that have not the form [batch, tokens]: compare("reference") ignores them'
                )
            return torch.stack([ids.to(torch.int64), words.expand_as(ids)], -1)
        except Exception as error:
            self.problem(f"masks and positions are not followed: {type(error).__name__}: {error}")
            return ids

    def _watch_class(self, kind: type[Any]) -> None:
        """It and all its subclasses, also those to come."""
        own, watch = vars(kind).get("__init_subclass__"), self._wrap_update

        def init_subclass(cls: type[Any], /, **options: Any) -> None:
            if own is None:  # that of the next class in its order, which may be another base
                super(kind, cls).__init_subclass__(**options)
            else:
                own.__get__(None, cls)(**options)
            watch(cls)

        self.replace(kind, "__init_subclass__", classmethod(init_subclass))
        for one in (kind, *_descendants(kind)):
            watch(one)

    def _wrap_update(self, kind: type[Any]) -> None:
        update = vars(kind).get("update")
        if inspect.isfunction(update) and not getattr(update, "__isabstractmethod__", False):
            self.replace(kind, "update", self._updating(update))

    def _updating(self, update: Callable[..., Any]) -> Callable[..., Any]:
        within = self._within

        import torch

        is_compiling = torch.compiler.is_compiling  # a compiler takes this for a constant

        @wraps(update)
        def updated(cache: Any, *args: Any, **options: Any) -> Any:
            # Whatever the parameters are called: K and V are the first two.
            given = [*args, *options.values()]
            if is_compiling() or self.is_off or getattr(within, "is_on", False) or len(given) < 2:
                return update(cache, *args, **options)
            within.is_on = True
            try:
                layer = options.get("layer_idx", given[2] if len(given) > 2 else None)
                layer = layer if type(layer) is int else None
                start = _length(cache, layer)
                result = update(cache, *args, **options)
                if start == 0 and not _length(cache, layer):
                    start = None  # it keeps rows elsewhere: counted by ourselves
            finally:
                within.is_on = False
            self.taken(cache, given[0], given[1], layer, start, sys._getframe(1))
            return result

        return updated


class _Method:
    """A method of the user's, after each call of which rows are taken as his expressions say."""

    def __init__(self, watch: TensorWatch, asked: dict[str, Any], imports: ImportWatch) -> None:
        self._watch, self._is_off = watch, False
        self._module, _, self._path = str(asked["method"]).partition(":")
        self._codes = {
            name: compile(str(asked[name]), f"--{name}", "eval")
            for name in ("k", "v", "layer", "start")
            if asked.get(name)
        }
        imports.add(self._module, self._found)

    def _found(self, module: ModuleType) -> None:
        try:
            *owners, name = self._path.split(".")
            owner: Any = module
            for one in owners:
                owner = getattr(owner, one)
            before = inspect.getattr_static(owner, name)
            if isinstance(before, (classmethod, staticmethod)):
                self._watch.replace(owner, name, type(before)(self._calling(before.__func__)))
            else:
                self._watch.replace(owner, name, self._calling(getattr(owner, name)))
        except Exception as error:
            self._say(error)

    def _calling(self, before: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(before)

        @wraps(before)
        def called(*args: Any, **options: Any) -> Any:
            result = before(*args, **options)
            if not self._is_off and not self._watch.is_off and not _is_compiling():
                try:
                    bound = signature.bind(*args, **options)
                    bound.apply_defaults()
                    names = {**before.__globals__, **bound.arguments, "result": result}
                    found = {name: eval(code, names) for name, code in self._codes.items()}
                    layer, start = found.get("layer"), found.get("start")
                    label = (None if layer is None else int(layer), None)
                    self._watch.tap("kv", None, found.get("k"), found.get("v"), label, start)
                except Exception as error:
                    self._say(error)
            return result

        return called

    def _say(self, error: Exception) -> None:
        self._is_off = True
        text = f"--kv {self._module}:{self._path} takes nothing: {type(error).__name__}: {error}"
        self._watch._recorder.problem(text)


def calling(kind: Any) -> Callable[..., Any]:
    """What a class's instances do when they are called: where the class has no such method of its own, that of the next
    class in an instance's order, which may be another base."""
    own = vars(kind).get("__call__")
    return own or (lambda found, *args, **options: super(kind, found).__call__(*args, **options))


def _asked(recorder: OpRecorder) -> list[dict[str, Any]]:
    text = os.environ.get(KV_VARIABLE)
    if not text:
        return []
    try:
        found = json.loads(text)
        if not all(isinstance(one["method"], str) and ":" in one["method"] for one in found):
            raise ValueError("a method is written package.module:Class.method")
        return list(found)
    except (ValueError, TypeError, KeyError) as error:
        recorder.problem(f"{KV_VARIABLE} cannot be read: {type(error).__name__}: {error}")
        return []


def _length(cache: Any, layer: int | None) -> int | None:
    """How many rows the cache holds, where that is known without asking a device; counted by ourselves if not."""
    try:
        if layer is not None:
            layers = getattr(cache, "layers", None)
            if layers is None or layer >= len(layers):
                return 0 if layers is not None else None
            cache = layers[layer]
        attributes = vars(cache)
        for name in ("cumulative_length_int", "cumulative_length"):
            if type(attributes.get(name)) is int:
                return int(attributes[name])
        counted = attributes.get("cumulative_length")
        if counted is not None:
            return int(counted) if counted.device.type == "cpu" else None
        keys = attributes.get("keys")
        if keys is None or not getattr(cache, "is_initialized", True):
            return 0
        return int(keys.shape[-2]) if keys.numel() else 0
    except Exception:  # a cache of the user's own may do anything when it is looked at
        return None


def _tap_fields(value: Any) -> dict[str, Any]:
    name, shape, dtype = value
    return {"name": name, "shape": list(shape), "dtype": str(dtype).rpartition(".")[2]}


def _checkpoint(model: Any) -> str:
    """Where a model of transformers was loaded from; "" if it does not say so."""
    found = getattr(vars(model).get("config"), "_name_or_path", "")
    return found if isinstance(found, str) else ""


def _descendants(kind: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for one in kind.__subclasses__():
        found += [one, *_descendants(one)]
    return found


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


def _is_compiling() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def _is_captured(torch: Any, tensor: Any) -> bool:
    return tensor.device.type == "cuda" and (
        captures.is_capturing or bool(torch.cuda.is_current_stream_capturing())
    )
