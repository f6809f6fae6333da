"""Offline use: `LLM(engine_dir).generate(prompts, sampling)`, `.chat(messages, sampling)`, `.stream(prompt, sampling)`."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backend.chat.answer import AnswerFormat
from backend.chat.messages import chat_request, placed_images
from backend.chat.template import ChatTemplate
from backend.engine import Engine, EngineLimits
from backend.errors import RequestError, refused
from backend.generation import Generation, Piece, PieceReader
from backend.grammar_check import check_grammar
from backend.images.limits import ImageLimits
from backend.images.loading import ImageLoader, ImageSource
from backend.images.local import local_images
from backend.images.placeholders import expand
from backend.images.preprocess import ImagePatches
from backend.job import CanvasOutput, DraftOutput
from backend.parameters import shown
from backend.sampling_config import ResolvedSampling, SamplingConfig
from backend.text_stream import EVERYWHERE, StopScope
from contract.manifest import ManifestError

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Images = Sequence[ImageSource]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A prompt that can be served. form: how to read a chat's answer."""

    prompt_ids: list[int]
    images: tuple[ImagePatches, ...]
    sampling: ResolvedSampling
    form: AnswerFormat | None = None

    @property
    def stop_scope(self) -> StopScope:
        return self.form.stop_scope if self.form else EVERYWHERE


class LLM:
    """An engine directory, loaded for offline generation. Used by one thread.

    llm = LLM("engines/diffusiongemma")
    [result] = llm.generate("What is 2 + 2?", SamplingConfig(seed=1))
    [result] = llm.chat([{"role": "user", "content": "What is 2 + 2?"}])
    """

    def __init__(
        self,
        engine_dir: str | PathLike,
        *,
        max_sequences: int | None = None,
        max_cached_tokens: int | None = None,
        checkpoint_dir: str | PathLike | None = None,
        image_soft_tokens: int | None = None,
    ):
        """See `EngineLimits` for the sizes; `checkpoint_dir` overrides where the weights are, `image_soft_tokens` how many
        tokens an image may have.

        Raises:
            ManifestError, CheckpointError: the engine or its checkpoint cannot be used.
            ValueError: see `ImageLoader`.
        """
        limits = EngineLimits(max_sequences=max_sequences, max_cached_tokens=max_cached_tokens)
        self._engine = Engine.load(Path(engine_dir), limits, Path(checkpoint_dir) if checkpoint_dir else None)
        self._images = _image_loader(self._engine, image_soft_tokens)
        try:
            self._template = ChatTemplate.load(Path(engine_dir), self._engine.tokenizer)
        except ValueError as error:
            raise ManifestError(str(error)) from None

    @classmethod
    def from_engine(cls, engine: Engine) -> "LLM":
        """Without a chat template."""
        llm = cls.__new__(cls)
        llm._engine, llm._template = engine, ChatTemplate(None, {}, engine.tokenizer)
        llm._images = _image_loader(engine, None)
        return llm

    @property
    def tokenizer(self):
        """The engine's `tokenizers.Tokenizer`."""
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        images: Images | Sequence[Images] | None = None,
        use_tqdm: bool = True,
    ) -> list[Generation]:
        """One result a prompt, in order. Prompts are texts or lists of token ids; one alone is taken as a list of one.
        `images`: those of the one prompt, or a list for each; one for each of its placeholders. An image is a Pillow image, a
        path (a text or a `pathlib.Path`), the bytes of a file, base64 or a data URL.

        `sampling` is one configuration for all or one for each. Prompts are denoised together, as many as fit, and each result
        is what the prompt gives alone. `use_tqdm`: on a terminal, a bar says how many are done.

        Raises:
            RequestError: a prompt or a parameter that cannot be served; nothing is generated then.
        """
        alone = _is_one(prompts)
        listed = [prompts] if alone else list(prompts)
        pictures = self._images_each(images, len(listed), alone=alone)
        asked = zip(listed, _one_each(sampling, len(listed)), pictures, strict=True)
        return self._results([self._request(prompt, config, each) for prompt, config, each in asked], use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        images: Images | Sequence[Images] | None = None,
        use_tqdm: bool = True,
    ) -> list[Generation]:
        """One result a chat; `messages` is one chat or a list of them. Tools, tool_choice and messages are in the OpenAI form;
        chat_template_kwargs are variables for the template, `{"enable_thinking": True}` for one; without parallel_tool_calls a
        result ends with its first call. `images`: one for each part of the messages of type image. Else as `generate`."""
        alone = not isinstance(messages, list | tuple) or (bool(messages) and isinstance(messages[0], Mapping))
        chats = [messages] if alone else list(messages)
        pictures = self._images_each(images, len(chats), alone=alone)
        asked = zip(chats, _one_each(sampling, len(chats)), pictures, strict=True)
        more = (tools, tool_choice, chat_template_kwargs, parallel_tool_calls)
        return self._results([self._chat_request(chat, config, each, *more) for chat, config, each in asked], use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        images: Images = (),
        draft_interval_s: float | None = None,
    ) -> Iterator[Piece]:
        """The result of one prompt, piece by piece: one a canvas, and with draft_interval_s drafts of canvases that are not
        finished, at most one in this time. Leaving the iteration early ends the request.

        Raises RequestError as `generate`, when called; for a grammar that the tokenizer has no tokens for, at the first piece.
        """
        given = local_images(images, self._images.limits)
        [config] = _one_each(sampling, 1)
        return self._pieces(self._request(prompt, config, given), draft_interval_s)

    def stream_chat(
        self,
        messages: Messages,
        sampling: SamplingConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        images: Images = (),
        draft_interval_s: float | None = None,
    ) -> Iterator[Piece]:
        """As `stream`, for one chat as in `chat`."""
        given = local_images(images, self._images.limits)
        more = (tools, tool_choice, chat_template_kwargs, parallel_tool_calls)
        [config] = _one_each(sampling, 1)
        return self._pieces(self._chat_request(messages, config, given, *more), draft_interval_s)

    def _request(self, prompt: Prompt, config: SamplingConfig, images: Images, form: AnswerFormat | None = None) -> _Request:
        patches = self._images.load(images)
        token_ids = self._engine.tokenize(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        prompt_ids = expand(token_ids, patches, self._engine.session.manifest.model)
        resolved = config.resolve(self._engine.defaults, self._engine.tokenize.of_answer)
        check_grammar(resolved.grammar)
        self._engine.scheduler.check(prompt_ids, resolved, images=patches)
        return _Request(prompt_ids=prompt_ids, images=patches, sampling=resolved, form=form)

    def _chat_request(self, messages: Messages, config: SamplingConfig, images: Images, *more) -> _Request:
        chat = chat_request(messages, *more)
        prompt = self._template.prompt(chat, keep_special_tokens=not config.skip_special_tokens)
        return self._request(prompt.text, prompt.form.sampling(config), placed_images(chat, images), prompt.form)

    def _images_each(self, images: Images | Sequence[Images] | None, count: int, *, alone: bool) -> list[Images]:
        if images is None:
            return [()] * count
        if not alone and (isinstance(images, str | bytes) or not isinstance(images, Sequence)):
            raise refused(f"images: got {type(images).__name__}, expected {count} lists of images, one a prompt")
        listed = [images] if alone else images
        if len(listed) != count:
            raise refused(f"images: got {len(listed)} lists of images, expected {count}, one a prompt")
        return [local_images(each, self._images.limits) for each in listed]

    def _results(self, requests: Sequence[_Request], use_tqdm: bool) -> list[Generation]:
        scheduler = self._engine.scheduler
        jobs, collectors = [], []
        # disable=None: no bar where there is no terminal.
        with tqdm(total=len(requests), desc="prompts", unit="", disable=None if use_tqdm else True) as bar:
            try:
                for request in requests:
                    collectors.append(_Collector(request, bar))
                    more = {"images": request.images, "stop_scope": request.stop_scope}
                    jobs.append(scheduler.add(request.prompt_ids, request.sampling, collectors[-1].take, **more))
                while not all(collector.is_done() for collector in collectors):
                    scheduler.tick()
            finally:
                for job in jobs:
                    scheduler.cancel(job)  # nothing, unless generation was interrupted
        return [collector.result for collector in collectors]

    def _pieces(self, request: _Request, draft_interval_s: float | None) -> Iterator[Piece]:
        scheduler, reader = self._engine.scheduler, PieceReader(request.form)
        arrived: deque[CanvasOutput | DraftOutput | RequestError] = deque()
        job = scheduler.add(
            request.prompt_ids,
            request.sampling,
            arrived.append,
            images=request.images,
            stop_scope=request.stop_scope,
            draft_interval_s=draft_interval_s,
        )
        try:
            finished = False
            while not finished:
                while not arrived:
                    scheduler.tick()
                output = arrived.popleft()
                if isinstance(output, RequestError):
                    raise output
                piece = reader.piece(output)
                finished = piece.finish_reason is not None
                yield piece
        finally:
            scheduler.cancel(job)


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    if isinstance(prompts, bytes | Mapping) or not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
        raise refused(f"prompts: got {shown(prompts)}, expected a text, a list of token ids, or a list of either")
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(each, Integral) for each in prompts))


def _token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        listed = list(prompt)
        if isinstance(prompt, bytes | Mapping) or any(isinstance(token, bool) for token in listed):
            raise TypeError  # Python counts these among lists of integers
        return [index(token) for token in listed]
    except TypeError:
        raise refused(f"prompt: got {shown(prompt)}, expected a text or a list of token ids, integers") from None


def _one_each(sampling: SamplingConfig | Sequence[SamplingConfig] | None, count: int) -> list[SamplingConfig]:
    configs = list(sampling) if isinstance(sampling, Sequence) else [SamplingConfig() if sampling is None else sampling] * count
    if bad := [each for each in configs if not isinstance(each, SamplingConfig)]:
        raise refused(f"sampling: got {shown(bad[0])}, expected a SamplingConfig or a list of them, one a prompt")
    if len(configs) != count:
        raise refused(f"sampling: got {len(configs)} configurations, expected {count}, one a prompt")
    return configs


def _image_loader(engine: Engine, max_soft_tokens: int | None) -> ImageLoader:
    vision = engine.session.manifest.model.vision
    return ImageLoader(limits=ImageLimits(), vision=vision, max_soft_tokens=max_soft_tokens)


class _Collector:
    """One request's outputs → its result."""

    def __init__(self, request: _Request, bar: tqdm):
        self.result = Generation()
        self._reader, self._bar = PieceReader(request.form), bar
        self._error: RequestError | None = None

    def take(self, output: CanvasOutput | RequestError) -> None:
        if isinstance(output, RequestError):
            self._error = output
            return
        self.result.add(self._reader.piece(output))
        self._bar.update(self.result.finish_reason is not None)

    def is_done(self) -> bool:
        """Raises the error that the request ended with."""
        if self._error is not None:
            raise self._error
        return self.result.finish_reason is not None
