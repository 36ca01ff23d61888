"""The exceptions that the command line turns into an exit code."""


class InputError(ValueError):
    """Something the user gave is wrong: says what, where, and what to do. The command line prints it and exits with 2.

    >>> import spdf_jax as spdf
    >>> try:
    ...     spdf.GPTConfig(d_model=10, n_head=4)
    ... except InputError as error:
    ...     print(error)
    model.d_model: 10 is not divisible by model.n_head 4
    """


class Restart(Exception):
    """The run ends before its time, in all its processes, and the same command goes on. The command line exits with 75."""
