"""`python -m builder merge`: a checkpoint with a LoRA adapter merged into its weights, everything else as it was.

PEFT adapts the modules of transformers' model, where each layer is there twice: in the encoder, for the pass over a prompt, and
in the decoder, for the canvas. Their weights are one, their adapters are two. So a merged checkpoint has two weights where an
adapter has a part in either: the decoder's under the name that was there, the encoder's under its own.

1. Read the adapter, find the weight of each of its modules, and plan a file a layer, and one for the rest. 2. Write each that
no run before has written. 3. Write the index, check all. 4. Put the finished directory in place, in one rename.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from builder.adapter import CONFIG, TENSORS, LowRank, read_adapter
from builder.config import read_model_config
from builder.description import checked
from builder.errors import BuildError
from builder.rewriting import INDEX, Content, by_layer, carried, file_name, finite, index, reading, record, write_files
from builder.staging import real_place
from builder.unfinished import check_is_new, unfinished
from builder.weights import CAST_FROM, DECODER_LAYERS, ENCODER_LAYERS, of_decoder
from contract.checkpoint import Checkpoint
from contract.fingerprint import FileFingerprint
from contract.problems import in_few_lines


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A tensor that is written: made of the checkpoint's tensor `source`. added: None leaves its numbers."""

    source: str
    added: LowRank | None = None

    def read(self, tensors: Checkpoint) -> Tensor:
        weight = tensors.tensor(self.source)
        return weight if self.added is None else self.added.added_to(weight)


def merge_adapter(
    checkpoint: Path,
    adapter: Path,
    output: Path,
    *,
    console: Console | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes `output` from `checkpoint` and `adapter`. `console`: where the progress bar goes.

    Raises:
        BuildError, CheckpointError: see their messages; `output` is then as it was. Files that were finished stay beside it, in
            a hidden directory, for the next run.
    """
    # 1.
    model, tensors, place = read_model_config(checkpoint), Checkpoint(checkpoint), real_place(output)
    check_is_new(place)
    model, _ = checked(tensors, model)
    added = read_adapter(adapter)
    merged = plan(tensors, added)
    contents = by_layer(merged, model.num_layers)
    files = {file_name(number, len(contents)): names for number, (_, names) in enumerate(contents, 1)}
    own = merged.keys() - tensors.names()
    own_bytes = sum(tensors.extent(merged[name].source).num_bytes for name in own)
    with reading(adapter):
        of_adapter = {
            CONFIG: json.loads((adapter / CONFIG).read_bytes()),
            TENSORS: FileFingerprint.of(adapter / TENSORS).model_dump(),
        }
    with unfinished(place, record(tensors, model, adapter=of_adapter)) as written:
        found = {
            name: written.metadata(name, {each: tensors.shape(merged[each].source) for each in names})
            for name, names in files.items()
        }
        before = sum(metadata is not None for metadata in found.values())
        report(f"{checkpoint}: {len(files)} files to write, {before} of them written before")
        own_size = f"{len(own)} more are the encoder's own, {own_bytes / 1e6:,.1f} MB"
        report(f"adapter {adapter}: {len(added)} weights change; {own_size}")

        # 2.
        def make(name: str) -> Content:
            with reading(checkpoint):
                content = {each: finite(each, merged[each].read(tensors).contiguous()) for each in files[name]}
            return content, {"format": "pt"}

        write_files(written, found, make, title="merging", console=console)
        # 3.
        written.add(carried(checkpoint) | {INDEX: index(files, written.directory)})
        checked(Checkpoint(written.directory), read_model_config(written.directory))
        # 4.
        written.put_in_place()
    report(f"{output} written")


def plan(tensors: Checkpoint, added: Mapping[str, LowRank]) -> dict[str, Merged]:
    """By the names of the tensors that are written. A weight of a layer's decoder that is adapted leaves the encoder one as it
    was, and so does that of an encoder the decoder's.

    Raises:
        BuildError: a module's weight is not among the tensors, or of another shape or dtype; a line for each of the first.
    """
    merged, problems = {name: Merged(source=name) for name in tensors.names()}, []
    for module, low_rank in added.items():
        name = f"{module}.weight"
        source = of_decoder(name) if name.startswith(ENCODER_LAYERS) and name not in tensors.names() else name
        if source not in tensors.names():
            problems.append(f"{module}: adapted, but the checkpoint has no {source}; the adapter is another model's")
        elif tensors.shape(source) != low_rank.shape:
            got, expected = list(low_rank.shape), list(tensors.shape(source))
            problems.append(f"{module}: got a change of shape {got}, expected {expected}; the adapter is another model's")
        elif tensors.dtype(source) not in CAST_FROM:
            expected = f"one of {', '.join(CAST_FROM)}; merge before quantize"
            problems.append(f"{source}: got {tensors.dtype(source)}, expected {expected}")
        else:
            merged[name] = Merged(source=source, added=low_rank)
            encoders = name.replace(DECODER_LAYERS, ENCODER_LAYERS)
            merged.setdefault(encoders, Merged(source=source))
    if problems:
        raise BuildError(in_few_lines(tensors.directory, problems))
    return merged
