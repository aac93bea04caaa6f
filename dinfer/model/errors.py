"""The error that `dinfer.model` raises for what its user can fix."""

from dinfer.errors import DinferError


class ModelError(DinferError, ValueError):
    """A model, checkpoint, cache or prompt cannot be used; the message names the given value, the allowed ones and what
    to do."""
