"""The serving half: engine directory → tokens.

    from backend import LLM, SamplingConfig

| module | one idea |
|---|---|
| `llm`, `generation` | offline use, and its results |
| `terminal_chat` | a chat that shows the canvas as it resolves |
| `chat` | chat template, thoughts, tool calls |
| `service` | an engine worker for many threads, and a new one when it dies |
| `worker`, `worker_process`, `worker_messages` | the child process with the device, its parent, what they say |
| `engine` | everything that serving one engine directory needs, put together |
| `planner` | what an engine takes in memory, and how many KV pages that leaves |
| `scheduler` | requests → ticks of encode and denoise |
| `admission`, `job` | what can be served; one request and what its canvases add to it |
| `images` | what clients send → patches, and the tokens that stand for them |
| `encode_budget`, `encode_pass` | who goes with the next encode pass; the pass |
| `metrics` | what is measured, and its values |
| `canvas_loop` | one denoising step of all active rows |
| `sampler` | vocabulary pass, acceptance, convergence |
| `row_extras`, `logit_filters`, `logprobs` | what a request may ask of a step beyond the plain one |
| `extras_tables`, `table_loop` | the same as tables, and the loops of compiled operators, which read them |
| `noise` | counter-based random numbers, public |
| `kv_cache` | pages of keys and values |
| `page_pool`, `prefix_cache` | who holds a page; which pages a prompt can start from |
| `session` | the engine's programs, loaded and bound |
| `batch_invariance` | programs that are said to be so are asked |
| `weights` | weight bindings → tensors of the checkpoint |
| `sampling_config`, `generation_defaults`, `parameters` | what a request chooses, what the checkpoint does |
| `text_stream` | tokens → text, piece by piece, with stop strings |
| `triton_server` | the Triton Inference Server model and its launcher |
| `openai_server` | OpenAI's API in front of it |
| `serving` | what `python -m backend serve` runs of both |
| `child_process` | children that end when their parent does |
"""

from backend.errors import RequestError

__all__ = ["LLM", "Generation", "RequestError", "SamplingConfig"]


def __getattr__(name: str):
    """Imports the engine only when it is asked for, so that `backend.errors` and the front ends start without PyTorch."""
    if name in ("LLM", "Generation"):
        from backend import llm

        return getattr(llm, name)
    if name == "SamplingConfig":
        from backend.sampling_config import SamplingConfig

        return SamplingConfig
    raise AttributeError(f"module 'backend' has no attribute {name!r}")
