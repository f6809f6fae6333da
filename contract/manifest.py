"""`manifest.json` of an engine directory: everything that the runtime knows about the engine.

engines/<name>/
  manifest.json          this record, with size and SHA-256 of every program's file
  <program>.<suffix>     the compiled programs of the target
  operators.so           operators in C++ that programs for the CPU call, in float32
  tokenizer.json …       copied from the checkpoint
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationError, model_validator

from contract.fingerprint import FileFingerprint
from contract.model_config import LayerType, ModelConfig, Record, Size
from contract.regular_file import regular
from contract.stored_file import StoredFile

FORMAT_VERSION = 3
FILE_NAME = "manifest.json"
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Files of the checkpoint that an engine directory carries along, where the checkpoint has them."""

DTYPES = frozenset(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float8_e4m3fn float8_e5m2 float16 bfloat16 float32 float64".split()
)
"""PyTorch's names. As names, because who only reads manifests, such as the process inside Triton, does without PyTorch."""

Target = Literal["tensorrt", "inductor"]
"""tensorrt: plans for Hopper. inductor: AOTInductor packages."""


class ManifestError(Exception):
    """An engine directory that cannot be used: what, got, expected, remedy."""


def _is_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError("none of PyTorch's dtypes")
    return name


Dtype = Annotated[str, AfterValidator(_is_dtype)]


class Binding(Record):
    """One input or output of a program: a fixed size, or the name of a size that varies with its minimum and maximum."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class Profile(Record):
    """What one optimization profile of a TensorRT plan takes: (least, likely, most) of every size that varies."""

    name: str
    sizes: dict[str, tuple[int, int, int]]

    def shapes(self, binding: Binding) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The binding's least, likely and most shape."""
        least, likely, most = (
            tuple(size if isinstance(size, int) else self.sizes[size][which] for size in binding.shape) for which in range(3)
        )
        return least, likely, most

    def __str__(self) -> str:
        ranges = (f"{name} {least}" + f"..{most}" * (most > least) for name, (least, _, most) in self.sizes.items())
        return f"{self.name}: {', '.join(ranges)}"


class Variant(Record):
    """Another file of a program, compiled for sizes of the first input's first axis from `minimum` on."""

    minimum: int
    file: str


class Program(Record):
    """One compiled program. It is called with the tensors of `inputs`, then of `weights`, in this order.

    profiles: of a TensorRT plan, in its order; empty for other targets, which take every size up to the build's limits.
    variants: files that are better from some size on, ascending; below the first of them, `file`.
    """

    file: str
    inputs: tuple[Binding, ...]
    weights: tuple[str, ...]
    outputs: tuple[Binding, ...]
    profiles: tuple[Profile, ...] = ()
    variants: tuple[Variant, ...] = ()


class Arrangement(Record):
    """In which format and order the weight of a layer's experts is bound: see `plugins.moe.formats`.

    halves: 1, its rows follow each other; 2, the rows of its two halves do, in turns.
    """

    format: Literal["packed", "int4", "nvfp4", "wide", "narrow"]
    halves: Literal[1, 2]


class Part(Record):
    """Of a tensor that is divided evenly along its first axis: part `number` of `of`, for the GPU of that number."""

    number: int
    of: Size


class Weight(Record):
    """Where a weight binding comes from: one checkpoint tensor or a part of one, or several one after the other along the first
    axis; and what is done with them at load: nothing, or they are cast to the engine's dtype, or arranged."""

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Dtype
    transform: Literal["none", "cast", "arrange"]
    arrangement: Arrangement | None = None
    part: Part | None = None


class Checkpoint(Record):
    """The checkpoint that the engine was built from; the path is relative to the engine directory."""

    path: str
    files: dict[str, FileFingerprint]


Device = Literal["cpu", "cuda"]


ExpertActivations = Literal["full", "float8"]
ExpertWeights = Literal["plain", "packed", "int4"]


class Gpu(Record):
    """The GPU that programs were compiled on: they run on every GPU of its compute capability, (major, minor)."""

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability[0]}.{self.compute_capability[1]})"


class BuildConfig(Record):
    """The choices of a build.

    device: where the programs run. page_size: tokens a KV page. max_encode_tokens: tokens one encode pass may take (the chunk
    of a long prompt). max_sequences: sequences one denoising step may take. max_head_rows: rows one head pass may take.
    expert_activations: what experts with FP8 weights multiply them by: rows in full precision, or rounded to FP8 too.
    expert_weights: bfloat16 weights of experts as they are, packed into 12 bits each (`plugins.moe.packing`), or rounded to 4
        bits (`plugins.moe.int4`).
    batch_invariant: what a request gets does not depend, bit for bit, on others that are served with it
        (`plugins.batch_invariance`).
    expert_gpus: GPUs that share the experts of each layer; all else is on the first.
    """

    target: Target
    dtype: Literal["float32", "bfloat16"]
    device: Device = "cpu"
    page_size: Size = 32
    max_encode_tokens: Size = 2048
    max_sequences: Size = 64
    max_head_rows: Size = 2048
    expert_activations: ExpertActivations = "full"
    expert_weights: ExpertWeights = "plain"
    batch_invariant: bool = False
    expert_gpus: Size = 1


def mixes(model: ModelConfig, build: BuildConfig) -> bool:
    """Whether an engine has the program `mixed`, in which encode and denoise share one reading of the weights: where reading
    them is what takes the time, on a GPU; both passes must have the same. Plans cannot write into their inputs."""
    return build.device == "cuda" and build.target == "inductor" and not (build.batch_invariant or model.encoder_weights)


class Manifest(Record):
    """The engine directory's one record; see the module docstring.

    gpu: None where the programs run on the CPU. operators: the library of C++ operators that they call, if they do.
    files: by name, every file that the build compiled or wrote as ONNX.
    """

    format_version: int
    plugin_abi: int
    build: BuildConfig
    gpu: Gpu | None = None
    model: ModelConfig
    programs: dict[str, Program]
    operators: str | None = None
    files: dict[str, StoredFile]
    weights: dict[str, Weight]
    checkpoint: Checkpoint
    tools: dict[str, str]
    source_digest: str

    @model_validator(mode="after")
    def _check_files(self) -> "Manifest":
        if unknown := sorted(set(self.program_files) - self.files.keys()):
            raise ValueError(f"no size and SHA-256 of {', '.join(unknown)}")
        if unbound := sorted({name for each in self.programs.values() for name in each.weights} - self.weights.keys()):
            raise ValueError(f"nothing about the weight {unbound[0]}, which a program reads")
        return self

    @property
    def program_files(self) -> list[str]:
        """The files that are loaded: programs, their variants, the operators that they call."""
        programs = self.programs.values()
        files = [file for program in programs for file in (program.file, *(variant.file for variant in program.variants))]
        return files + ([self.operators] if self.operators else [])

    def weights_of(self, gpu: int) -> list[Weight]:
        """Those that are on a GPU, by number; all that no other has are on the first."""
        return [each for each in self.weights.values() if (each.part.number if each.part else 0) == gpu]

    @property
    def page_table_names(self) -> dict[LayerType, str]:
        return {layer_type: f"{layer_type}.page_table" for layer_type in self.model.attention}

    def write(self, directory: Path) -> None:
        (directory / FILE_NAME).write_text(self.model_dump_json(indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks `directory/manifest.json`.

    Raises:
        ManifestError: no manifest there, damaged, or written in another format version.
    """
    path = directory / FILE_NAME
    remedy = "build the engine with: python -m builder build CHECKPOINT ENGINE"
    try:
        text = regular(path).read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(f"{path}: no such file; expected an engine directory; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read ({error}); {remedy} --force") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ManifestError(
            f"{path}: not a manifest of format {FORMAT_VERSION} ({where or 'file'}: {first['msg']}); {remedy} --force"
        ) from None
    if manifest.format_version != FORMAT_VERSION:
        raise ManifestError(f"{path}: got format {manifest.format_version}, expected {FORMAT_VERSION}; {remedy} --force")
    return manifest
