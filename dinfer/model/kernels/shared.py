"""Copies of a model's layers for capturing: they share its weights, attend by `attend`, and join products.

Q, K and V of a token are three products of one input, and so are gate and up of an MLP. One product of the joined
weights is faster, and gives the same bits. The joined weights take the place of the model's own, which become views of
them, so that nothing is kept twice.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dinfer.model.kernels.attend import NAME

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
    return mine


def _join(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let these products of one module become parts of one."""
    parts: list[Any] = [module._modules[name] for name in names]
    weights, biases = [part.weight for part in parts], [part.bias for part in parts]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return
    weight = _side_by_side(weights)
    bias = _side_by_side(biases) if biases[0] is not None else None
    product, start = _Product(weight, bias), 0
    for name, part in zip(names, weights, strict=True):
        module._modules[name] = _Part(product, start, start + len(part))
        start += len(part)


def _side_by_side(tensors: list[Any]) -> Tensor:
    """One tensor of which these, concatenated, become views."""
    storage = tensors[0].untyped_storage().data_ptr()
    if all(one.untyped_storage().data_ptr() == storage for one in tensors):  # joined before
        size = torch.Size((sum(len(one) for one in tensors), *tensors[0].shape[1:]))
        joined: Tensor = tensors[0].data.as_strided(size, tensors[0].stride())
        return joined
    joined, start = torch.cat([one.data for one in tensors]), 0
    for one in tensors:
        one.data = joined[start : start + len(one)]
        start += len(one)
    return joined


class _Product(nn.Module):
    """One product, computed once for all of its parts."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler itself sees that the products are one
            return nn.functional.linear(hidden, self.weight, self.bias)
        if self.last is None or self.last[0] is not hidden:
            self.last = hidden, nn.functional.linear(hidden, self.weight, self.bias)
        return self.last[1]


class _Part(nn.Module):
    """The part of a product's output from `start` to `stop`."""

    def __init__(self, product: _Product, start: int, stop: int) -> None:
        super().__init__()
        self.product, self.start, self.stop = product, start, stop

    def forward(self, hidden: Tensor) -> Tensor:
        part: Tensor = self.product(hidden)[..., self.start : self.stop]
        return part
