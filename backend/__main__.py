"""The backend's command line: `python -m backend serve`, `openai`, `config`, `generate`, `chat` and `plan`."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from backend.addresses import answers, host_and_port, host_and_port_of_url
from backend.errors import RequestError
from backend.gpu_groups import GpuGroup, group_name, parse_gpu_groups
from backend.json_text import parse_json_object
from backend.parameters import INT32_MAX
from backend.triton_server.launch import MODEL_NAME, MODEL_REPOSITORY, ServerError, leave_on_signals
from backend.triton_server.model_config import Instances, config_pbtxt
from backend.triton_server.settings import Settings
from contract.problems import printable
from contract.standard_streams import standard_streams

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

_FEWEST_BYTES = 1_000_000  # no engine takes so few: a number that is lower lacks its unit
_Settings = Annotated[
    list[str], typer.Option("--set", metavar="NAME=VALUE", help="A setting of config.pbtxt; may be repeated.")
]
_NumInstances = Annotated[int | None, typer.Option(min=1, max=INT32_MAX, help="Replicas, or replicas a GPU.")]
_ApiKeyFile = Annotated[Path | None, typer.Option(help="A file of keys that clients of OpenAI's API may send, one a line.")]
_AllowedOrigins = Annotated[
    list[str], typer.Option("--allowed-origin", metavar="ORIGIN", help="Whose pages may call OpenAI's API; may be repeated.")
]
_Images = Annotated[list[Path], typer.Option("--image", help="A picture to ask about; may be repeated.")]
_Gpus = Annotated[str, typer.Option(metavar="0,1,…", help="GPUs to have replicas on.")]
_GpuGroups = Annotated[
    str, typer.Option(metavar="0,1,…", help="GPUs to have replicas on; 0+1,2+3: two each, which share an engine's experts.")
]


@app.command()
def serve(
    engine: Annotated[Path | None, typer.Option(help="Engine directory; without it, the one in config.pbtxt.")] = None,
    model_repository: Annotated[Path, typer.Option(help="Triton model repository.")] = MODEL_REPOSITORY,
    host: Annotated[str, typer.Option(help="Address to listen on, with all ports; Triton's know no keys.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8002,
    openai_port: Annotated[int, typer.Option(min=0, max=65535, help="OpenAI's API beside it; 0: a free one.")] = 9000,
    openai: Annotated[bool, typer.Option("--openai/--no-openai", help="With or without OpenAI's API.")] = True,
    api_key_file: _ApiKeyFile = None,
    allowed_origin: _AllowedOrigins = (),
    setting: _Settings = (),
    instances: _NumInstances = None,
    gpus: _GpuGroups = "",
) -> None:
    """Serve an engine with Triton Inference Server, and OpenAI's API in front of it, until it is told to stop."""
    from backend import serving
    from backend.openai_server.launch import FrontEndError
    from backend.openai_server.settings import OpenAISettings, checked_origins, read_api_keys

    leave_on_signals("stopping; requests under way have a few seconds")
    parameters = _parameters(setting)
    if engine is not None and "engine_dir" in parameters:
        _fail(f"--set engine_dir: got {parameters['engine_dir']} beside --engine {engine}; remove one")
    groups = _gpu_groups(gpus)
    try:
        keys = read_api_keys(api_key_file) if api_key_file else ()
        origins = checked_origins(allowed_origin)
        front_end = OpenAISettings(host=host, port=openai_port, api_keys=keys, allowed_origins=origins)
        serving.serve(
            front_end if openai else None,
            host=host,
            ports={"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port},
            replicas=instances,
            gpu_groups=groups,
            report=_note,
            engine_dir=engine,
            model_repository=model_repository,
            parameters=parameters,
        )
    except (ServerError, FrontEndError, ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))


@app.command("openai")
def openai_front_end(
    triton: Annotated[
        list[str], typer.Option(metavar="HOST:PORT", help="A Triton server's gRPC service; repeated, they share the load.")
    ] = ("localhost:8001",),
    triton_metrics: Annotated[str | None, typer.Option(help="URL that /metrics passes on; for one server.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 9000,
    model: Annotated[str, typer.Option(help="Triton model.")] = "diffusiongemma",
    served_name: Annotated[str, typer.Option(help="What clients call the model.")] = "diffusiongemma",
    api_key: Annotated[list[str] | None, typer.Option(help="A key that clients may send; may be repeated.")] = None,
    api_key_file: _ApiKeyFile = None,
    allowed_origin: _AllowedOrigins = (),
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of one request, images in base64 included.")] = 192 * 1024**2,
) -> None:
    """Serve OpenAI's API in front of running Triton servers until SIGINT or SIGTERM."""
    from backend.openai_server.launch import FrontEndError
    from backend.openai_server.serve import serve
    from backend.openai_server.settings import OpenAISettings, checked_origins, read_api_keys

    if not all(key.strip() for key in api_key or []):
        _fail("--api-key: got an empty key, expected at least one character; leave the option out to serve without keys")
    try:
        wanted = [("--triton", each, host_and_port("--triton", each)) for each in triton]
        if twice := [each for at, each in enumerate(triton) if each in triton[:at]]:
            _fail(f"--triton: got {twice[0]} twice, expected each server once; remove one")
        if triton_metrics:
            wanted.append(("--triton-metrics", triton_metrics, host_and_port_of_url("--triton-metrics", triton_metrics)))
            if len(triton) > 1:
                got = f"got {triton_metrics} beside {len(triton)} of --triton, expected it beside one"
                _fail(f"--triton-metrics: {got}; leave it out, and scrape /metrics of each server")
        settings = OpenAISettings(
            triton_urls=tuple(triton),
            triton_metrics_url=triton_metrics,
            model=model,
            served_name=served_name,
            host=host,
            port=port,
            api_keys=(*(api_key or []), *(read_api_keys(api_key_file) if api_key_file else ())),
            allowed_origins=checked_origins(allowed_origin),
            max_body_bytes=max_body_bytes,
        )
        for option, given, at in wanted:
            if not answers(*at):
                _note(f"{option}: nothing answers at {given} yet; starting all the same")
        serve(settings)
    except (FrontEndError, ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))


@app.command()
def config(
    output: Annotated[Path, typer.Option(help="Where to write it.")] = MODEL_REPOSITORY / MODEL_NAME / "config.pbtxt",
    setting: _Settings = (),
    instances: _NumInstances = None,
    gpus: _Gpus = "",
) -> None:
    """Write the model's config.pbtxt."""
    settings = Settings.from_parameters(_parameters(setting))
    groups = _gpu_groups(gpus)
    if together := next((group for group in groups if len(group) > 1), None):
        _fail(f"--gpus: got {group_name(together)}, expected single GPUs: a worker of one model sees one, or all")
    text = config_pbtxt(settings, Instances(count=instances or 1, gpus=tuple(gpu for [gpu] in groups)))
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"--output: {output} cannot be written ({error.strerror}), expected a file in an existing directory")
    print(f"wrote {output}")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...")],
    engine: Annotated[Path, typer.Option(help="Engine directory.")],
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template, each prompt being a user's turn.")] = False,
    image: _Images = (),
    sampling: Annotated[str, typer.Option(help="Sampling parameters, a JSON object.", metavar="JSON")] = "{}",
) -> None:
    """Answer prompts without a server; all of them are one batch, and every image goes with each of them.

    With --chat an image stands before the text; without, where the prompt has its placeholder.
    """
    # These load PyTorch, which `serve`, `openai` and `--help` can do without.
    from backend import LLM, SamplingConfig
    from backend.terminal_chat import user_turn
    from contract.checkpoint import CheckpointError
    from contract.manifest import ManifestError

    try:
        config = SamplingConfig.from_mapping(parse_json_object("--sampling", sampling))
        llm, images = LLM(engine), [image] * len(prompts)
        chats = [[user_turn(prompt, len(image))] for prompt in prompts]
        for result in llm.chat(chats, config, images=images) if chat else llm.generate(prompts, config, images=images):
            print(result.text)
            steps = " ".join(map(str, result.num_steps))
            print(
                f"[{result.finish_reason}, {len(result.token_ids)} tokens, denoising steps a canvas: {steps}]", file=sys.stderr
            )
    except (RequestError, ManifestError, CheckpointError) as error:
        _fail(*_problems(error))


@app.command()
def chat(
    engine: Annotated[Path, typer.Option(help="Engine directory.")],
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first.")] = False,
    sampling: Annotated[str, typer.Option(help="Sampling parameters, a JSON object.", metavar="JSON")] = "{}",
) -> None:
    """Chat in the terminal and watch the canvas resolve; or answer the lines of standard input.

    Without a terminal, notes and errors go to standard error, and the exit status is 1 if a question has no answer.
    """
    from rich.console import Console

    from backend import LLM, SamplingConfig
    from backend.terminal_chat import HELP, TerminalChat
    from contract.checkpoint import CheckpointError
    from contract.manifest import ManifestError

    is_typed = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused as a question, and the chat goes on
    console = Console()
    notes = console if is_typed and console.is_terminal else Console(stderr=True)
    try:
        config = SamplingConfig.from_mapping(parse_json_object("--sampling", sampling))
        session = TerminalChat(LLM(engine, max_sequences=1), console, config, thinking=thinking, notes=notes)
        if is_typed:
            notes.print(HELP, style="dim")
        all_answered = session.run(_typed_lines(notes.input) if is_typed else sys.stdin)
    except (RequestError, ManifestError, CheckpointError) as error:
        _fail(*_problems(error))
    if not all_answered and notes is not console:
        raise typer.Exit(1)


@app.command()
def plan(
    engine: Annotated[Path, typer.Argument(help="Engine directory, or one that has a manifest alone.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory for everything, such as 80GB or 79.6GiB.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; without it, what the engine was built for.")] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once that the server is to take; 16, if the engine takes as many.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a sequence; may be repeated.")] = None,
) -> None:
    """Say what serving an engine takes in memory, and how many sequences of which length fit; nothing is loaded."""
    from rich.console import Console

    from backend.capacity import LENGTHS, capacities, parse_bytes, table
    from backend.planner import EngineLimits, plan_memory
    from contract.manifest import ManifestError, read_manifest

    if device not in (None, "cpu", "cuda"):
        _fail(f"--device: got {device!r}, expected cpu or cuda")
    try:
        manifest = read_manifest(engine)
        memory_bytes, device_type = parse_bytes(memory), device or manifest.build.device
        if memory.strip().isdecimal() and memory_bytes < _FEWEST_BYTES:
            _fail(f"--memory: got {memory!r}, which is {memory_bytes} bytes, expected a unit too, such as 80GB or 79.6GiB")
        longest = manifest.model.max_position_embeddings
        if too_long := [each for each in length or () if each > longest]:
            _fail(f"--length: got {too_long[0]}, expected at most {longest}, the positions of the model")
        limits = EngineLimits(max_sequences=max_sequences, memory_bytes=memory_bytes)
        planned = plan_memory(manifest, limits, device_type=device_type)
    except ManifestError as error:
        _fail(re.sub(r"^memory(_bytes)?:", "--memory:", str(error)))
    rows = capacities(manifest, memory_bytes, device_type=device_type, lengths=sorted(length or LENGTHS))
    print(f"with --set max_sequences={planned.max_sequences} --set memory_bytes={memory_bytes}:\n{planned.report()}")
    print("the most of each length, with max_sequences set to just that many:")
    Console().print(table(rows))


def _parameters(settings: Sequence[str]) -> dict[str, str]:
    """What `--set` says, checked."""
    parameters: dict[str, str] = {}
    for each in settings:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            _fail(f"--set: got {each!r}, expected NAME=VALUE, such as max_sequences=8")
        if name in parameters:
            _fail(f"--set {name}: got {parameters[name]!r} and {value!r}, expected one value")
        parameters[name] = value
    try:
        Settings.from_parameters(parameters)
    except ValueError as error:
        _fail(f"--set: {str(error).removeprefix('config.pbtxt: ')}")
    return parameters


def _typed_lines(ask: Callable[[str], str]) -> Iterator[str]:
    """Until the end of input, or Ctrl-C at the prompt."""
    while True:
        try:
            yield ask("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return


def _gpu_groups(text: str) -> list[GpuGroup]:
    try:
        return parse_gpu_groups(text)
    except ValueError as error:
        _fail(str(error))


def _note(line: str) -> None:
    """On standard error, which may be a terminal that is closed."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _problems(error: Exception) -> list[str]:
    """A line each. Of a checkpoint there may be several; in other errors a line break is of a name that they quote."""
    from contract.checkpoint import CheckpointError

    return str(error).split("\n") if isinstance(error, CheckpointError) else [str(error)]


def _fail(*lines: str) -> NoReturn:
    for line in lines:
        print(f"error: {printable(line)}", file=sys.stderr)
    raise typer.Exit(1)


def main() -> None:
    """The command line."""
    with standard_streams():
        app()


if __name__ == "__main__":
    main()
