"""torch.compile for layers, with one change: equal products are computed once.

The parts of a joined product (see `shared`) are each a product of the whole to the compiler, which does not see that
they are one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compiled(run: Callable[..., Tensor], *, one_token: bool) -> Callable[..., Tensor]:
    """`run(layer, …)`, compiled when it is first called for a shape, and once for all layers of one structure."""
    # Layers share a compilation although each has a number of its own; without this each ninth one and on had none.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # A product of one row is bound by reading the weights: as a sum, tuned by trying, it reads them faster.
    options = {"coordinate_descent_tuning": True} if one_token else {}

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        _join_products(module)
        return compile_fx(module, inputs, config_patches=options)

    return torch.compile(run, dynamic=False, fullgraph=True, backend=backend)


def _join_products(module: torch.fx.GraphModule) -> None:
    first: dict[Any, torch.fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not nn.functional.linear or node.kwargs:
            continue
        if node.args in first:
            node.replace_all_uses_with(first[node.args])
            module.graph.erase_node(node)
        else:
            first[node.args] = node
    module.recompile()
