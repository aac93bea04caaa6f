"""The messages between session and rank."""

from typing import Any

Message = dict[str, Any]
