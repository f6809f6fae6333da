"""What `python -m backend serve` runs: a Triton server, or one a GPU, and OpenAI's API in front of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from backend.addresses import AddressError, free_ports, ipv4_address
from backend.gpu_groups import GpuGroup, group_name
from backend.openai_server.launch import FrontEnd
from backend.openai_server.settings import OpenAISettings
from backend.triton_server.launch import POLL_INTERVAL_S, TritonServer
from backend.triton_server.model_config import Instances

_CHECK_INTERVAL_S = 0.5
_PORTS_APART = 10


def serve(
    openai: OpenAISettings | None,
    *,
    host: str,
    ports: Mapping[str, int],
    replicas: int | None = None,
    gpu_groups: Sequence[GpuGroup] = (),
    report: Callable[[str], None],
    **options: Any,
) -> None:
    """Serves until a signal leaves it, and prints a line with the addresses once all is ready.

    openai: of the front end, whose port may be 0; None for none. ports: of the first server, by the names of `TritonServer`;
    0 for free ones. replicas: in all, or of each of `gpu_groups`; with neither, what config.pbtxt says. options: others of
    `TritonServer`. Raises ServerError, FrontEndError and ValueError.
    """
    each = _options_of_servers(replicas, gpu_groups, with_front_end=bool(openai), report=report)
    # All of them before anything starts: loading an engine takes minutes.
    ports_of_servers, openai_port = chosen_ports(host, ports, len(each), openai.port if openai else None)
    servers = [
        TritonServer(host=host, **its_ports, **its_own, **options)
        for its_ports, its_own in zip(ports_of_servers, each, strict=True)
    ]
    # The front end outlasts the servers: what they refuse, or end, while they stop is for it to tell its clients.
    with ExitStack() as outlasting, ExitStack() as running:
        _start(servers, running)
        addresses = {"gRPC": _joined(servers, "grpc_url"), "HTTP": _joined(servers, "http_url")}
        addresses["metrics"], logs = _joined(servers, "metrics_url"), {"log": _joined(servers, "log_path")}
        front_ends: list[FrontEnd] = []
        if openai:
            found = {"triton_urls": tuple(server.grpc_url for server in servers), "port": openai_port}
            if len(servers) == 1:
                found["triton_metrics_url"] = servers[0].metrics_url
            front_end = FrontEnd(openai.model_copy(update=found), servers[0].log_path.with_name("openai.log"))
            front_ends.append(outlasting.enter_context(front_end))  # while the servers load
            addresses["OpenAI"], logs["OpenAI log"] = f"{front_end.url}/v1", front_end.log_path
        _wait_until_ready(servers, front_ends)
        print("ready", *(f"{name} {where}" for name, where in (addresses | logs).items()), sep="  ", flush=True)
        while True:
            for part in (*servers, *front_ends):
                part.check_alive()
            time.sleep(_CHECK_INTERVAL_S)


def _options_of_servers(
    replicas: int | None, gpu_groups: Sequence[GpuGroup], *, with_front_end: bool, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A dict for each server: one for each group of GPUs, or one for all.

    A front end gives a request to the server that has the fewest, where of several instances in one server any may take it. And
    a worker sees one GPU of its instance group, or all that its server sees: so GPUs that it needs together have their server.
    """
    several = [len(group) > 1 for group in gpu_groups]
    if not gpu_groups or not (with_front_end or any(several)):
        gpus = tuple(gpu for [gpu] in gpu_groups)
        return [{"instances": Instances(count=replicas or 1, gpus=gpus) if replicas or gpus else None, "report": report}]
    count = replicas or 1
    alone = Instances(count=count, gpus=(0,))  # a server counts the GPUs that it sees, and refuses one that is not there
    return [
        {"instances": Instances(count=count) if shared else alone, "gpus": group, "report": _of_gpus(report, group)}
        for shared, group in zip(several, gpu_groups, strict=True)
    ]


def _start(servers: Sequence[TritonServer], running: ExitStack) -> None:
    """All at once, because loading an engine takes a minute, and so they stop: each may wait for the requests that it has."""
    for server in servers:
        running.push(server)
        server.start()
    running.callback(lambda: [server.begin_to_stop() for server in servers])


def _wait_until_ready(servers: Sequence[TritonServer], front_ends: Sequence[FrontEnd]) -> None:
    waiting = servers
    while True:
        waiting = [server for server in waiting if not server.is_ready()]
        for front_end in front_ends:
            front_end.check_alive()
        if not waiting:
            return
        time.sleep(POLL_INTERVAL_S)


def chosen_ports(
    host: str, ports: Mapping[str, int], num_servers: int, openai_port: int | None
) -> tuple[list[dict[str, int]], int | None]:
    """Those of each server, and the front end's, with every 0 replaced by a free one. A server's are 10 above those before.

    Raises AddressError for one that cannot be used.
    """
    wanted, most = [], 65535 - _PORTS_APART * (num_servers - 1)
    for at in range(num_servers):
        for name, first in ports.items():
            option = f"--{name.replace('_', '-')}"
            if first > most:
                expected = f"expected at most {most} for {num_servers} servers, whose ports are {_PORTS_APART} apart"
                raise AddressError(f"{option}: got {first}, {expected}; pass a lower one, or 0")
            wanted.append((option, first and first + _PORTS_APART * at))
    if openai_port is not None:
        wanted.append(("--openai-port", openai_port))
    chosen = iter(free_ports(ipv4_address(host), wanted))
    return [{name: next(chosen) for name in ports} for _ in range(num_servers)], next(chosen, None)


def _joined(servers: Sequence[TritonServer], attribute: str) -> str:
    return ",".join(str(getattr(server, attribute)) for server in servers)


def _of_gpus(report: Callable[[str], None], group: GpuGroup) -> Callable[[str], None]:
    return lambda line: report(f"GPU {group_name(group)}: {line}")
