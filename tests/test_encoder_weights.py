"""Checkpoints whose encode pass has weights of its own, as adapters of the two passes leave them: against transformers."""

import pytest
import torch
from oracles import Oracle
from safetensors.torch import load_file, save_file
from small_checkpoints import random_checkpoint
from test_generation import RANDOM, expected_of, llm_of, prompt_of

from backend import SamplingConfig
from builder.config import read_model_config
from builder.description import checked
from builder.export import signatures
from builder.weights import bindings, layer_prefix, of_decoder
from contract.checkpoint import Checkpoint, CheckpointError
from contract.manifest import BuildConfig

OWN = {
    0: ("self_attn.q_proj.weight", "self_attn.q_norm.weight", "mlp.up_proj.weight", "input_layernorm.weight", "router.scale"),
    1: ("self_attn.k_proj.weight", "self_attn.o_proj.weight", "experts.gate_up_proj", "router.per_expert_scale"),
    2: ("mlp.gate_proj.weight", "mlp.down_proj.weight", "experts.down_proj", "router.proj.weight"),
}


def with_own(directory, names: list[str], change: float = 0.3):
    """A random checkpoint in which the encoder has `names` for itself, differing from the decoder's."""
    checkpoint = random_checkpoint(directory, seed=8)
    tensors = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in names:
        shared = tensors[of_decoder(name)]
        tensors[name] = shared * (1 + change * torch.randn(shared.shape, generator=generator))
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


def own_names() -> list[str]:
    return [f"{layer_prefix(layer, encoder=True)}.{name}" for layer, names in OWN.items() for name in names]


def test_generations_are_those_of_transformers(tmp_path):
    """Which then does not tie the two; with the decoder's weights in both passes the answers are others."""
    checkpoint, shared = with_own(tmp_path / "own", own_names()), random_checkpoint(tmp_path / "shared", seed=8)
    llm, oracle = llm_of(checkpoint), Oracle(checkpoint)
    encoder, decoder = oracle.model.model.encoder.language_model, oracle.model.model.decoder
    for name in own_names():
        path = name.partition("language_model.")[2]
        assert not torch.equal(encoder.get_parameter(path), decoder.get_parameter(path))
    for length in (3, 49):
        expected = expected_of(oracle, prompt_of(length), seed=length)
        [result], [other] = (
            each.generate([prompt_of(length)], SamplingConfig(seed=length, **RANDOM)) for each in (llm, llm_of(shared))
        )
        assert result.token_ids == expected.token_ids(max_tokens=40, ends=set())
        assert result.num_steps == expected.num_steps
        assert result.token_ids != other.token_ids


def test_each_pass_reads_its_own_and_what_is_shared(tmp_path):
    """A stack of which the encoder has one part for itself takes the others from the decoder."""
    checkpoint = with_own(tmp_path, own_names())
    model, shapes = checked(Checkpoint(checkpoint), read_model_config(checkpoint))
    assert list(model.encoder_weights) == sorted(own_names())
    encoder, decoder = (layer_prefix(0, encoder=each) for each in (True, False))
    parts = [f"self_attn.{name}.weight" for name in ("k_proj", "v_proj")]
    of_encoder = (f"{encoder}.self_attn.q_proj.weight", *(f"{decoder}.{part}" for part in parts))
    assert bindings(shapes)[f"{encoder}.self_attn.qkv_proj.weight"] == of_encoder
    encode, denoise, *_ = signatures(model, BuildConfig(target="inductor", dtype="float32"))
    assert f"{encoder}.self_attn.qkv_proj.weight" in encode.weights
    assert f"{decoder}.self_attn.qkv_proj.weight" not in encode.weights
    assert f"{decoder}.self_attn.qkv_proj.weight" in denoise.weights
    assert not any(name.startswith("model.encoder") for name in denoise.weights)
    assert len(encode.weights) == len(set(encode.weights)) == len(denoise.weights) - len(shared_by_none(denoise.weights))


def shared_by_none(names) -> list[str]:
    """What only the denoise pass has."""
    return [name for name in names if name == "model.decoder.norm.weight" or ".self_conditioning." in name]


def test_what_the_encoder_cannot_have_for_itself_is_refused(tmp_path):
    checkpoint = with_own(tmp_path, [])
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.encoder.language_model.embed_tokens.weight"
    save_file(tensors | {name: torch.zeros(97, 48)}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: unexpected tensor"):
        checked(Checkpoint(checkpoint), read_model_config(checkpoint))
