"""Closing: what ends at the end of a `with`, whatever happened in it."""

from typing import Self


class Closing:
    """Something that has to be closed."""

    def close(self) -> None:
        """End it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
