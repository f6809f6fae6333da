"""The serving half: engine directory → tokens.

    from backend import LLM, SamplingConfig

| module | one idea |
|---|---|
| `llm` | offline use |
| `service` | a running engine for many threads |
| `engine` | everything that serving one engine directory needs, put together |
| `scheduler` | requests → ticks of encode and denoise |
| `canvas_loop` | one denoising step of all active rows |
| `sampler` | vocabulary pass, acceptance, convergence |
| `noise` | counter-based random numbers, public |
| `kv_cache` | pages of keys and values |
| `session` | the engine's programs, loaded and bound |
| `weights` | weight bindings → tensors of the checkpoint |
| `sampling_config`, `generation_defaults`, `parameters` | what a request chooses, what the checkpoint does |
| `text_stream` | tokens → text, piece by piece, with stop strings |
| `triton_server` | the Triton Inference Server model and its launcher |
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
