"""Where in a chat's model text the answer stands that `structured_outputs` describes: rules of Lark for `Grammar.before`.

start: thought? (call+ | @answer)
"""

from collections.abc import Set

from backend.chat.reasoning import CHANNEL_CLOSE, CHANNEL_OPEN, REASONING_TAGS
from backend.chat.tools import CALL_CLOSE, CALL_OPEN, QUOTE, TOOL_TAGS

# A text of Lark has no special tokens: only their names, as here, stand for them.
_TEXT = r"/(.|\n)*/"
_THOUGHT = f"thought: {CHANNEL_OPEN} {_TEXT} {CHANNEL_CLOSE}"
_CALL = rf"call: {CALL_OPEN} (/(.|\n)+/ | {QUOTE})* {CALL_CLOSE}"


def rules_before_answer(special_tokens: Set[str], *, in_thought: bool, after_thought: bool, with_tools: bool) -> str:
    """No rules, "", where the model's whole text is the answer. in_thought: the prompt ends inside a thought; after_thought:
    behind one, so that none may begin. with_tools: the model may call tools instead. Tags that are no special tokens stand for
    nothing.
    """
    can_call = special_tokens >= set(TOOL_TAGS) and with_tools
    thought, rules = thought_before(special_tokens, in_thought=in_thought, after_thought=after_thought)
    if not thought and not can_call:
        return ""
    start = f"start: {thought}{'(call+ | @answer)' if can_call else '@answer'}"
    return "\n".join([start, *rules, *([_CALL] if can_call else [])])


def thought_before(special_tokens: Set[str], *, in_thought: bool, after_thought: bool) -> tuple[str, list[str]]:
    """What a rule begins with, for a thought that may come first, and the rules that this names; nothing where none may."""
    if after_thought or not special_tokens >= set(REASONING_TAGS):
        return "", []
    return (f"{_TEXT} {CHANNEL_CLOSE} ", []) if in_thought else ("thought? ", [_THOUGHT])
