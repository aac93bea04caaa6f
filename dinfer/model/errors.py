"""The one error that `dinfer.model` raises for something the user can put right."""

from dinfer.errors import DinferError


class ModelError(DinferError, ValueError):
    """A model, checkpoint, cache or prompt that cannot be used.

    The message says what was given, what is allowed and what to do.
    """
