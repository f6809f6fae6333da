"""A prompt's text → its tokens; the engine worker's parent and the offline `LLM` do it alike."""

from tokenizers import Tokenizer


def prompt_tokens(tokenizer: Tokenizer, bos_token: str | None, prompt: str) -> list[int]:
    """The prompt's tokens, special tokens in the text recognised; the tokenizer's <bos> is added unless the text starts
    with one. No text has no tokens."""
    if not prompt:
        return []
    has_bos = bos_token is not None and prompt.startswith(bos_token)
    return tokenizer.encode(prompt, add_special_tokens=not has_bos).ids
