"""Structured output: an answer that is a text of a grammar. A JSON schema, a regular expression, a list of choices is one, too.

    {"json": {"type": "object", …}}  ──checked_grammar──▶  Grammar

What a request may ask for, as llguidance takes it. `grammar_check` has it looked at, `answer_grammar` holds answers to it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from llguidance import LLMatcher, regex_to_lark

from backend.errors import RequestError, refused
from backend.json_text import read_json
from backend.parameters import shown

MAX_GRAMMAR_LENGTH = 65_536  # characters
# Rules that let every token be read in several ways take 0.1 s a canvas with so many, minutes with 2,000; schemas do not.
_MAX_READINGS_OF_RULES = 300
# Between the parts of a JSON text: as people and programs write it. More would be room for an answer of nothing else.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,40})?"}
_EXPECTED = (
    'one of {"json": a JSON schema}, {"json_object": true}, {"regex": a text}, {"choice": a list of texts} and '
    '{"grammar": a text in llguidance\'s form of Lark}'
)


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """answer: as llguidance takes it, JSON. before: rules of Lark, whose `start` says where in the model's text `@answer`
    stands; "": it is all of it. max_readings: that a text may have at once, in llguidance's count of a parser's items. of: the
    parameter that asks for it."""

    answer: str
    before: str = ""
    max_readings: int = 2000
    of: str = "structured_outputs"

    def refusal(self, problem: str) -> RequestError:
        """INVALID_ARGUMENT for who gave what it is made of."""
        return refused(f"{self.of}: {problem}; change the {'grammar' if self.of == Grammar.of else 'schemas'}")

    @property
    def text(self) -> str:
        """What a matcher is made of."""
        answer = {**json.loads(self.answer), "name": "answer"}
        return json.dumps({"grammars": [{"lark_grammar": self.before}, answer] if self.before else [answer]})


def checked_grammar(value: object) -> Grammar | None:
    """Raises ValueError for what is none at first sight; see `grammar_check` for the rest."""
    if value is None or isinstance(value, Grammar):
        return value
    name, content = _only_item(value)
    answer = json.dumps(_READERS[name](f"structured_outputs.{name}", content))
    max_readings = _MAX_READINGS_OF_RULES if name == "grammar" else Grammar.max_readings
    if len(answer) > MAX_GRAMMAR_LENGTH:
        raise ValueError(
            f"structured_outputs.{name}: got {len(answer)} characters, expected at most {MAX_GRAMMAR_LENGTH}; shorten it"
        )
    return Grammar(answer=answer, max_readings=max_readings)


def _only_item(value: object) -> tuple[str, object]:
    given = {name: each for name, each in value.items() if each is not None} if isinstance(value, Mapping) else {}
    if len(given) != 1 or not set(given) <= set(_READERS):
        raise ValueError(f"structured_outputs: got {shown(value)}, expected {_EXPECTED}")
    [(name, content)] = given.items()
    return name, content


def _json_schema(name: str, schema: object) -> dict:
    if isinstance(schema, str):
        try:
            schema = read_json(schema)
        except ValueError as error:
            raise ValueError(f"{name}: got {error}: {shown(schema)}; expected a JSON schema") from None
    if not isinstance(schema, Mapping):
        raise ValueError(f"{name}: got {shown(schema)}, expected a JSON schema, an object")
    if "x-guidance" in schema:
        raise ValueError(f"{name}: got x-guidance, which would change how llguidance reads it; remove it")
    try:
        text = json.dumps(schema, allow_nan=False)
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: got {shown(schema)}, which is refused: {' '.join(str(error).split())}") from None
    return json.loads(grammar)["grammars"][0]


def _json_object(name: str, wanted: object) -> dict:
    if wanted is not True:
        raise ValueError(f"{name}: got {shown(wanted)}, expected true")
    return _json_schema(name, {"type": "object"})


def _regex(name: str, regex: object) -> dict:
    text = _text(name, regex)
    if (len(text) - len(text.rstrip("\\"))) % 2:  # what would take it for the next character's has none
        raise ValueError(f"{name}: got {shown(text)}, expected no single backslash at the end; double it")
    return {"lark_grammar": f"start: /{regex_to_lark(text)}/"}


def _choice(name: str, choices: object) -> dict:
    if not isinstance(choices, list | tuple) or not choices:
        raise ValueError(f"{name}: got {shown(choices)}, expected a list of non-empty texts")
    # A terminal, in capitals: the lexer takes thousands of choices at once, the parser one by one.
    return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(_text(name, choice)) for choice in choices)}


def _lark(name: str, grammar: object) -> dict:
    return {"lark_grammar": _text(name, grammar)}


def _text(name: str, text: object) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name}: got {shown(text)}, expected a non-empty text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: got {shown(text)}, with half of a surrogate pair, expected text") from None
    return text


_READERS = {"json": _json_schema, "json_object": _json_object, "regex": _regex, "choice": _choice, "grammar": _lark}
