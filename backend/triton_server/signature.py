"""The model's inputs and outputs: name, type and shape, once. `request.py` and `response.py` say what each means.

`config.pbtxt` is made from these tables, and tests hold `READERS` and the responses against them.
"""

from dataclasses import dataclass
from typing import Literal

Datatype = Literal["BOOL", "INT32", "UINT32", "UINT64", "FP32", "STRING"]


@dataclass(frozen=True)
class TensorSpec:
    """dims: (1,) is one value, (-1,) any number of them. Every input is optional; Triton checks none that is not."""

    name: str
    datatype: Datatype
    dims: tuple[int] = (1,)


INPUTS = (
    TensorSpec("text_input", "STRING"),
    TensorSpec("messages", "STRING"),
    TensorSpec("input_ids", "INT32", (-1,)),
    TensorSpec("image", "STRING", (-1,)),
    TensorSpec("tools", "STRING"),
    TensorSpec("tool_choice", "STRING"),
    TensorSpec("parallel_tool_calls", "BOOL"),
    TensorSpec("chat_template_kwargs", "STRING"),
    TensorSpec("stream", "BOOL"),
    TensorSpec("return_drafts", "BOOL"),
    TensorSpec("sampling_parameters", "STRING"),
    TensorSpec("max_tokens", "INT32"),
    TensorSpec("temperature", "FP32"),
    TensorSpec("top_k", "INT32"),
    TensorSpec("top_p", "FP32"),
    TensorSpec("seed", "UINT64"),
    TensorSpec("stop_words", "STRING", (-1,)),
    TensorSpec("return_logprobs", "BOOL"),
    TensorSpec("return_finish_reason", "BOOL"),
    TensorSpec("return_num_input_tokens", "BOOL"),
    TensorSpec("return_num_output_tokens", "BOOL"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("num_choices", "INT32"),
)

OUTPUTS = (
    TensorSpec("text_output", "STRING"),
    TensorSpec("reasoning_output", "STRING"),
    TensorSpec("tool_calls", "STRING"),
    TensorSpec("finish_reason", "STRING"),
    TensorSpec("num_input_tokens", "UINT32"),
    TensorSpec("num_cached_tokens", "UINT32"),
    TensorSpec("num_output_tokens", "UINT32"),
    TensorSpec("num_reasoning_tokens", "UINT32"),
    TensorSpec("output_ids", "INT32", (-1,)),
    TensorSpec("canvas_index", "INT32"),
    TensorSpec("num_steps", "INT32"),
    TensorSpec("draft_text", "STRING"),
    TensorSpec("token_logprobs", "FP32", (-1,)),
    TensorSpec("cumulative_logprob", "FP32"),
    TensorSpec("logprobs", "STRING"),
)
