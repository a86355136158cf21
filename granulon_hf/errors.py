"""The one error that says what a user can mend."""


class GranulonError(ValueError):
    """Something that was given cannot be used: one sentence says what was expected, what came and what to do.

    From Python it is an ordinary exception. The `granulon` command alone turns it into that sentence and exit code 2.
    """


def one_line(error: BaseException) -> str:
    """Say on one line what an error says, without Python's numbers and names for what is wrong with a file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(reason := getattr(error, "reason", None), Exception):  # of an address that cannot be opened
        return one_line(reason)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return " ".join(str(error).split()) or type(error).__name__


def first_sentence(error: BaseException) -> str:
    """Take the first sentence of what a library says, which tends to go on with advice for its own users."""
    return one_line(error).split(". ")[0].rstrip(".")
