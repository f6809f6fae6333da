"""`CanvasOutput`s → the inference responses of one request.

| output             | dtype, shape | meaning                                                                         |
|--------------------|--------------|---------------------------------------------------------------------------------|
| text_output        | STRING [1]   | the new text since the last response; of a chat, what is neither thought nor    |
|                    |              | tool call                                                                       |
| reasoning_output   | STRING [1]   | new text of a chat's thought                                                    |
| tool_calls         | STRING [1]   | JSON list: a chat's tool calls that became complete, as in OpenAI's messages    |
| finish_reason      | STRING [1]   | empty until the last response with data; then stop, length or tool_calls        |
| num_input_tokens   | UINT32 [1]   | tokens of the prompt                                                            |
| num_cached_tokens  | UINT32 [1]   | of these, the tokens that the prefix cache had                                  |
| num_output_tokens  | UINT32 [1]   | new tokens in this response                                                     |
| num_reasoning_tokens | UINT32 [1] | of these, the tokens of a chat's thought                                        |
| output_ids         | INT32 [-1]   | the new tokens                                                                  |
| canvas_index       | INT32 [1]    | the canvas that this response ends with, counted from 0                         |
| num_steps          | INT32 [1]    | denoising steps of this response's canvases                                     |
| draft_text         | STRING [1]   | only with return_drafts: what text_output and reasoning_output would be, if the |
|                    |              | canvas were finished at this step; the next response replaces it                |
| token_logprobs     | FP32 [-1]    | on request: log probabilities of the new tokens                                 |
| cumulative_logprob | FP32 [1]     | on request: their sum over the whole result so far                              |
| logprobs           | STRING [1]   | on request: JSON list, one entry a new token, as in OpenAI's chat completions   |

A response with draft_text has besides it canvas_index, num_steps (the canvas's so far), and text_output and finish_reason,
which are empty. After the last data comes an empty response with the FINAL flag. An error is one response, with the flag.
Imports only inside the Python backend of a Triton server.
"""

import json
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from backend.chat.answer import AnswerDelta, AnswerFormat, AnswerParser, joined
from backend.chat.logprobs import described_logprobs
from backend.chat.reasoning import ThoughtTokens
from backend.errors import RequestError
from backend.job import CanvasOutput, DraftOutput
from backend.text_stream import special_tokens
from backend.triton_server.request import GenerationRequest

# Triton's codes by ours, the best first: releases differ in what they have; none has a deadline, nor aborted.
_TRITON_CODES = {
    "INVALID_ARGUMENT": ("INVALID_ARG",),
    "UNAVAILABLE": ("UNAVAILABLE",),
    "ABORTED": ("UNAVAILABLE",),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED", "UNAVAILABLE"),
    "CANCELLED": ("CANCELLED", "UNAVAILABLE"),
    "INTERNAL": ("INTERNAL",),
}


class Answer:
    """The responses to one accepted request. Owns its response sender and finishes it exactly once.

    Used by one thread alone; what comes after the end is dropped, because a cancelled request may still have outputs under
    way. `request` is what was asked for, without its images; `handle` is the service's name for it, None until the service has
    given one.
    """

    def __init__(self, sender, request: GenerationRequest, tokenizer: Tokenizer, *, is_made_ready: bool = False):
        """is_made_ready: other threads have it before the service, for a time that a client need not wait for."""
        self._sender = sender
        self._is_made_ready = is_made_ready
        self.request = replace(request, images=())  # whoever loads them has them; they are large
        self._tokenizer = tokenizer
        self._parser = AnswerParser(request.answer) if request.answer else None
        self._thought_tokens = _thought_tokens(tokenizer, request.answer) if request.answer else None
        described_without = request.sampling.logprobs and request.sampling.skip_special_tokens
        self._without_text = special_tokens(tokenizer) if described_without else frozenset()
        self._held_back: list[tuple[CanvasOutput, AnswerDelta]] = []
        self._described: list[str] = []  # their log probabilities, in JSON
        self._num_sent = 0
        self._cumulative_logprob = 0.0
        self._deadline_s = time.monotonic() + request.timeout_s if request.timeout_s else None
        self.handle: int | None = None
        self.finished = False

    def add(self, output: CanvasOutput | DraftOutput) -> None:
        """Sends the output, or holds it back until the last one when the client does not stream."""
        if self.finished:
            return
        if isinstance(output, DraftOutput):
            self._sender.send(pb_utils.InferenceResponse(self._draft_tensors(output)))
            return
        is_last = bool(output.finish_reason)
        delta = self._parser.push(output.text, last=is_last) if self._parser else AnswerDelta(text=output.text)
        # Canvas by canvas: a long answer's all at once would keep the others' responses waiting.
        if output.logprobs:
            self._described.append(self._described_in_json(output))
        self._held_back.append((replace(output, top_logprobs=None), delta))
        if self.request.stream or is_last:
            self._sender.send(pb_utils.InferenceResponse(self._tensors()))
            self._num_sent += 1
            self._held_back, self._described = [], []
        if is_last:
            self.finish()

    def fail(self, error: RequestError) -> None:
        """Ends the request with an error."""
        if not self.finished:
            self.finished = True
            send_error(self._sender, self.request.request_id, error)

    def finish(self) -> None:
        """Ends the request with the empty final response."""
        if not self.finished:
            self.finished = True
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    @property
    def is_cancellable(self) -> bool:
        """Whether it can end here: one that has no handle may be getting it at this moment, unless it is made ready first."""
        return self.handle is not None or self._is_made_ready

    def abandoned(self) -> RequestError | None:
        """The error to end with if nobody waits for the answer any longer: cancelled, disconnected, or past a deadline.

        Asks the server, which takes about 35 us.
        """
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            allowed = f"{self.request.timeout_s:g} s"
            return RequestError(
                "DEADLINE_EXCEEDED", f"request: not finished within its time-out of {allowed}; allow more or ask for less"
            )
        if self._sender.is_cancelled():
            return RequestError("CANCELLED", "request: cancelled by the client")
        return None

    def _tensors(self) -> list:
        """The output tensors of one response, which covers the canvases held back."""
        outputs = [output for output, _ in self._held_back]
        delta = joined(delta for _, delta in self._held_back)
        last = outputs[-1]
        token_ids = list(chain.from_iterable(output.token_ids for output in outputs))
        echo = self.request.prompt if self.request.echo_prompt and not self._num_sent else ""
        echo_text, echo_ids = (echo, []) if isinstance(echo, str) else ("", echo)
        values = {
            "text_output": echo_text + delta.text,
            "reasoning_output": delta.reasoning,
            "tool_calls": json.dumps([call.as_message() for call in delta.tool_calls], ensure_ascii=False),
            "finish_reason": self._finish_reason(last),
            "num_input_tokens": np.array([last.num_prompt_tokens], np.uint32),
            "num_cached_tokens": np.array([last.num_cached_tokens], np.uint32),
            "num_output_tokens": np.array([len(token_ids)], np.uint32),
            "num_reasoning_tokens": np.array([self._num_thought_tokens(token_ids)], np.uint32),
            "output_ids": np.array(echo_ids + token_ids, np.int32),
            "canvas_index": np.array([last.canvas_index], np.int32),
            "num_steps": np.array([sum(output.num_steps for output in outputs)], np.int32),
        }
        if self.request.sampling.logprobs:
            values |= self._logprobs(outputs)
        return self._wanted(values)

    def _wanted(self, values: dict[str, str | np.ndarray]) -> list:
        """The tensors that the client has not declined."""
        return [
            _string(name, value) if isinstance(value, str) else pb_utils.Tensor(name, value)
            for name, value in values.items()
            if name not in self.request.omitted
        ]

    def _draft_tensors(self, draft: DraftOutput) -> list:
        text = draft.text
        if self._parser:
            delta = self._parser.preview(draft.text)
            text = delta.reasoning + delta.text
        return self._wanted(
            {
                "text_output": "",
                "finish_reason": "",
                "draft_text": text,
                "canvas_index": np.array([draft.canvas_index], np.int32),
                "num_steps": np.array([draft.step], np.int32),
            }
        )

    def _num_thought_tokens(self, token_ids: list[int]) -> int:
        return self._thought_tokens.count(token_ids) if self._thought_tokens else 0

    def _finish_reason(self, output: CanvasOutput) -> str:
        reason = self._parser.finish_reason(output.finish_reason) if self._parser else output.finish_reason
        return reason or ""

    def _logprobs(self, outputs: list[CanvasOutput]) -> dict:
        logprobs = list(chain.from_iterable(output.logprobs or [] for output in outputs))
        self._cumulative_logprob += sum(logprobs)
        return {
            "token_logprobs": np.array(logprobs, np.float32),
            "cumulative_logprob": np.array([self._cumulative_logprob], np.float32),
            "logprobs": f"[{', '.join(self._described)}]",
        }

    def _described_in_json(self, output: CanvasOutput) -> str:
        """What stands between the brackets of a list."""
        more = {"without_text": self._without_text}
        described = described_logprobs(self._tokenizer, output.token_ids, output.logprobs, output.top_logprobs, **more)
        return json.dumps(described, ensure_ascii=False)[1:-1]


def send_error(sender, request_id: str, error: RequestError) -> None:
    """Ends a request with one error response, which is final.

    The id and the code are in the message because clients of a stream get errors without them.
    """
    prefix = (f"[request id: {request_id}] " if request_id else "") + f"[{error.code}] "
    line = " ".join(f"{prefix}{error}".split()).encode(errors="backslashreplace").decode()
    code = next(
        getattr(pb_utils.TritonError, name) for name in _TRITON_CODES[error.code] if hasattr(pb_utils.TritonError, name)
    )
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(line, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _thought_tokens(tokenizer: Tokenizer, form: AnswerFormat) -> ThoughtTokens:
    return ThoughtTokens(tokenizer, in_thought=form.in_thought, with_tools=form.with_tools, prefill=form.prefill)


def _string(name: str, text: str):
    return pb_utils.Tensor(name, np.array([text.encode()], np.object_))
