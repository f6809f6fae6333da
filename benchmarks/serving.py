"""A server's throughput and latency, by how many clients ask at once; every request has the same work.

    python benchmarks/serving.py --engine engines/26b --clients 1 4 16 64
    python benchmarks/serving.py --engine engines/26b --clients 16 --api openai -- --gpus 0,1

Starts `python -m backend serve` with the engine, and asks over gRPC or OpenAI's API. A client sends a request, random tokens
of its own, reads the stream to its end, and sends the next. Tokens a second count those of the answers; "first canvas" is how
long a client waits for the first response, which has a whole canvas. Checked: that every answer has its tokens and, over gRPC,
its steps. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import command_line
import torch
from measuring import Report, refuse
from openai import OpenAI

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from server_clients import Stream  # noqa: E402

from backend.openai_server.settings import OpenAISettings  # noqa: E402
from contract.manifest import read_manifest  # noqa: E402

OURS = "this server"
STOP_TIMEOUT_S = 60


class Request(NamedTuple):
    prompt: list[int]
    seed: int
    num_tokens: int
    num_canvases: int
    steps: int  # of each canvas

    @property
    def sampling(self) -> dict[str, object]:
        return {"max_denoising_steps": self.steps, "confidence_threshold": 0, "ignore_eos": True}


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
    parser.add_argument("--api", choices=("grpc", "openai"), default="grpc", help="what is asked; grpc: without the front end")
    parser.add_argument("serve", nargs="*", help="after --: options of `serve`, such as --gpus 0,1")
    options = parser.parse_args()
    report = Report(benchmark=f"serving over {options.api}, {options.engine.name}")
    started_s = time.perf_counter()
    with served(options) as url:
        report.add("ready", OURS, time.perf_counter() - started_s, "s")
        answer = partial(ask_grpc, url) if options.api == "grpc" else partial(ask_openai, openai_client(url))
        num_tokens = options.canvases * read_manifest(options.engine).model.canvas_length

        def ask(seed: int) -> Served:
            prompt = torch.randint(20, 400, (options.prompt_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
            return answer(Request(prompt, seed, num_tokens, options.canvases, options.steps))

        report.add("the first request", OURS, ask(0).all_s, "s")
        for clients in options.clients:
            measure(ask, clients, clients * options.requests_a_client, num_tokens, report)
    report.finish()


@contextmanager
def served(options: argparse.Namespace) -> Iterator[str]:
    """The address that is asked, of a server that runs meanwhile."""
    command = [sys.executable, "-m", "backend", "serve", "--engine", str(options.engine.resolve()), *options.serve]
    command += [word for name in ("grpc", "http", "metrics", "openai") for word in (f"--{name}-port", "0")]
    command += ["--no-openai"] if options.api == "grpc" else []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready, *words = process.stdout.readline().split() or [""]
            if ready != "ready":
                refuse(f"serve ended with exit code {process.wait(STOP_TIMEOUT_S)}; it says why above")
            yield words[words.index("gRPC" if options.api == "grpc" else "OpenAI") + 1]
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def measure(ask: Callable[[int], Served], clients: int, num_requests: int, num_tokens: int, report: Report) -> None:
    started_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        served = list(pool.map(ask, range(1, 1 + num_requests)))
    elapsed_s = time.perf_counter() - started_s
    case = f"{clients} client{'s' if clients > 1 else ''}"
    report.add(case, OURS, num_requests * num_tokens / elapsed_s, "tokens/s")
    report.add(f"{case}, first canvas, median", OURS, statistics.median(each.first_canvas_s for each in served), "s")
    report.add(f"{case}, whole answer, median", OURS, statistics.median(each.all_s for each in served), "s")
    report.add(f"{case}, whole answer, longest", OURS, max(each.all_s for each in served), "s")


def ask_grpc(url: str, request: Request) -> Served:
    sampling = json.dumps(request.sampling | {"max_tokens": request.num_tokens})
    started_s = time.perf_counter()
    stream = Stream(url, input_ids=request.prompt, seed=request.seed, sampling_parameters=sampling, stream=True)
    try:
        responses, first_s = [], None
        for response in stream:
            first_s = first_s or time.perf_counter() - started_s
            responses.append(response)
        all_s = time.perf_counter() - started_s
    finally:
        stream.close()
    expected = {"tokens": request.num_tokens, "steps": request.num_canvases * request.steps}
    got = {"tokens": sum(len(each.token_ids) for each in responses), "steps": sum(each.num_steps for each in responses)}
    if got != expected:
        refuse(f"request {request.seed}: got {got}, expected {expected}")
    return Served(first_s, all_s)


def openai_client(url: str) -> OpenAI:
    """One for all threads: making one takes a twentieth of a second of this process, which would be measured."""
    return OpenAI(base_url=url, api_key="none", max_retries=0)


def ask_openai(client: OpenAI, request: Request) -> Served:
    started_s = time.perf_counter()
    chunks = client.completions.create(
        model=OpenAISettings().served_name,
        prompt=request.prompt,
        max_tokens=request.num_tokens,
        seed=request.seed,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=request.sampling,
    )
    first_s = None
    for chunk in chunks:
        first_s, usage = first_s or time.perf_counter() - started_s, chunk.usage
    all_s = time.perf_counter() - started_s
    if usage.completion_tokens != request.num_tokens:
        refuse(f"request {request.seed}: got {usage.completion_tokens} tokens, expected {request.num_tokens}")
    return Served(first_s, all_s)


if __name__ == "__main__":
    main()
