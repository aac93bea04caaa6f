"""The watch for hangs: collects signs of life and stacks from all ranks and asks `verdict` what they mean.

Imports `cluster` and what lies below. Start at `watch`; `signs` turns what ranks report into what a verdict reads.
"""
