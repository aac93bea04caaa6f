"""The reference: transformers' own forward of the whole model, which dinfer's runs are compared with.

It uses the model's own forward and `DynamicCache`, and of dinfer only the loaded weights. Run it with the thread count
of the ranks: float32 attention differs between 1 and 2 threads.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinfer.model.decoder import Decoder

OnTensor = Callable[[str, int, Tensor], None]
"""called with ("hidden", layer, [1, tokens, hidden_size]) before each layer and after the last one, and with ("kv",
layer, [tokens, 2, kv_heads, head_dim]) when a layer updates its cache"""


class PieceOutput(NamedTuple):
    """Normed `hidden` [1, tokens, hidden_size] of a piece; float32 `logits` [vocab_size] of its last token."""

    hidden: Tensor
    logits: Tensor


class Forward:
    """transformers' forward of the whole model, fed a prompt piece by piece; calls `see` with each tensor as it is
    made.

    Only its KV outlives a piece. Hooks are on the modules while a piece runs, and ignore calls of other threads, since
    ranks that are threads of one process share the modules.
    """

    def __init__(self, decoder: Decoder, see: OnTensor) -> None:
        self._decoder, self._see = decoder, see
        from transformers import DynamicCache

        self._cache = DynamicCache(config=decoder.model.config)
        layers: list[Any] = self._cache.layers
        for index, layer in enumerate(layers):
            layer.update = partial(self._update, index, layer.update)
        self._normed: Tensor | None = None
        self._looking = False

    @torch.no_grad()
    def feed(
        self, ids: Sequence[int], mask: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> PieceOutput:
        """Run the next tokens of the prompt. `mask`: of all tokens so far, these included, 0 for padding; `positions`:
        of these tokens; if not given, as transformers numbers them. Raises what `see` raises, and `ModelError` where
        weight files have been written to."""
        self._decoder.check_files()
        device = self._decoder.device
        given: dict[str, Tensor] = {}
        if mask is not None:
            given["attention_mask"] = torch.tensor([list(mask)], device=device)
        if positions is not None:
            given["position_ids"] = torch.tensor([list(positions)], device=device)
        piece = torch.tensor([list(ids)], device=device)
        with self._hooks():
            output = self._decoder.model(
                input_ids=piece, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **given
            )
        assert self._normed is not None
        return PieceOutput(self._normed, output.logits[0, 0].float())

    def fork(self, see: OnTensor) -> "Forward":
        """Another forward that goes on from here. What either is fed later, the other does not see."""
        other = Forward(self._decoder, see)
        mine, its = (list[Any](one._cache.layers) for one in (self, other))
        for layer, copied in zip(mine, its, strict=True):
            vars(copied).update({name: value for name, value in vars(layer).items() if name != "update"})
        return other

    def replace_kv(self, made_of: Callable[[Tensor], Tensor]) -> None:
        """Replace what the cache holds of each layer by what `made_of` makes of it, [tokens, 2, kv_heads, head_dim]."""
        layers: list[Any] = self._cache.layers
        for layer in layers:
            rows = made_of(_rows(layer.keys, layer.values))
            layer.keys, layer.values = (rows[:, n].transpose(0, 1).unsqueeze(0).contiguous() for n in (0, 1))

    def _update(self, layer: int, update: Any, keys: Tensor, values: Tensor, *args: Any, **named: Any) -> Any:
        """Show what a layer hands to its cache, from which sliding-window layers drop earlier rows."""
        self._show("kv", layer, _rows(keys, values))
        return update(keys, values, *args, **named)

    def _show(self, what: str, layer: int, tensor: Tensor) -> None:
        self._looking = True
        try:
            self._see(what, layer, tensor)  # `see` may run layers of this model itself: do not show those
        finally:
            self._looking = False

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        base, thread = self._decoder.model.get_decoder(), threading.get_ident()

        def before(layer: int, _: Any, args: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread and not self._looking:
                self._show("hidden", layer, args[0])

        def after(_: Any, __: Any, output: Tensor) -> None:
            if threading.get_ident() == thread and not self._looking:
                self._normed = output

        modules = [*base.layers, base.norm]
        hooks = [
            module.register_forward_pre_hook(partial(before, index)) for index, module in enumerate(modules)
        ]
        hooks.append(base.norm.register_forward_hook(after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _rows(keys: Tensor, values: Tensor) -> Tensor:
    """K and V, each [1, kv_heads, tokens, head_dim], as a block [tokens, 2, kv_heads, head_dim]."""
    return torch.stack([keys[0], values[0]], dim=1).permute(2, 1, 0, 3).contiguous()
