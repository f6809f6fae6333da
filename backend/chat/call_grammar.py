"""The grammar of an answer that must be a tool call, from where the prompt has begun it; `tools` says what calls look like,
`argument_rules` what arguments are held to.
"""

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from backend.chat.argument_rules import VALUES, ArgumentRules, TooLarge
from backend.chat.tools import CALL_CLOSE, CALL_OPEN, TOOL_TAGS
from backend.grammar import MAX_GRAMMAR_LENGTH, Grammar

_MOST_WORK = 1 << 19  # of all tools together, in `ArgumentRules.work`: 0.1 s
_ANY = ArgumentRules(True, "", _MOST_WORK)


def call_grammar(tools: Sequence[Mapping[str, Any]], special_tokens: Set[str], *, begun: str) -> Grammar | None:
    """Calls of the tool whose name is `begun`, the first from behind its bracket; or, "", of any of `tools`, in OpenAI's form,
    the first from its name on. One at least. None where tags are no special tokens, which a grammar could name.

    Tools whose schemas are too large together have calls with any arguments, the largest first.
    """
    if not special_tokens >= set(TOOL_TAGS):
        return None
    functions = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    names, left, rules = [begun] if begun else list(functions), _MOST_WORK, {}
    for place, name in enumerate(names):
        rules[name], left = _rules(functions[name], f"{place}_", left)
    total = sum(map(_size, rules.values()))
    for name in sorted(rules, key=lambda name: _size(rules[name]), reverse=True):
        if total <= MAX_GRAMMAR_LENGTH:
            break
        total -= _size(rules[name]) - _size(_ANY)
        rules[name] = _ANY
    call = " | ".join(f'{json.dumps(name)} "{{" {each.inner} "}}"' for name, each in rules.items())
    first = f'{rules[begun].inner} "}}"' if begun else "call"
    lines = [f'start: {first} {CALL_CLOSE} ({CALL_OPEN} "call:" call {CALL_CLOSE})*', f"call: {call}"]
    lines += [line for each in rules.values() for line in each.lines]
    return Grammar(answer=json.dumps({"lark_grammar": "\n".join(lines) + VALUES}), of="tools")


def _rules(schema: object, prefix: str, left: int) -> tuple[ArgumentRules, int]:
    """And what is left of the work."""
    try:
        rules = ArgumentRules(schema, prefix, left)
    except TooLarge:
        return _ANY, left // 2
    return rules, left - rules.work


def _size(rules: ArgumentRules) -> int:
    return len(rules.inner) + sum(map(len, rules.lines))
