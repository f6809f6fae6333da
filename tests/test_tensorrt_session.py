"""The session over TensorRT plans, on a fake of TensorRT's runtime that runs the network on what it is given."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from fake_tensorrt import FakeTensorRT
from onnx_once import LIMITS
from small_checkpoints import network_session, random_image
from tensorrt_plans import Plans, small_plans
from test_network import Passes
from tokenizers import Tokenizer
from tolerances import assert_close

from backend import LLM, SamplingConfig
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.session import Session
from backend.tensorrt_session import PlanError, load_plans
from backend.weights import bind_weights
from contract.manifest import Manifest, ManifestError


@pytest.fixture(scope="module")
def plans() -> Plans:
    return small_plans()


@pytest.fixture
def network(plans) -> Session:
    return network_session(plans.checkpoint, dtype="float32", **LIMITS)


@pytest.fixture
def fake(plans, network) -> FakeTensorRT:
    """A runtime whose plans compute what the network does; what a plan does not read is made up."""
    manifest = plans.manifest
    programs = {name: runs[0][1] for name, runs in network._programs.items()}

    def run(name: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        program = manifest.programs[name]
        read = [(binding, inputs[binding.name]) for binding in program.inputs if binding.name in inputs]
        sizes = {size: value.shape[axis] for binding, value in read for axis, size in enumerate(binding.shape)}
        values = {weight: torch.full(manifest.weights[weight].shape, float("nan")) for weight in program.weights}
        for binding in program.inputs:
            shape = [sizes.get(size, 1) if isinstance(size, str) else size for size in binding.shape]
            values[binding.name] = torch.zeros(shape, dtype=getattr(torch, binding.dtype))
        values |= inputs
        return programs[name]([values[each] for each in (*(binding.name for binding in program.inputs), *program.weights)])

    return FakeTensorRT(run)


def session(plans: Plans, fake: FakeTensorRT, manifest: Manifest | None = None) -> Session:
    manifest = manifest or plans.manifest
    programs = load_plans(manifest, plans.plans, fake.trt)
    weights = bind_weights(manifest, plans.plans, plans.checkpoint)
    # As on a GPU, where weights are copies: the mapped file's need not start at a multiple of 16 bytes.
    return Session(manifest, programs, {name: weight.clone() for name, weight in weights.items()})


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 40])
def test_encode_equals_the_network_at_every_length(plans, network, fake, num_tokens):
    ours, expected = Passes(session(plans, fake)), Passes(network)
    tokens = [(7 * place) % 97 for place in range(num_tokens)]
    for got, wanted in zip(ours.encode(tokens), expected.encode(tokens), strict=True):
        assert_close(got, wanted, torch.float32)
    for got, wanted in zip(ours.encode(tokens[:3]), expected.encode(tokens[:3]), strict=True):
        assert_close(got, wanted, torch.float32)


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 5, 6])
def test_denoise_equals_the_network_at_every_batch(plans, network, fake, num_sequences):
    length, hidden = plans.model.canvas_length, plans.model.hidden_size
    torch.manual_seed(0)
    canvas = torch.randint(97, (num_sequences, length)).int()
    arguments = (
        canvas,
        torch.randn(num_sequences, length, hidden),
        torch.arange(num_sequences).int() * 5,
        {kind: torch.arange(4 * num_sequences).view(-1, 4).int() for kind in plans.model.attention},
    )
    ours = session(plans, fake)
    pages = [
        torch.randn(24, 8, 2, plans.model.attention[kind].num_kv_heads, plans.model.attention[kind].head_dim)
        for kind in plans.model.layer_types
    ]
    for each in (ours, network):
        each.bind_pages(pages)
    assert_close(ours.denoise(*arguments), network.denoise(*arguments), torch.float32)


def test_head_takes_any_number_of_rows(plans, network, fake):
    ours = session(plans, fake)
    for rows in (1, 7, 40):
        hidden = torch.randn(rows, plans.model.hidden_size)
        assert_close(ours.head(hidden), network.head(hidden), torch.float32)


@pytest.mark.parametrize("num_soft_tokens", [1, 5, 48])
def test_vision_takes_images_of_any_size(plans, network, fake, num_soft_tokens):
    """Filled up to the largest that an encode pass takes: what is filled up is not looked at."""
    image = random_image(num_soft_tokens, plans.model.vision)
    assert_close(session(plans, fake).vision(image), network.vision(image), torch.float32)
    [context] = fake.contexts
    assert context.shapes["patches"] == (48, 9, 768)


def test_whole_generations_are_the_networks(plans, network, fake):
    """Prompts shorter and longer than a chunk, more of them than fit at once, three canvases each."""
    tokenizer = Tokenizer.from_file(str(plans.checkpoint / "tokenizer.json"))
    defaults = GenerationDefaults.from_json(plans.checkpoint / "generation_config.json")
    prompts = [[(11 * place + length) % 97 for place in range(length)] for length in (5, 60, 23, 1)]
    sampling = SamplingConfig(seed=3, max_tokens=40, max_denoising_steps=4)
    generated = [
        LLM.from_engine(Engine(each, tokenizer, defaults, EngineLimits(max_sequences=3))).generate(prompts, sampling)
        for each in (session(plans, fake), network)
    ]
    ours, expected = ([(each.token_ids, each.num_steps) for each in results] for results in generated)
    assert ours == expected and all(len(tokens) == 40 for tokens, _ in ours)


def test_shapes_share_contexts(plans, fake):
    """Lengths from 1 to 16 tokens are one shape; a context is made for a shape once, and never changes it."""
    passes = Passes(session(plans, fake))
    for length in (1, 5, 16, 16, 3):
        passes.encode(list(range(length)))
    assert len(fake.contexts) == 1
    passes.encode(list(range(17)))
    assert len(fake.contexts) == 2
    assert [context.shapes["token_ids"] for context in fake.contexts] == [(16,), (32,)]


def broken(plans: Plans, program: str, **changes) -> Manifest:
    records = {**plans.manifest.programs, program: plans.manifest.programs[program].model_copy(update=changes)}
    return plans.manifest.model_copy(update={"programs": records})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tools": {"tensorrt": "10.14.1"}},
            "built with TensorRT 10.14.1, here is 11.4.0; plans run only in their own version",
        ),
        ({"tools": {}}, "built with TensorRT None"),
    ],
)
def test_other_versions_are_refused(plans, fake, change, message):
    with pytest.raises(ManifestError, match=message):
        load_plans(plans.manifest.model_copy(update=change), plans.plans, fake.trt)


def test_a_missing_tensorrt_is_named(plans):
    with pytest.raises(ManifestError, match=r"built for TensorRT, which does not import here \(.*\); pip install"):
        load_plans(plans.manifest, plans.plans)


def test_plans_that_do_not_load_say_why(plans, fake):
    fake.refuse.add("deserialize_cuda_engine")
    with pytest.raises(ManifestError, match=r"encode.plan: TensorRT cannot load the plan; Version tag does not match"):
        load_plans(plans.manifest, plans.plans, fake.trt)


def test_plans_must_be_the_manifests(plans, fake):
    head = plans.manifest.programs["head"]
    (output,), (rows,) = head.outputs, head.inputs
    cases = [
        ({"inputs": ()}, "has a binding 'hidden' that the manifest does not know"),
        ({"weights": ()}, "has a binding 'model.decoder.embed_tokens.weight' that the manifest does not know"),
        ({"outputs": (output, output.model_copy(update={"name": "more"}))}, "binding 'more' is missing"),
        (
            {"inputs": (rows.model_copy(update={"dtype": "bfloat16"}),)},
            "binding 'hidden' is DataType.FLOAT, expected DataType.BF16",
        ),
        ({"profiles": ()}, "has 1 profiles, the manifest 0"),
    ]
    for changes, message in cases:
        with pytest.raises(ManifestError, match=f"head.plan: {message}"):
            load_plans(broken(plans, "head", **changes), plans.plans, fake.trt)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create_execution_context", "program head: TensorRT made no execution context"),
        ("set_optimization_profile_async", "program head: profile 'rows: rows 1..40' refused"),
        ("set_input_shape", r"program head: profile 'rows: rows 1..40', binding 'hidden': shape \(3, 48\) refused"),
        ("infer_shapes", "program head: TensorRT misses the shape or address of kv_pages.0"),
        ("get_tensor_shape", r"program head, binding 'output.0': TensorRT gives shape \(4, 97\), expected \(3, 97\)"),
        ("set_tensor_address", "program head: binding 'hidden': address refused"),
        ("execute_async_v3", "program head: TensorRT did not enqueue it"),
    ],
)
def test_every_refusal_of_tensorrt_is_an_error(plans, fake, call, message):
    ours = session(plans, fake)
    fake.refuse.add(call)
    with pytest.raises(PlanError, match=message):
        ours.head(torch.randn(3, plans.model.hidden_size))


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.zeros(3, 48, dtype=torch.bfloat16), "binding 'hidden': got torch.bfloat16, expected torch.float32"),
        (torch.zeros(3, 47), r"binding 'hidden': got shape \(3, 47\), expected \(3, 48\)"),
        (torch.zeros(3, 48, device="meta"), "binding 'hidden': got a tensor on meta, expected cpu"),
        (
            torch.zeros(41, 48),
            "program head: no profile takes rows 41; the plan has rows: rows 1..40; build the engine with larger",
        ),
    ],
)
def test_tensors_that_are_not_the_bindings_are_refused(plans, fake, hidden, message):
    with pytest.raises(PlanError, match=message):
        session(plans, fake).head(hidden)


def test_small_tensors_are_copied_and_large_ones_refused_where_kernels_could_not_read_them(plans, network, fake):
    ours, width = session(plans, fake), plans.model.hidden_size
    for hidden in (torch.randn(width, 3).t(), torch.randn(1 + 3 * width)[1:].view(3, width)):
        assert_close(ours.head(hidden), network.head(hidden), torch.float32)
    passes = Passes(ours)
    ours.bind_pages([pages.transpose(0, 1).contiguous().transpose(0, 1) for pages in passes.cache.pages])
    message = r"program encode, binding 'kv_pages.0': expected a contiguous tensor .* \(it is too large to copy\)"
    with pytest.raises(PlanError, match=message):
        passes.encode([1, 2, 3])


def test_sizes_must_agree(plans, fake):
    ours, kinds = session(plans, fake), plans.model.attention
    with pytest.raises(PlanError, match=r"program denoise, binding 'prefix_lengths': got shape \(3,\), expected \(2,\)"):
        ours.bind_pages(Passes(ours).cache.pages)
        canvas = torch.zeros(2, plans.model.canvas_length).int()
        soft = torch.zeros(*canvas.shape, plans.model.hidden_size)
        ours.denoise(canvas, soft, torch.zeros(3).int(), {kind: torch.zeros(2, 1).int() for kind in kinds})
