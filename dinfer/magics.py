"""Placeholder until the magics branch is merged."""


def load(shell: object) -> None:
    pass
