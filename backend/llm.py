"""Offline use: `LLM(engine_dir).generate(prompts, sampling)`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from backend.engine import Engine, EngineLimits
from backend.errors import RequestError
from backend.sampling_config import SamplingConfig
from backend.scheduler import CanvasOutput

Prompt = str | Sequence[int]


@dataclass(kw_only=True)
class Generation:
    """The result of one prompt.

    token_ids: the new tokens, without the end-of-sequence token. num_steps: denoising steps of each canvas. finish_reason:
    "stop" (end-of-sequence token, stop token or stop string) or "length" (max_tokens).
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    num_steps: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0


class LLM:
    """An engine directory, loaded for offline generation.

    llm = LLM("engines/tiny")
    [result] = llm.generate("What is 2 + 2?", SamplingConfig(seed=1))
    """

    def __init__(
        self,
        engine_dir: str | PathLike,
        *,
        max_sequences: int = 16,
        max_cached_tokens: int | None = None,
        checkpoint_dir: str | PathLike | None = None,
    ):
        """See `EngineLimits` for the sizes; `checkpoint_dir` overrides where the weights are.

        Raises:
            ManifestError, CheckpointError: the engine or its checkpoint cannot be used.
        """
        limits = EngineLimits(max_sequences=max_sequences, max_cached_tokens=max_cached_tokens)
        self._engine = Engine.load(Path(engine_dir), limits, Path(checkpoint_dir) if checkpoint_dir else None)

    @classmethod
    def from_engine(cls, engine: Engine) -> "LLM":
        llm = cls.__new__(cls)
        llm._engine = engine
        return llm

    @property
    def tokenizer(self):
        """The engine's `tokenizers.Tokenizer`."""
        return self._engine.tokenizer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingConfig | Sequence[SamplingConfig] | None = None
    ) -> list[Generation]:
        """One result a prompt, in order. Prompts are texts or lists of token ids; one alone is taken as a list of one.

        `sampling` is one configuration for all or one for each. Prompts are denoised together, as many as fit, and each result
        is what the prompt gives alone.

        Raises:
            RequestError: a prompt or a parameter that cannot be served; nothing is generated then.
        """
        listed = [prompts] if _is_one(prompts) else list(prompts)
        configs = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingConfig()] * len(listed)
        if len(configs) != len(listed):
            raise RequestError(
                "INVALID_ARGUMENT", f"sampling: got {len(configs)} configurations, expected {len(listed)}, one a prompt"
            )
        scheduler = self._engine.scheduler
        requests = []
        for prompt, config in zip(listed, configs, strict=True):
            token_ids = self._engine.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
            if isinstance(prompt, str) and not prompt:
                token_ids = []
            resolved = config.resolve(self._engine.defaults)
            scheduler.check(token_ids, resolved)
            requests.append((token_ids, resolved))

        results = [Generation() for _ in listed]
        try:
            for (token_ids, resolved), result in zip(requests, results, strict=True):
                scheduler.add(token_ids, resolved, _collector(result))
            while not scheduler.is_idle:
                scheduler.tick()
        except BaseException:
            scheduler.fail_all(RequestError("CANCELLED", "generation was interrupted"))
            raise
        return results


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(each, int) for each in prompts))


def _collector(result: Generation):
    def collect(output: CanvasOutput | RequestError) -> None:
        if isinstance(output, RequestError):
            return  # only `fail_all` above, on the way out
        result.token_ids += output.token_ids
        result.text += output.text
        result.num_steps.append(output.num_steps)
        result.finish_reason = output.finish_reason
        result.num_prompt_tokens = output.num_prompt_tokens

    return collect
