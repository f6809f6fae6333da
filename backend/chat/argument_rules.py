"""Rules of Lark for a tool's arguments, from its JSON schema, in the form in which the model writes them; see `tools`.

They are held to what the schema says of types, properties and which are required, `additionalProperties`, `items`,
`prefixItems`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and `$ref`; what else it says does not matter here. Properties come
in the order in which chat templates of this family write them, sorted without regard to case, which is what the model has
learned.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from backend.chat.tools import BARE_KEY, QUOTE

VALUES = rf"""
object: "{{" pairs "}}"
pairs: (pair ("," pair)*)?
pair: key ":" value
list: "[" (value ("," value)*)? "]"
value: text | NUMBER | boolean | "null" | object | list
boolean: "true" | "false"
key: KEY | text
text: {QUOTE} TEXT? {QUOTE}
TEXT: /(.|\n)+/ & ~/(.|\n)*(<\|"\|>|<tool_call\|>|<\|tool_call>)(.|\n)*/
KEY: /[^\s\x00-\x1f:,{{}}\[\]<>"]+( [^\s\x00-\x1f:,{{}}\[\]<>"]+)*/
INTEGER: /-?(0|[1-9][0-9]{{0,99}})/
NUMBER: /-?(0|[1-9][0-9]{{0,99}})(\.[0-9]{{1,99}})?([eE][-+]?[0-9]{{1,2}})?/
"""
"""What every such grammar has. A text has no tags, spelled in ordinary tokens: who reads the call would take them for such."""

_MAX_DEPTH = 32  # of a schema; what is deeper may be any value
_KEYWORDS = "type properties required additionalProperties items prefixItems minItems enum const anyOf oneOf allOf $ref".split()
_OF_TYPE = {
    "string": "text",
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": "boolean",
    "null": '"null"',
    "object": "object",
    "array": "list",
}
Plain = dict[str, Any]
"""Of a schema the keywords that count, references and parts of `allOf` taken in."""


class TooLarge(Exception):
    """The schema makes more rules than are worth their time."""


class ArgumentRules:
    """Those of one tool. inner: what stands between the brackets of its call. lines: the rules that it names. work: characters
    of rules made, those that other rules repeat included.

    prefix: of the rules' names, without letters. Raises TooLarge at more work than `most`.
    """

    def __init__(self, schema: object, prefix: str, most: int):
        self.lines: list[str] = []
        self.work = 0
        self._root, self._prefix, self._most = schema, prefix, most
        self._of_references: dict[str, str] = {}
        self.inner = self._pairs(self._plain(schema, 0), 0)

    def _pairs(self, plain: Plain, depth: int) -> str:
        """What stands between the brackets of an object."""
        properties, listed = plain.get("properties"), plain.get("required")
        required = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
        properties = dict.fromkeys(sorted(required), True) | (dict(properties) if isinstance(properties, Mapping) else {})
        if not properties:
            more = plain.get("additionalProperties")
            if more is False:
                return ""
            value = self._value(more, depth + 1)
            pair = "pair" if value == "value" else self._named(f'key ":" {value}')
            return f'({pair} ("," {pair})*)?'
        first, tail = [], ""  # of the object's last property, and forwards from there: those that it may begin with
        for name in sorted(properties, key=str.lower, reverse=True):
            begins = self._named(f'{_key(name)} ":" {self._value(properties[name], depth + 1)} {tail}')
            first = [begins] if name in required else [begins, *first]
            tail = self._named(f'"," {begins}' if name in required else _or(f'"," {begins}', tail))
        alternatives = f"({' | '.join(first)})"
        return alternatives if required else f"{alternatives}?"

    def _value(self, schema: object, depth: int) -> str:
        if depth >= _MAX_DEPTH or not isinstance(schema, Mapping):
            return "value"
        if set(schema) & set(_KEYWORDS) == {"$ref"}:
            return self._referred(schema["$ref"], depth)
        made = self._of_plain(self._plain(schema, depth), depth)
        self._did(len(made))
        return made

    def _of_plain(self, plain: Plain, depth: int) -> str:
        for key in ("anyOf", "oneOf"):
            if isinstance(options := plain.get(key), list) and options:
                rest = {name: value for name, value in plain.items() if name != key}
                return self._any_of([self._value(self._with(rest, each, depth), depth + 1) for each in options])
        match plain:
            case {"enum": [_, *_] as values}:
                return self._constants(values)
            case {"const": value}:
                return self._constants([value])
            case {"type": [_, *_] as types}:
                kinds = dict.fromkeys(each for each in types if isinstance(each, str))
                return self._any_of([self._value(plain | {"type": each}, depth + 1) for each in kinds] or ["value"])
            case {"type": "object"}:
                return f'"{{" {self._pairs(plain, depth)} "}}"'
            case {"type": "array", "prefixItems": [_, *_] as parts} if plain.get("minItems") == len(parts):
                return _in_a_row("[", [self._value(part, depth + 1) for part in parts], "]")
            case {"type": "array", "items": False}:
                return '"[" "]"'
            case {"type": "array", "items": items}:
                item = self._named(self._value(items, depth + 1))
                return f'"[" ({item} ("," {item})*)? "]"'
            case {"type": str(kind)}:
                return _OF_TYPE.get(kind, "value")
            case {"properties": Mapping()}:
                return f'"{{" {self._pairs(plain, depth)} "}}"'
        return "value"

    # -- What a schema consists of

    def _plain(self, schema: object, depth: int) -> Plain:
        if not isinstance(schema, Mapping) or depth >= _MAX_DEPTH:
            return {}
        plain = {key: schema[key] for key in _KEYWORDS if key in schema}
        parts = [self._target(plain.pop("$ref"))] if "$ref" in plain else []
        listed = plain.pop("allOf", None)
        parts += listed if isinstance(listed, list) else []
        for part in reversed(parts):
            plain = self._merged(self._plain(part, depth + 1), plain)
        return plain

    def _with(self, rest: Plain, option: object, depth: int) -> object:
        """An alternative, with what stands beside all of them."""
        return self._merged(rest, self._plain(option, depth + 1)) if rest else option

    def _merged(self, first: Plain, second: Plain) -> Plain:
        """Both; the second, where they differ."""
        merged = first | second
        for key, kind in (("properties", Mapping), ("required", list)):
            both = [each[key] for each in (first, second) if isinstance(each.get(key), kind)]
            if len(both) == 2:
                merged[key] = {**both[0], **both[1]} if kind is Mapping else [*both[0], *both[1]]
                self._did(len(merged[key]))
        self._did(len(merged))
        return merged

    def _target(self, reference: object) -> object:
        """What a reference within the schema names; True, any value, for others."""
        found = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or step not in found:
                return True
            found = found[step]
        return found

    def _referred(self, reference: object, depth: int) -> str:
        """A rule for what is named, made once: it may name itself."""
        target = self._target(reference)
        if not isinstance(target, Mapping):
            return "value"
        if reference not in self._of_references:
            self._of_references[reference] = name = self._named("")
            place = len(self.lines) - 1
            made = self._value(target, depth + 1)
            self.lines[place] = f"{name}: {'value' if made == name else made}"
        return self._of_references[reference]

    # -- What rules consist of

    def _constants(self, values: Sequence[object]) -> str:
        """Those values. As terminals: the lexer takes thousands of choices at once, the parser one by one."""
        texts = [_literal(value) for value in values if isinstance(value, str) and value]
        atoms = [_literal(json.dumps(value)) for value in values if not isinstance(value, str | Mapping | list)]
        made = [f"{QUOTE} {self._named(' | '.join(texts), kind='TEXT')} {QUOTE}"] if texts else []
        made += [self._named(" | ".join(atoms), kind="ATOM")] if atoms else []
        made += [_text("")] if "" in values else []
        return self._any_of(made + [_constant(value, 0) for value in values if isinstance(value, Mapping | list)])

    def _any_of(self, expressions: Sequence[str]) -> str:
        return f"({' | '.join(dict.fromkeys(expressions))})"

    def _named(self, expression: str, *, kind: str = "rule") -> str:
        """kind: capitals make it a terminal."""
        self._did(len(expression))
        name = f"{kind}_{self._prefix}{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name

    def _did(self, amount: int) -> None:
        self.work += amount + 8
        if self.work > self._most:
            raise TooLarge


def _or(expression: str, other: str) -> str:
    """other: "" for nothing."""
    return f"({expression} | {other})" if other else f"({expression})?"


def _constant(value: object, depth: int) -> str:
    if isinstance(value, str):
        return _text(value)
    if depth >= _MAX_DEPTH:
        return "value"
    if isinstance(value, list):
        return _in_a_row("[", [_constant(each, depth + 1) for each in value], "]")
    if isinstance(value, Mapping):
        names = sorted(value, key=str.lower)
        return _in_a_row("{", [f'{_key(name)} ":" {_constant(value[name], depth + 1)}' for name in names], "}")
    return _literal(json.dumps(value))


def _in_a_row(opening: str, parts: Sequence[str], closing: str) -> str:
    return f'"{opening}" ' + ' "," '.join(parts) + f' "{closing}"'


def _key(name: str) -> str:
    return _literal(name) if BARE_KEY.fullmatch(name) else _text(name)


def _text(text: str) -> str:
    return f"{QUOTE} {_literal(text)} {QUOTE}" if text else f"{QUOTE} {QUOTE}"


def _literal(text: str) -> str:
    return json.dumps(text)
