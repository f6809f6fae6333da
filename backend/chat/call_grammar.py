"""Grammars of answers with tool calls: of one that must be a call, from where the prompt has begun it, and of one in which the
model calls as it likes. `tools` says what calls look like, `argument_rules` what arguments are held to.
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
    rules = _of_tools({begun: functions[begun]} if begun else functions)
    first = f'{rules[begun].inner} "}}"' if begun else "call"
    return _grammar([f'start: {first} {CALL_CLOSE} ({CALL_OPEN} "call:" call {CALL_CLOSE})*'], rules)


def strict_calls_grammar(
    tools: Sequence[Mapping[str, Any]], special_tokens: Set[str], *, thought: str, thought_rules: Sequence[str]
) -> Grammar | None:
    """An answer of text and calls of `tools`, of which those that are `strict` are held to their schemas. None where none is,
    or tags are no special tokens.

    thought, thought_rules: see `answer_place.thought_before`.
    """
    functions = [tool["function"] for tool in tools]
    if not special_tokens >= set(TOOL_TAGS) or not any(each.get("strict") for each in functions):
        return None
    rules = _of_tools({each["name"]: each.get("parameters") if each.get("strict") else True for each in functions})
    start = f'start: {thought}PLAIN? ({CALL_OPEN} "call:" call {CALL_CLOSE} PLAIN?)*'
    return _grammar([start, *thought_rules, r"PLAIN: /(.|\n)+/"], rules)


def _of_tools(functions: Mapping[str, object]) -> dict[str, ArgumentRules]:
    """By name. functions: name → schema of the arguments."""
    left, rules = _MOST_WORK, {}
    for place, (name, schema) in enumerate(functions.items()):
        rules[name], left = _rules(schema, f"{place}_", left)
    total = sum(map(_size, rules.values()))
    for name in sorted(rules, key=lambda name: _size(rules[name]), reverse=True):
        if total <= MAX_GRAMMAR_LENGTH:
            break
        total -= _size(rules[name]) - _size(_ANY)
        rules[name] = _ANY
    return rules


def _grammar(lines: Sequence[str], rules: Mapping[str, ArgumentRules]) -> Grammar:
    """lines: the first rules, which name `call`."""
    call = " | ".join(f'{json.dumps(name)} "{{" {each.inner} "}}"' for name, each in rules.items())
    of_tools = (line for each in rules.values() for line in each.lines)
    return Grammar(answer=json.dumps({"lark_grammar": "\n".join([*lines, f"call: {call}", *of_tools]) + VALUES}), of="tools")


def _rules(schema: object, prefix: str, left: int) -> tuple[ArgumentRules, int]:
    """And what is left of the work."""
    try:
        rules = ArgumentRules(schema, prefix, left)
    except TooLarge:
        return _ANY, left // 2  # all of it was spent; half is left to others, so that ever less is spent in vain
    return rules, left - rules.work


def _size(rules: ArgumentRules) -> int:
    return len(rules.inner) + sum(map(len, rules.lines))
