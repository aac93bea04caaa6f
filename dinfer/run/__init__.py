"""A run: what a user holds, steps, inspects, breaks and saves.

Imports everything below (`cluster`, `kv`, `monitor`, `saved`, …), never `session` or `views`. Start at `run`, which is
composed of the parts in the other files.
"""
