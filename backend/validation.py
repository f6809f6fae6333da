"""JSON values checked against types, and what is wrong with one in a line: where, got, expected."""

import re
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from backend.errors import refused
from backend.parameters import shown, shown_json

T = TypeVar("T")


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # clients send back what they got: refusal, annotations …


# Where pydantic's own word is of Python, not of JSON.
_EXPECTED = {
    "dict_type": "a JSON object",
    "model_attributes_type": "a JSON object",
    "model_type": "a JSON object",
    "list_type": "a list",
    "iterable_type": "a list",
    "none_required": "null",
}


def checked(name: str, adapter: TypeAdapter[T], value: object) -> T:
    """`value` as `adapter` reads it; `name` is what messages call it. Raises RequestError INVALID_ARGUMENT."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise refused(_line(name, value, error)) from None


def _line(name: str, value: object, error: ValidationError) -> str:
    """What is wrong with `value`. Of the errors of alternatives, the one deepest in the data is about what was meant, of those
    that do not say another `type`. Where all do, the `type` itself is wrong."""
    errors = error.errors(include_url=False)
    others = {each["loc"][:-1]: each for each in errors if each["loc"][-1:] == ("type",) and each["type"] == "literal_error"}
    meant = [each for each in errors if not any(each["loc"][: len(place)] == place for place in others)]
    # Of other types, the one furthest out: those within it follow from it.
    fault = max(meant, key=_depth) if meant else min(others.values(), key=_depth)
    places = [_place(name, value, fault["loc"], with_tags=with_tags) for with_tags in (False, True)]
    where, got, key = next((place for place in places if place[1] is fault["input"]), places[0])
    kind, message, context = fault["type"], fault["msg"], fault.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        key = context["discriminator"].strip("'") if context else fault["loc"][-1]
        return f"{where}.{key}: got nothing, expected a value; add it"
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        return f"{where}.{key}: got {shown(context['tag'])}, expected one of {context['expected_tags']}"
    if not meant:
        alternatives = [each for each in others.values() if _place(name, value, each["loc"], with_tags=False)[0] == where]
        message = " or ".join(each["ctx"]["expected"] for each in alternatives)
    message = _EXPECTED.get(kind, message)
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"{where}: got {shown_json(got)}{key}, expected {expected[:1].lower()}{expected[1:]}"


def _depth(error: ErrorDetails) -> int:
    return len(error["loc"])


def _place(name: str, value: object, steps: Sequence[str | int], *, with_tags: bool) -> tuple[str, object, str]:
    """(where, what is there, the client's own key that it is at, if it is) of an error. Steps that are not in the data are
    pydantic's names of the alternatives. with_tags: so is the first in an object that is its `type` or `role`, also where the
    object has a key of that name."""
    where, got, tagged = name, value, None
    for step in steps:
        if with_tags and isinstance(got, dict) and got is not tagged and step in (got.get("type"), got.get("role")):
            tagged = got
        elif isinstance(step, int) and isinstance(got, list) and step < len(got):
            where, got = f"{where}[{step}]", got[step]
        elif isinstance(step, str) and isinstance(got, dict) and step in got:
            if not re.fullmatch(r"[\w-]{1,64}", step):
                return where, got[step], f" at {shown(step)}"
            where, got = f"{where}.{step}", got[step]
    return where, got, ""
