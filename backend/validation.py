"""JSON values checked against types, and what is wrong with one in a line: where, got, expected."""

import re
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

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
    that do not say another `type`."""
    errors = error.errors(include_url=False)
    others = {each["loc"][:-1]: each for each in errors if each["loc"][-1:] == ("type",) and each["type"] == "literal_error"}
    meant = [each for each in errors if not any(each["loc"][: len(place)] == place for place in others)]
    deepest = max(meant or errors, key=lambda each: len(each["loc"]))
    if not meant and len({place[:-1] for place in others}) == 1:  # one value, which is none of several
        deepest["ctx"] = {"expected": " or ".join(each["ctx"]["expected"] for each in others.values())}
        deepest["msg"] = f"Input should be {deepest['ctx']['expected']}"
    where, got, key = name, value, ""
    for step in deepest["loc"]:  # steps that are not in the data are pydantic's names of the alternatives
        if isinstance(step, int) and isinstance(got, list) and step < len(got):
            where, got = f"{where}[{step}]", got[step]
        elif isinstance(step, str) and isinstance(got, dict) and step in got:
            if not re.fullmatch(r"[\w-]{1,64}", step):  # a key of the client's own
                key, got = f" at {shown(step)}", got[step]
                break
            where, got = f"{where}.{step}", got[step]
    kind, message, context = deepest["type"], deepest["msg"], deepest.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        key = context["discriminator"].strip("'") if context else deepest["loc"][-1]
        return f"{where}.{key}: got nothing, expected a value; add it"
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        return f"{where}.{key}: got {shown(context['tag'])}, expected one of {context['expected_tags']}"
    message = _EXPECTED.get(kind, message)
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"{where}: got {shown_json(got)}{key}, expected {expected[:1].lower()}{expected[1:]}"
