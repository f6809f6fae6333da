"""Where in a chat's answer stop strings are looked for: in what the client gets as the answer's text.

Not in its thought, in its tool calls and in the tags around them, which the client did not write and does not see.
"""

from tokenizers import Tokenizer

from backend.chat.reasoning import CHANNEL_CLOSE, CHANNEL_OPEN, REASONING_TAGS
from backend.chat.tools import CALL_CLOSE, CALL_OPEN, TOOL_TAGS
from backend.text_stream import StopScope


class AnswerText:
    """Makes the scopes of one tokenizer's answers. A tag that is not a token of its own is text like any other."""

    def __init__(self, tokenizer: Tokenizer):
        ids = {tag: tokenizer.token_to_id(tag) for tag in (*REASONING_TAGS, *TOOL_TAGS)}
        self._ids = {tag: token_id for tag, token_id in ids.items() if token_id is not None}
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    def scope(self, *, is_open: bool, with_tools: bool, keep_special_tokens: bool) -> StopScope:
        """is_open: the answer begins inside a thought or a call. Else as in `AnswerFormat`: without tools a call is text."""
        opening = (CHANNEL_OPEN, CALL_OPEN) if with_tools else (CHANNEL_OPEN,)
        closing = (CHANNEL_CLOSE, CALL_CLOSE if with_tools else CALL_OPEN)
        tags = frozenset(self._ids.values())
        return StopScope(
            hidden=tags if keep_special_tokens else tags | self._special,
            opening=self._of(opening),
            closing=self._of(closing),
            is_open=is_open,
        )

    def _of(self, tags: tuple[str, ...]) -> frozenset[int]:
        return frozenset(self._ids[tag] for tag in tags if tag in self._ids)
