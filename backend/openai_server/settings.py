"""How the front end is started: one record, checked when it is made."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from backend.parameters import shown

# Scheme, host and port, as browsers write them: in small letters, without the scheme's own port.
_ORIGIN = re.compile(r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")


class OpenAISettings(BaseModel):
    """triton_urls: host:port of each Triton server's gRPC service. triton_metrics_url: what `/metrics` passes on of a single
    server; without it there is none. model: the Triton model. served_name: what clients call it. api_keys: any of them opens
    `/v1`; none leaves it open. allowed_origins: of the pages whose scripts may call the server, "*" for all. max_body_bytes: of
    one request, before it is read as JSON; the default holds seven images of 20 MiB in base64."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    triton_urls: Annotated[tuple[str, ...], Field(min_length=1)] = ("localhost:8001",)
    triton_metrics_url: str | None = None
    model: str = "diffusiongemma"
    served_name: str = "diffusiongemma"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9000
    max_body_bytes: Annotated[int, Field(ge=1)] = 192 * 1024**2
    api_keys: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(repr=False)] = ()
    allowed_origins: tuple[str, ...] = ()


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line. Raises ValueError, a line for the option that names the file, if there is none."""
    expected = "expected a text file of keys, one a line"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--api-key-file: {path} cannot be read ({error.strerror}), {expected}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--api-key-file: {path} is not UTF-8, {expected}") from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise ValueError(f"--api-key-file: got no API key in {path}, expected one a line")
    return keys


def checked_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """As given. Raises ValueError, a line for the option that gives them, if one can never be a page's."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            form = "scheme://host or scheme://host:port as browsers send it (small letters, no path, no default port)"
            raise ValueError(f"--allowed-origin: got {shown(origin)}, expected {form}, such as https://chat.example.com, or *")
    return tuple(origins)
