"""A server under load: many clients, streamed and whole answers, cancelled and malformed requests; what is left afterwards.

    python benchmarks/server_load.py --engine engines/diffusiongemma --requests 2000 --clients 32

Starts a server of its own. Checked, and the exit code says so: every request ends in exactly one way, of the kind that was
asked for; the server counts the same; memory does not grow; when all is over no request is active, and the server's processes
and shared memory are gone. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import command_line
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server_clients import ANY_PORTS, NO_PROXY, metrics, tensors  # noqa: E402
from server_processes import engine_workers, leftovers, resident_bytes, stubs  # noqa: E402

from backend.triton_server.launch import MODEL_NAME, TritonServer  # noqa: E402

KINDS = ("whole", "streamed", "cancelled", "malformed")
MALFORMED = (
    {"text_input": ""},
    {"input_ids": [5, 1_000_000]},
    {"text_input": "hello", "sampling_parameters": "{bad"},
    {"text_input": "hello", "max_tokens": 0},
)
MAX_GROWTH_MIB = 16  # after the first fifth of the requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument("--requests", type=command_line.count, default=2000)
    parser.add_argument("--clients", type=command_line.count, default=32)
    parser.add_argument("--max-tokens", type=command_line.count, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    shm_before = shared_memory()
    with TritonServer(engine_dir=options.engine, **ANY_PORTS) as server:
        result = asyncio.run(load(server, options))
        result |= after_load(server, result["ended"])
        name = server.shm_prefix
        with grpcclient.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
            started_s = time.perf_counter()
            client.unload_model(MODEL_NAME)
            while (stubs(server) or engine_workers(server)) and time.perf_counter() - started_s < 60:
                time.sleep(0.05)
            result["unload_s"] = round(time.perf_counter() - started_s, 2)
            result["processes_after_unload"] = len(stubs(server)) + len(engine_workers(server))
    result["left"] = leftovers(name)
    result["shm_is_as_before"] = shared_memory() == shm_before
    problems = found_problems(result, options.requests)
    print(json.dumps(result | {"problems": problems}))
    sys.exit(1 if problems else 0)


async def load(server: TritonServer, options: argparse.Namespace) -> dict:
    """Every client asks one request after the other, of a random kind: 10 % malformed, 30 % cancelled, the rest answered."""
    choices = random.Random(options.seed)
    kinds = choices.choices(KINDS, weights=(30, 30, 30, 10), k=options.requests)
    pending = iter([(index, kind, choices.random()) for index, kind in enumerate(kinds)])
    ended: Counter[str] = Counter()
    latencies_s: list[float] = []
    memory: list[dict[str, int]] = []

    async def client() -> None:
        async with aioclient.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as each:
            for index, kind, chance in pending:
                started_s = time.perf_counter()
                ended[f"{kind}: {await ask(each, kind, index, chance, options.max_tokens)}"] += 1
                if kind == "whole":
                    latencies_s.append(time.perf_counter() - started_s)
                if sum(ended.values()) % max(1, options.requests // 10) == 0:
                    memory.append(memory_of(server))
                    print(f"{sum(ended.values())} of {options.requests} requests ended", file=sys.stderr)

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(options.clients)))
    elapsed_s = time.perf_counter() - started_s
    return {
        "ended": dict(sorted(ended.items())),
        "requests_per_s": round(options.requests / elapsed_s, 1),
        "whole_answer_median_s": round(statistics.median(latencies_s), 3) if latencies_s else None,
        "memory": memory,
    }


async def ask(client: aioclient.InferenceServerClient, kind: str, index: int, chance: float, max_tokens: int) -> str:
    """How the request ended: finish_reason, the first words of the error, or "cancelled" by this client."""
    inputs = {"text_input": f"Count from {index % 50} to {index % 50 + 20}.", "seed": index, "max_tokens": max_tokens}
    inputs["stream"] = kind != "whole"
    if kind == "cancelled":
        inputs |= {"max_tokens": 3000, "sampling_parameters": json.dumps({"ignore_eos": True, "confidence_threshold": 0})}
    if kind == "malformed":
        inputs = MALFORMED[index % len(MALFORMED)]

    async def requests():
        yield {"model_name": MODEL_NAME, "inputs": tensors(**inputs), "request_id": str(index)}

    responses = client.stream_infer(requests())
    if kind == "cancelled":
        return await cancelled(responses, wait_s=chance)
    reasons = []
    try:
        async for result, error in responses:
            if error is not None:
                assert f"[request id: {index}]" in error.message()
                reasons.append("error")
            elif reason := result.as_numpy("finish_reason")[0].decode():
                reasons.append(reason)
    except InferenceServerException as error:
        reasons.append(f"broken stream: {error.message()}")
    return " and ".join(reasons) or "nothing"


async def cancelled(responses, wait_s: float) -> str:
    """Reads for a while, then cancels the call."""

    async def read() -> str:
        async for _, error in responses:
            if error is not None:
                return f"error: {error.message()}"
        return "ended before"

    reading = asyncio.create_task(read())
    done, _ = await asyncio.wait([reading], timeout=wait_s)
    if done:
        return reading.result()
    responses.cancel()
    try:
        return await reading
    except (asyncio.CancelledError, InferenceServerException):
        return "cancelled"


def after_load(server: TritonServer, ended: dict[str, int]) -> dict:
    """What the server says once it has seen every client go."""

    def counted() -> dict[str, float]:
        outcomes = ("success", "cancelled", "rejected", "failed")
        series = 'diffusiongemma_requests_total{{instance="diffusiongemma_0_0",model="diffusiongemma",outcome="{}"}}'
        return {outcome: metrics(server.metrics_url, series.format(outcome)) for outcome in outcomes}

    gauges = ("active_requests", "queued_requests", "kv_pages_used")
    until_s = time.monotonic() + 10
    while sum(counted().values()) < sum(ended.values()) and time.monotonic() < until_s:
        time.sleep(0.1)
    time.sleep(0.5)  # gauges follow within two reports
    return {
        "counted": counted(),
        **{gauge: metrics(server.metrics_url, f"diffusiongemma_{gauge}") for gauge in gauges},
    }


def shared_memory() -> list[str]:
    """What is there, but for the regions of servers like this one, which may start and stop meanwhile."""
    return sorted(path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("diffusiongemma_server_"))


def memory_of(server: TritonServer) -> dict[str, int]:
    """MiB that are resident."""
    pids = {"stub": stubs(server)[0], "worker": engine_workers(server)[0], "server": server.pid}
    return {name: resident_bytes(pid) >> 20 for name, pid in pids.items()}


def found_problems(result: dict, num_requests: int) -> list[str]:
    expected = {
        "whole": ("stop", "length"),
        "streamed": ("stop", "length"),
        "cancelled": ("cancelled",),
        "malformed": ("error",),
    }
    problems = [
        f"{count} requests ended as {ending}"
        for ending, count in result["ended"].items()
        if ending.partition(": ")[2] not in expected[ending.partition(": ")[0]]
    ]
    ended, counted = result["ended"], result["counted"]
    answers = sum(count for ending, count in ended.items() if ending.startswith(("whole", "streamed")))
    # What is cancelled early enough never reaches the model.
    if counted["success"] != answers or counted["rejected"] != ended.get("malformed: error", 0) or counted["failed"]:
        problems.append(f"the server counted {counted}")
    if sum(ended.values()) != num_requests:
        problems.append(f"{sum(ended.values())} requests ended, not {num_requests}")
    for gauge in ("active_requests", "queued_requests", "kv_pages_used"):
        if result[gauge]:
            problems.append(f"{gauge} is {result[gauge]:g} when all is over")
    warm = result["memory"][len(result["memory"]) // 5 :]
    for name in warm[0]:
        if (growth := warm[-1][name] - warm[0][name]) > MAX_GROWTH_MIB:
            problems.append(f"the {name} grew by {growth} MiB")
    if result["processes_after_unload"]:
        problems.append(f"{result['processes_after_unload']} processes of the model are left after it was unloaded")
    if result["left"]:
        problems.append(f"left by the server: {result['left']}")
    if not result["shm_is_as_before"]:
        problems.append("/dev/shm is not as it was")
    return problems


if __name__ == "__main__":
    main()
