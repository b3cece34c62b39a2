"""The one exception that a user is meant to read: one line with what was got, what is wanted and
how to mend it."""


class FasttrError(ValueError):
    """A mistake in the input or the set-up. The command line prints it as one line and exits with
    status 2."""

    def __init__(self, message: str) -> None:
        # A value from a file or a command line, quoted in the message, may hold line breaks.
        super().__init__(" ".join(message.splitlines()))
