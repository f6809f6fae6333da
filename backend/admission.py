"""What can never be served is refused before it is queued."""

from collections.abc import Sequence

from backend.encode_budget import most_in_one_pass
from backend.errors import refused
from backend.images.placeholders import image_spans
from backend.images.preprocess import ImagePatches
from backend.kv_cache import PagedKVCache
from backend.prompt_tokens import check_positions, most_positions
from backend.sampling_config import ResolvedSampling
from contract.manifest import Manifest
from contract.model_config import ModelConfig
from plugins.batch_invariance import CUT_TOKENS


def most_cached_tokens(
    num_prompt_tokens: int, sampling: ResolvedSampling, canvas_length: int, *, commit_last: bool = False
) -> int:
    """Cached tokens that a request may come to: the prompt and its canvases, but the last one unless it is committed too."""
    return most_positions(num_prompt_tokens, sampling, canvas_length) - (0 if commit_last else canvas_length)


def check_request(
    model: ModelConfig, cache: PagedKVCache, prompt_ids: Sequence[int], sampling: ResolvedSampling, *, commit_last: bool
) -> None:
    """Safe to call from any thread.

    Raises:
        RequestError INVALID_ARGUMENT: no tokens, one outside the vocabulary, or more than there are positions or pages; a
            token of logit_bias, stop_token_ids or infill outside the vocabulary.
    """
    if not prompt_ids:
        raise refused("prompt: got no tokens, expected at least one; send a prompt that is not empty")
    bad = next((token for token in prompt_ids if not 0 <= token < model.vocab_size), None)
    if bad is not None:
        raise refused(f"prompt: got token id {bad}, expected 0 to {model.vocab_size - 1}")
    named = {
        "logit_bias": [token for token, _ in sampling.logit_bias],
        "stop_token_ids": sampling.stop_token_ids,
        "infill": sampling.infill,
    }
    for name, token_ids in named.items():
        bad = next((token for token in token_ids if token >= model.vocab_size), None)
        if bad is not None:
            raise refused(f"{name}: got token id {bad}, expected 0 to {model.vocab_size - 1}")
    check_positions(model, prompt_ids, sampling)
    num_tokens = most_cached_tokens(len(prompt_ids), sampling, model.canvas_length, commit_last=commit_last)
    if not cache.fits(num_tokens, when_empty=True):
        needed, has = cache.pages_needed(num_tokens), cache.num_pages
        pages = ", ".join(f"{kind} {needed[kind]} of {has[kind]}" for kind in needed)
        raise refused(
            f"prompt: got {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens}, which need more KV pages than "
            f"this server has in all ({pages}); shorten the prompt or lower max_tokens",
        )


def check_images(manifest: Manifest, prompt_ids: Sequence[int], images: Sequence[ImagePatches]) -> None:
    """Safe to call from any thread.

    Raises:
        RequestError INVALID_ARGUMENT: the prompt's image tokens are not those of `images`, or what must go in one encode pass
            has more than fit: an image, in a batch-invariant engine several that are close together.
    """
    spans = image_spans(prompt_ids, images, manifest.model)
    most, most_allowed = max((image.num_soft_tokens for image in images), default=0), manifest.build.max_encode_tokens
    remedy = "lower image_soft_tokens, or rebuild the engine with a larger --max-encode-tokens"
    if most > most_allowed:
        raise refused(
            f"images: got one of {most} soft tokens, expected at most {most_allowed}, the tokens of one encode pass; {remedy}"
        )
    if len(images) > 1:
        remedy = f"put {CUT_TOKENS} tokens of text between them, {remedy}"
    together = most_in_one_pass(len(prompt_ids), [(span.start, span.end) for span in spans], manifest.build)
    if together > most_allowed:
        raise refused(
            f"images: got {together} tokens of images that a batch-invariant engine cannot encode apart, expected at most "
            f"{most_allowed}, the tokens of one encode pass; {remedy}"
        )
