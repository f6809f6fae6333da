"""What can go wrong when a server is started."""


class ServerError(RuntimeError):
    """The server cannot start, does not load the model, or died; the message is one line."""
