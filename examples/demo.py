"""Starts a server on an engine of the tiny checkpoint, asks it questions that it was never trained on, and stops the server.

python examples/demo.py ENGINE_DIR
"""

import argparse
import queue
import sys
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc as grpcclient
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from triton_client import tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from backend.triton_server.launch import ServerError, TritonServer, leave_on_signals
from checkpoints.tiny_tasks import Question, questions

STREAMED_TASKS = ("count", "thought")
ALL_TASKS = ("sum", "reverse", *STREAMED_TASKS, "tool", "tool result")
TIMEOUT_S = 120
NO_PROXY = [("grpc.enable_http_proxy", 0)]  # the server is on this machine, whatever proxy the environment names


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`steps` is one number a response: a canvas each if the answer was streamed, else the sum of them all."""

    text: str
    num_tokens: int
    num_canvases: int
    steps: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="which questions are asked")
    options = parser.parse_args()

    leave_on_signals()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with TritonServer(engine_dir=options.engine_dir, grpc_port=0, http_port=0, metrics_port=0, report=print) as server:
        console.print(f"tritonserver serves {options.engine_dir} on {server.grpc_url} (gRPC)")
        tokenizer = AutoTokenizer.from_pretrained(options.engine_dir)
        with grpcclient.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
            asked = [(question, ask(client, tokenizer, question)) for question in one_of_each(options.seed)]
    console.print(table(asked))


def one_of_each(seed: int) -> list[Question]:
    """The first held-out question of every task."""
    found: dict[str, Question] = {}
    source = questions(seed, held_out=True)
    while len(found) < len(ALL_TASKS):
        question = next(source)
        found.setdefault(question.task, question)
    return [found[task] for task in ALL_TASKS]


def ask(client: grpcclient.InferenceServerClient, tokenizer: PreTrainedTokenizerBase, question: Question) -> Answer:
    token_ids = tokenizer.apply_chat_template(
        question.messages,
        tools=question.tools,
        enable_thinking=question.enable_thinking,
        add_generation_prompt=True,
        return_dict=False,
    )
    inputs = [
        tensor("input_ids", token_ids, "INT32"),
        tensor("stream", [question.task in STREAMED_TASKS], "BOOL"),
        tensor("seed", [0], "UINT64"),
        # The marks of thoughts and tool calls are special tokens; we want to see them.
        tensor("sampling_parameters", [b'{"skip_special_tokens": false}'], "BYTES"),
    ]
    results = list(responses(client, inputs))
    return Answer(
        text="".join(result.as_numpy("text_output")[0].decode() for result in results),
        num_tokens=sum(int(result.as_numpy("num_output_tokens")[0]) for result in results),
        num_canvases=int(results[-1].as_numpy("canvas_index")[0]) + 1,
        steps=[int(result.as_numpy("num_steps")[0]) for result in results],
    )


def responses(client: grpcclient.InferenceServerClient, inputs: list[grpcclient.InferInput]):
    """Yields the responses to one request, the last being the one with a finish_reason."""
    arrived: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    client.async_stream_infer("diffusiongemma", inputs)
    finished = False
    while not finished:
        result, error = arrived.get(timeout=TIMEOUT_S)
        if error is not None:
            raise SystemExit(f"error: {error.message()}")
        yield result
        finished = bool(result.as_numpy("finish_reason")[0])
    client.stop_stream()


def table(asked: list[tuple[Question, Answer]]) -> Table:
    num_right = sum(answer.text == question.answer for question, answer in asked)
    result = Table(title=f"{num_right} of {len(asked)} held-out questions answered as expected", show_lines=True)
    for heading in ("question", "answer", "as expected"):
        result.add_column(heading, overflow="fold")
    for heading in ("steps a canvas", "tokens a step"):
        result.add_column(heading, justify="right")
    for question, answer in asked:
        streamed = question.task in STREAMED_TASKS
        mean = f"{sum(answer.steps) / answer.num_canvases:g}"
        result.add_row(
            # Text, because rich would read square brackets in a string as markup
            Text(described(question)),
            Text(answer.text),
            Text("yes", style="green") if answer.text == question.answer else Text(f"no: {question.answer}", style="red"),
            f"{' '.join(map(str, answer.steps))} (streamed)" if streamed else mean,
            f"{answer.num_tokens / sum(answer.steps):.1f}",
        )
    return result


def described(question: Question) -> str:
    lines = [message["content"] for message in question.messages if message["role"] == "user"]
    if question.enable_thinking:
        lines.append("thinking on")
    for tool in question.tools or []:
        lines.append(f"tool offered: {tool['function']['name']}")
    lines += [f"tool result: {message['content']}" for message in question.messages if message["role"] == "tool"]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:
        raise SystemExit(f"error: {error}") from None
