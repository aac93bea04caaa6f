"""Copies of a model's layers for capturing: they share its weights, attend by `attend`, and join products.

Q, K and V of a token are three products of one input, and so are gate and up of an MLP. One product of the joined
weights is faster, and gave the same bits where that was measured. The joined weights take the place of the model's own,
which become views of them, so that nothing is kept twice.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dinfer.model.kernels.attend import NAME
from dinfer.model.kernels.product import product

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def copied_layers(base: Any, config: Any) -> list[Any]:
    """A shallow copy of each layer of a decoder, whose modules are copies too and whose weights are not."""
    config = copy.copy(config)
    config._attn_implementation = NAME
    return [_copied(layer, config) for layer in base.layers]


def _copied(module: nn.Module, config: Any) -> Any:
    mine: Any = copy.copy(module)
    mine._modules = {
        name: None if child is None else _copied(child, config) for name, child in module._modules.items()
    }
    if hasattr(mine, "config"):
        mine.config = config
    for names in _JOINED:
        if all(type(mine._modules.get(name)) is nn.Linear for name in names):
            _join(mine, names)
    for name, child in mine._modules.items():
        if type(child) is nn.Linear:
            mine._modules[name] = _Product(child.weight, child.bias)
    return mine


def _join(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let these products of one module become parts of one."""
    parts: list[Any] = [module._modules[name] for name in names]
    weights, biases = [part.weight for part in parts], [part.bias for part in parts]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return
    weight = _side_by_side(weights)
    bias = _side_by_side(biases) if biases[0] is not None else None
    whole, start = _Product(weight, bias, len(names)), 0
    for name, part in zip(names, weights, strict=True):
        module._modules[name] = _Part(whole, start, start + len(part))
        start += len(part)


def _side_by_side(tensors: list[Any]) -> Tensor:
    """One tensor of which these, concatenated, become views."""
    if all(b.data_ptr() == a.data_ptr() + a.nbytes for a, b in pairwise(tensors)):
        size = torch.Size((sum(len(one) for one in tensors), *tensors[0].shape[1:]))
        if tensors[0].untyped_storage().data_ptr() == tensors[-1].untyped_storage().data_ptr():
            found: Tensor = tensors[0].data.as_strided(size, tensors[0].stride())  # joined before
            return found
    joined, start = torch.cat([one.data for one in tensors]), 0
    for one in tensors:
        one.data = joined[start : start + len(one)]
        start += len(one)
    return joined


class _Product(nn.Module):
    """A product, computed once for all of its parts, which are taken one after another."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: int = 1) -> None:
        super().__init__()
        self.register_buffer("weight", weight.data, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.data, persistent=False)
        self.parts, self._taken = parts, 0
        self._made: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.parts == 1 or torch.compiler.is_compiling():  # `compiled` sees that equal products are one
            return product(hidden, self.weight, self.bias)
        made = product(hidden, self.weight, self.bias) if self._made is None else self._made
        self._taken = (self._taken + 1) % self.parts
        self._made = made if self._taken else None
        return made


class _Part(nn.Module):
    """The part of a product's output from `start` to `stop`."""

    def __init__(self, whole: _Product, start: int, stop: int) -> None:
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop

    def forward(self, hidden: Tensor) -> Tensor:
        part: Tensor = self.whole(hidden)[..., self.start : self.stop]
        return part
