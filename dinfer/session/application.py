"""Kept for programs that import `dinfer.launch.application` by its former name."""

import warnings

from dinfer.launch.application import open_engine

__all__ = ["open_engine"]

warnings.warn("dinfer.session.application is dinfer.launch.application now", DeprecationWarning, stacklevel=2)
