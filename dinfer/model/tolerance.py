"""How far two correct computations of one model may differ by rounding, by dtype and depth.

It is for runs in other chunks or in another dtype. Two runs of the same chunks in one dtype on one CPU are equal bit
for bit and need no tolerance.
"""

from math import sqrt

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""the largest relative error of one rounding, by dtype"""

ROUNDINGS = 16
"""roundings of a value on its longest path through a layer: norm (2), projection, head norm (2), rotation (2), scores,
softmax (2), weighted sum, projection, residual; and after the MLP's product again projection and residual"""

CONFIDENCE = 4.0
"""the multiple of a random walk of roundings that still counts as rounding. One rounding is at most u, which is √3 of
its standard deviations, so 4 is 7 standard deviations of the sum. 6 would miss one value in 10^9; one more allows for
values of one tensor that share inputs, so that their errors are correlated"""


def tolerance(one: str, other: str, layer: int, width: int) -> float:
    """How far K, V or the hidden state at `layer` (0: the input of the first) may differ, as a share of the largest
    value of that tensor in that block: λ · √(layer + 1) · (√k · u + √n · 2^-24).

    u is the unit roundoff of the coarser of the two dtypes, k = ROUNDINGS the roundings of a value in one layer, n =
    `width` the length of the longest sum (hidden or intermediate size, or tokens), which is accumulated in float32 in
    any dtype, and λ = CONFIDENCE. Roundings are taken as independent with mean zero, so m of them add up like a random
    walk, √m · u, and not like the worst case, m · u (Higham and Mary, A New Approach to Probabilistic Rounding Error
    Analysis, SIAM J. Sci. Comput. 41(5), 2019). The norms keep a layer's input at the size of the weights, so an error
    keeps its relative size, and each layer adds an independent one: hence the √ of the depth. The scale is the largest
    value of the block: sums cancel, and a small value has the error of the large ones in its sum.

    It is not a proof. A near-tie (a router's choice of experts, a sharp attention) makes a rounding larger, and a
    smaller fault goes unnoticed; only a comparison with equal chunks and dtypes, where nothing may differ, avoids both.
    For ten families with random weights and 4 layers, correct computations used at most 0.21 of the tolerance in other
    chunks and 0.81 in another dtype; with 24 layers, Gemma3 and Qwen3-MoE exceeded it in another dtype.
    """
    u = max(UNIT_ROUNDOFF[one], UNIT_ROUNDOFF[other])
    return CONFIDENCE * sqrt(layer + 1) * (sqrt(ROUNDINGS) * u + sqrt(width) * UNIT_ROUNDOFF["float32"])
