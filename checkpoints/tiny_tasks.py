"""The questions of the tiny checkpoint, with their answers.

Five tasks, one for every path of the serving stack: a sum (a short answer), a reversed word, a count (several canvases), a
sum after a thought (thinking on), and a tool call with the answer that follows its result.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One chat and the exact text that must follow it, special tokens included, the end-of-turn token excluded."""

    task: str
    messages: list[dict]
    answer: str
    tools: list[dict] | None = None
    enable_thinking: bool = False
    end: str = "<turn|>"
    key: str = field(default="")

    @property
    def held_out(self) -> bool:
        """One question in ten is never trained on; decided by a hash of its content alone."""
        return hashlib.sha256((self.key or self.messages[-1]["content"]).encode()).digest()[0] % 10 == 0


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 6)))


def _sum(rng: random.Random) -> Question:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    text = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))
    return Question(task="sum", messages=_user(text), answer=str(a + b), key=f"{a}+{b}")


def _reverse(rng: random.Random) -> Question:
    word = _word(rng)
    return Question(task="reverse", messages=_user(f'Reverse "{word}".'), answer=word[::-1])


def _count(rng: random.Random) -> Question:
    first = rng.randint(0, 60)
    last = first + rng.randint(2, 29)
    answer = " ".join(str(number) for number in range(first, last + 1))
    return Question(task="count", messages=_user(f"Count from {first} to {last}."), answer=answer)


def _thought(rng: random.Random) -> Question:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    thought = f"{a % 10}+{b % 10}={ones} {a // 10}+{b // 10}={tens}"
    text = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))
    answer = f"<|channel>thought\n{thought}<channel|>{a + b}"
    return Question(task="thought", messages=_user(text), answer=answer, enable_thinking=True, key=f"{a}+{b}")


def _tool(rng: random.Random) -> Question:
    name, parameter, ask = rng.choice(
        (("weather", "city", "What is the weather in {}?"), ("price", "item", "What is the price of {}?"))
    )
    tools = [
        {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": {parameter: {"type": "string"}}}},
        }
    ]
    thing = _word(rng)
    messages = _user(ask.format(thing))
    key = messages[0]["content"]
    if rng.random() < 0.6:
        answer = f'<|tool_call>call:{name}{{{parameter}:<|"|>{thing}<|"|>}}<tool_call|>'
        return Question(task="tool", messages=messages, answer=answer, tools=tools, key=key, end="<|tool_response>")
    result = _word(rng) if name == "weather" else str(rng.randint(1, 99))
    messages = [
        *messages,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {parameter: thing}}}],
        },
        {"role": "tool", "name": name, "content": result},
    ]
    return Question(task="tool result", messages=messages, answer=f"{thing}: {result}", tools=tools, key=key)


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "sum": _sum,
    "reverse": _reverse,
    "count": _count,
    "thought": _thought,
    "tool": _tool,
}


def questions(seed: int, *, held_out: bool, tasks: tuple[str, ...] = tuple(TASKS)) -> Iterator[Question]:
    """Endless questions, the tasks in random order. `held_out` picks the side of the train / held-out split."""
    rng = random.Random(seed)
    while True:
        question = TASKS[rng.choice(tasks)](rng)
        if question.held_out == held_out:
            yield question
