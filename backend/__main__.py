"""The backend's command line: `python -m backend serve` and `python -m backend generate`."""

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from backend.errors import RequestError
from backend.triton_server.launch import MODEL_REPOSITORY, ServerError, TritonServer
from backend.triton_server.request import parse_json_object
from contract.checkpoint import CheckpointError
from contract.manifest import ManifestError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

_CHECK_INTERVAL_S = 0.5


@app.command()
def serve(
    engine: Annotated[Path | None, typer.Option(help="Engine directory; without it, the one in config.pbtxt.")] = None,
    model_repository: Annotated[Path, typer.Option(help="Triton model repository.")] = MODEL_REPOSITORY,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8002,
) -> None:
    """Serve an engine with Triton Inference Server until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # leaves the `with` block, as Ctrl-C does
    server = TritonServer(
        engine_dir=engine,
        model_repository=model_repository,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
    )
    try:
        with server:
            addresses = f"gRPC {server.grpc_url}  HTTP {server.http_url}  metrics {server.metrics_url}"
            print(f"ready  {addresses}  log {server.log_path}", flush=True)
            while True:
                server.check_alive()
                time.sleep(_CHECK_INTERVAL_S)
    except KeyboardInterrupt:
        pass
    except ServerError as error:
        _fail(str(error))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...")],
    engine: Annotated[Path, typer.Option(help="Engine directory.")],
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template, each prompt being a user's turn.")] = False,
    sampling: Annotated[str, typer.Option(help="Sampling parameters, a JSON object.", metavar="JSON")] = "{}",
) -> None:
    """Answer prompts without a server; all of them are one batch."""
    from backend import LLM, SamplingConfig  # loads PyTorch, which `serve` and `--help` can do without

    try:
        config = SamplingConfig.from_mapping(parse_json_object("--sampling", sampling))
        llm = LLM(engine)
        for result in llm.generate([_chat_token_ids(engine, prompt) for prompt in prompts] if chat else prompts, config):
            print(result.text)
            steps = " ".join(map(str, result.num_steps))
            print(
                f"[{result.finish_reason}, {len(result.token_ids)} tokens, denoising steps a canvas: {steps}]", file=sys.stderr
            )
    except (RequestError, ManifestError, CheckpointError) as error:
        _fail(str(error))


def _chat_token_ids(engine: Path, prompt: str) -> list[int]:
    from transformers import AutoTokenizer

    if not (engine / "chat_template.jinja").is_file():
        _fail(f"{engine}: got no chat_template.jinja, expected the checkpoint's; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    return AutoTokenizer.from_pretrained(engine).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
