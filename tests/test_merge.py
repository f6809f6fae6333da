"""`python -m builder merge`: checkpoints with a LoRA adapter merged into them, against transformers with the adapter beside."""

import json
import re
from pathlib import Path

import pytest
import torch
from nvfp4_weights import nvfp4_checkpoint
from oracles import Oracle
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_checkpoints import random_checkpoint
from test_generation import RANDOM, expected_of, llm_of, prompt_of
from typer.testing import CliRunner

from backend import SamplingConfig
from builder.__main__ import app
from builder.config import read_model_config
from builder.errors import BuildError
from builder.merge import merge_adapter
from builder.quantize import quantize_checkpoint
from builder.weights import layer_prefix
from contract.checkpoint import Checkpoint

ATTENTION = r"layers\.\d+\.self_attn\.(q|v|o)_proj"
BOTH, DECODER = (rf"model\.{each}\.{ATTENTION}" for each in (r"(decoder|encoder\.language_model)", "decoder"))
LINEAR = r"model\.(decoder|encoder\.language_model)\.(layers\.\d+\.(self_attn|mlp|router)|self_conditioning)\.[a-z]+(_proj)?"
ADAPTERS = {
    "attention of both passes": {"target_modules": BOTH},
    "attention of the canvas alone": {"target_modules": DECODER},
    "every linear layer, ranks and alphas of their own": {
        "target_modules": rf"{LINEAR}",
        "exclude_modules": r".*\.router\.norm",
        "rank_pattern": {"q_proj": 2, r"^model\.decoder\.layers\.1\.mlp\.up_proj": 5},
        "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 1, "o_proj": 9},
    },
    "rank-stabilised": {"target_modules": BOTH, "use_rslora": True},
}
OF_HEAD = {"A": (3, 48), "B": (97, 3)}
NAME = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("merge") / "checkpoint", seed=8)


def adapted(checkpoint: Path, directory: Path, **choices) -> Oracle:
    """transformers with a random adapter, which is saved in `directory`."""
    oracle = Oracle(checkpoint)
    torch.manual_seed(0)
    model = get_peft_model(oracle.model, LoraConfig(**{"r": 3, "lora_alpha": 4, **choices}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # As in `random_checkpoint`: the path from step to step, at full strength, would make the network chaotic.
                size = 0.06 if "self_conditioning.down_proj" in name else 0.3
                parameter.copy_(size * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return oracle


@pytest.fixture(scope="module")
def adapter(checkpoint) -> Path:
    directory = checkpoint.parent / "adapter"
    adapted(checkpoint, directory, target_modules=BOTH)
    return directory


@pytest.mark.parametrize("kind", ADAPTERS)
def test_generations_are_those_of_the_adapted_model(kind, checkpoint, tmp_path):
    oracle = adapted(checkpoint, tmp_path / "adapter", **ADAPTERS[kind])
    merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    llm, prompt = llm_of(tmp_path / "merged"), prompt_of(33)
    expected = expected_of(oracle, prompt, seed=5)
    [result] = llm.generate([prompt], SamplingConfig(seed=5, **RANDOM))
    assert result.token_ids == expected.token_ids(max_tokens=40, ends=set())
    assert result.num_steps == expected.num_steps
    [before] = llm_of(checkpoint).generate([prompt], SamplingConfig(seed=5, **RANDOM))
    assert result.token_ids != before.token_ids


def test_nothing_else_changes_and_transformers_takes_it(checkpoint, adapter, tmp_path):
    output = tmp_path / "merged"
    shown = CliRunner().invoke(app, ["merge", str(checkpoint), str(adapter), str(output)])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"16 weights change; 8 more are the encoder's own, 0\.\d MB", shown.output.replace("\n", " "))
    before, after = Checkpoint(checkpoint), Checkpoint(output)
    changed = {name for name in before.names() if not torch.equal(before.tensor(name), after.tensor(name))}
    own = {name.replace("model.decoder.", "model.encoder.language_model.") for name in changed}
    assert len(changed) == 8 and after.names() == before.names() | own
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes()
    [result] = llm_of(output).generate([prompt_of(9)], SamplingConfig(seed=5, **RANDOM))
    expected = expected_of(Oracle(output), prompt_of(9), seed=5)  # which finds both weights, and does not tie them
    assert result.token_ids == expected.token_ids(max_tokens=40, ends=set())


def test_a_run_that_was_cut_off_is_continued(checkpoint, adapter, tmp_path, monkeypatch):
    from builder.unfinished import Unfinished

    written, save = [], Unfinished.save

    def save_two(self, name, *content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        save(self, name, *content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Unfinished, "save", save_two)
        merge_adapter(checkpoint, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lines: list[str] = []
    merge_adapter(checkpoint, adapter, tmp_path / "merged", report=lines.append)
    assert lines[0].endswith("4 files to write, 2 of them written before")
    with pytest.raises(BuildError, match="is there already"):
        merge_adapter(checkpoint, adapter, tmp_path / "merged")


def test_before_and_after_quantize(checkpoint, adapter, tmp_path):
    """The same, because what is adapted is not quantized."""
    merge_adapter(checkpoint, adapter, tmp_path / "merged")
    quantize_checkpoint(tmp_path / "merged", tmp_path / "after")
    quantize_checkpoint(checkpoint, tmp_path / "quantized")
    merge_adapter(tmp_path / "quantized", adapter, tmp_path / "before")
    after, before = Checkpoint(tmp_path / "after"), Checkpoint(tmp_path / "before")
    assert after.names() == before.names()
    for name in after.names():
        assert torch.equal(*(each.tensor(name).view(torch.uint8) for each in (after, before)))
    both = [f"{layer_prefix(1, encoder=encoder)}.self_attn.q_proj.weight" for encoder in (True, False)]
    assert not torch.equal(*(after.tensor(name) for name in both))
    assert read_model_config(tmp_path / "before") == read_model_config(tmp_path / "after")
    llm_of(tmp_path / "before").generate([prompt_of(9)], SamplingConfig(seed=5, **RANDOM))


def test_a_checkpoint_in_nvfp4_can_be_merged_into(adapter, tmp_path):
    checkpoint = random_checkpoint(tmp_path / "checkpoint", seed=8, moe_intermediate_size=32)
    quantize_checkpoint(nvfp4_checkpoint(checkpoint, tmp_path / "published"), tmp_path / "quantized")
    merge_adapter(tmp_path / "quantized", adapter, tmp_path / "merged")
    before, after = Checkpoint(tmp_path / "quantized"), Checkpoint(tmp_path / "merged")
    experts = f"{layer_prefix(1)}.experts.down_proj"
    assert before.dtype(experts) == "uint8" and torch.equal(after.tensor(experts), before.tensor(experts))
    llm_of(tmp_path / "merged").generate([prompt_of(9)], SamplingConfig(seed=5, **RANDOM))


def changed(adapter: Path, directory: Path, config: dict, tensors: dict) -> Path:
    """A copy of the adapter with other keys and tensors; None takes one away."""
    directory.mkdir()
    values = json.loads((adapter / "adapter_config.json").read_text()) | config
    (directory / "adapter_config.json").write_text(json.dumps(values))
    parts = load_file(adapter / "adapter_model.safetensors") | tensors
    save_file({name: each for name, each in parts.items() if each is not None}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, r"adapter_config.json: peft_type: got 'IA3': Input should be 'LORA'"),
        ({"use_dora": True}, {}, r"use_dora: got True, which merge does not know; merge this adapter with PEFT"),
        ({"bias": "all"}, {}, r"bias: got 'all', which merge does not know"),
        ({"target_parameters": ["experts.down_proj"]}, {}, r"target_parameters: got \['experts.down_proj'\]"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save: got"),
        ({"something_new": 3}, {}, r"something_new: got 3, which merge does not know"),
        ({"init_lora_weights": "pissa"}, {}, r"init_lora_weights: got 'pissa', which changes the checkpoint's own weights"),
        ({"rank_pattern": {"(": 2}}, {}, r"got the pattern '\(', expected a regular expression"),
        ({"r": 0}, {}, r"r: got 0"),
        ({"r": 4}, {}, r"got lora_A \[3, 48\] and lora_B \[\d+, 3\], expected rank 4 of both"),
        ({}, {NAME.replace("lora_A", "lora_B"): None}, r"got lora_A \[3, 48\] and lora_B None, expected rank 3"),
        ({}, {NAME: None}, r"got lora_A None and lora_B \[\d+, 3\], expected rank 3"),
        ({}, {NAME: torch.full((3, 48), torch.nan)}, r"safetensors: model.decoder.layers.0.self_attn.q_proj: has numbers that"),
        ({"lora_alpha": float("inf")}, {}, r"adapter_config.json: lora_alpha: got inf: Input should be a finite number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, {}, r"alpha_pattern.q_proj: got nan: Input should be a finite number"),
        ({}, {"x.weight": torch.zeros(1)}, r"adapter_model.safetensors: x.weight: got a tensor that is no part of a low rank"),
        ({}, {NAME: torch.zeros(3, 47)}, r"got a change of shape \[\d+, 47\], expected \[\d+, 48\]; the adapter is another"),
        (
            {},
            {
                f"base_model.model.lm_head.lora_{part}.weight": torch.zeros(shape)
                for part, shape in (("A", (3, 48)), ("B", (97, 3)))
            },
            r"lm_head: adapted, but the checkpoint has no lm_head.weight",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_what_merge_does_not_know_is_refused(config, tensors, message, checkpoint, adapter, tmp_path):
    other = changed(adapter, tmp_path / "adapter", config, tensors)
    with pytest.raises(BuildError, match=message):
        merge_adapter(checkpoint, other, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("content", [None, b"{", b"[]"], ids=["missing", "damaged", "a list"])
def test_an_adapter_that_cannot_be_read_is_told_in_one_line(content, checkpoint, tmp_path):
    if content is not None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_bytes(content)
    shown = CliRunner().invoke(app, ["merge", str(checkpoint), str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert shown.exit_code == 1 and shown.output.count("\n") == 1
    assert shown.output.startswith(f"error: {tmp_path / 'adapter' / 'adapter_config.json'}: ")


def test_a_pickled_adapter_is_named(checkpoint, adapter, tmp_path):
    other = changed(adapter, tmp_path / "adapter", {}, {})
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    with pytest.raises(
        BuildError, match=r"adapter/adapter_model\.bin: got a pickle, .* load the adapter with PEFT and save it"
    ):
        merge_adapter(checkpoint, other, tmp_path / "merged")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_an_adapters_configuration_may_be_in_any_encoding_of_json(encoding, checkpoint, adapter, tmp_path):
    other = changed(adapter, tmp_path / "adapter", {}, {})
    path = other / "adapter_config.json"
    path.write_text(path.read_text(), encoding=encoding)
    merge_adapter(checkpoint, other, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()


def test_a_path_with_control_characters_is_refused_in_one_line(checkpoint, adapter, tmp_path):
    odd = tmp_path / "a\nb\x1b[2J"
    for paths in ((odd, adapter, tmp_path / "merged"), (checkpoint, odd, tmp_path / "merged"), (checkpoint, adapter, odd)):
        shown = CliRunner().invoke(app, ["merge", *map(str, paths)])
        assert shown.exit_code == 1 and shown.output.count("\n") == 1 and "\x1b" not in shown.output
    assert not list(tmp_path.iterdir())
