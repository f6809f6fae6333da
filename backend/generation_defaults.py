"""The checkpoint's own choices for generation: its `generation_config.json`, which a request's SamplingConfig overrides."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backend.json_text import json_object
from backend.parameters import NUMBERS, TOKEN_ID, shown
from contract.regular_file import regular

SAMPLER_CLASS = "EntropyBoundSamplerConfig"

# Keys of the file that say nothing about the result here: other tokens, transformers' caches, outputs and bookkeeping.
_IGNORED_KEYS = frozenset(
    (
        "bos_token_id",
        "cache_implementation",
        "cache_config",
        "disable_compile",
        "return_dict_in_generate",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
    )
)
# The file's names of our fields, where they differ. The sampler's own and the token ids are read apart.
_FILE_KEYS = {
    "max_new_tokens": "max_tokens",
    "max_denoising_steps": "max_denoising_steps",
    "t_min": "t_min",
    "t_max": "t_max",
    "stability_threshold": "stability_threshold",
    "confidence_threshold": "confidence_threshold",
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What holds where a request says nothing. The values here are transformers' for a checkpoint that says nothing either.

    Raises ValueError, one line, for a value out of its range.
    """

    max_tokens: int = 256
    max_denoising_steps: int = 48
    entropy_bound: float = 0.1  # nats
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1  # steps
    confidence_threshold: float = 0.005  # nats
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in (*_FILE_KEYS.values(), "entropy_bound"):
            object.__setattr__(self, name, NUMBERS[name].checked(name, getattr(self, name)))
        if self.t_min > self.t_max:
            raise ValueError(f"t_min: got {self.t_min}, expected at most t_max, {self.t_max}")
        eos_token_ids = tuple(TOKEN_ID.checked("eos_token_id", token_id) for token_id in self.eos_token_ids)
        object.__setattr__(self, "eos_token_ids", eos_token_ids)
        if self.pad_token_id is not None:
            object.__setattr__(self, "pad_token_id", TOKEN_ID.checked("pad_token_id", self.pad_token_id))

    @classmethod
    def from_json(cls, source: str | os.PathLike | Mapping) -> "GenerationDefaults":
        """From a `generation_config.json`, by path or as parsed. A field that is absent or null takes the default above.

        Raises ValueError, one line that begins with the file's name, for bad JSON, an unknown key or a bad value; OSError for a
        file that cannot be read.
        """
        if isinstance(source, Mapping):
            return cls._from_mapping(source, "generation_config")
        path = Path(source)
        return cls._from_mapping(json_object(regular(path).read_bytes(), path), str(path))

    @classmethod
    def _from_mapping(cls, mapping: Mapping, source: str) -> "GenerationDefaults":
        given = {key: value for key, value in mapping.items() if value is not None and key not in _IGNORED_KEYS}
        numbers = {key: given.pop(key) for key in _FILE_KEYS if key in given}
        sampler = given.pop("sampler_config", None)
        eos_token_id = given.pop("eos_token_id", ())
        eos_token_ids = tuple(eos_token_id) if isinstance(eos_token_id, list | tuple) else (eos_token_id,)
        pad_token_id = given.pop("pad_token_id", None)
        if given:
            raise ValueError(f"{source}: unknown keys {', '.join(map(repr, given))}; remove what does not apply to this model")
        try:
            fields = {_FILE_KEYS[key]: NUMBERS[_FILE_KEYS[key]].checked(key, value) for key, value in numbers.items()}
            if sampler is not None:
                fields.update(_sampler_fields(sampler))
            return cls(**fields, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def _sampler_fields(sampler: object) -> dict:
    """The entropy bound from the file's `sampler_config` object."""
    if not isinstance(sampler, Mapping):
        raise ValueError(f"sampler_config: got {shown(sampler)}, expected an object or null")
    class_name = sampler.get("_cls_name")
    if class_name != SAMPLER_CLASS:
        raise ValueError(f"sampler_config: got sampler class {shown(class_name)}, expected {SAMPLER_CLASS!r}")
    unknown = [key for key in sampler if key not in ("_cls_name", "entropy_bound")]
    if unknown:
        raise ValueError(f"sampler_config: unknown keys {', '.join(map(repr, unknown))}; expected 'entropy_bound'")
    return {"entropy_bound": sampler["entropy_bound"]} if sampler.get("entropy_bound") is not None else {}
