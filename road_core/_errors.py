"""The one error that bad input raises."""


class AdapterError(ValueError):
    """Input that can't be used: one sentence that says where, what was expected and what was found.

    Commands print the sentence and exit with code 2; from Python it is a ``ValueError`` like any other.
    """
