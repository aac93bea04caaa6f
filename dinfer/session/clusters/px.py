"""%px and %%px on exactly the session's ranks: `--targets 1` is rank 1, whatever its engine's id."""

from collections.abc import Sequence
from typing import Any

from ipyparallel.client.magics import ParallelMagics
from IPython.core.error import UsageError
from IPython.core.getipython import get_ipython


class RankMagics(ParallelMagics):  # type: ignore[misc]
    """ipyparallel's own magics, with ranks for targets."""

    ids: Sequence[int] = ()

    def _eval_target_str(self, ts: str) -> int | list[int]:
        return target_ids(ts, self.ids)


def target_ids(text: str, ids: Sequence[int]) -> int | list[int]:
    """`1`, `0,2`, `[0, 2]`, `1:`, `::2` or `all`, in ranks, as engine ids. Raises UsageError."""
    ranks = list(range(len(ids)))
    try:
        if text.strip() == "all":
            return list(ids)
        if ":" in text:
            return [
                ids[rank] for rank in ranks[slice(*(int(w) if w.strip() else None for w in text.split(":")))]
            ]
        wanted = [ranks[int(word)] for word in text.strip("[]() ").split(",") if word.strip()]
    except (ValueError, IndexError, TypeError):
        raise UsageError(
            f"--targets is {text!r}; the ranks are 0 to {len(ids) - 1}: one (1), some (0,2), a slice (1:) or all."
        ) from None
    return ids[wanted[0]] if len(wanted) == 1 and "[" not in text else [ids[rank] for rank in wanted]


def activate(view: Any, ids: Sequence[int]) -> None:
    """Make %px, %%px, %pxresult and %pxconfig run on this view; nothing where there is no IPython."""
    shell = get_ipython()
    if shell is None:
        return
    magics = RankMagics(shell, view)
    magics.ids = list(ids)
    shell.magics_manager.register(magics)
