"""One request inside the scheduler: what it asks for, how far it is, and what each of its canvases adds to its result."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from backend.answer_grammar import AnswerGrammar
from backend.errors import RequestError
from backend.images.preprocess import ImagePatches
from backend.infill import BLANK, given_tokens
from backend.opening import Opening
from backend.prefix_cache import ImageSpan
from backend.sampling_config import ResolvedSampling
from backend.text_stream import TextStream


class TokenLogprob(NamedTuple):
    """Of one token. top: (token id, log probability) of the most likely tokens in its place, falling, itself first; empty if
    none were asked for."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class CanvasOutput:
    """What one finished canvas adds to a request.

    text: new text, complete characters, stop strings cut. token_ids: new tokens, cut at max_tokens, before the first
    end-of-sequence or stop token and at a stop string; tokens whose text is not decided yet come with a later canvas.
    num_steps: denoising steps of this canvas. finish_reason: None until the last output, then "stop", "length" or "cancelled".
    num_cached_tokens: tokens of the prompt that the prefix cache had. logprobs: natural logarithms of the probabilities of
    token_ids, if the request asks; top_logprobs: for each of token_ids the (token id, log probability) of the request's
    `top_logprobs` most likely tokens, falling, its own first; if it asks.
    """

    text: str
    token_ids: list[int]
    canvas_index: int
    num_steps: int
    finish_reason: str | None
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True, kw_only=True)
class DraftOutput:
    """What a canvas that is still being denoised would add, if it were finished at this step: the text and tokens that a
    CanvasOutput would have, cut as there. A later draft or output of the canvas replaces it; it is never part of the result.

    step: denoising steps that the canvas has taken, from 1.
    """

    text: str
    token_ids: list[int]
    canvas_index: int
    step: int


OnOutput = Callable[[CanvasOutput | DraftOutput | RequestError], None]


@dataclass(kw_only=True, eq=False)
class Job:
    """One request. `images` are in the prompt at `image_spans`. `prefix`: tokens that are in the cache or about to be, of which
    the last `num_pending` are not yet: the rest of the prompt, or a canvas to commit. `page_keys`: keys of the prefix's full
    pages. `tokens`: the result so far, of which the first `num_sent` have been sent, and which ends before the first of
    `end_tokens`; `logprobs`: of those that have not been sent, if the request asks. `slot`: -1 until it is admitted.
    `num_cached_tokens`: tokens of the prompt that the prefix cache had by then.
    `waiting_since`: the tick its pending tokens are from. `ended`: the last output has been sent; what is pending is encoded
    for later requests only.

    Times are in seconds of the scheduler's clock. `draft_interval_s`: None sends no drafts, 0 one after every step.
    """

    prompt_ids: list[int]
    images: Sequence[ImagePatches] = ()
    image_spans: Sequence[ImageSpan] = ()
    sampling: ResolvedSampling
    on_output: OnOutput
    text: TextStream
    grammar: AnswerGrammar | None = None
    draft_interval_s: float | None = None
    added_at: float
    slot: int = -1
    num_cached_tokens: int = 0
    prefix: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    num_pending: int = 0
    waiting_since: int = 0
    ended: bool = False
    canvas_index: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_sent: int = 0
    canvas_started_at: float = 0.0
    drafted_at: float = float("-inf")
    end_tokens: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.end_tokens = frozenset(self.sampling.eos_token_ids + self.sampling.stop_token_ids)

    @property
    def is_encoding(self) -> bool:
        return self.num_pending > 0

    def next_tokens(self, count: int) -> list[int]:
        """The first `count` pending tokens."""
        start = len(self.prefix) - self.num_pending
        return self.prefix[start : start + count]

    def next_images(self, count: int) -> list[tuple[int, ImagePatches]]:
        """The images among the first `count` pending tokens, each with the index of its first token there."""
        first = len(self.prefix) - self.num_pending
        return [
            (span.start - first, image)
            for span, image in zip(self.image_spans, self.images, strict=True)
            if first <= span.start < first + count
        ]

    @property
    def images_left(self) -> list[tuple[int, int]]:
        """Where the images are among the pending tokens: (first token, token behind the last one)."""
        first = len(self.prefix) - self.num_pending
        return [(span.start - first, span.end - first) for span in self.image_spans if span.start >= first]

    @property
    def canvas_sampling(self) -> ResolvedSampling:
        """What holds for the next canvas: penalties for what the prompt and the answer have so far.

        A repetition penalty is of both. The others are biases, of the answer alone: as in OpenAI's API, a token that it has n
        times loses n * frequency_penalty + presence_penalty. What the next canvas will have does not count: its tokens are
        chosen together. transformers' processors of logits see the same.
        """
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            sampling = replace(sampling, repeated=tuple({*self.prompt_ids, *self.tokens}))
        if not (sampling.frequency_penalty or sampling.presence_penalty):
            return sampling
        bias = dict(sampling.logit_bias)
        for token, count in Counter(self.tokens).items():
            bias[token] = bias.get(token, 0.0) - count * sampling.frequency_penalty - sampling.presence_penalty
        return replace(sampling, logit_bias=tuple(bias.items()))

    def opening(self, vocab_size: int) -> Opening | None:
        """What the next canvas may begin with: what a grammar lets come next, or nothing that would end the answer before it
        has min_tokens. Raises RequestError, see `AnswerGrammar.allowed`."""
        if self.grammar:
            return Opening(self.grammar.allowed())
        missing = self.sampling.min_tokens - len(self.tokens)
        return Opening.without(self.end_tokens, vocab_size, missing) if missing > 0 and self.end_tokens else None

    def finish_canvas(self, canvas: list[int], num_steps: int, logprobs: list[TokenLogprob] | None = None) -> CanvasOutput:
        """Takes a finished canvas into the result; the output's finish_reason says whether it was the last. logprobs: of every
        token of the canvas, if the request asks."""
        own, added, reason = self._trim(canvas)
        if self.grammar:
            self.grammar.take(own + added)
        self.tokens += own + added
        if logprobs:
            self.logprobs += self._with_given(logprobs)[: len(own)] + [self._sure(token) for token in added]
        delta = self.text.push(own + added, last=reason is not None)
        new = slice(self.num_sent, delta.num_tokens)
        self.num_sent = delta.num_tokens
        output = self.output(delta.text, new, num_steps, "stop" if delta.stopped else reason)
        del self.logprobs[: len(output.token_ids)]
        self.canvas_index += 1
        return output

    def draft_is_due(self, now: float) -> bool:
        return self.draft_interval_s is not None and now - self.drafted_at >= self.draft_interval_s

    def draft(self, canvas: list[int], step: int) -> DraftOutput | None:
        """What `finish_canvas` would give for the canvas as it stands, None for what a grammar refuses; changes nothing."""
        try:
            own, added, reason = self._trim(canvas)
        except RequestError:  # the finished canvas may be another
            return None
        delta = self.text.fork().push(own + added, last=reason is not None)
        new_tokens = (self.tokens + own + added)[self.num_sent : delta.num_tokens]
        return DraftOutput(text=delta.text, token_ids=new_tokens, canvas_index=self.canvas_index, step=step)

    def output(self, text: str, new: slice, num_steps: int, finish_reason: str | None) -> CanvasOutput:
        """`new`: which of `tokens` the output adds; they follow what has been sent."""
        logprobs = self.logprobs[: len(self.tokens[new])]
        return CanvasOutput(
            text=text,
            token_ids=self.tokens[new],
            canvas_index=self.canvas_index,
            num_steps=num_steps,
            finish_reason=finish_reason,
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.num_cached_tokens,
            logprobs=[each.logprob for each in logprobs] if self.sampling.logprobs else None,
            top_logprobs=[each.top for each in logprobs] if self.sampling.top_logprobs else None,
        )

    def _with_given(self, logprobs: list[TokenLogprob]) -> list[TokenLogprob]:
        """Those of a canvas, with those of the tokens that the request gives."""
        given = given_tokens(self.sampling.infill, self.canvas_index, len(logprobs))
        return [each if token == BLANK else self._sure(token) for token, each in zip(given, logprobs, strict=True)]

    def _sure(self, token: int) -> TokenLogprob:
        """Of a token that the model has no choice about: probability 1."""
        return TokenLogprob(0.0, [(token, 0.0)] if self.sampling.top_logprobs else [])

    def _trim(self, canvas: list[int]) -> tuple[list[int], list[int], str | None]:
        """The canvas up to max_tokens or the first end-of-sequence or stop token, which is not part of the result, and with a
        grammar as far as that accepts it; tokens that a grammar adds; and why the result ends there, if it does."""
        room = self.sampling.max_tokens - len(self.tokens)
        end = next((index for index, token in enumerate(canvas[:room]) if token in self.end_tokens), None)
        if self.grammar:
            return self.grammar.fitted(canvas[: room if end is None else end], None if end is None else canvas[end], room)
        if end is not None:
            return canvas[:end], [], "stop"
        return canvas[:room], [], "length" if room <= len(canvas) else None
