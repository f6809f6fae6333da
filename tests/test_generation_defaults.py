"""The checkpoint's generation_config.json: what it says, what transformers takes where it says nothing, and what is refused."""

import json

import pytest
from small_checkpoints import TINY
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from builder.build import write_manifest
from contract.manifest import ManifestError

CHECKPOINT = {
    "max_new_tokens": 512,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 2,
    "confidence_threshold": 0.01,
    "bos_token_id": 2,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
}


def test_defaults_of_a_checkpoint(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**CHECKPOINT, "transformers_version": "5.23.0", "cache_implementation": None}))
    defaults = GenerationDefaults.from_json(path)
    assert defaults == GenerationDefaults.from_json(str(path)) == GenerationDefaults.from_json(CHECKPOINT)
    assert defaults == GenerationDefaults(
        max_tokens=512,
        max_denoising_steps=48,
        entropy_bound=0.2,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=2,
        confidence_threshold=0.01,
        eos_token_ids=(1, 106, 50),
        pad_token_id=0,
    )


@pytest.mark.parametrize("mapping", [{}, dict.fromkeys(CHECKPOINT)])
def test_missing_fields_take_the_defaults_of_transformers(mapping):
    theirs = DiffusionGemmaGenerationConfig._get_default_generation_params()
    ours = GenerationDefaults.from_json(mapping)
    assert ours.max_tokens == theirs.pop("max_new_tokens")
    assert ours.entropy_bound == theirs.pop("sampler_config").entropy_bound
    assert {name: getattr(ours, name) for name in theirs} == theirs
    assert ours.eos_token_ids == () and ours.pad_token_id is None


def test_one_eos_token_and_a_sampler_without_a_bound():
    defaults = GenerationDefaults.from_json({"eos_token_id": 1, "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig"}})
    assert defaults.eos_token_ids == (1,) and defaults.entropy_bound == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5, "num_beams": 1}, "unknown keys 'top_k', 'num_beams'; remove what does not apply to this model"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected an integer from 1 to 2147483647"),
        ({"max_denoising_steps": "48"}, "max_denoising_steps: got '48', expected an integer from 1 to 65536"),
        ({"t_min": 0.9}, "t_min: got 0.9, expected at most t_max, 0.8"),
        ({"eos_token_id": "1"}, "eos_token_id: got '1', expected an integer from 0 to 2147483647"),
        ({"eos_token_id": [1, -2]}, "eos_token_id: got -2, expected an integer from 0 to 2147483647"),
        ({"pad_token_id": -1}, "pad_token_id: got -1, expected an integer from 0 to 2147483647"),
        ({"sampler_config": 3}, "sampler_config: got 3, expected an object or null"),
        (
            {"sampler_config": {"_cls_name": "TopSamplerConfig"}},
            "sampler_config: got sampler class 'TopSamplerConfig', expected 'EntropyBoundSamplerConfig'",
        ),
        (
            {"sampler_config": {"entropy_bound": 0.1}},
            "sampler_config: got sampler class None, expected 'EntropyBoundSamplerConfig'",
        ),
        (
            {"sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "bound": 0.1}},
            "sampler_config: unknown keys 'bound'; expected 'entropy_bound'",
        ),
        (
            {"sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": -1}},
            "entropy_bound: got -1, expected a finite number from 0 to 1000000",
        ),
    ],
)
def test_refused_checkpoints(tmp_path, change, message):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**CHECKPOINT, **change}))
    with pytest.raises(ValueError) as error:
        GenerationDefaults.from_json(path)
    assert str(error.value) == f"{path}: {message}"
    with pytest.raises(ValueError) as error:
        GenerationDefaults.from_json({**CHECKPOINT, **change})
    assert str(error.value) == f"generation_config: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); "
            "copy the file from the checkpoint again",
        ),
        pytest.param("[" * 100_000, "not valid JSON: maximum recursion depth exceeded", id="nested deeply"),
        ("[1]", "got [1], expected a JSON object"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        GenerationDefaults.from_json(path)
    assert str(error.value).startswith(f"{path}: {message}")
    with pytest.raises(FileNotFoundError):
        GenerationDefaults.from_json(tmp_path / "absent.json")


def test_an_engine_whose_file_cannot_be_read(tmp_path, monkeypatch):
    engine = tmp_path / "e"
    write_manifest(TINY, engine)
    (engine / "generation_config.json").mkdir()
    monkeypatch.setattr("backend.engine.Session.load", lambda *_: None)
    with pytest.raises(ManifestError, match=r"generation_config\.json: cannot be read \(Is a directory\); give access to it"):
        Engine.load(engine, EngineLimits())
