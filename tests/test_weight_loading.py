"""Weights from files to where they are used: every byte once, whatever the readers do, and files that change are noticed."""

import io
import os

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from small_checkpoints import random_checkpoint

from backend import weights as binding
from backend.load_progress import bar, lines, show_progress
from backend.weight_lanes import CudaCopies, HostLane, StagedLane
from backend.weight_loading import Wanted, cut, load, reading
from backend.weights import bind_weights, transform_of
from builder.config import read_model_config
from builder.description import describe
from builder.weights import bindings, text_weights
from contract.checkpoint import Checkpoint, CheckpointError
from contract.manifest import BuildConfig, ManifestError, Weight

USUAL = reading("cpu")._asdict()
PIECE = 512
SHAPES = {
    "rows": (63, 17),
    "one long slice": (2, 257),
    "vector": (1,),
    "empty": (0, 4),
    "scalar": (),
    "experts": (5, 3, 7),
    "exact": (8, 32),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, torch.Tensor]:
    """bfloat16 tensors in two files, their names in both orders."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


@pytest.fixture
def checkpoint(stored, tmp_path) -> Checkpoint:
    names = sorted(stored)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({name: stored[name] for name in part}, tmp_path / f"model-{index}.safetensors")
    index = {"weight_map": {name: f"model-{names.index(name) % 2}.safetensors" for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    return Checkpoint(tmp_path)


def wanted(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Wanted]:
    """Every tensor, its target full of NaN."""
    transform = (
        None if dtype == torch.bfloat16 else transform_of(Weight(tensors=(), shape=(), dtype="float32", transform="cast"))
    )
    return {
        name: Wanted(
            extent=checkpoint.extent(name),
            stored=torch.bfloat16,
            target=torch.full(checkpoint.shape(name), float("nan"), dtype=dtype),
            transform=transform,
        )
        for name in checkpoint.names()
    }


class LateCopies:
    """A device that copies as late as it may: when it is waited for. What a reader overwrites before that is lost."""

    def staging(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def start(self, piece, staged):
        def arrive() -> None:
            data = piece.as_stored(staged)
            piece.target.copy_(data if piece.transform is None else piece.transform(data, piece.target.dtype))

        return arrive


LANES = {"host": HostLane, "staged": lambda most: StagedLane(most, LateCopies())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("num_readers", [1, 3])
@pytest.mark.parametrize("piece_bytes", [1, PIECE, 1 << 20])
def test_what_is_loaded_is_what_is_stored(piece_bytes, num_readers, lane, dtype, stored, checkpoint):
    asked, read = wanted(checkpoint, dtype), []
    load([*asked.values()], LANES[lane], num_readers=num_readers, piece_bytes=piece_bytes, advance=read.append)
    for name, tensor in stored.items():
        assert torch.equal(asked[name].target, tensor.to(dtype)), name
    assert sum(read) == sum(tensor.nbytes for tensor in stored.values())


def test_pieces_cover_the_files_once_and_in_order(checkpoint):
    pieces = cut([*wanted(checkpoint, torch.bfloat16).values()], PIECE)
    for path in sorted(checkpoint.directory.glob("*.safetensors")):
        own = [piece for piece in pieces if piece.path == path]
        starts, ends = [piece.offset for piece in own], [piece.offset + piece.num_bytes for piece in own]
        header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert [header_bytes, *ends] == [*starts, path.stat().st_size]
    assert max(piece.num_bytes for piece in pieces if piece.shape[0] > 1) <= PIECE
    assert [piece.shape for piece in pieces if piece.num_bytes > PIECE] == [(1, 257), (1, 257)]


def test_slices_reach_a_transform_whole(checkpoint):
    """A transform may take rows together, and change what is behind the first axis."""
    extent = checkpoint.extent("experts")
    target = torch.empty(5, 3)
    each = Wanted(extent=extent, stored=torch.bfloat16, target=target, transform=lambda data, dtype: data.to(dtype).amax(-1))
    load([each], HostLane, num_readers=2, piece_bytes=1)
    assert torch.equal(target, checkpoint.tensor("experts").float().amax(-1))


def test_nothing_to_load():
    load([], HostLane, **USUAL)


# -- Files that are not as they should be


def test_a_file_that_ends_too_early(checkpoint):
    asked = [*wanted(checkpoint, torch.bfloat16).values()]
    path = checkpoint.directory / "model-1.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(
        CheckpointError, match=r"model-1\.safetensors: ends at byte \d+, expected at least \d+; it was truncated"
    ):
        load(asked, HostLane, num_readers=3, piece_bytes=PIECE)


def test_a_file_that_is_gone(checkpoint):
    asked = [*wanted(checkpoint, torch.bfloat16).values()]
    (checkpoint.directory / "model-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors: cannot be opened \(No such file or directory\)"):
        load(asked, HostLane, **USUAL)


def test_a_file_that_cannot_be_read(checkpoint, monkeypatch):
    def preadv(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("backend.weight_loading.os.preadv", preadv)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\); check the disk"):
        load([*wanted(checkpoint, torch.bfloat16).values()], HostLane, **USUAL)


def test_a_reader_that_fails_stops_the_others(checkpoint):
    class Failing(HostLane):
        def deliver(self, piece, buffer):
            raise RuntimeError("out of memory")

    read = []
    with pytest.raises(RuntimeError, match="out of memory"):
        load([*wanted(checkpoint, torch.bfloat16).values()], Failing, num_readers=2, piece_bytes=1, advance=read.append)
    assert read == []


# -- Binding


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("random"), max_shard_size="100KB")


def described(checkpoint, dtype: str):
    model, build = read_model_config(checkpoint), BuildConfig(target="inductor", dtype=dtype)
    return describe(model, build, Checkpoint(checkpoint), text_weights(model), checkpoint, checkpoint)


def test_on_the_cpu_weights_are_mapped_stacked_or_cast(random):
    tensors = Checkpoint(random)
    assert {tensors.dtype(name) for name in tensors.names()} == {"float32"}
    told = []

    def show(total_bytes):
        told.append(total_bytes)
        return lines(total_bytes, told.append)

    stored = bind_weights(described(random, "float32"), random, random, show)
    cast = bind_weights(described(random, "bfloat16"), random, random, show)
    names_of = bindings(text_weights(read_model_config(random)))
    stacked = sum(stored[name].nbytes for name, names in names_of.items() if len(names) > 1)
    assert told == [stacked, sum(tensor.nbytes for tensor in stored.values())]  # what is mapped is not read
    assert [*stored] == [*cast] == [*names_of]
    for name, tensor in stored.items():
        assert torch.equal(tensor, torch.cat([tensors.tensor(each) for each in names_of[name]]))
        assert torch.equal(cast[name], tensor.bfloat16())


def test_a_checkpoint_that_has_moved(random, tmp_path):
    manifest = described(random, "float32")
    record = manifest.checkpoint.model_copy(update={"path": "../models/../gone"})
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: no such directory; expected the checkpoint"):
        bind_weights(manifest, tmp_path / "engine", tmp_path / "loop")
    with pytest.raises(CheckpointError) as raised:
        bind_weights(manifest.model_copy(update={"checkpoint": record}), tmp_path / "engine")
    assert str(raised.value) == (
        f"{tmp_path / 'gone'}: no such directory; expected the checkpoint that engine {tmp_path / 'engine'} was built from; "
        f"move it back, or build again from where it is now: python -m builder build CHECKPOINT {tmp_path / 'engine'}"
    )


@pytest.mark.parametrize("change", [{"tensors": ()}, {"tensors": ("gone",)}, {"shape": (7,)}], ids=str)
def test_a_manifest_with_other_tensors_than_the_checkpoint(change, random, tmp_path):
    manifest = described(random, "float32")
    binding, weight = next(iter(manifest.weights.items()))
    weights = manifest.weights | {binding: weight.model_copy(update=change)}
    message = rf"manifest\.json: {binding}: got .*, which the checkpoint does not have; build the engine again"
    with pytest.raises(ManifestError, match=message):
        bind_weights(manifest.model_copy(update={"weights": weights}), tmp_path / "engine", random)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda path: os.utime(path), r"\d+ bytes"),
        (lambda path: path.unlink(), "no such file"),
        (
            lambda path: (path.rename(path.with_suffix(".old")), path.write_bytes(path.with_suffix(".old").read_bytes())),
            r"\d+ bytes",
        ),
    ],
    ids=["written", "gone", "replaced"],
)
def test_a_file_that_changes_while_it_is_loaded(change, got, monkeypatch, tmp_path):
    checkpoint = random_checkpoint(tmp_path, max_shard_size="100KB")
    path = sorted(checkpoint.glob("*.safetensors"))[1]

    def changing(*arguments, **options):
        load(*arguments, **options)
        change(path)

    monkeypatch.setattr(binding, "load", changing)
    message = rf"{path.name}: got {got}, expected the \d+ bytes that were there before; it changed while it was being loaded"
    with pytest.raises(CheckpointError, match=message):
        bind_weights(described(checkpoint, "bfloat16"), checkpoint, checkpoint, lambda total: lines(total, lambda line: None))


# -- Progress


def test_lines_tell_how_far_and_how_fast():
    told, times = [], iter([0.0, 2.0, 6.0, 7.0, 10.0])
    with lines(4_000_000_000, told.append, clock=lambda: next(times)) as advance:
        for _ in range(3):
            advance(1_000_000_000)
    assert told == ["weights: 2.0 of 4.0 GB, 0.33 GB/s", "weights: 4.00 GB in 10.0 s, 0.40 GB/s"]


def test_a_bar_on_a_terminal_has_gigabytes_a_second():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with bar(2_000_000_000, console) as advance:
        advance(1_000_000_000)
        advance(1_000_000_000)
    text = console.file.getvalue()
    assert "weights" in text and "2.0/2.0 GB" in text and "B/s" in text


def test_logs_get_lines_and_short_loads_none(monkeypatch, capsys):
    monkeypatch.setattr("backend.load_progress._REPORT_INTERVAL_S", 0.0)
    with show_progress(10_000_000_000) as advance:
        advance(5_000_000_000)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("weights: 5.0 of 10.0 GB, ")


# -- On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece_bytes", [1, PIECE, 1 << 20])
def test_to_a_gpu(piece_bytes, dtype, stored, checkpoint):
    asked = {
        name: Wanted(extent=each.extent, stored=each.stored, target=each.target.cuda(), transform=each.transform)
        for name, each in wanted(checkpoint, dtype).items()
    }
    after = torch.cuda.current_stream()
    load([*asked.values()], lambda most: StagedLane(most, CudaCopies([after])), num_readers=3, piece_bytes=piece_bytes)
    for name, tensor in stored.items():
        assert torch.equal(asked[name].target.cpu(), tensor.to(dtype)), name
