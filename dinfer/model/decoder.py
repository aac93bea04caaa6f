"""The model as the steps that an engine runs: embed, one decoder layer, final norm, logits.

Every step calls transformers' own module, so for equal chunks the result equals transformers' bit for bit. Callers
decide which layers to run on which tokens. All methods run under `torch.no_grad`: inference tensors cannot be edited.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from dinfer.errors import ModelError
from dinfer.model.cache import CacheWindow, KVCache
from dinfer.model.checkpoint import (
    Spec,
    check,
    fingerprint,
    in_one_line,
    resolved_config,
    stored_shapes,
    weight_files,
)
from dinfer.model.families import family_of
from dinfer.model.mapped import MappedFiles
from dinfer.model.positions import Positions, layer_kinds

P = ParamSpec("P")

DTYPES = ("auto", "float32", "bfloat16", "float16")

_PAGE = 4096
_CACHE_LINE = 64
_LOADING = threading.Lock()


def _without_grad(method: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """`torch.no_grad` for a method, at no cost where the caller is under it already."""

    @wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return called


class Decoder:
    """A causal language model as separate steps. Threads may share it, each with its own cache."""

    def __init__(self, model: Any, spec: Spec, files: MappedFiles | None = None) -> None:
        """Wrap a transformers `...ForCausalLM` in eval mode, loaded from the checkpoint of `spec`. `files`: of which
        its weights are views; every step raises `ModelError` once they have been written to."""
        config = model.config
        self.model, self.spec, self._files = model, spec, files
        self.num_layers, self.hidden_size = spec.layers, spec.hidden_size
        self.kv_heads, self.head_dim = spec.kv_heads, spec.head_dim
        self.vocab_size, self.max_positions = spec.vocab_size, spec.max_positions
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.eos_ids = _eos_ids(model)
        self.family = family_of(config)
        self.base = model.get_decoder()
        """transformers' module of embedding, layers and norm"""
        self.kinds = layer_kinds(config)
        self.positions = Positions(config, self.base.rotary_emb, self.family.rotary_per_layer_type)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str = "auto",
        device: str = "cpu",
        on_progress: Callable[[int, int], None] | None = None,
        mapped: bool = True,
    ) -> Self:
        """Load a checkpoint folder (or "demo") with weights in `dtype` ("auto": the checkpoint's own).

        On a CPU, weights in the dtype of the files are views of the files: ranks of one machine share them, and they
        are read from disk at first use. (Editing weights in place copies them. Once a file is written to, every step
        raises, and a step that is under way when it is shortened ends the process, by SIGBUS: without `mapped`, weights
        are copied into memory.) Weights of another dtype, and
        experts, are converted tensor by tensor. Then they move to `device` one by one, each freed on the CPU as it
        arrives. `on_progress(done, total)`, in bytes, is called for each; on a CPU it makes all weights be read from
        disk now.

        Raises `ModelError` for an unknown dtype, and for a checkpoint that is incomplete or unsupported or changes
        while it is loaded.
        """
        spec = check(path)
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if torch.device(device).type == "cpu":
            # transformers reads this at every attention call: masked attention then shares KV heads instead of copying
            # them, with equal bits. On CUDA it would fall back to a slow kernel.
            os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
        else:
            # cuDNN plans its attention for every length in every thread: 50 ms for each chunk and new token.
            torch.backends.cuda.enable_cudnn_sdp(False)
        with _one_load_at_a_time():
            files = MappedFiles(spec.path, weight_files(spec.path))
            model = _load_model(spec, dtype)
            views = str(model.dtype) == f"torch.{spec.stored_dtype}" and not family_of(spec).rebuilds_weights
            if views and not mapped and device == "cpu":
                for weight in model.parameters():
                    weight.data = _copied(weight.data)
            stays = views and mapped and torch.device(device).type == "cpu"
            if fingerprint(spec.path) != spec.fingerprint:
                raise ModelError(f"{spec.path} has changed while it was loaded: load it again")
            if on_progress:
                _place(model, torch.device(device), on_progress)
            return cls(model.to(device), spec, files if stays else None)

    def check_files(self) -> None:
        """Raises `ModelError` where weights are views of files that have been written to since."""
        if self._files:
            self._files.check()

    def _check_files_recently(self) -> None:
        """As `check_files`, for each layer: a look at the files counts for some milliseconds."""
        if self._files:
            self._files.check_recent()

    def is_intact(self) -> bool:
        """Whether the weights are those that were loaded, as far as files are concerned."""
        return self._files is None or self._files.is_intact()

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` tokens, in the dtype and on the device of the model."""
        return KVCache(self.num_layers, capacity, self.kv_heads, self.head_dim, self.dtype, self.device)

    @_without_grad
    def embed(self, ids: Tensor | Sequence[int]) -> Tensor:
        """The embeddings [1, T, hidden_size] of token `ids` [T]: the input of layer 0."""
        return self.embed_known(self.checked_ids(ids))

    def checked_ids(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Token ids [T] on the device. Raises `ModelError` for ids that the model does not have, or none."""
        tensor = torch.as_tensor(ids, dtype=torch.long)
        if tensor.ndim != 1 or tensor.numel() == 0:
            raise ModelError(f"token ids must be one row of at least one id; got shape {tuple(tensor.shape)}")
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= self.vocab_size:
            raise ModelError(f"token ids must be 0 to {self.vocab_size - 1}; got ids from {low} to {high}")
        return tensor.to(self.device)

    @_without_grad
    def embed_known(self, ids: Tensor) -> Tensor:
        """`embed` for ids from `checked_ids`; does not wait for the device."""
        self.check_files()
        hidden: Tensor = self.base.embed_tokens(ids.unsqueeze(0))
        scale = self.family.embedding_scale
        return hidden if scale is None else hidden * getattr(self.model.config, scale)

    @_without_grad
    def layer(self, index: int, hidden: Tensor, cache: KVCache, position: int, shift: int = 0) -> Tensor:
        """Run decoder layer `index` on `hidden` [1, T, hidden_size], the tokens [position, position + T).

        Writes their K and V into `cache`, which must hold this layer's rows before `position`, and returns the next
        hidden state, same shape. `shift` is added to the position ids alone.
        """
        if not 0 <= index < self.num_layers:
            raise ModelError(
                f"layer {index} is out of range: this model has layers 0 to {self.num_layers - 1}"
            )
        if hidden.ndim != 3 or hidden.shape[::2] != (1, self.hidden_size) or hidden.shape[1] == 0:
            wanted = f"[1, tokens, {self.hidden_size}]"
            raise ModelError(f"layer {index} takes a hidden state {wanted}; got {list(hidden.shape)}")
        kind = self.kinds[index]
        window = CacheWindow(cache, position, hidden.shape[1], kind.sliding_window)
        placement = self.positions.of(kind, position, hidden)
        if shift:
            placement = replace(self.positions.of(kind, position + shift, hidden), mask=placement.mask)
        self._check_files_recently()
        output: Tensor = self.base.layers[index](
            hidden,
            attention_mask=placement.mask,
            position_embeddings=placement.rotary,
            position_ids=placement.position_ids,
            past_key_values=window,
            use_cache=True,
        )
        self._check_files_recently()  # they may have been written to meanwhile
        return output

    @_without_grad
    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to the last layer's output [1, T, hidden_size]; same shape."""
        self.check_files()
        output: Tensor = self.base.norm(hidden)
        return output

    @_without_grad
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [vocab_size] from one token's normed hidden state [1, 1, hidden_size]."""
        if hidden.shape != (1, 1, self.hidden_size):
            wanted = [1, 1, self.hidden_size]
            raise ModelError(
                f"logits takes the normed hidden state of one token, {wanted}; got {list(hidden.shape)}"
            )
        self.check_files()
        logits: Tensor = self.model.lm_head(hidden)
        config, family = self.model.config, self.family
        if family.logits_divisor is not None:
            logits = logits / getattr(config, family.logits_divisor)
        if family.logits_softcap is not None and (cap := getattr(config, family.logits_softcap)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits[0, 0].float()

    @_without_grad
    def forward(
        self,
        ids: Tensor | Sequence[int],
        cache: KVCache,
        position: int,
        extra: Mapping[int, int] | None = None,
    ) -> Tensor:
        """The hidden state [1, T, hidden_size] before `norm`, after `embed` and all layers on `ids` [T] at `position`.

        `extra`: by layer, how many rows `cache` holds before `position` beyond one a token.
        """
        hidden = self.embed(ids)
        for index in range(self.num_layers):
            more = extra.get(index, 0) if extra else 0
            hidden = self.layer(index, hidden, cache, position + more, -more)
        return hidden

    def warm_up(self, chunk: int, last: int) -> None:
        """Run prefill and decode once on a GPU, to load kernels: chunks of `chunk` tokens, and a last one of `last`.

        That takes seconds the first time and memory for a KV cache of two chunks. Does nothing on a CPU.
        """
        if self.device.type == "cpu":
            return
        second = min(chunk, self.max_positions - chunk)
        cache = self.new_cache(second + chunk)
        for position, tokens in ((0, chunk), (second, chunk), (second, last), (second, 1)):
            hidden = self.norm(self.forward([0] * tokens, cache, position))
            self.logits(hidden[:, -1:])
        torch.cuda.synchronize(self.device)


def _copied(weight: Tensor) -> Tensor:
    """A copy that begins at the same place in a cache line: the last bits of products depend on it, so copied weights
    would not compute what mapped ones do, as in a replay."""
    if weight.data_ptr() % weight.itemsize or not weight.is_contiguous():
        return weight.clone()
    memory = torch.empty(weight.nbytes + _CACHE_LINE, dtype=torch.uint8)
    start = (weight.data_ptr() - memory.data_ptr()) % _CACHE_LINE
    return memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight)


def _auto() -> Any:
    """transformers' class of all causal models. Not imported with dinfer: most sessions load no model themselves."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM  # its type lacks the loading report


def _load_model(spec: Spec, dtype: str) -> Any:
    """Load the weights on the CPU for inference. Raises `ModelError` for weights that are missing, which transformers
    would fill with random values, or that do not fit. (Loading straight to another device, `device_map`, needs
    accelerate.)"""
    _check_weights(spec)
    try:
        model, report = _auto().from_pretrained(
            spec.path,
            dtype=dtype,
            attn_implementation=family_of(spec).attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelError(f"transformers cannot load {spec.path}: {in_one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(_lacking_text(spec, missing, sorted(report["unexpected_keys"])))
    return model.eval().requires_grad_(False)


def _check_weights(spec: Spec) -> None:
    """Compare the headers of the files with the model that config.json describes, before any weight is read. Raises
    `ModelError` for a model that cannot be built, and for weights of other shapes or, as far as the names are those of
    the model (loading may rename weights), that are missing."""
    try:
        with torch.device("meta"):
            model = _auto().from_config(resolved_config(spec.path))
    except Exception as error:  # model classes raise anything for values that they do not expect
        raise ModelError(
            f"transformers cannot build the model of {spec.path}/config.json: {in_one_line(error)}"
        ) from error
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    stored = stored_shapes(spec.path)
    other = [name for name in expected if name in stored and stored[name] != expected[name]]
    if other:
        name = other[0]
        raise ModelError(
            f"config.json and weights of {spec.path} do not belong together: by config.json "
            f"{name} is {_shape_text(expected[name])}, the files hold {_shape_text(stored[name])}"
            + (f" ({len(other)} weights differ)" if len(other) > 1 else "")
            + f". {_size_keys(model.config, expected[name], stored[name])}"
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(expected.keys() - stored.keys() - tied)
    if missing and not stored.keys() - expected.keys():
        raise ModelError(_lacking_text(spec, missing, []))


def _shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _size_keys(config: Any, expected: tuple[int, ...], stored: tuple[int, ...]) -> str:
    """Which entries of the config have the size that differs: `vocab_size is 200 there, where 160 would fit`."""
    for size, found in zip(expected, stored, strict=False):
        keys = [key for key, value in config.to_dict().items() if value == size and key.endswith("_size")]
        if size != found and keys:
            return f"{' or '.join(keys)} is {size} there, where {found} would fit"
    return "One of the two is from another model"


def _lacking_text(spec: Spec, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What a folder without some of the weights may be, and what to do."""
    names = resolved_config(spec.path).architectures or []
    text = f"{spec.path} lacks {len(missing)} weights of a whole model, the first {missing[0]!r}"
    if (spec.path / "adapter_config.json").exists():
        return f"{text}: it holds an adapter; merge it into its base model, and give the folder of the result"
    if unexpected:
        return (
            f"{text}, and holds {len(unexpected)} of other names, the first {unexpected[0]!r}: it is part of another "
            "model, or packed; save the language model as a checkpoint of its own"
        )
    if names and not any(name.endswith("ForCausalLM") for name in names):
        return (
            f"{text}: config.json calls it {', '.join(names)}, which is not a whole language model (a draft head, for "
            "example); give the folder of the model that it belongs to"
        )
    return f"{text}: download the checkpoint again"


def _place(model: Any, device: torch.device, on_progress: Callable[[int, int], None]) -> None:
    """Move the weights to the device (on a CPU: read them from disk) one by one, and report progress."""
    parameters = list(model.parameters())
    total, done = sum(parameter.nbytes for parameter in parameters), 0
    for parameter in parameters:
        on_progress(done, total)
        done += parameter.nbytes
        if device.type == "cpu":
            parameter.view(-1)[:: max(1, _PAGE // parameter.element_size())].sum()  # reads each page
        else:
            parameter.data = parameter.data.to(device)
    on_progress(done, total)


@contextlib.contextmanager
def _one_load_at_a_time() -> Iterator[None]:
    """Hold what from_pretrained needs: it sets process-wide defaults (dtype, init) while it runs.

    It must not print a progress bar and a report of missing weights per rank into the notebook, nor read ahead in
    threads, which takes 2.1 times the memory of the weights with experts, instead of 1.3 times.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    with _LOADING:
        from transformers.utils import logging as hf_logging

        before, shown = os.environ.get(name), hf_logging.is_progress_bar_enabled()
        level = hf_logging.get_verbosity()
        os.environ[name] = "1"
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            hf_logging.set_verbosity(level)
            if shown:
                hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _eos_ids(model: Any) -> frozenset[int]:
    """The token ids that end a text: those of the generation config, else those of the config."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
