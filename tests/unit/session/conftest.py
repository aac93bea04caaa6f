"""The session tests use the decoders of the engine tests."""

from __future__ import annotations

from tests.unit.engine.conftest import decoders, no_thread_is_left, small

__all__ = ["decoders", "no_thread_is_left", "small"]
