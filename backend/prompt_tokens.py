"""A prompt's text → its tokens, and whether there are positions for them; the engine worker's parent and the offline `LLM` do
it alike."""

from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

from backend.errors import refused
from backend.sampling_config import ResolvedSampling
from contract.model_config import ModelConfig


class PromptTokenizer:
    """tokenizer, bos_token: the checkpoint's; None if there is no <bos>. max_tokens: positions of the model."""

    def __init__(self, tokenizer: Tokenizer, bos_token: str | None, max_tokens: int):
        self._tokenizer, self._bos_token, self._max_tokens = tokenizer, bos_token, max_tokens

    @cached_property
    def _max_characters(self) -> int:
        """No token stands for more text than it is long; this is so of tokenizers that keep the length of the text. It goes
        through the whole vocabulary, which takes a second, and only a very long text asks for it."""
        return self._max_tokens * max(map(len, self._tokenizer.get_vocab()))

    def __call__(self, prompt: str) -> list[int]:
        """The prompt's tokens, special tokens in the text recognised; <bos> is added unless the text starts with one. No text
        has no tokens.

        Raises RequestError INVALID_ARGUMENT for half of a surrogate pair, which Python has for bytes that are not UTF-8, and
        for a text that cannot have so few tokens as there are positions: finding them takes a second and 100 MB a megabyte.
        """
        if not prompt:
            return []
        if len(prompt) > self._max_tokens and len(prompt) > self._max_characters:
            raise refused(
                f"prompt: got {len(prompt)} characters, expected at most {self._max_characters}, since the model has "
                f"{self._max_tokens} positions; shorten the prompt"
            )
        has_bos = self._bos_token is not None and prompt.startswith(self._bos_token)
        return self._ids("prompt", prompt, add_special_tokens=not has_bos)

    def of_answer(self, text: str) -> list[int]:
        """The tokens of a text inside of an answer, where <bos> has no place. It is short: `infill.MAX_LENGTH`."""
        return self._ids("infill", text, add_special_tokens=False)

    def _ids(self, name: str, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            got = f"U+{ord(text[error.start]):04X}, half of a surrogate pair"
            raise refused(f"{name}: got {got}, expected text; was its source in UTF-8?") from None
        # A batch of one, because that lets other threads run.
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids


def check_positions(model: ModelConfig, prompt_ids: Sequence[int], sampling: ResolvedSampling) -> None:
    """Raises RequestError INVALID_ARGUMENT for a prompt and canvases of more tokens than the model has positions."""
    length, most = model.canvas_length, model.max_position_embeddings
    needed = most_positions(len(prompt_ids), sampling, length)
    if needed > most:
        free, canvases = most - len(prompt_ids), -(-sampling.max_tokens // length)
        fitting = free - length + 1 if sampling.grammar else free // length * length
        remedy = f"lower max_tokens to {fitting}, or shorten the prompt" if fitting > 0 else "shorten the prompt"
        as_canvases = f"{canvases} {'canvas' if canvases == 1 else 'canvases'} of {length}"
        if sampling.grammar:
            as_canvases = f"canvases of {length}, the last of which may begin before the last token"
        raise refused(
            f"prompt: got {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens}, which is {as_canvases}, so {needed} "
            f"positions, expected at most {most} in all; {remedy}"
        )


def most_positions(num_prompt_tokens: int, sampling: ResolvedSampling, canvas_length: int) -> int:
    """Of a prompt and its canvases. With a grammar a canvas may be kept in part, and the next one begins behind that."""
    if sampling.grammar:
        return num_prompt_tokens + sampling.max_tokens - 1 + canvas_length
    return num_prompt_tokens + -(-sampling.max_tokens // canvas_length) * canvas_length
