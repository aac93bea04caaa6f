"""The model as the steps that an engine runs: embed, one decoder layer, final norm, logits.

Every step calls transformers' own module, so for equal chunks the result equals transformers' bit for bit. Callers
decide which layers to run on which tokens. All methods run under `torch.no_grad`: inference tensors cannot be edited.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from dinfer.errors import ModelError
from dinfer.model.cache import CacheWindow, KVCache
from dinfer.model.checkpoint import Spec, check
from dinfer.model.families import family_of
from dinfer.model.positions import Positions, layer_kinds

DTYPES = ("auto", "float32", "bfloat16", "float16")
_PAGE = 4096
_LOADING = threading.Lock()


class Decoder:
    """A causal language model as separate steps. Threads may share it, each with its own cache."""

    def __init__(self, model: Any, spec: Spec) -> None:
        """Wrap a transformers `...ForCausalLM` in eval mode, loaded from the checkpoint of `spec`."""
        config = model.config
        self.model, self.spec = model, spec
        self.num_layers, self.hidden_size = spec.layers, spec.hidden_size
        self.kv_heads, self.head_dim = spec.kv_heads, spec.head_dim
        self.vocab_size, self.max_positions = spec.vocab_size, spec.max_positions
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.eos_ids = _eos_ids(model)
        self._family = family_of(config)
        self._base = model.get_decoder()
        self._kinds = layer_kinds(config)
        self._positions = Positions(config, self._base.rotary_emb, self._family.rotary_per_layer_type)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str = "auto",
        device: str = "cpu",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Load a checkpoint folder (or "demo") with weights in `dtype` ("auto": the checkpoint's own).

        On a CPU, weights in the dtype of the files are views of the files: ranks of one machine share them, and they
        are read from disk at first use. (Editing weights in place copies them. The files must not change while a rank
        runs.) Weights of another dtype, and experts, are converted tensor by tensor. Then they move to `device` one by
        one, each freed on the CPU as it arrives. `on_progress(done, total)`, in bytes, is called for each; on a CPU it
        makes all weights be read from disk now.

        Raises `ModelError` for an unknown dtype and for a checkpoint that is incomplete or unsupported.
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
        auto: Any = AutoModelForCausalLM  # its type lacks the loading report
        with _one_load_at_a_time():
            # On the CPU first: loading straight to another device, `device_map`, needs accelerate.
            model, report = auto.from_pretrained(
                spec.path,
                dtype=dtype,
                attn_implementation=family_of(spec).attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            if missing := sorted(report["missing_keys"]):  # transformers would fill them with random values
                raise ModelError(
                    f"{spec.path} lacks {len(missing)} weights, the first {missing[0]!r}: download the checkpoint again"
                )
            model.eval().requires_grad_(False)
            if on_progress:
                _place(model, torch.device(device), on_progress)
            return cls(model.to(device), spec)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` tokens, in the dtype and on the device of the model."""
        return KVCache(self.num_layers, capacity, self.kv_heads, self.head_dim, self.dtype, self.device)

    @torch.no_grad()
    def embed(self, ids: Tensor | Sequence[int]) -> Tensor:
        """The embeddings [1, T, hidden_size] of token `ids` [T]: the input of layer 0."""
        tensor = torch.as_tensor(ids, dtype=torch.long)
        if tensor.ndim != 1 or tensor.numel() == 0:
            raise ModelError(f"token ids must be one row of at least one id; got shape {tuple(tensor.shape)}")
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= self.vocab_size:
            raise ModelError(f"token ids must be 0 to {self.vocab_size - 1}; got ids from {low} to {high}")
        hidden: Tensor = self._base.embed_tokens(tensor.to(self.device).unsqueeze(0))
        scale = self._family.embedding_scale
        return hidden if scale is None else hidden * getattr(self.model.config, scale)

    @torch.no_grad()
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
        kind = self._kinds[index]
        window = CacheWindow(cache, position, hidden.shape[1], kind.sliding_window)
        placement = self._positions.of(kind, position, hidden)
        if shift:
            placement = replace(self._positions.of(kind, position + shift, hidden), mask=placement.mask)
        output: Tensor = self._base.layers[index](
            hidden,
            attention_mask=placement.mask,
            position_embeddings=placement.rotary,
            position_ids=placement.position_ids,
            past_key_values=window,
            use_cache=True,
        )
        return output

    @torch.no_grad()
    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to the last layer's output [1, T, hidden_size]; same shape."""
        output: Tensor = self._base.norm(hidden)
        return output

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [vocab_size] from one token's normed hidden state [1, 1, hidden_size]."""
        if hidden.shape != (1, 1, self.hidden_size):
            wanted = [1, 1, self.hidden_size]
            raise ModelError(
                f"logits takes the normed hidden state of one token, {wanted}; got {list(hidden.shape)}"
            )
        logits: Tensor = self.model.lm_head(hidden)
        config, family = self.model.config, self._family
        if family.logits_divisor is not None:
            logits = logits / getattr(config, family.logits_divisor)
        if family.logits_softcap is not None and (cap := getattr(config, family.logits_softcap)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits[0, 0].float()

    @torch.no_grad()
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

    It must not print a progress bar per rank into the notebook, nor read ahead in threads, which takes 2.1 times the
    memory of the weights with experts, instead of 1.3 times.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    with _LOADING:
        before, shown = os.environ.get(name), hf_logging.is_progress_bar_enabled()
        os.environ[name] = "1"
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
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
