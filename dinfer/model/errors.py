"""The one error that `dinfer.model` raises for something the user can put right."""


class ModelError(ValueError):
    """A model, checkpoint, cache or prompt that cannot be used.

    The message says what was given, what is allowed and what to do.
    """
