"""The Triton kernels at the real model's shapes on a GPU: checked against float32, then µs, TFLOP/s, GB/s and the memory floor.

The floor is each kernel's fewest bytes over the copy bandwidth measured in the same run. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton.testing
from rich.console import Console
from rich.table import Table

from plugins.attention.launch import attention, choose_num_splits
from plugins.moe.launch import experts
from plugins.vocabulary.launch import vocabulary_pass

HIDDEN, WIDTH, EXPERTS, TOP_K, VOCAB, CANVAS = 2816, 704, 128, 8, 262_144, 256
MAX_RELATIVE_ERROR = 1e-2  # Frobenius norm; bfloat16 operands and one rounding of the result


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    run: Callable[[], object]
    flops: float
    bytes: float
    error: float = field(default=0.0)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def experts_case(rows: int) -> Case:
    hidden = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    index = torch.rand(rows, EXPERTS, device="cuda").topk(TOP_K).indices
    weights = torch.rand(rows, TOP_K, device="cuda")
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, dtype=torch.bfloat16, device="cuda") * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=torch.bfloat16, device="cuda") * WIDTH**-0.5
    checked = slice(0, min(rows, 64))
    expected = torch.zeros(hidden[checked].shape, device="cuda")
    for slot in range(TOP_K):
        for row in range(checked.stop):
            expert = index[row, slot]
            gate, up = (gate_up[expert].float() @ hidden[row].float()).chunk(2)
            activated = torch.nn.functional.gelu(gate, approximate="tanh") * up
            expected[row] += weights[row, slot] * (down[expert].float() @ activated)
    result = experts(hidden, index, weights, gate_up, down)
    hit = index.unique().numel()
    return Case(
        name=f"experts, {rows} rows",
        run=lambda: experts(hidden, index, weights, gate_up, down),
        flops=rows * TOP_K * 6 * WIDTH * HIDDEN,
        bytes=2 * (hit * 3 * WIDTH * HIDDEN + 2 * rows * HIDDEN),
        error=relative_error(result[checked], expected),
    )


def attention_case(batch: int, prefix: int, *, kv_heads: int, head_dim: int, window: int, heads: int = 16) -> Case:
    page_size, length = 32, CANVAS
    columns = -(-prefix // page_size)
    query = torch.randn(batch * length, heads, head_dim, dtype=torch.bfloat16, device="cuda") * head_dim**-0.5
    new_kv = torch.randn(batch * length, 2, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    pages = torch.randn(batch * columns, page_size, 2, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(batch * columns, device="cuda").view(batch, columns).int()
    prefixes = torch.full((batch,), prefix, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length
    blocks = torch.full((batch * length,), -1, dtype=torch.int32, device="cuda")
    inputs = (query, new_kv, pages, table, prefixes, starts, blocks)
    splits = choose_num_splits(inputs, window, torch.cuda.get_device_properties(0).multi_processor_count)
    seen = min(prefix, window - 1) if window else prefix
    kv = torch.cat([pages[table[0].long()].flatten(0, 1)[prefix - seen : prefix], new_kv[:length]]).float()
    key, value = (each.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for each in (kv[:, 0], kv[:, 1]))
    expected = ((query[:length].float().transpose(0, 1) @ key.transpose(1, 2)).softmax(-1) @ value).transpose(0, 1)
    result = attention(*inputs, False, window, num_splits=splits)
    return Case(
        name=f"attention {head_dim}, batch {batch}, prefix {prefix}, {splits} splits",
        run=lambda: attention(*inputs, False, window, num_splits=splits),
        flops=4 * batch * heads * length * (seen + length) * head_dim,
        bytes=2 * batch * (2 * length * heads * head_dim + 2 * (seen + length) * kv_heads * head_dim),
        error=relative_error(result[:length], expected),
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
        run=lambda: vocabulary_pass(logits, cap=30.0, **arguments),
        flops=0,
        bytes=2 * rows * VOCAB,
        error=relative_error(result.entropy, entropy),
    )


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a 4 GB copy."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * triton.testing.do_bench(lambda: target.copy_(source), return_mode="median"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    makers = [lambda rows=rows: experts_case(rows) for rows in (256, 1024, 2048, 4096, 8192, 16384)]
    for batch, prefix in ((1, 512), (1, 8192), (1, 65536), (4, 8192), (16, 2048)):
        makers.append(lambda b=batch, p=prefix: attention_case(b, p, kv_heads=8, head_dim=256, window=1024))
        makers.append(lambda b=batch, p=prefix: attention_case(b, p, kv_heads=2, head_dim=512, window=0))
    makers += [lambda rows=rows: vocabulary_case(rows) for rows in (256, 1024)]

    table = Table("kernel", "µs", "TFLOP/s", "GB/s", "floor µs", "x floor", "error", title=torch.cuda.get_device_name())
    records = []
    for make in makers:
        case = make()
        right = case.error <= MAX_RELATIVE_ERROR
        record = {"kernel": case.name, "error": float(f"{case.error:.3g}"), "right": right}
        if right:
            seconds = 1e-3 * triton.testing.do_bench(case.run, return_mode="median")
            floor = case.bytes / bandwidth
            record |= {
                "us": round(1e6 * seconds, 1),
                "tflops": round(case.flops / seconds / 1e12, 1),
                "gb_per_s": round(case.bytes / seconds / 1e9),
                "floor_us": round(1e6 * floor, 1),
                "ratio": round(seconds / floor, 2),
            }
        records.append(record)
        row = [record.get(key, "-") for key in ("us", "tflops", "gb_per_s", "floor_us", "ratio")]
        table.add_row(case.name, *map(str, row), f"{case.error:.1e}" + ("" if right else " WRONG"))
        del case
        torch.cuda.empty_cache()
    Console(width=130).print(table)
    print(
        json.dumps(
            {"benchmark": "kernels", "copy_gb_per_s": round(bandwidth / 1e9), "torch": torch.__version__, "results": records}
        )
    )
    if not all(record["right"] for record in records):
        raise SystemExit("some results are wrong")


if __name__ == "__main__":
    main()
