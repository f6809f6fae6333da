"""JSON of clients: what is read, and what is refused."""

import pytest

from backend.json_text import read_json


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": [1, -2.5e3, null, true]}', {"a": [1, -2.5e3, None, True]}), (r'"\ud83d\uDE00é"', "😀é"), ("0", 0)],
)
def test_json_is_read(text, value):
    assert read_json(text) == value


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{bad", "malformed JSON (Expecting property name enclosed in double quotes at character 1)"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "key 'a' 2 times"),
        ("[NaN]", "NaN, which is not a JSON number"),
        ("-Infinity", "-Infinity, which is not a JSON number"),
        ("[-1e999]", "-1e999, which is more than numbers can be"),
        (r'"\ud83d"', "half of a surrogate pair, which is no character"),
        (r'{"\uDE00": 1}', "half of a surrogate pair, which is no character"),
        ('"\udcff"', "half of a surrogate pair, which is no character"),  # bytes of the command line that are not UTF-8
        ("[-" + "9" * 5000 + "]", "an integer of more than 4300 digits"),
        ("[" * 100_000, "JSON that is nested too deeply"),
    ],
)
def test_what_is_no_json_or_means_two_things_is_refused(text, got):
    with pytest.raises(ValueError) as refused:
        read_json(text)
    assert str(refused.value) == got
