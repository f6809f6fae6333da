"""The one exception of the builder: its message says what, got, expected, remedy, one line a problem."""


class BuildError(Exception):
    """The build cannot go on; nothing has been written where the engine would be."""
