"""Small random checkpoints in Hugging Face format, and sessions that run the network on them uncompiled."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig, Gemma4VisionConfig

from backend.images.preprocess import ImagePatches
from backend.session import Session
from backend.weights import bind_weights
from builder.config import read_model_config
from builder.description import describe
from builder.export import export_program, mixed_signature, signatures
from builder.weights import all_weights, with_encoder_weights
from contract.checkpoint import Checkpoint
from contract.manifest import BuildConfig, Program
from contract.model_config import VisionConfig

TINY = Path(__file__).parent.parent / "checkpoints" / "tiny"

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_experts": 12,
    "top_k_experts": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 24,
    "max_position_embeddings": 2048,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "use_bidirectional_attention": "vision",
}


LEAST_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "position_embedding_size": 8,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "position_embedding_size": 256,
    "standardize": True,
}
"""A tower to be looked at; its heads are no power of two, as those of the 26B model."""
IMAGE_TOKENS = {"image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92}


def random_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    canvas_length: int = 16,
    max_shard_size: str = "5GB",
    feedback: float = 0.05,
    vision: dict | None = None,
    **text,
) -> Path:
    """Writes a checkpoint with random weights, scaled so that attention, routing and logits are far from uniform.

    vision: the vision tower's configuration; None is the least one, and no token of the vocabulary stands for images.
    """
    torch.manual_seed(seed)
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**{**BASE, **text}),
        vision_config=Gemma4VisionConfig(**(vision or LEAST_VISION)),
        canvas_length=canvas_length,
        **(IMAGE_TOKENS if vision else {}),
    )
    model = DiffusionGemmaForBlockDiffusion(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "scale")) or "layernorm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))
            elif name.endswith("self_conditioning.down_proj.weight"):
                # The one continuous path from step to step. At full strength a random network is chaotic along it:
                # rounding errors grow tenfold a step, and no two correct implementations agree after eight.
                parameter.copy_(feedback * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            elif parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.7 + 0.6 * torch.rand(1))
            elif name.endswith(("std_bias", "std_scale", "_min", "_max")):
                # Clipping that clips some, in and out: activations are of order one.
                sign = -1 if name.endswith("_min") else 1
                buffer.copy_(sign * (1 + torch.rand_like(buffer)))
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor.bfloat16())  # the same weights whichever dtype they are loaded in
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    (directory / "generation_config.json").write_text(json.dumps({"max_denoising_steps": 48, "eos_token_id": []}))
    return directory


def change_tensors(tensors: dict[str, torch.Tensor], prefix: str, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Puts others in place of tensors under `prefix`, None: takes one away. Keys have "__" where names have a dot."""
    for key, value in changes.items():
        name = f"{prefix}.{key.replace('__', '.')}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value


def random_image(num_soft_tokens: int, vision: VisionConfig) -> ImagePatches:
    """Noise, at places of no order."""
    generator, patches = torch.Generator().manual_seed(num_soft_tokens), vision.pooling_kernel_size**2
    pixels = torch.randint(256, (num_soft_tokens, patches, 3 * vision.patch_size**2), generator=generator)
    places = torch.randint(vision.position_embedding_size, (num_soft_tokens, patches, 2), generator=generator)
    return ImagePatches(patches=pixels.to(torch.uint8).numpy(), positions=places.int().numpy(), digest=b"")


def network_session(
    checkpoint: Path, *, dtype: str = "auto", traced: Collection[str] = (), mixed: bool = False, **choices
) -> Session:
    """A session whose programs are the network's own modules: no tracing, no compilation. mixed: with that program.

    traced: programs that are traced and run as their graphs, which lack what no output needs: in encode, the last layer but for
    its keys and values.
    """
    model = with_encoder_weights(read_model_config(checkpoint), Checkpoint(checkpoint).names())
    build = BuildConfig(target="inductor", dtype=model.dtype if dtype == "auto" else dtype, **choices)
    manifest = describe(model, build, Checkpoint(checkpoint), all_weights(model), checkpoint, checkpoint)
    programs, runners = {}, {}
    for signature in (*signatures(model, build), *((mixed_signature(model, build),) if mixed else ())):
        signature.module.to(build.device)
        programs[signature.name] = Program(file="", inputs=signature.inputs, weights=signature.weights, outputs=())

        network = signature.module
        if signature.name in traced:
            network = export_program(signature, model, build).exported.module()
            for node in network.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
                network.graph.erase_node(node)  # or what is dead would be asserted
            network.graph.eliminate_dead_code()
            network.recompile()

        def run(tensors: list[torch.Tensor], signature=signature, network=network):
            names = [binding.name for binding in signature.inputs]
            inputs = dict(zip(names, tensors[: len(names)], strict=True))
            with torch.no_grad():
                output = network(inputs, dict(zip(signature.weights, tensors[len(names) :], strict=True)))
            return [output] if isinstance(output, torch.Tensor) else output

        runners[signature.name] = run
    manifest = manifest.model_copy(update={"programs": programs})
    return Session(manifest, runners, bind_weights(manifest, checkpoint, checkpoint))
