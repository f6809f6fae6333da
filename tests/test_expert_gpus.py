"""Experts that several GPUs share, as far as it goes without a GPU: the parts of the weights, the programs, what is refused."""

import pytest
import torch
from small_checkpoints import TINY, network_session, random_checkpoint
from tokenizers import Tokenizer
from typer.testing import CliRunner

from backend import LLM, SamplingConfig
from backend.__main__ import app as backend_app
from backend.engine import Engine, EngineLimits
from backend.expert_gpus import check_others_free, connect_gpus
from backend.generation_defaults import GenerationDefaults
from backend.planner import check_weights_fit, plan_memory
from backend.session import Session
from backend.weights import bind_weights
from builder.__main__ import app
from builder.build import build_engine
from builder.config import read_model_config
from builder.description import describe
from builder.errors import BuildError
from builder.expert_gpus import check_expert_gpus
from builder.export import minimums, signatures
from builder.quantize import quantize_checkpoint
from builder.weights import all_weights
from contract.checkpoint import Checkpoint
from contract.manifest import BuildConfig, Gpu, Manifest, ManifestError

H200 = Gpu(name="NVIDIA H200", compute_capability=(9, 0))
GPU_BUILD = {"target": "inductor", "dtype": "bfloat16", "device": "cuda"}


def described(**choices) -> Manifest:
    """Of the tiny checkpoint for an H200, which need not be here."""
    model, build = read_model_config(TINY), BuildConfig(**GPU_BUILD | choices)
    manifest = describe(model, build.model_copy(update={"device": "cpu"}), Checkpoint(TINY), all_weights(model), TINY, TINY)
    return manifest.model_copy(update={"gpu": H200, "build": build})


# -- Weights


def of_denoise(session: Session) -> dict[str, torch.Tensor]:
    return dict(zip(session.manifest.programs["denoise"].weights, session._weights["denoise"], strict=True))


@pytest.mark.parametrize("fp8", [False, True])
def test_each_gpu_has_its_part_of_the_experts_and_the_first_one_all_else(fp8, tmp_path):
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    if fp8:
        checkpoint, plain = tmp_path / "fp8", checkpoint
        quantize_checkpoint(plain, checkpoint)
    whole, shared = network_session(checkpoint), network_session(checkpoint, expert_gpus=2)
    parts = {name for name, weight in shared.manifest.weights.items() if weight.part}
    assert {name.rpartition(".experts.")[2] for name in parts} == {
        f"{projection}{scale}{gpu}"
        for projection in ("gate_up_proj", "down_proj")
        for scale in (("", "_scale") if fp8 else ("",))
        for gpu in ("", ".1")
    }
    bound = of_denoise(shared)
    for name, tensor in of_denoise(whole).items():
        tensors = [bound[each] for each in ((name, f"{name}.1") if name in parts else (name,))]
        assert len({each.shape for each in tensors}) == 1
        assert torch.equal(torch.cat([each.view(torch.uint8) for each in tensors]), tensor.view(torch.uint8))
    assert [len(shared.manifest.weights_of(gpu)) for gpu in (0, 1, 2)] == [len(whole.manifest.weights), len(parts) // 2, 0]


def test_a_request_gets_the_same(render, held_out):
    questions, answers = [render(question) for question in held_out[:4]], []
    for choices in ({}, {"expert_gpus": 2}):
        session = network_session(TINY, dtype="float32", **choices)
        defaults = GenerationDefaults.from_json(TINY / "generation_config.json")
        llm = LLM.from_engine(Engine(session, Tokenizer.from_file(str(TINY / "tokenizer.json")), defaults, EngineLimits()))
        answers.append(llm.generate(questions, SamplingConfig(seed=1, max_tokens=64)))
    assert [each.token_ids for each in answers[1]] == [each.token_ids for each in answers[0]]


def test_a_damaged_part_is_told(tmp_path):
    manifest = described(device="cpu", expert_gpus=2)
    name, weight = next((name, weight) for name, weight in manifest.weights.items() if weight.part)
    wrong = weight.model_copy(update={"shape": (weight.shape[0] * 2, *weight.shape[1:])})
    manifest = manifest.model_copy(update={"weights": manifest.weights | {name: wrong}})
    with pytest.raises(ManifestError, match="which the checkpoint does not have; build the engine again with --force"):
        bind_weights(manifest, tmp_path, TINY)


# -- Building


def test_encode_is_compiled_once():
    """Its kernels are chosen at each call."""
    model, build = read_model_config(TINY), BuildConfig(**GPU_BUILD, expert_gpus=2)
    assert {minimums(each, build) for each in signatures(model, build)} == {(1,)}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"expert_gpus": 3}, r"expert_gpus: got 3, expected a divisor of the 16 experts of a layer"),
        (
            {"device": "cpu"},
            "got 2 with device 'cpu', expected 'cuda'; choose another, or leave out --expert-gpus",
        ),
        ({"target": "tensorrt"}, "expert_gpus: got 2 with target 'tensorrt', expected 'inductor': a plan runs on one GPU"),
    ],
    ids=str,
)
def test_what_gpus_cannot_share_is_refused(choices, message):
    model = read_model_config(TINY)
    check_expert_gpus(BuildConfig(**GPU_BUILD, expert_gpus=2), model)
    with pytest.raises(BuildError, match=message):
        check_expert_gpus(BuildConfig(**GPU_BUILD | {"expert_gpus": 2} | choices), model)


def test_the_command_refuses_a_cpu_and_onnx(tmp_path):
    for option, message in (("--device=cpu", "got 2 with device 'cpu'"), ("--keep-onnx", "got 2 GPUs that share the experts")):
        result = CliRunner().invoke(app, ["build", str(TINY), str(tmp_path / "engine"), "--expert-gpus", "2", option])
        [line] = result.stderr.strip().splitlines()
        assert message in line and not list(tmp_path.iterdir())


def test_the_target_is_not_left_to_tensorrt(tmp_path, monkeypatch):
    monkeypatch.setattr("builder.build.choose_device", lambda wanted: ("cuda", "a test"))
    monkeypatch.setattr("builder.targets.missing_for_tensorrt", lambda device: [])
    lines = []

    def far_enough(directory):
        raise BuildError("far enough")

    monkeypatch.setattr("builder.build.Checkpoint", far_enough)
    with pytest.raises(BuildError, match="far enough"):
        build_engine(TINY, tmp_path / "engine", expert_gpus=2, report=lines.append)
    assert lines[0] == "target inductor (GPUs share the experts), device cuda (a test)"
    assert lines[-1] == "experts shared by 2 GPUs, 8 of each layer on each"


# -- Memory


def test_the_plan_counts_what_each_gpu_has():
    limits = EngineLimits(max_sequences=4)
    one, two = (plan_memory(described(expert_gpus=count), limits, device_type="cuda") for count in (1, 2))
    assert one.others is None and two.others.count == 1
    assert two.weights_bytes + two.others.weights_bytes == one.weights_bytes
    assert two.total_bytes == one.total_bytes - two.others.weights_bytes
    assert len(one.report().splitlines()) == 2 and two.report().splitlines()[2].startswith("GPU 1  1.00 GB = runtime 1.00 + w")
    four = plan_memory(described(expert_gpus=4), limits, device_type="cuda")
    assert four.others.count == 3 and four.others.weights_bytes * 2 == two.others.weights_bytes
    assert four.report().splitlines()[2].startswith("GPUs 1 to 3, each  ")


def test_a_plan_for_gpus_that_are_not_here(tmp_path):
    build, plan = (CliRunner().invoke, str(tmp_path / "plan"))
    made = build(app, ["manifest", str(TINY), plan, "--expert-gpus", "4"])
    assert made.exit_code == 0, made.output
    planned = build(backend_app, ["plan", plan, "--memory", "2GB", "--device", "cuda"])
    assert planned.exit_code == 0 and "\nGPUs 1 to 3, each  1." in planned.output
    [line] = build(app, ["manifest", str(TINY), str(tmp_path / "other"), "--expert-gpus", "5"]).stderr.splitlines()
    assert line == "error: expert_gpus: got 5, expected a divisor of the 16 experts of a layer"


def test_each_gpu_must_have_room(monkeypatch):
    manifest = described(expert_gpus=2)
    others = plan_memory(manifest, EngineLimits(max_sequences=4), device_type="cuda").others
    check_weights_fit(manifest, others.weights_bytes, 1)
    with pytest.raises(ManifestError, match="end what else uses GPU 1, take a larger one"):
        check_weights_fit(manifest, others.weights_bytes - 1, 1)
    free = {"cuda:1": others.workspace_bytes}
    monkeypatch.setattr("backend.expert_gpus.free_bytes", lambda device: free[str(device)])
    check_others_free(others)
    free["cuda:1"] -= 1
    with pytest.raises(ManifestError, match=r"GB free beside the weights on GPU 1, expected \d\.\d\d GB for passes"):
        check_others_free(others)


# -- Loading


def test_a_machine_with_other_gpus_is_refused(tmp_path, monkeypatch):
    there = {"count": 1, "second": (9, 0), "peer": True}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there["count"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: there["second"] if gpu else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU number {gpu}")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: there["peer"])
    manifest = described(expert_gpus=2)
    message = r"got 1 visible GPUs, expected the 2 that share its experts; pass serve --gpus 0\+1, let CUDA_VISIBLE_DEVICES"
    with pytest.raises(ManifestError, match=message):
        connect_gpus(manifest, tmp_path)
    there |= {"count": 2, "second": (8, 0)}
    with pytest.raises(ManifestError, match=r"built for NVIDIA H200 .*, but GPU 1 here is GPU number 1; let CUDA_VISIBLE"):
        connect_gpus(manifest, tmp_path)
    there |= {"second": (9, 0), "peer": False}
    with pytest.raises(ManifestError, match="GPU 0 cannot reach the memory of GPU 1 here; build the engine again"):
        connect_gpus(manifest, tmp_path)
