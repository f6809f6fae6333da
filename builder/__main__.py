"""`python -m builder`: build an engine directory from a checkpoint, say what is in one; quantize a checkpoint, or merge an
adapter into one."""

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from builder.build import build_engine, write_manifest
from builder.errors import BuildError
from builder.merge import merge_adapter
from builder.quantize import PROJECTIONS, quantize_checkpoint
from contract.checkpoint import CheckpointError
from contract.manifest import BuildConfig, ManifestError, read_manifest
from contract.model_config import INT32_MAX
from contract.problems import printable
from contract.standard_streams import standard_streams

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_DEFAULTS = {name: field.default for name, field in BuildConfig.model_fields.items()}
_PageSize = Annotated[int, typer.Option(min=1, max=INT32_MAX, help="Tokens a KV page.")]
_MaxEncodeTokens = Annotated[int, typer.Option(min=1, max=INT32_MAX, help="Tokens one encode pass may take.")]
_MaxSequences = Annotated[int, typer.Option(min=1, max=INT32_MAX, help="Sequences one denoising step may take.")]
_MaxHeadRows = Annotated[int, typer.Option(min=1, max=INT32_MAX, help="Rows one head pass may take.")]
_ExpertGpus = Annotated[
    int, typer.Option(min=1, max=INT32_MAX, help="GPUs that share the experts of each layer; all else is on the first.")
]


class TargetOption(str, Enum):
    auto = "auto"
    tensorrt = "tensorrt"
    inductor = "inductor"


class DtypeOption(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class DeviceOption(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WeightsOption(str, Enum):
    auto = "auto"
    plain = "plain"
    packed = "packed"
    int4 = "int4"


class ActivationsOption(str, Enum):
    full = "full"
    float8 = "float8"


@app.command()
def build(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a Hugging Face checkpoint.")],
    engine: Annotated[Path, typer.Argument(help="Engine directory to write; an older engine of CHECKPOINT is replaced.")],
    target: Annotated[
        TargetOption, typer.Option(help="auto picks what this machine can build and says why.")
    ] = TargetOption.auto,
    dtype: Annotated[DtypeOption, typer.Option(help="Of weights, activations and KV pages; auto is the checkpoint's.")] = (
        DtypeOption.auto
    ),
    device: Annotated[DeviceOption, typer.Option(help="Where the engine runs; auto is the GPU where there is one.")] = (
        DeviceOption.auto
    ),
    page_size: _PageSize = _DEFAULTS["page_size"],
    max_encode_tokens: _MaxEncodeTokens = _DEFAULTS["max_encode_tokens"],
    max_sequences: _MaxSequences = _DEFAULTS["max_sequences"],
    expert_activations: Annotated[
        ActivationsOption, typer.Option(help="What FP8 experts multiply: full precision, or float8 with a scale for each row.")
    ] = ActivationsOption.full,
    expert_weights: Annotated[
        WeightsOption,
        typer.Option(
            help="How the experts' bfloat16 weights are bound. packed: in 12 bits each, exact but near 0; int4: rounded to 4 "
            "bits, a scale for 32; auto is plain or packed, and says why."
        ),
    ] = WeightsOption.auto,
    max_head_rows: _MaxHeadRows = _DEFAULTS["max_head_rows"],
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="On a GPU, a request gets the same tokens alone and among others, bit for bit."),
    ] = False,
    expert_gpus: _ExpertGpus = _DEFAULTS["expert_gpus"],
    keep_onnx: Annotated[bool, typer.Option("--keep-onnx", help="Also write each program as ONNX, without weights.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT's timings; default: a file beside ENGINE.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build even if ENGINE is up to date or of another checkpoint.")
    ] = False,
) -> None:
    """Build ENGINE from CHECKPOINT. Safe to run again: it does nothing when the engine is up to date."""
    console, started = Console(), time.monotonic()
    try:
        with console.status("reading the checkpoint") as status:

            def report(line: str) -> None:
                line = escape(line)  # paths may have brackets
                console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {line}", highlight=False, soft_wrap=True)
                status.update(line)

            build_engine(
                checkpoint,
                engine,
                target=target.value,
                dtype=dtype.value,
                device=device.value,
                expert_weights=expert_weights.value,
                keep_onnx=keep_onnx,
                timing_cache=timing_cache,
                force=force,
                console=console,
                report=report,
                page_size=page_size,
                max_encode_tokens=max_encode_tokens,
                max_sequences=max_sequences,
                max_head_rows=max_head_rows,
                expert_activations=expert_activations.value,
                batch_invariant=batch_invariant,
                expert_gpus=expert_gpus,
            )
    except (BuildError, CheckpointError) as error:
        _fail(error)


@app.command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a Hugging Face checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; a run that was cut off is continued.")],
) -> None:
    """Write OUTPUT, a checkpoint like CHECKPOINT with the experts' weights in FP8, and print the error of every layer. Experts
    that are in FP8 or NVFP4 keep their numbers."""
    with _rewriting() as (console, report):
        errors = quantize_checkpoint(checkpoint, output, console=console, report=report)
        if any(error for of_layer in errors.values() for error in of_layer.values()):
            table = Table("layer", *PROJECTIONS, title="error of the weights, relative to their norm", title_justify="left")
            for layer, of_layer in sorted(errors.items()):
                table.add_row(str(layer), *(f"{of_layer[projection]:.4f}" for projection in PROJECTIONS))
            console.print(table)


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a Hugging Face checkpoint.")],
    adapter: Annotated[Path, typer.Argument(help="Directory of a LoRA adapter, as PEFT saves it.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; a run that was cut off is continued.")],
) -> None:
    """Write OUTPUT, a checkpoint like CHECKPOINT with ADAPTER merged into its weights."""
    with _rewriting() as (console, report):
        merge_adapter(checkpoint, adapter, output, console=console, report=report)


@app.command()
def manifest(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a Hugging Face checkpoint; config.json is enough.")],
    engine: Annotated[Path, typer.Argument(help="Directory to write.")],
    dtype: Annotated[DtypeOption, typer.Option(help="Of weights, activations and KV pages; auto is the checkpoint's.")] = (
        DtypeOption.auto
    ),
    page_size: _PageSize = _DEFAULTS["page_size"],
    max_encode_tokens: _MaxEncodeTokens = _DEFAULTS["max_encode_tokens"],
    max_sequences: _MaxSequences = _DEFAULTS["max_sequences"],
    expert_weights: Annotated[
        WeightsOption, typer.Option(help="packed: the experts' bfloat16 weights in 12 bits each; int4: in 4.5; auto is plain.")
    ] = WeightsOption.auto,
    expert_gpus: _ExpertGpus = _DEFAULTS["expert_gpus"],
) -> None:
    """Write the manifest of ENGINE and no programs: what `python -m backend plan` needs, in seconds."""
    try:
        write_manifest(
            checkpoint,
            engine,
            dtype=dtype.value,
            report=typer.echo,
            page_size=page_size,
            max_encode_tokens=max_encode_tokens,
            max_sequences=max_sequences,
            expert_weights=expert_weights.value,
            expert_gpus=expert_gpus,
        )
    except (BuildError, CheckpointError, ManifestError) as error:
        _fail(error)


@app.command()
def inspect(engine: Annotated[Path, typer.Argument(help="Engine directory.")]) -> None:
    """Print what ENGINE was built from and every binding of its programs."""
    try:
        manifest = read_manifest(engine)
    except ManifestError as error:
        _fail(error)
    console = Console()
    weight_bytes = sum(_num_elements(each.shape) * getattr(torch, each.dtype).itemsize for each in manifest.weights.values())
    facts = Table("engine", escape(str(engine)), title_justify="left")
    facts.add_row("target, dtype", f"{manifest.build.target}, {manifest.build.dtype}")
    facts.add_row("device", str(manifest.gpu or manifest.build.device))
    files = ", ".join(manifest.checkpoint.files) or "no weights: made from config.json alone"
    facts.add_row("checkpoint", escape(f"{manifest.checkpoint.path} ({files})"))
    facts.add_row("weights", f"{len(manifest.weights)} tensors, {weight_bytes / 1e6:,.1f} MB, inputs of the programs")
    layers = Counter(manifest.model.layer_types)
    facts.add_row("layers", f"{manifest.model.num_layers}: {', '.join(f'{count} {kind}' for kind, count in layers.items())}")
    facts.add_row("canvas, vocabulary", f"{manifest.model.canvas_length}, {manifest.model.vocab_size}")
    choices = manifest.build.model_dump(exclude={"target", "dtype", "device"})
    facts.add_row("built for", ", ".join(f"{name} {value}" for name, value in choices.items()))
    facts.add_row("built with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()))
    console.print(facts)
    for program in manifest.programs.values():
        table = Table(
            "binding", "dtype", "shape", title=f"{program.file} ({len(program.weights)} weights)", title_justify="left"
        )
        for binding in program.inputs:
            table.add_row(binding.name, binding.dtype, " x ".join(str(size) for size in binding.shape))
        table.add_section()
        for binding in program.outputs:
            table.add_row(binding.name, binding.dtype, " x ".join(str(size) for size in binding.shape))
        console.print(table)
        for profile in program.profiles:
            console.print(f"profile {profile}", highlight=False)


@contextmanager
def _rewriting() -> Iterator[tuple[Console, Callable[[str], None]]]:
    """What writes a checkpoint is given; tells how long it took, or what is wrong."""
    console, started = Console(), time.monotonic()
    try:
        yield console, lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)
    except (BuildError, CheckpointError) as error:
        _fail(error)
    console.print(f"{time.monotonic() - started:.1f} s", highlight=False)


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _fail(error: Exception) -> None:
    """One line a problem on standard error; exit status 1."""
    for line in [str(error)] if isinstance(error, ManifestError) else str(error).split("\n"):
        typer.echo(f"error: {printable(line)}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """The command line. SIGTERM, and a terminal that is closed, end it like an error does, so that what is half written is
    removed; under nohup it goes on."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    with standard_streams():
        app()


if __name__ == "__main__":
    main()
