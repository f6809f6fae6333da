"""transformers' `generate` as the other system: batches, both kinds of cache, and the noise of our requests.

Noise: a first run replaces what `generate` draws by our noise of each row's seed, and keeps the tokens that it came to.
Timed runs draw as transformers does, pay for it, and then take the kept tokens: so they take the same steps as ours, at
their own cost.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import DiffusionGemmaForBlockDiffusion

from backend.noise import gumbel_noise, initial_canvas, renoise_tokens

EXPERTS = ("eager", "grouped_mm", "batched_mm")
CACHES = ("dynamic", "static")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts of one length, a seed for each. `settings`: of `generate`; every canvas counts, whatever ends a text."""

    prompts: list[list[int]]
    seeds: list[int]
    max_tokens: int
    settings: dict


class Transformers:
    """One checkpoint, loaded by transformers on the CPU."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32):
        self.model = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=dtype).eval()
        self.canvas_length = self.model.config.canvas_length
        self.vocab_size = self.model.config.text_config.vocab_size

    def choose_experts(self) -> dict[str, float]:
        """Takes the fastest implementation of the experts for one canvas: milliseconds of a forward pass with each."""
        times_ms = {}
        for name in EXPERTS:
            self.model.set_experts_implementation(name)
            times_ms[name] = self._forward_ms()
            if times_ms[name] < 5 * min(times_ms.values()):  # else it will not win, and may take a minute
                times_ms[name] = min(self._forward_ms() for _ in range(2))
        self.model.set_experts_implementation(min(times_ms, key=times_ms.get))
        return {name: round(value, 1) for name, value in times_ms.items()}

    @torch.no_grad()
    def _forward_ms(self) -> float:
        tokens = torch.arange(self.canvas_length).unsqueeze(0) % self.vocab_size
        started_s = time.perf_counter()
        self.model.model.encoder.language_model(input_ids=tokens, use_cache=False)
        return 1e3 * (time.perf_counter() - started_s)

    def generate(self, batch: Batch, *, cache: str = "dynamic") -> list[list[int]]:
        """The new tokens of each prompt."""
        output = self.model.generate(
            torch.tensor(batch.prompts),
            max_new_tokens=batch.max_tokens,
            eos_token_id=None,
            pad_token_id=None,
            # A static cache would have generate compile its passes, for minutes, anew for each batch size.
            disable_compile=True,
            cache_implementation=cache,
            **batch.settings,
        )
        return output.sequences[:, len(batch.prompts[0]) :].tolist()


class Noise:
    """Our noise for one batch; see the module's docstring."""

    def __init__(self, batch: Batch, canvas_length: int, vocab_size: int):
        self._seeds, self._sizes = batch.seeds, {"canvas_length": canvas_length, "vocab_size": vocab_size}
        self._drawn: dict[str, list[torch.Tensor]] = {}
        self.num_steps: list[int] = []
        """Denoising steps of each canvas, until its last row converged."""
        self.probabilities = torch.empty(0)
        """Of the last step, [batch * C, V] float32."""

    @contextmanager
    def injected(self) -> Iterator[None]:
        """Draws are our noise, and are kept."""
        num_steps, in_step = [], False

        def of_rows(function, **where) -> torch.Tensor:
            return torch.stack([function(seed=seed, canvas_index=len(num_steps) - 1, **where) for seed in self._seeds])

        def randint(*, low, high, size, device):
            nonlocal in_step
            assert (low, high, tuple(size)) == (0, self._sizes["vocab_size"], (len(self._seeds), self._sizes["canvas_length"]))
            if in_step:
                in_step = False
                drawn = of_rows(renoise_tokens, step=num_steps[-1] - 1, **self._sizes)
            else:
                num_steps.append(0)
                drawn = of_rows(initial_canvas, **self._sizes)
            self._drawn["randint"].append(drawn)
            return drawn.to(device)

        def multinomial(probabilities, num_samples):
            nonlocal in_step
            in_step = True
            num_steps[-1] += 1
            rows = probabilities.view(len(self._seeds), -1, self._sizes["vocab_size"])
            noise = of_rows(gumbel_noise, step=num_steps[-1] - 1, device=rows.device, **self._sizes)
            self.probabilities = probabilities
            drawn = (rows.log() + noise).argmax(dim=-1).view(-1, num_samples)
            self._drawn["multinomial"].append(drawn)
            return drawn

        self._drawn, self.num_steps = {"randint": [], "multinomial": []}, num_steps
        with mock.patch.object(torch, "randint", randint), mock.patch.object(torch, "multinomial", multinomial):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draws are made, and replaced by what was kept, as long as there is any: with a static cache, which rounds
        differently, a canvas may take more steps."""

        def draws(function):
            kept = iter(self._drawn[function.__name__])

            def drawn(*arguments, **options):
                own = function(*arguments, **options)
                return next(kept, own)

            return drawn

        with (
            mock.patch.object(torch, "randint", draws(torch.randint)),
            mock.patch.object(torch, "multinomial", draws(torch.multinomial)),
        ):
            yield
