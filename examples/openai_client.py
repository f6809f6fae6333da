"""OpenAI's client against this server: an answer streamed, a thought, and a tool call with its result.

    make serve
    python examples/openai_client.py

The questions are those that the tiny checkpoint knows. Needs `openai`.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from openai import APIConnectionError, OpenAI, OpenAIError

MODEL = "diffusiongemma"
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:9000/v1")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args()
    with OpenAI(base_url=options.base_url, api_key=options.api_key) as client:
        stream_an_answer(client)
        think(client)
        call_a_tool(client)


def stream_an_answer(client: OpenAI) -> None:
    question = {"role": "user", "content": "Count from 3 to 30."}
    for chunk in client.chat.completions.create(model=MODEL, messages=[question], stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)  # a canvas at a time
    print()


def think(client: OpenAI) -> None:
    question = {"role": "user", "content": "What is 17 + 25?"}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(model=MODEL, messages=[question], extra_body=thinking).choices[0].message
    print(f"{message.content}   (thought: {message.reasoning_content})")


def call_a_tool(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the weather in ulm?"}]
    message = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        print(f"calls {call.function.name}({call.function.arguments})")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    print(client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message.content)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except APIConnectionError as error:
        raise SystemExit(f"error: {error.request.url} cannot be reached; start a server with: make serve") from None
    except OpenAIError as error:  # the server refuses
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    with errors_in_one_line():
        main()
