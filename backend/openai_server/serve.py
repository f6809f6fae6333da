"""The front end in this process, until a signal."""

from contextlib import closing

import uvicorn

from backend.addresses import AddressError, listening
from backend.openai_server.app import create_app
from backend.openai_server.launch import FrontEndError
from backend.openai_server.settings import OpenAISettings

# Of an idle connection. nginx and AWS's balancers close theirs after 60 s; who sends the requests has to be the first that
# closes, because a request may be on its way to a server that does.
_KEEP_ALIVE_S = 75


def serve(settings: OpenAISettings) -> None:
    """Serves until SIGINT or SIGTERM. Raises FrontEndError for an address that cannot be used."""
    try:
        opened = listening(settings.host, settings.port, "--port")
    except AddressError as error:
        raise FrontEndError(str(error)) from None
    host, port = opened.getsockname()[:2]
    print(f"ready  OpenAI API http://{host}:{port}/v1  Triton {', '.join(settings.triton_urls)}", flush=True)
    timeouts = {"timeout_keep_alive": _KEEP_ALIVE_S, "timeout_graceful_shutdown": 5}
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", **timeouts))
    with closing(opened):
        server.run(sockets=[opened])
