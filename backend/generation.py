"""What offline generation gives: whole results and pieces of one, from the scheduler's outputs."""

from dataclasses import dataclass, field

from backend.chat.answer import AnswerDelta, AnswerFormat, AnswerParser
from backend.chat.tools import ToolCall
from backend.job import CanvasOutput, DraftOutput


@dataclass(kw_only=True)
class Generation:
    """The result of one prompt.

    text: of a chat, what is neither reasoning, the model's thought, nor tool_calls, which are empty for other prompts.
    token_ids: the new tokens, without the end-of-sequence token. num_steps: denoising steps of each canvas. finish_reason:
    "stop" (end-of-sequence token, stop token or stop string), "length" (max_tokens) or "tool_calls". num_cached_tokens: as in
    `CanvasOutput`; results that differ in nothing else are equal. logprobs, top_logprobs: as there, of all token_ids.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    num_steps: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = field(default=0, compare=False)
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def add(self, piece: "Piece") -> None:
        self.token_ids += piece.token_ids
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.tool_calls += piece.tool_calls
        self.finish_reason = piece.finish_reason
        self.num_steps.append(piece.num_steps)
        self.num_prompt_tokens, self.num_cached_tokens = piece.num_prompt_tokens, piece.num_cached_tokens
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs
        if piece.top_logprobs is not None:
            self.top_logprobs = (self.top_logprobs or []) + piece.top_logprobs


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one canvas adds to a result; the fields are as in `Generation`, num_steps and canvas_index are the canvas's.

    is_draft: the canvas is not finished; the next piece replaces this one. finish_reason: None until the last piece.
    """

    text: str
    reasoning: str
    tool_calls: list[ToolCall]
    token_ids: list[int]
    canvas_index: int
    num_steps: int
    is_draft: bool
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


class PieceReader:
    """One request's outputs → pieces. `form`: how to read a chat's answer; None for a prompt that is no chat."""

    def __init__(self, form: AnswerFormat | None):
        self._parser = AnswerParser(form) if form else None

    def piece(self, output: CanvasOutput | DraftOutput) -> Piece:
        if isinstance(output, DraftOutput):
            delta = self._parser.preview(output.text) if self._parser else AnswerDelta(text=output.text)
            steps, more = output.step, {"is_draft": True}
        else:
            is_last = output.finish_reason is not None
            delta = self._parser.push(output.text, last=is_last) if self._parser else AnswerDelta(text=output.text)
            steps, more = output.num_steps, self._of_canvas(output)
        return Piece(
            text=delta.text,
            reasoning=delta.reasoning,
            tool_calls=list(delta.tool_calls),
            token_ids=output.token_ids,
            canvas_index=output.canvas_index,
            num_steps=steps,
            **more,
        )

    def _of_canvas(self, output: CanvasOutput) -> dict:
        reason = self._parser.finish_reason(output.finish_reason) if self._parser else output.finish_reason
        return {
            "is_draft": False,
            "finish_reason": reason,
            "num_prompt_tokens": output.num_prompt_tokens,
            "num_cached_tokens": output.num_cached_tokens,
            "logprobs": output.logprobs,
            "top_logprobs": output.top_logprobs,
        }
