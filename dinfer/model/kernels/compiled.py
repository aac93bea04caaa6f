"""torch.compile for layers, with one change: equal products are computed once.

The parts of a joined product (see `shared`) are each a product of the whole to the compiler, which does not see that
they are one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dinfer.model.kernels.product import one_row

_STEADY = {
    "triton.autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "max_autotune": False,
    "max_autotune_pointwise": False,
}
"""no kernel is chosen by the clock: another one adds up in another order, and ranks decode alone on equal KV"""

_PRODUCTS = (nn.functional.linear, one_row, torch.ops.dinfer.one_row.default)


def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run(layer, …)`, compiled when it is first called for a shape, and once for all layers of one structure."""
    # Layers share a compilation although each has a number of its own; without this each ninth one and on had none.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # Each chunk size, kind of layer and model of a session takes one; past the limit nothing would be compiled.
    torch._dynamo.config.recompile_limit = 256

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        _join_products(module)
        return compile_fx(module, inputs, config_patches=_STEADY)

    return torch.compile(run, dynamic=False, fullgraph=True, backend=backend)


def _join_products(module: torch.fx.GraphModule) -> None:
    first: dict[Any, torch.fx.Node] = {}
    for node in list(module.graph.nodes):
        is_product = node.op == "call_function" and node.target in _PRODUCTS
        if not is_product or node.kwargs:
            continue
        same = first.setdefault((node.target, node.args), node)
        if same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
    module.recompile()
