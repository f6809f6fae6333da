"""`CanvasOutput`s → the inference responses of one request.

| output            | dtype, shape | meaning                                                                          |
|-------------------|--------------|----------------------------------------------------------------------------------|
| text_output       | STRING [1]   | the new text since the last response                                             |
| finish_reason     | STRING [1]   | empty until the last response with data; then stop, length or cancelled          |
| num_input_tokens  | UINT32 [1]   | tokens of the prompt                                                             |
| num_output_tokens | UINT32 [1]   | new tokens in this response                                                      |
| output_ids        | INT32 [-1]   | the new tokens                                                                   |
| canvas_index      | INT32 [1]    | the canvas that this response ends with, counted from 0                          |
| num_steps         | INT32 [1]    | denoising steps of this response's canvases                                      |

After the last data comes an empty response with the FINAL flag. An error is one response, with the flag.
Imports only inside the Python backend of a Triton server.
"""

import time
from collections.abc import Sequence
from itertools import chain

import numpy as np
import triton_python_backend_utils as pb_utils

from backend.errors import RequestError
from backend.scheduler import CanvasOutput
from backend.triton_server.request import GenerationRequest

# Triton's codes by ours, the best first: releases differ in what they have, and none has a deadline.
_TRITON_CODES = {
    "INVALID_ARGUMENT": ("INVALID_ARG",),
    "UNAVAILABLE": ("UNAVAILABLE",),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED", "UNAVAILABLE"),
    "CANCELLED": ("CANCELLED", "UNAVAILABLE"),
    "INTERNAL": ("INTERNAL",),
}


class Answer:
    """The responses to one accepted request. Owns its response sender and finishes it exactly once.

    Used by one thread alone; what comes after the end is dropped, because a cancelled request may still have outputs under
    way. `handle` is the service's name for the request, None until the service has given one.
    """

    def __init__(self, sender, request: GenerationRequest):
        self._sender = sender
        self._request = request
        self._held_back: list[CanvasOutput] = []
        self._num_sent = 0
        self._deadline_s = time.monotonic() + request.timeout_s if request.timeout_s else None
        self.handle: int | None = None
        self.finished = False

    def add(self, output: CanvasOutput) -> None:
        """Sends the output, or holds it back until the last one when the client does not stream."""
        if self.finished:
            return
        self._held_back.append(output)
        if self._request.stream or output.finish_reason:
            echo = self._request.prompt if self._request.echo_prompt and not self._num_sent else ""
            self._sender.send(pb_utils.InferenceResponse(_tensors(self._held_back, echo)))
            self._num_sent += 1
            self._held_back = []
        if output.finish_reason:
            self.finish()

    def fail(self, error: RequestError) -> None:
        """Ends the request with an error."""
        if not self.finished:
            self.finished = True
            send_error(self._sender, self._request.request_id, error)

    def finish(self) -> None:
        """Ends the request with the empty final response."""
        if not self.finished:
            self.finished = True
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def abandoned(self) -> RequestError | None:
        """The error to end with if nobody waits for the answer any longer: cancelled, disconnected, or past a deadline.

        Asks the server, which takes about 35 us.
        """
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            allowed = f"{self._request.timeout_s:g} s"
            return RequestError(
                "DEADLINE_EXCEEDED", f"request: not finished within its time-out of {allowed}; allow more or ask for less"
            )
        if self._sender.is_cancelled():
            return RequestError("CANCELLED", "request: cancelled by the client")
        return None


def send_error(sender, request_id: str, error: RequestError) -> None:
    """Ends a request with one error response, which is final.

    The id is in the message because the Python client reports stream errors without one.
    """
    prefix = f"[request id: {request_id}] " if request_id else ""
    line = " ".join(f"{prefix}{error}".split()).encode(errors="backslashreplace").decode()
    code = next(
        getattr(pb_utils.TritonError, name) for name in _TRITON_CODES[error.code] if hasattr(pb_utils.TritonError, name)
    )
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(line, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _tensors(outputs: Sequence[CanvasOutput], echo: str | list[int]) -> list:
    """The output tensors of one response, which covers one or more canvases. `echo` is the prompt to open it with."""
    last = outputs[-1]
    text = "".join(output.text for output in outputs)
    token_ids = list(chain.from_iterable(output.token_ids for output in outputs))
    echo_text, echo_ids = (echo, []) if isinstance(echo, str) else ("", echo)
    return [
        _string("text_output", echo_text + text),
        _string("finish_reason", last.finish_reason or ""),
        pb_utils.Tensor("num_input_tokens", np.array([last.num_prompt_tokens], np.uint32)),
        pb_utils.Tensor("num_output_tokens", np.array([len(token_ids)], np.uint32)),
        pb_utils.Tensor("output_ids", np.array(echo_ids + token_ids, np.int32)),
        pb_utils.Tensor("canvas_index", np.array([last.canvas_index], np.int32)),
        pb_utils.Tensor("num_steps", np.array([sum(output.num_steps for output in outputs)], np.int32)),
    ]


def _string(name: str, text: str):
    return pb_utils.Tensor(name, np.array([text.encode()], np.object_))
