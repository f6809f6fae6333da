"""The attention operator as a TensorRT plugin: the kernel that never splits the keys, whose number of splits would have to be
a constant."""

from torch import Tensor

from plugins.attention.launch import attention_launch
from plugins.tensorrt_plugin import KernelPlugin, Output
from plugins.triton_launch import Launch


def _describe(inputs: tuple[Tensor, ...], *, causal: int, window: int) -> Launch:
    return attention_launch(inputs, bool(causal), window)


PAGED_ATTENTION = KernelPlugin(
    op_type="PagedAttention",
    inputs=("query", "new_kv", "kv_pages", "page_table", "prefix_lengths", "sequence_starts", "image_block_ids"),
    attributes=("causal", "window"),
    outputs=(Output(name="output", rank=3, dtype="query"),),
    describe=_describe,
)
"""The operator's own inputs and attributes; see the package's docstring."""
