"""Where in a chat's model text the answer stands that `structured_outputs` describes: rules of Lark for `Grammar.before`.

start: thought? (call+ | @answer)
"""

import json
from collections.abc import Sequence, Set

from backend.chat.argument_rules import VALUES
from backend.chat.reasoning import CHANNEL_CLOSE, CHANNEL_OPEN, REASONING_TAGS
from backend.chat.tools import CALL_CLOSE, CALL_OPEN, TOOL_TAGS

# A text of Lark has no special tokens: only their names, as here, stand for them.
_TEXT = r"/(.|\n)*/"
_THOUGHT = f"thought: {CHANNEL_OPEN} {_TEXT} {CHANNEL_CLOSE}"
# In the form that is read as one: what is not is text, and would be an answer that `@answer` does not allow.
_CALL = f'call: {CALL_OPEN} "call:" NAME "{{" pairs "}}" {CALL_CLOSE}'


def rules_before_answer(special_tokens: Set[str], *, in_thought: bool, after_thought: bool, tools: Sequence[str]) -> str:
    """No rules, "", where the model's whole text is the answer. in_thought: the prompt ends inside a thought; after_thought:
    behind one, so that none may begin. tools: the names of those that the model may call instead, with any arguments. Tags
    that are no special tokens stand for nothing.
    """
    can_call = special_tokens >= set(TOOL_TAGS) and bool(tools)
    thought, rules = thought_before(special_tokens, in_thought=in_thought, after_thought=after_thought)
    if not thought and not can_call:
        return ""
    start = f"start: {thought}{'(call+ | @answer)' if can_call else '@answer'}"
    calls = [_CALL, f"NAME: {' | '.join(map(json.dumps, tools))}{VALUES}"] if can_call else []
    return "\n".join([start, *rules, *calls])


def thought_before(special_tokens: Set[str], *, in_thought: bool, after_thought: bool) -> tuple[str, list[str]]:
    """What a rule begins with, for a thought that may come first, and the rules that this names; nothing where none may."""
    if after_thought or not special_tokens >= set(REASONING_TAGS):
        return "", []
    return (f"{_TEXT} {CHANNEL_CLOSE} ", []) if in_thought else ("thought? ", [_THOUGHT])
