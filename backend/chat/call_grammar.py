"""The grammar of an answer that must be a tool call, from where the prompt has begun it; `tools` says what calls look like.

Arguments are held to the tool's schema as far as it says types, properties and which are required, `enum`, `const`, `items`,
`anyOf` and `oneOf`; what else it says does not matter here. They come in the order in which chat templates of this family write
them, sorted without regard to case, which is what the model has learned.
"""

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from backend.chat.tools import BARE_KEY, CALL_CLOSE, CALL_OPEN, QUOTE, TOOL_TAGS
from backend.grammar import MAX_GRAMMAR_LENGTH, Grammar

_VALUES = rf"""
object: "{{" pairs "}}"
pairs: (pair ("," pair)*)?
pair: (KEY | text) ":" value
list: "[" (value ("," value)*)? "]"
value: text | NUMBER | boolean | "null" | object | list
boolean: "true" | "false"
text: {QUOTE} /(.|\n)*/ {QUOTE}
KEY: /[^\s:,{{}}\[\]<>"]+( [^\s:,{{}}\[\]<>"]+)*/
INTEGER: /-?(0|[1-9][0-9]{{0,99}})/
NUMBER: /-?(0|[1-9][0-9]{{0,99}})(\.[0-9]{{1,99}})?([eE][-+]?[0-9]{{1,2}})?/
"""
_MAX_DEPTH = 32  # of a schema; what is deeper may be any value
_OF_TYPE = {
    "string": "text",
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": "boolean",
    "null": '"null"',
    "object": "object",
    "array": "list",
}


def call_grammar(tools: Sequence[Mapping[str, Any]], special_tokens: Set[str], *, begun: str) -> Grammar | None:
    """Calls of `tools`, in OpenAI's form, one at least. begun: the name of the one that the prompt calls, up to the bracket
    behind it; "": the prompt ends before the name. None where tags are no special tokens, which a grammar could name."""
    if not special_tokens >= set(TOOL_TAGS):
        return None
    functions = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    text = _calls(functions, begun)
    if len(text) > MAX_GRAMMAR_LENGTH:
        text = _calls(dict.fromkeys(functions), begun)
    return Grammar(answer=json.dumps({"lark_grammar": text}))


def _calls(functions: Mapping[str, Any], begun: str) -> str:
    rules = _Rules()
    inner = {name: rules.arguments(parameters) for name, parameters in functions.items()}
    call = " | ".join(f'{_literal(name)} "{{" {arguments} "}}"' for name, arguments in inner.items())
    first = f'{inner[begun]} "}}"' if begun else "call"
    lines = [f'start: {first} {CALL_CLOSE} ({CALL_OPEN} "call:" call {CALL_CLOSE})*', f"call: {call}", *rules.lines]
    return "\n".join(lines) + _VALUES


class _Rules:
    """Rules made for schemas."""

    def __init__(self):
        self.lines: list[str] = []

    def arguments(self, schema: object, depth: int = 0) -> str:
        """What stands between the brackets of an object."""
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if not isinstance(properties, Mapping) or not properties:
            return "pairs"
        listed = schema.get("required")
        required = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
        first, tail = [], ""  # of the object's last property, and forwards from there: those that it may begin with
        for name in sorted(properties, key=str.lower, reverse=True):
            key = _literal(name) if BARE_KEY.fullmatch(name) else f"{QUOTE} {_literal(name)} {QUOTE}"
            begins = self._named(f'{key} ":" {self._value(properties[name], depth + 1)} {tail}')
            first = [begins] if name in required else [begins, *first]
            tail = self._named(f'"," {begins}' if name in required else _or(f'"," {begins}', tail))
        alternatives = f"({' | '.join(first)})"
        return alternatives if required & set(properties) else f"{alternatives}?"

    def _value(self, schema: object, depth: int) -> str:
        match schema if depth < _MAX_DEPTH else None:
            case {"enum": [_, *_] as values}:
                return self._any_of([*self._texts(values), *(_constant(each) for each in values if not isinstance(each, str))])
            case {"const": value}:
                return _constant(value)
            case {"anyOf": [_, *_] as options} | {"oneOf": [_, *_] as options}:
                return self._any_of([self._value(option, depth + 1) for option in options])
            case {"type": [_, *_] as types}:
                return self._any_of([self._value({**schema, "type": each}, depth + 1) for each in types])
            case {"type": "object"}:
                return f'"{{" {self.arguments(schema, depth)} "}}"'
            case {"type": "array", "items": items}:
                item = self._named(self._value(items, depth + 1))
                return f'"[" ({item} ("," {item})*)? "]"'
            case {"type": str(kind)}:
                return _OF_TYPE.get(kind, "value")
        return "value"

    def _texts(self, values: Sequence[object]) -> list[str]:
        """Those of them. As a terminal: the lexer takes thousands of choices at once, the parser one by one."""
        texts = [_literal(value) for value in values if isinstance(value, str) and value]
        terminal = [f"{QUOTE} {self._named(' | '.join(texts), kind='TEXT')} {QUOTE}"] if texts else []
        return terminal + [f"{QUOTE} {QUOTE}"] * ("" in values)

    def _any_of(self, expressions: Sequence[str]) -> str:
        return f"({' | '.join(dict.fromkeys(expressions))})"

    def _named(self, expression: str, *, kind: str = "rule") -> str:
        """kind: capitals make it a terminal."""
        name = f"{kind}_{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name


def _or(expression: str, other: str) -> str:
    """other: "" for nothing."""
    return f"({expression} | {other})" if other else f"({expression})?"


def _constant(value: object) -> str:
    if isinstance(value, str):
        return f"{QUOTE} {_literal(value)} {QUOTE}" if value else f"{QUOTE} {QUOTE}"
    return "value" if isinstance(value, Mapping | list) else _literal(json.dumps(value))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
