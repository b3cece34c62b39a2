"""The one exception that a user is meant to read: one line with what was got, what is wanted and how to mend it."""


class FasttrError(ValueError):
    """A mistake in the input or the set-up. The command line prints it as one line and exits with status 2."""
