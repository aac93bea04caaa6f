"""The demo model: a tiny Qwen3 that recalls facts from its prompt.

A lost or wrong KV block shows as a wrong answer. `task` makes prompts, `train` made the checkpoint. Importing this
package imports neither torch nor transformers.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
