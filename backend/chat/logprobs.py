"""Log probabilities as OpenAI's chat completions list them: each token with its text and bytes."""

import re
from collections.abc import Iterable, Sequence, Set

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def described_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    top_logprobs: Sequence[Iterable[tuple[int, float]]] | None,
    *,
    without_text: Set[int] = frozenset(),
) -> list[dict]:
    """One entry a token: token, logprob, bytes and top_logprobs (empty if not asked for). without_text: ids of tokens that the
    text leaves out; they have no bytes."""
    tops = top_logprobs or [()] * len(token_ids)
    return [
        _entry(tokenizer, token_id, logprob, without_text)
        | {"top_logprobs": [_entry(tokenizer, *each, without_text) for each in top]}
        for token_id, logprob, top in zip(token_ids, logprobs, tops, strict=True)
    ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float, without_text: Set[int]) -> dict:
    """bytes: None for a token that is a part of a character and does not say which."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if byte := _BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token_id) or ""):
        return {"token": text, "logprob": logprob, "bytes": [int(byte[1], 16)]}
    if token_id in without_text:
        return {"token": text, "logprob": logprob, "bytes": []}
    data = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data}
