"""The one exception that is the user's to fix.

Everything that can go wrong with a picture, a prompt or a folder given from outside is raised as an
`InputError`: one line that says what was wrong, what was expected and what to do. It is a `ValueError`, so
that library users need not know it; the command line prints it without a traceback and exits with 2.
"""


class InputError(ValueError):
    """Bad input from a user. The message is one line and says what to do about it."""
