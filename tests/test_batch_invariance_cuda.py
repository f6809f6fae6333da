"""A batch-invariant engine on a GPU, at the widths of the 26B model: requests get bit for bit what they get alone.

The weights are random, and a random network is chaotic: where a bit differs in one step, all tokens do a few steps later.
"""

import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from random_model import random_session, random_weights, read_text_model  # noqa: E402

from backend.batch_invariance import check_batch_invariance  # noqa: E402
from backend.errors import RequestError  # noqa: E402
from backend.generation_defaults import GenerationDefaults  # noqa: E402
from backend.job import CanvasOutput  # noqa: E402
from backend.kv_cache import PagedKVCache  # noqa: E402
from backend.sampling_config import SamplingConfig  # noqa: E402
from backend.scheduler import Scheduler  # noqa: E402
from backend.session import Session  # noqa: E402
from builder.quantization import FP8, NVFP4  # noqa: E402
from contract.manifest import BuildConfig  # noqa: E402
from plugins.batch_invariance import CUT_TOKENS  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CHECKPOINT = ROOT / "checkpoints" / "diffusiongemma-26B-A4B"
LAYERS = 6  # five with a window, one without
MAX_SEQUENCES = 12
DEFAULTS = GenerationDefaults.from_json({"eos_token_id": []})


def session_of(kind: str, *, batch_invariant: bool) -> Session:
    """The network's own modules; in a batch-invariant build they call the kernels that compiled programs call."""
    model = read_text_model(CHECKPOINT)
    stored = {"fp8": FP8, "nvfp4": NVFP4}.get(kind)
    model = model.model_copy(update={"layer_types": model.layer_types[:LAYERS], "experts_dtype": stored})
    build = BuildConfig(
        target="inductor",
        dtype="bfloat16",
        device="cuda",
        max_encode_tokens=1280,
        max_sequences=MAX_SEQUENCES,
        expert_weights="plain" if stored else kind,
        batch_invariant=batch_invariant,
    )
    torch.manual_seed(0)
    return random_session(model, CHECKPOINT, build, random_weights(model, build), compiled=False, report=print)


def scheduler_of(session: Session, *, prefix_cache: bool) -> Scheduler:
    from backend.captured_loop import CapturedLoop  # only here: it needs triton

    model, build = session.manifest.model, session.manifest.build
    cache = PagedKVCache(
        model,
        page_size=build.page_size,
        num_pages=dict.fromkeys(model.attention, 1400),
        max_sequences=MAX_SEQUENCES,
        max_tokens=8192,
        dtype=session.dtype,
        device=session.device,
        shared_multiple=CUT_TOKENS // build.page_size,
    )
    session.bind_pages(cache.pages)
    loop = CapturedLoop(session, cache)
    if build.batch_invariant:
        check_batch_invariance(session, cache, batches=loop.batches, head_rows=loop.head_rows)
    tokenizer = Tokenizer.from_file(str(ROOT / "checkpoints" / "tiny" / "tokenizer.json"))
    return Scheduler(session, cache, loop, tokenizer, prefix_cache=prefix_cache)


def requests() -> list[tuple[list[int], SamplingConfig]]:
    """Prompts below and beyond a pass and a window, some that begin alike; one to three canvases."""
    rng = random.Random(3)
    common = [rng.randrange(1000) for _ in range(700)]
    lengths = (1, 30, 63, 64, 255, 300, 900, 1100, 1500, 2600, 3100, 33)
    prompts = [
        (common[:length] if index % 2 else []) + [rng.randrange(1000) for _ in range(length)]
        for index, length in enumerate(lengths)
    ]
    return [
        (
            prompt,
            SamplingConfig(
                seed=index,
                max_tokens=(200, 300, 600)[index % 3],
                max_denoising_steps=4 + index % 3,
                confidence_threshold=0,
                logprobs=True,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]


def answers(scheduler: Scheduler, wanted: list[tuple[list[int], SamplingConfig]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log probabilities; a request comes at every second tick."""
    waiting, sent = list(enumerate(wanted)), {index: [] for index in range(len(wanted))}

    def take(index: int):
        def on_output(output: CanvasOutput | RequestError) -> None:
            assert not isinstance(output, RequestError), output
            sent[index].append(output)

        return on_output

    ticks = 0
    while waiting or not scheduler.is_idle:
        if waiting and ticks % 2 == 0:
            index, (prompt, sampling) = waiting.pop(0)
            scheduler.add(prompt, sampling.resolve(DEFAULTS), take(index))
        scheduler.tick()
        ticks += 1
    return [
        ([token for output in outputs for token in output.token_ids], [each for output in outputs for each in output.logprobs])
        for outputs in sent.values()
    ]


@pytest.mark.parametrize("kind", ["packed", "plain", "int4", "nvfp4", "fp8"])
def test_requests_get_what_they_get_alone(kind):
    session, wanted = session_of(kind, batch_invariant=True), requests()
    alone = [answers(scheduler_of(session, prefix_cache=False), [each])[0] for each in wanted]
    together = scheduler_of(session, prefix_cache=True)
    assert answers(together, wanted) == alone
    rng = random.Random(4)
    for _ in range(2):  # now with what the cache has of them
        order = rng.sample(range(len(wanted)), len(wanted))
        assert answers(together, [wanted[index] for index in order]) == [alone[index] for index in order]


def test_requests_of_another_engine_do_not():
    """So the test above can fail."""
    session, wanted = session_of("packed", batch_invariant=False), requests()
    alone = [answers(scheduler_of(session, prefix_cache=False), [each])[0] for each in wanted]
    together = answers(scheduler_of(session, prefix_cache=True), wanted)
    same = sum(own[0] == other[0] for own, other in zip(alone, together, strict=True))
    print(f"{same} of {len(wanted)} requests get the tokens that they get alone from an engine that is not batch-invariant")
    assert same < len(wanted)
