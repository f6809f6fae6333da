"""What Triton and gRPC add to the offline loop: milliseconds a canvas, the same prompts and seeds, at 1 and 16 clients.

    python benchmarks/server.py --engine engines/diffusiongemma

Offline is `LLM` in this process; online are clients of a server of this benchmark's own, one stream each, a request after
the other. The tokens of both are compared first. The engine's threads are the same in both, and they run in turns, never at
once. The last line is JSON.
"""

import argparse
import json
import queue
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command_line
import torch
import tritonclient.grpc as grpcclient
from measuring import Goal, Report, Timing, in_turns, refuse

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server_clients import ANY_PORTS, NO_PROXY, TIMEOUT_S, tensors  # noqa: E402

from backend import LLM, SamplingConfig  # noqa: E402
from backend.triton_server.launch import MODEL_NAME, TritonServer  # noqa: E402
from contract.manifest import read_manifest  # noqa: E402

OFFLINE, ONLINE = "offline", "gRPC"
PROMPT_TOKENS = 40
ADDED_SHARE, ADDED_MS = 0.05, 3.0  # the goal at one client: the larger of the two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument("--clients", type=command_line.count, nargs="+", default=(1, 16))
    parser.add_argument(
        "--canvases", type=command_line.count, default=16, help="in all, at one client; at more, at least one a client"
    )
    parser.add_argument("--canvases-a-request", type=command_line.count, default=4)
    parser.add_argument("--steps", type=command_line.count, default=12, help="fixed denoising steps a canvas")
    parser.add_argument("--rounds", type=command_line.count, default=7)
    options = parser.parse_args()
    model = read_manifest(options.engine).model
    tokens = options.canvases_a_request * model.canvas_length
    settings = {"max_denoising_steps": options.steps, "confidence_threshold": 1e-9, "ignore_eos": True, "max_tokens": tokens}
    generator = torch.Generator().manual_seed(0)
    report = Report(benchmark=f"server, {options.engine.name}")
    llm = LLM(options.engine)
    with TritonServer(engine_dir=options.engine, **ANY_PORTS) as server:
        for clients in options.clients:
            num_requests = max(options.canvases // options.canvases_a_request, clients)
            prompts = torch.randint(20, 400, (num_requests, PROMPT_TOKENS), generator=generator).tolist()
            systems = {
                OFFLINE: lambda prompts=prompts, clients=clients: offline(llm, prompts, clients, settings),
                ONLINE: lambda prompts=prompts, clients=clients: online(server.grpc_url, prompts, clients, settings),
            }
            if systems[OFFLINE]() != systems[ONLINE]():
                refuse(f"{clients} clients: tokens over gRPC differ from those of the offline loop")
            timings = in_turns(systems, options.rounds, doing=f"{clients} clients")
            add_case(report, clients, num_requests * options.canvases_a_request, timings)
    report.finish()


def offline(llm: LLM, prompts: list[list[int]], at_once: int, settings: dict) -> list[list[int]]:
    """Tokens of each prompt; its seed is its index."""
    results = []
    for begin in range(0, len(prompts), at_once):
        some = prompts[begin : begin + at_once]
        sampling = [SamplingConfig(seed=begin + index, **settings) for index in range(len(some))]
        results += llm.generate(some, sampling, use_tqdm=False)
    return [result.token_ids for result in results]


def online(url: str, prompts: list[list[int]], clients: int, settings: dict) -> list[list[int]]:
    """The same, by so many clients at once; each keeps one stream open, and sends a request when the one before has ended."""
    waiting, results = iter(range(len(prompts))), {}

    def client() -> None:
        arrived: queue.Queue = queue.Queue()
        with grpcclient.InferenceServerClient(url, channel_args=NO_PROXY) as connection:
            connection.start_stream(lambda result, error: arrived.put((result, error)))
            for index in waiting:
                inputs = {"input_ids": prompts[index], "seed": index, "sampling_parameters": json.dumps(settings)}
                connection.async_stream_infer(MODEL_NAME, tensors(**inputs, stream=True), enable_empty_final_response=True)
                results[index] = []
                while True:
                    result, error = arrived.get(timeout=TIMEOUT_S)
                    if error is not None:
                        raise error
                    if result.get_response().parameters["triton_final_response"].bool_param:
                        break
                    results[index] += result.as_numpy("output_ids").tolist()

    with ThreadPoolExecutor(clients) as pool:
        for running in [pool.submit(client) for _ in range(clients)]:
            running.result()
    return [results[index] for index in range(len(prompts))]


def add_case(report: Report, clients: int, num_canvases: int, timings: dict[str, Timing]) -> None:
    """What is added is the median of the rounds' differences: both halves of a round meet the same other work."""
    case = f"{clients} client{'s' if clients > 1 else ''}"
    for name, timing in timings.items():
        report.add(case, name, 1e3 * timing.median_s / num_canvases, "ms a canvas", timing)
    pairs = zip(timings[ONLINE].seconds, timings[OFFLINE].seconds, strict=True)
    added_ms = 1e3 * statistics.median(online - offline for online, offline in pairs) / num_canvases
    report.add(f"{case}, added", ONLINE, added_ms, "ms a canvas")
    if clients == 1:
        limit_ms = max(ADDED_MS, ADDED_SHARE * 1e3 * timings[OFFLINE].median_s / num_canvases)
        goal = {"value": round(added_ms, 3), "limit": round(limit_ms, 3), "unit": "ms a canvas"}
        report.goals.append(Goal(what="the server adds, at 1 client", **goal))


if __name__ == "__main__":
    main()
