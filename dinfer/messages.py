"""dinfer.messages."""

from typing import Any

Message = dict[str, Any]
