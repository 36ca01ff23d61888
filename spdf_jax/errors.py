"""The one exception a user can cause."""


class InputError(ValueError):
    """Something the user gave is wrong: says what, where, and what to do. The command line prints it and exits with 2."""
