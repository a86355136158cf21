"""The one error that says what a user can mend."""


class GranulonError(ValueError):
    """Something that was given cannot be used: one sentence says what was expected, what came and what to do.

    From Python it is an ordinary exception. The `granulon` command alone turns it into that sentence and exit code 2.
    """
