"""A server's throughput and latency over gRPC, by how many clients ask at once; every request has the same work.

    python benchmarks/serving.py --engine engines/26b --clients 1 4 16 64

Starts a server of its own. A client sends a request, random tokens of its own, reads the stream to its end, and sends the next.
Tokens a second count those of the answers; "first canvas" is how long a client waits for the first response, which has a whole
canvas. Checked: that every answer has its tokens and its steps. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import command_line
import torch
from measuring import Report, refuse

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from server_clients import ANY_PORTS, Stream  # noqa: E402

from backend.triton_server.launch import TritonServer  # noqa: E402
from backend.triton_server.model_config import Instances  # noqa: E402
from contract.manifest import read_manifest  # noqa: E402

OURS = "this server"


class Served(NamedTuple):
    """One request, in seconds from when it was sent."""

    first_canvas_s: float
    all_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument("--clients", type=command_line.count, nargs="+", default=(1, 4, 16, 64))
    parser.add_argument("--requests-a-client", type=command_line.count, default=2)
    parser.add_argument("--prompt-tokens", type=command_line.count, default=128)
    parser.add_argument("--canvases", type=command_line.count, default=2, help="of an answer")
    parser.add_argument("--steps", type=command_line.count, default=48, help="fixed denoising steps a canvas")
    parser.add_argument("--gpus", type=int, nargs="+", default=(), help="a replica on each; without it, one")
    parser.add_argument("--set", dest="settings", type=setting, action="append", default=[], help="NAME=VALUE, of config.pbtxt")
    options = parser.parse_args()
    report = Report(benchmark=f"serving, {options.engine.name}")
    started_s = time.perf_counter()
    with TritonServer(
        engine_dir=options.engine,
        parameters=dict(options.settings),
        instances=Instances(gpus=tuple(options.gpus)) if options.gpus else None,
        report=lambda line: print(line, file=sys.stderr),
        **ANY_PORTS,
    ) as server:
        report.add("ready", OURS, time.perf_counter() - started_s, "s")
        num_tokens = options.canvases * read_manifest(options.engine).model.canvas_length
        report.add("the first request", OURS, ask(server, options, num_tokens, 0).all_s, "s")
        for clients in options.clients:
            measure(server, options, num_tokens, clients, report)
    report.finish()


def setting(text: str) -> tuple[str, str]:
    """An option of argparse."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"got {text}, expected NAME=VALUE")
    return name, value


def measure(server: TritonServer, options: argparse.Namespace, num_tokens: int, clients: int, report: Report) -> None:
    seeds = range(1, 1 + clients * options.requests_a_client)
    started_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        served = list(pool.map(lambda seed: ask(server, options, num_tokens, seed), seeds))
    elapsed_s = time.perf_counter() - started_s
    case = f"{clients} client{'s' if clients > 1 else ''}"
    report.add(case, OURS, len(served) * num_tokens / elapsed_s, "tokens/s")
    report.add(f"{case}, first canvas, median", OURS, statistics.median(each.first_canvas_s for each in served), "s")
    report.add(f"{case}, whole answer, median", OURS, statistics.median(each.all_s for each in served), "s")
    report.add(f"{case}, whole answer, longest", OURS, max(each.all_s for each in served), "s")


def ask(server: TritonServer, options: argparse.Namespace, num_tokens: int, seed: int) -> Served:
    prompt = torch.randint(20, 400, (options.prompt_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    sampling = {"max_denoising_steps": options.steps, "confidence_threshold": 0, "ignore_eos": True, "max_tokens": num_tokens}
    started_s = time.perf_counter()
    stream = Stream(server.grpc_url, input_ids=prompt, seed=seed, sampling_parameters=json.dumps(sampling), stream=True)
    try:
        responses, first_s = [], None
        for response in stream:
            first_s = first_s or time.perf_counter() - started_s
            responses.append(response)
        all_s = time.perf_counter() - started_s
    finally:
        stream.close()
    expected = {"tokens": num_tokens, "steps": options.canvases * options.steps}
    got = {"tokens": sum(len(each.token_ids) for each in responses), "steps": sum(each.num_steps for each in responses)}
    if got != expected:
        refuse(f"request {seed}: got {got}, expected {expected}")
    return Served(first_s, all_s)


if __name__ == "__main__":
    main()
