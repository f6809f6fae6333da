"""The Triton kernels at the real model's shapes on a GPU: checked against float32, then µs, TFLOP/s, GB/s and the memory floor.

The floor is each kernel's fewest bytes over the copy bandwidth measured in the same run. A time is that of one call among a few
in a CUDA graph, as in a denoising step; the calls take turns on enough copies of their inputs to find none in the cache.
With --sweep: other tiles, too, and the quickest of each case. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import command_line
import torch
import triton.testing
from kernel_tiles import arranged_tiles, attention_tiles, plain_tiles
from random_experts import EXPERTS, HIDDEN, WIDTH, expert_weights
from rich.console import Console
from rich.table import Table
from triton.runtime.errors import OutOfResources

from plugins.attention.hopper_launch import hopper_attention
from plugins.attention.launch import Tile as AttentionTile
from plugins.attention.launch import attention, choose_num_splits
from plugins.moe import four_bit_launch, launch, packed_launch
from plugins.moe.formats import Format
from plugins.moe.launch import Tile as ExpertsTile
from plugins.moe.launch import combine, route
from plugins.moe.packing import ROW_FACTOR
from plugins.triton_launch import HOPPER_CAPABILITY
from plugins.vocabulary.launch import vocabulary_pass

TOP_K, VOCAB, CANVAS = 8, 262_144, 256
MAX_RELATIVE_ERROR = 1e-2  # Frobenius norm; bfloat16 operands and one rounding of the result


UNCACHED_BYTES = 200e6  # of the inputs that calls take turns on: over three times the L2 of an H200


@dataclass(frozen=True, kw_only=True)
class Case:
    """`calls`: the same work on different copies of the inputs."""

    name: str
    calls: list[Callable[[], object]]
    flops: float
    bytes: float
    error: float = field(default=0.0)
    max_error: float = MAX_RELATIVE_ERROR


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


@cache
def experts_problem(rows: int, stored: Format | None) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The operator's inputs, and what to expect of the first 64 rows."""
    hidden = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    index = torch.rand(rows, EXPERTS, device="cuda").topk(TOP_K).indices
    top_k_weights = torch.rand(rows, TOP_K, device="cuda")
    weights, (gate_up, down) = expert_weights(stored)
    expected = torch.zeros(min(rows, 64), HIDDEN, device="cuda")
    for row, chosen in enumerate(index[:64].tolist()):
        for slot, expert in enumerate(chosen):
            gate, up = (gate_up[expert].float() @ hidden[row].float()).chunk(2)
            activated = torch.nn.functional.gelu(gate, approximate="tanh") * up
            expected[row] += top_k_weights[row, slot] * (down[expert].float() @ activated)
    return (hidden, index, top_k_weights, *weights), expected


def experts_case(rows: int, stored: Format | None, **options: ExpertsTile) -> Case:
    (hidden, index, weights, *projections), expected = experts_problem(rows, stored)
    launches = {None: launch, "packed": packed_launch, "int4": four_bit_launch, "nvfp4": four_bit_launch}[stored]
    dtype = () if stored == "packed" else (torch.bfloat16,)
    scaled = hidden * ROW_FACTOR if stored == "packed" else hidden  # rows are made ready where they are normed
    options = {"tile": launches.choose_tile(rows, TOP_K, EXPERTS, *dtype), **options}

    def run() -> torch.Tensor:
        routing = route(index, weights, EXPERTS, options["tile"])
        return combine(launches.weighted_rows(scaled, routing, *projections, **options), TOP_K).run()[0]

    weights_bytes = index.unique().numel() * sum(each[0].nbytes for each in projections)
    return Case(
        name=f"experts, {rows} rows" + (f", {stored}" if stored else ""),
        calls=[run] * 4,
        flops=rows * TOP_K * 6 * WIDTH * HIDDEN,
        bytes=weights_bytes + 2 * 2 * rows * HIDDEN,
        error=relative_error(run()[:64], expected),
    )


@cache
def attention_problem(
    batch: int, prefix: int, kv_heads: int, head_dim: int, window: int, heads: int
) -> tuple[list[tuple[torch.Tensor, ...]], int, torch.Tensor]:
    """The operator's inputs, a few times; the cached keys that a row sees; what to expect of the first sequence."""
    page_size, length = 32, CANVAS
    columns = -(-prefix // page_size)
    seen = min(prefix, window - 1) if window else prefix
    copies = int(min(12, UNCACHED_BYTES // (4 * batch * (seen + length) * kv_heads * head_dim) + 1))
    problems = []
    for _ in range(copies):
        query = torch.randn(batch * length, heads, head_dim, dtype=torch.bfloat16, device="cuda") * head_dim**-0.5
        new_kv = torch.randn(batch * length, 2, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
        pages = torch.randn(batch * columns, page_size, 2, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
        table = torch.randperm(batch * columns, device="cuda").view(batch, columns).int()
        prefixes = torch.full((batch,), prefix, dtype=torch.int32, device="cuda")
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length
        blocks = torch.full((batch * length,), -1, dtype=torch.int32, device="cuda")
        problems.append((query, new_kv, pages, table, prefixes, starts, blocks))
    query, new_kv, pages, table, *_ = problems[0]
    kv = torch.cat([pages[table[0].long()].flatten(0, 1)[prefix - seen : prefix], new_kv[:length]]).float()
    key, value = (each.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for each in (kv[:, 0], kv[:, 1]))
    expected = ((query[:length].float().transpose(0, 1) @ key.transpose(1, 2)).softmax(-1) @ value).transpose(0, 1)
    return problems, seen, expected


def attention_case(
    batch: int,
    prefix: int,
    *,
    kv_heads: int,
    head_dim: int,
    window: int,
    heads: int = 16,
    hopper: bool = False,
    tile: AttentionTile | None = None,
    num_splits: int | None = None,
) -> Case:
    problems, seen, expected = attention_problem(batch, prefix, kv_heads, head_dim, window, heads)
    num_multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = num_splits or choose_num_splits(problems[0], window, num_multiprocessors)
    if hopper:
        calls = [partial(hopper_attention, problem, False, window, splits, tile) for problem in problems]
    else:
        calls = [partial(attention, *problem, False, window, num_splits=splits, tile=tile) for problem in problems]
    return Case(
        name=f"attention {head_dim}, batch {batch}, prefix {prefix}, {splits} splits" + ", for Hopper" * hopper,
        calls=calls,
        flops=4 * batch * heads * CANVAS * (seen + CANVAS) * head_dim,
        bytes=2 * batch * (2 * CANVAS * heads * head_dim + 2 * (seen + CANVAS) * kv_heads * head_dim),
        error=relative_error(calls[0]()[:CANVAS], expected),
    )


def vocabulary_case(rows: int) -> Case:
    logits = (torch.randn(rows, VOCAB, device="cuda") * 6).bfloat16()
    each = torch.arange(rows, device="cuda")
    arguments = {
        "temperature": torch.full((rows,), 0.6, device="cuda"),
        "greedy": torch.zeros(rows, dtype=torch.bool, device="cuda"),
        "seeds": each * 977,
        "canvas_indices": each * 0,
        "steps": each * 0,
        "positions": each,
    }
    processed = 30 * torch.tanh(logits.float() / 30) / 0.6
    entropy = torch.distributions.Categorical(logits=processed).entropy()
    result = vocabulary_pass(logits, cap=30.0, **arguments)
    assert torch.equal(result.argmax, processed.argmax(-1)), "argmax differs"
    return Case(
        name=f"vocabulary pass, {rows} rows",
        calls=[partial(vocabulary_pass, logits, cap=30.0, **arguments)] * 4,
        flops=0,
        bytes=2 * rows * VOCAB,
        error=relative_error(result.entropy, entropy),
    )


def seconds_a_call(case: Case) -> float:
    """The median of 11 replays of all calls."""
    for call in case.calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in case.calls:
            call()
    times = []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e-3 * begin.elapsed_time(end))
    return statistics.median(times[2:]) / len(case.calls)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a 4 GB copy."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * triton.testing.do_bench(lambda: target.copy_(source), return_mode="median"))


Maker = Callable[..., Case]
OtherTiles = Callable[[Maker], Iterator[dict[str, object]]]


def makers() -> Iterator[Maker]:
    """A maker of each case, with the tiles that the product chooses."""
    for rows in (256, 512, 1024, 2048, 4096, 8192, 16384):
        for stored in (None, "packed", "int4", "nvfp4"):
            yield partial(experts_case, rows, stored)
    for batch, prefix in ((1, 512), (1, 8192), (1, 65536), (4, 8192), (16, 2048)):
        for hopper in (False, True) if torch.cuda.get_device_capability() == HOPPER_CAPABILITY else (False,):
            yield partial(attention_case, batch, prefix, kv_heads=8, head_dim=256, window=1024, hopper=hopper)
            yield partial(attention_case, batch, prefix, kv_heads=2, head_dim=512, window=0, hopper=hopper)
    for rows in (256, 1024):
        yield partial(vocabulary_case, rows)


def other_tiles(maker: Maker) -> Iterator[dict[str, object]]:
    """Options to try instead."""
    if maker.func is experts_case:
        num_rows, stored = maker.args
        for tile in arranged_tiles(num_rows) if stored else plain_tiles(num_rows):
            yield {"tile": tile, "down_tile": tile}
    elif maker.func is attention_case:
        for tile in attention_tiles(maker.keywords["head_dim"], maker.keywords["hopper"]):
            for num_splits in (1, 2, 3, 4) if maker.args[0] == 1 else (1, 2):
                yield {"tile": tile, "num_splits": num_splits}


def measured(case: Case, bandwidth: float) -> dict[str, object]:
    """The record of a case: its error and, where that is small, its times."""
    right = case.error <= case.max_error
    record = {"kernel": case.name, "error": float(f"{case.error:.3g}"), "right": right}
    if right:
        seconds, floor = seconds_a_call(case), case.bytes / bandwidth
        record |= {
            "us": round(1e6 * seconds, 1),
            "tflops": round(case.flops / seconds / 1e12, 1),
            "gb_per_s": round(case.bytes / seconds / 1e9),
            "floor_us": round(1e6 * floor, 1),
            "ratio": round(seconds / floor, 2),
        }
    return record


def sweep(maker: Maker, other_tiles: OtherTiles, bandwidth: float, until: float) -> list[dict[str, object]]:
    """Records of other tiles, quickest first; a tile that takes more shared memory than there is is told and left out."""
    records = []
    for options in other_tiles(maker):
        if time.monotonic() > until:
            print("out of time")
            break
        try:
            record = measured(maker(**options), bandwidth) | {"options": str(options)}
        except OutOfResources as error:
            print(options, error)
            continue
        print(record["kernel"], record.get("us"), record["options"], flush=True)
        records.append(record)
    return sorted(records, key=lambda record: record.get("us", float("inf")))


def main() -> None:
    benchmark("kernels", __doc__, makers(), other_tiles, (experts_problem, attention_problem))


def benchmark(
    name: str, about: str, makers: Iterable[Maker], other_tiles: OtherTiles, problems: Sequence[Callable[..., object]]
) -> None:
    """The command line: measures what the makers make. `problems`: caches to empty after each."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="try other tiles, too")
    parser.add_argument("--sweep-seconds", type=float, default=120, help="begin no other tile after them; %(default)s")
    options = parser.parse_args()
    command_line.need_cuda()
    torch.manual_seed(0)
    bandwidth, until = copy_bandwidth(), time.monotonic() + options.sweep_seconds

    table = Table("kernel", "µs", "TFLOP/s", "GB/s", "floor µs", "x floor", "error", title=torch.cuda.get_device_name())
    records, quickest = [], []
    for maker in makers:
        record = measured(maker(), bandwidth)
        records.append(record)
        row = [record.get(key, "-") for key in ("us", "tflops", "gb_per_s", "floor_us", "ratio")]
        table.add_row(record["kernel"], *map(str, row), f"{record['error']:.1e}" + ("" if record["right"] else " WRONG"))
        if options.sweep:
            quickest += sweep(maker, other_tiles, bandwidth, until)[:1]
        for problem in problems:
            problem.cache_clear()
        torch.cuda.empty_cache()
    Console(width=130).print(table)
    for record in quickest:
        print("quickest:", record["kernel"], record.get("us"), record["options"])
    device, copy_gb_per_s = torch.cuda.get_device_name(), round(bandwidth / 1e9)
    facts = {"benchmark": name, "device": device, "copy_gb_per_s": copy_gb_per_s, "torch": torch.__version__}
    print(json.dumps(facts | {"results": records, "quickest": quickest}))
    if not all(record["right"] for record in records + quickest):
        raise SystemExit("some results are wrong")


if __name__ == "__main__":
    main()
