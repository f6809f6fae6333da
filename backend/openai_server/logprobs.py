"""Log probabilities in the form of `/v1/completions`."""

from collections.abc import Sequence
from typing import Any

from openai.types.completion_choice import Logprobs


def completion_logprobs(entries: Sequence[dict[str, Any]], text_offset: int) -> Logprobs:
    """entries: as in chat completions. text_offset: where the text of the first token begins, in characters."""
    offsets = []
    for entry in entries:
        offsets.append(text_offset)
        text_offset += len(entry["token"])
    return Logprobs(
        tokens=[entry["token"] for entry in entries],
        token_logprobs=[entry["logprob"] for entry in entries],
        top_logprobs=[{each["token"]: each["logprob"] for each in entry["top_logprobs"]} for entry in entries],
        text_offset=offsets,
    )
