"""The one exception for wrong input: a sentence that names what is wrong, where, and the cure."""


class UserError(ValueError):
    """Wrong input by the person who runs misa; the command line prints its sentence and exits with status 2."""
