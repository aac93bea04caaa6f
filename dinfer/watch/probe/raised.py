"""What is said of an exception: its text, and where it was raised."""

from .callers import whose


def message_of(error: BaseException, is_handled: bool) -> str:
    """Its text. While the program goes on, that of plain arguments only: a tensor's would wait for its device."""
    try:
        if is_handled and not all(
            isinstance(one, (str, int, float, bytes, type(None))) for one in error.args
        ):
            return f"({', '.join(type(one).__name__ for one in error.args)})"
        return str(error)[:2000]
    except Exception:
        return ""


def raised_at(error: BaseException) -> tuple[str, int]:
    """File and line of the innermost frame of the user's code; where there is none, of the innermost of all."""
    best, found = -1, ("", 0)
    step = error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        rank = 3 - whose(file)
        if rank >= best:
            best, found = rank, (file, step.tb_lineno)
        step = step.tb_next
    return found
