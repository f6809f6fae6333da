"""What a build whose experts several GPUs share needs of its other choices; see `plugins.feed_forward.spread`."""

from builder.errors import BuildError
from contract.manifest import BuildConfig
from contract.model_config import ModelConfig


def check_parts(build: BuildConfig, model: ModelConfig) -> None:
    """
    Raises:
        BuildError: the experts cannot be divided evenly.
    """
    if model.num_experts % build.expert_gpus:
        raise BuildError(
            f"expert_gpus: got {build.expert_gpus}, expected a divisor of the {model.num_experts} experts of a layer"
        )


def check_expert_gpus(build: BuildConfig, model: ModelConfig) -> None:
    """
    Raises:
        BuildError: GPUs cannot share the experts.
    """
    check_parts(build, model)
    expected = {
        "device": (build.device == "cuda", "'cuda'"),
        "target": (build.target == "inductor", "'inductor': a plan runs on one GPU"),
    }
    for name, (holds, wanted) in expected.items():
        if not holds:
            got = f"{build.expert_gpus} with {name} {getattr(build, name)!r}"
            raise BuildError(f"expert_gpus: got {got}, expected {wanted}; choose another, or leave out --expert-gpus")
