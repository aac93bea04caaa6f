"""Products of one token with a weight, which read the weight once at nearly the speed of the memory.

cuBLAS reaches half of that for one row. For more rows, and on a CPU, torch's own product runs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

MOST_STEPS = 16
"""of one row: all its loads are under way at once, and take registers"""


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden` [1, T, in] by `weight` [out, in], with `bias` [out] or None: [1, T, out]."""
    if hidden.shape[1] == 1 and hidden.is_cuda and weight.is_contiguous():
        made: Tensor = one_row(hidden, weight, bias)
        return made
    return linear(hidden, weight, bias)


@torch.library.custom_op("dinfer::one_row", mutates_args=())
def one_row(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for one token on a GPU."""
    from dinfer.model.kernels import device_code
    from dinfer.model.kernels.attend import triton_dtype

    count, width = weight.shape
    # The fastest of those tried on one H200.
    rows, step = (1, 512) if width <= 512 * MOST_STEPS else (2, 1024)
    while -(-width // step) > MOST_STEPS:
        step *= 2
    out = torch.empty((1, 1, count), dtype=hidden.dtype, device=hidden.device)
    device_code.product[(-(-count // rows),)](
        hidden.contiguous(), weight, weight if bias is None else bias, out, count,
        width, step, -(-width // step), rows, bias is not None, triton_dtype(hidden), num_warps=4,
    )  # fmt: skip
    return out


@one_row.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return hidden.new_empty((1, 1, weight.shape[0]))
