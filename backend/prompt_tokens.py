"""A prompt's text → its tokens, and whether there are positions for them; the engine worker's parent and the offline `LLM` do
it alike."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from backend.errors import refused
from backend.sampling_config import ResolvedSampling
from contract.model_config import ModelConfig


def prompt_tokens(tokenizer: Tokenizer, bos_token: str | None, prompt: str) -> list[int]:
    """The prompt's tokens, special tokens in the text recognised; the tokenizer's <bos> is added unless the text starts
    with one. No text has no tokens.

    Raises RequestError INVALID_ARGUMENT for half of a surrogate pair, which Python has for bytes that are not UTF-8.
    """
    if not prompt:
        return []
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        got = f"U+{ord(prompt[error.start]):04X}, half of a surrogate pair"
        raise refused(f"prompt: got {got}, expected text; was its source in UTF-8?") from None
    has_bos = bos_token is not None and prompt.startswith(bos_token)
    # A batch of one, because that lets other threads run: a text of megabytes takes seconds.
    [encoding] = tokenizer.encode_batch([prompt], add_special_tokens=not has_bos)
    return encoding.ids


def check_positions(model: ModelConfig, prompt_ids: Sequence[int], sampling: ResolvedSampling) -> None:
    """Raises RequestError INVALID_ARGUMENT for a prompt and canvases of more tokens than the model has positions."""
    canvases = -(-sampling.max_tokens // model.canvas_length)
    if len(prompt_ids) + canvases * model.canvas_length > model.max_position_embeddings:
        raise refused(
            f"prompt: got {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} ({canvases} canvases of "
            f"{model.canvas_length}), expected at most {model.max_position_embeddings} in all; "
            "shorten the prompt or lower max_tokens",
        )
