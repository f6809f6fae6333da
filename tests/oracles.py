"""transformers as the oracle: the same noise fed to its `generate`, and its logits one pass at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from backend.noise import gumbel_noise, initial_canvas, renoise_tokens


@dataclass(frozen=True)
class OracleResult:
    """canvases: argmax canvas of each canvas, whole. num_steps: denoising steps of each. probabilities: softmax of the
    processed logits at the last step of each, [C, V] float32."""

    canvases: list[list[int]]
    num_steps: list[int]
    probabilities: list[torch.Tensor]

    def token_ids(self, *, max_tokens: int, ends: set[int]) -> list[int]:
        """The canvases cut at max_tokens and before the first end token."""
        flat = [token for canvas in self.canvases for token in canvas][:max_tokens]
        return next((flat[:index] for index, token in enumerate(flat) if token in ends), flat)


class Oracle:
    """One checkpoint, loaded by transformers on the CPU."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32):
        self.model = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=dtype).eval()
        self.canvas_length = self.model.config.canvas_length
        self.vocab_size = self.model.config.text_config.vocab_size

    def generate(
        self,
        prompt_ids: list[int],
        *,
        seed: int,
        greedy: bool = False,
        warpers: LogitsProcessorList | None = None,
        given: Sequence[int] = (),
        first_canvas: int = 0,
        **generation,
    ) -> OracleResult:
        """`generate` of transformers with `torch.randint` and `torch.multinomial` replaced by our noise for `seed`.

        Tokens after the end are not replaced by padding here (pad_token_id None), so that whole canvases are compared.
        `warpers` restrict what is drawn and nothing else; a `logits_processor`, which transformers takes, acts on everything.
        `given`: tokens that the answer begins with, negative where it is free: in canvases from the start, and by a processor.
        `first_canvas`: index of the first canvas, where the prompt ends with others.
        """
        warpers = LogitsProcessorList() if warpers is None else warpers
        if given:
            only = _OnlyGiven(len(prompt_ids), given)
            generation["logits_processor"] = LogitsProcessorList([*generation.get("logits_processor", ()), only])
        with _injected(seed, self.canvas_length, self.vocab_size, greedy, warpers, given, first_canvas) as trace:
            output = self.model.generate(torch.tensor([prompt_ids]), **generation)
        new = output.sequences[0, len(prompt_ids) :].tolist()
        canvases = [new[start : start + self.canvas_length] for start in range(0, len(new), self.canvas_length)]
        return OracleResult(canvases, trace.num_steps, trace.probabilities)

    def image_inputs(self, prompt_ids: list[int], images: list[Image.Image], max_soft_tokens: int) -> dict[str, torch.Tensor]:
        """What `generate` takes besides the prompt, whose placeholders are expanded."""
        patches = Gemma4ImageProcessorPil(
            max_soft_tokens=max_soft_tokens, patch_size=self.model.config.vision_config.patch_size
        )(images, return_tensors="pt")
        return {
            "pixel_values": patches["pixel_values"],
            "image_position_ids": patches["image_position_ids"],
            "mm_token_type_ids": (torch.tensor([prompt_ids]) == self.model.config.image_token_id).int(),
        }

    @torch.no_grad()
    def image_features(self, image: Image.Image, max_soft_tokens: int) -> torch.Tensor:
        """What stands in for the image's tokens, [S, D]."""
        inputs = self.image_inputs([], [image], max_soft_tokens)
        return self.model.model.encoder.get_image_features(
            inputs["pixel_values"], inputs["image_position_ids"], return_dict=True
        ).pooler_output

    @torch.no_grad()
    def encode_with_images(self, prompt_ids: list[int], images: list[Image.Image], max_soft_tokens: int) -> DynamicCache:
        """The cache after the prompt, with the masks that `generate` makes."""
        encoder, inputs = self.model.model.encoder, self.image_inputs(prompt_ids, images, max_soft_tokens)
        cache = DynamicCache(config=self.model.config.get_text_config())
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty(1, len(prompt_ids), 0, dtype=self.model.dtype),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.bool),
            cache=cache,
            position_ids=torch.arange(len(prompt_ids)).unsqueeze(0),
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        encoder(input_ids=torch.tensor([prompt_ids]), attention_mask=masks, cache=cache, **inputs)
        return cache

    @torch.no_grad()
    def encode(self, *chunks: list[int]) -> DynamicCache:
        """The cache after the chunks, encoded one after the other."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        for chunk in chunks:
            start = cache.get_seq_length()
            self.model.model.encoder(
                input_ids=torch.tensor([chunk]),
                cache=cache,
                position_ids=torch.arange(start, start + len(chunk)).unsqueeze(0),
                attention_mask=torch.ones(1, start + len(chunk), dtype=torch.bool),
            )
        return cache

    @torch.no_grad()
    def logits(self, cache: DynamicCache, canvas: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """Soft-capped logits [C, V] float32 of canvas [C]; `previous`: the processed logits [C, V] of the step before."""
        return self.model(
            decoder_input_ids=canvas.unsqueeze(0),
            cache=cache,
            self_conditioning_logits=None if previous is None else previous.unsqueeze(0),
        ).logits[0]


class _OnlyGiven(LogitsProcessor):
    """Where a token is given, no other is possible."""

    def __init__(self, prompt_length: int, given: Sequence[int]):
        self._prompt_length, self._given = prompt_length, given

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        start = input_ids.shape[1] - self._prompt_length
        scores = scores.clone()
        for position, token in enumerate(self._given[start : start + scores.shape[1]]):
            if token >= 0:
                own = scores[:, position, token].clone()
                scores[:, position] = -1e9
                scores[:, position, token] = own
        return scores


class _Trace:
    """Follows the calls of one `generate`: a canvas opens with randint, each step is multinomial then randint."""

    def __init__(self):
        self.num_steps: list[int] = []
        self.probabilities: list[torch.Tensor] = []
        self.in_step = False


@contextmanager
def _injected(
    seed: int,
    canvas_length: int,
    vocab_size: int,
    greedy: bool,
    warpers: LogitsProcessorList,
    given: Sequence[int],
    first_canvas: int,
) -> Iterator[_Trace]:
    trace = _Trace()

    def where() -> dict[str, int]:
        return {
            "seed": seed,
            "canvas_index": first_canvas + len(trace.num_steps) - 1,
            "canvas_length": canvas_length,
            "vocab_size": vocab_size,
        }

    def randint(*, low, high, size, device):
        assert (low, high, tuple(size)) == (0, vocab_size, (1, canvas_length))
        if trace.in_step:
            trace.in_step = False
            return renoise_tokens(**where(), step=trace.num_steps[-1] - 1).unsqueeze(0)
        trace.num_steps.append(0)
        trace.probabilities.append(torch.empty(0))
        canvas = initial_canvas(**where())
        of_it = torch.tensor(given[(len(trace.num_steps) - 1) * canvas_length :][:canvas_length], dtype=canvas.dtype)
        canvas[: len(of_it)] = torch.where(of_it >= 0, of_it, canvas[: len(of_it)])
        return canvas.unsqueeze(0)

    def multinomial(probabilities, num_samples):
        assert num_samples == 1 and tuple(probabilities.shape) == (canvas_length, vocab_size)
        trace.in_step = True
        trace.num_steps[-1] += 1
        trace.probabilities[-1] = probabilities.clone()
        if greedy:
            return probabilities.argmax(dim=-1, keepdim=True)
        scores = warpers(None, probabilities.log()) + gumbel_noise(**where(), step=trace.num_steps[-1] - 1)
        return scores.argmax(dim=-1, keepdim=True)

    with mock.patch.object(torch, "randint", randint), mock.patch.object(torch, "multinomial", multinomial):
        yield trace
