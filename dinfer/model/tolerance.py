"""How far two right computations of one model may lie apart, by dtype and depth, before it is no rounding any more.

Plain arithmetic: it looks at no tensor. Two runs of the same chunks in one dtype on one CPU need no tolerance, they
are equal bit for bit; this is for runs in other chunks or in another dtype.
"""

from __future__ import annotations

from math import sqrt

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The largest relative error of rounding once, by dtype."""

ROUNDINGS = 16
"""So often a value is rounded in a layer on its longest way: norm (2), projection, head norm (2), rotation (2), scores,
softmax (2), weighted sum, projection, residual; and after the MLP's product once more projection and residual."""

CONFIDENCE = 4.0
"""How many times what a random walk of roundings comes to still counts as rounding: a rounding is at most u, which is
√3 standard deviations of one, so that 4 are 7 of the sum's. 6 leave out one value in 10^9; one more is for values of
one tensor being made of the same inputs, so that their errors go together."""


def tolerance(one: str, other: str, layer: int, width: int) -> float:
    """How far K, V or the hidden state at `layer` (0: what enters the first) may lie apart, as a share of the largest
    value of that tensor in that block.

    λ · √(layer + 1) · (√k · u + √n · 2^-24), where u is the unit roundoff of the coarser of the two dtypes,
    k = ROUNDINGS the roundings that a value goes through in one layer, n = `width` the longest sum (hidden or
    intermediate size, or tokens), which is added up in float32 whatever the dtype, and λ = CONFIDENCE.

    Roundings are taken as independent and of mean zero, so that m of them add up like a random walk, √m · u, and not
    as in the worst case, m · u (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J.
    Sci. Comput. 41(5), 2019). The norms keep what enters a layer at the size of the weights, so an error is carried
    on at its relative size while each layer adds one of its own, independent of those before: hence √ of the depth.
    The measure is the largest value of the block and not each value: sums cancel, and a small value inherits the
    error of the large ones that it is made of.

    It is no proof. Where a near-tie decides (which experts a router takes, a sharp attention) a rounding becomes more
    than that, and a fault smaller than that is not seen: only equal chunks and dtypes, where nothing may differ, leave
    no room for either. Of ten families with random weights and 4 layers, right computations used at most 0.21 of it in
    other chunks and 0.81 in another dtype; the demo checkpoint 0.05 and 0.18. With 24 random layers Gemma3 and
    Qwen3-MoE went beyond it in another dtype.
    """
    u = max(UNIT_ROUNDOFF[one], UNIT_ROUNDOFF[other])
    return CONFIDENCE * sqrt(layer + 1) * (sqrt(ROUNDINGS) * u + sqrt(width) * UNIT_ROUNDOFF["float32"])
