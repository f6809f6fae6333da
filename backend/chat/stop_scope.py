"""Where in a chat's answer stop strings are looked for: in what the client gets as the answer's text.

Not in its thought, in its tool calls and in the tags around them, which the client did not write and does not see. An answer
that may have but one call ends behind it, as behind a stop string.
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

    def scope(
        self, *, in_thought: bool, in_call: bool, with_tools: bool, one_call: bool, keep_special_tokens: bool
    ) -> StopScope:
        """in_thought, in_call: where the answer begins. one_call: it ends behind the first call, also one that is malformed.
        Else as in `AnswerFormat`: without tools a call is text."""
        opening = (CHANNEL_OPEN, CALL_OPEN) if with_tools else (CHANNEL_OPEN,)
        closing = (CHANNEL_CLOSE, CALL_CLOSE if with_tools else CALL_OPEN)
        tags = frozenset(self._ids.values())
        return StopScope(
            hidden=tags if keep_special_tokens else tags | self._special,
            opening=self._of(opening),
            closing=self._of(closing),
            is_open=in_thought or in_call,
            last=self._call(in_call) if with_tools and one_call else None,
        )

    def _call(self, has_begun: bool) -> tuple[int | None, int] | None:
        if not self._ids.keys() >= {CALL_OPEN, CALL_CLOSE}:
            return None
        return None if has_begun else self._ids[CALL_OPEN], self._ids[CALL_CLOSE]

    def _of(self, tags: tuple[str, ...]) -> frozenset[int]:
        return frozenset(self._ids[tag] for tag in tags if tag in self._ids)
