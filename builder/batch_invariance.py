"""What a batch-invariant build needs of its other choices; see `plugins.batch_invariance`."""

from builder.errors import BuildError
from contract.manifest import BuildConfig
from contract.model_config import SOFT_TOKEN_BUDGETS, ModelConfig
from plugins.batch_invariance import CUT_TOKENS, PASS_ROWS


def check_batch_invariant(build: BuildConfig, model: ModelConfig) -> None:
    """
    Raises:
        BuildError: the build cannot be batch-invariant.
    """
    # In one piece go a canvas, beside as much of a prompt, and the largest image with the tokens that stay with it.
    largest = SOFT_TOKEN_BUDGETS[-1] + 2 * CUT_TOKENS if model.vision else 0
    least = -(-max(largest, 2 * model.canvas_length) // PASS_ROWS) * PASS_ROWS
    whole_passes = build.max_encode_tokens % PASS_ROWS == 0 and build.max_encode_tokens >= least
    whole_pages = CUT_TOKENS % build.page_size == 0 or build.page_size % CUT_TOKENS == 0
    expected = {
        "device": (build.device == "cuda", "'cuda': on a CPU requests get in float32 what they get alone as it is"),
        "target": (build.target == "inductor", "'inductor', which alone has such kernels"),
        "expert_activations": (build.expert_activations == "full", "'full': FP8 rows are summed otherwise among many"),
        "max_encode_tokens": (whole_passes, f"a multiple of {PASS_ROWS}, at least {least}"),
        "page_size": (whole_pages, f"a divisor or a multiple of {CUT_TOKENS}"),
        "max_head_rows": (build.max_head_rows >= model.canvas_length, f"at least a canvas, {model.canvas_length}"),
    }
    for name, (holds, wanted) in expected.items():
        if not holds:
            got = getattr(build, name)
            raise BuildError(
                f"batch_invariant: got {name} {got!r}, expected {wanted}; choose another, or leave out --batch-invariant"
            )
