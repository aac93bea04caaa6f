"""The demo model: a tiny Qwen3 that recalls facts from its prompt.

A lost or wrong KV block then shows as a wrong answer. `task` writes prompts and `train` made the checkpoint;
importing this package imports neither torch nor transformers.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"

LOOKUP_LAYER = 1
"""The layer of the shipped weights that looks facts up: without its block of a fact, the answer is wrong."""
