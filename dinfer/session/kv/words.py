"""Words for rows and places, and the keys by which rows are found again."""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

KV = ("K", "V")


def span_text(start: int, stop: int) -> str:
    """Places as people write them: row 5, rows 26–51."""
    return f"row {start}" if stop - start == 1 else f"rows {start}–{stop - 1}"


def numbers_text(places: Sequence[int]) -> str:
    """Runs of numbers: 3, 5–9."""
    runs = []
    for _, group in groupby(enumerate(sorted(places)), key=lambda one: one[1] - one[0]):
        run = [place for _, place in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(runs[:4]) + (f" and {len(runs) - 4} runs more" if len(runs) > 4 else "")


def places_text(places: Sequence[int]) -> str:
    return f"row{'s' * (len(places) != 1)} {numbers_text(places)}"


def rows_text(places: Sequence[int], start: int) -> str:
    return places_text([start + place for place in places])


def tokens_text(cells: Tensor, start: int) -> str:
    return rows_text(concerned(cells), start)


def tensors_text(cells: Tensor) -> str:
    return " and ".join(KV[n] for n in (0, 1) if cells[:, n].any())


def what_text(cells: Tensor) -> str:
    """K and V, or K alone, and which heads of it, where not all."""
    heads = cells.any(0).any(0).nonzero().flatten().tolist()
    some = "" if len(heads) == cells.shape[2] else f", head{'s' * (len(heads) > 1)} {numbers_text(heads)}"
    return f"{tensors_text(cells)}{some}"


def concerned(cells: Tensor) -> list[int]:
    found: list[int] = cells.flatten(1).any(1).nonzero().flatten().tolist()
    return found


def are(places: Sequence[int]) -> str:
    return "is" if len(places) == 1 else "are"


def keys_of(rows: Tensor) -> list[bytes]:
    """Each row's digests as one key; the places of `rows` come first."""
    return [row.tobytes() for row in rows.flatten(1).contiguous().numpy()] if len(rows) else []


def places_of(keys: Sequence[bytes]) -> dict[bytes, int]:
    """The first place of each row."""
    found = dict[bytes, int]()
    for place, key in enumerate(keys):
        found.setdefault(key, place)
    return found
