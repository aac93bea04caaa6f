"""Layers as CUDA graphs over transformers' own modules: faster than their own kernels, and stopped between any two.

Start with `graphs` (capture and launch), then `attend` (the one operator that touches the cache) and `table` (what it
reads on the device). `device_code` has the Triton kernels, `shared` the copies of the layers.
"""
