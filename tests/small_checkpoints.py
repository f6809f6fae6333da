"""Small random checkpoints in Hugging Face format, and sessions that run the network on them uncompiled."""

import json
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig, Gemma4VisionConfig

from backend.session import Session
from backend.weights import bind_weights
from builder.build import describe
from builder.config import read_model_config
from builder.export import signatures
from builder.weights import text_weights
from contract.checkpoint import Checkpoint
from contract.manifest import BuildConfig, Program

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


def random_checkpoint(
    directory: Path, *, seed: int = 0, canvas_length: int = 16, max_shard_size: str = "5GB", feedback: float = 0.05, **text
) -> Path:
    """Writes a checkpoint with random weights, scaled so that attention, routing and logits are far from uniform."""
    torch.manual_seed(seed)
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16
    )
    vision.position_embedding_size = 8
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**{**BASE, **text}), vision_config=vision, canvas_length=canvas_length
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
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor.bfloat16())  # the same weights whichever dtype they are loaded in
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    (directory / "generation_config.json").write_text(json.dumps({"max_denoising_steps": 48, "eos_token_id": []}))
    return directory


def network_session(checkpoint: Path, *, dtype: str = "auto", **choices) -> Session:
    """A session whose programs are the network's own modules: no tracing, no compilation."""
    model = read_model_config(checkpoint)
    build = BuildConfig(target="inductor", dtype=model.dtype if dtype == "auto" else dtype, **choices)
    manifest = describe(model, build, Checkpoint(checkpoint), text_weights(model), checkpoint, checkpoint)
    programs, runners = {}, {}
    for signature in signatures(model, build):
        signature.module.to(build.device)
        programs[signature.name] = Program(file="", inputs=signature.inputs, weights=signature.weights, outputs=())

        def run(tensors: list[torch.Tensor], signature=signature):
            names = [binding.name for binding in signature.inputs]
            inputs = dict(zip(names, tensors[: len(names)], strict=True))
            with torch.no_grad():
                output = signature.module(inputs, dict(zip(signature.weights, tensors[len(names) :], strict=True)))
            return output if isinstance(output, list) else [output]

        runners[signature.name] = run
    manifest = manifest.model_copy(update={"programs": programs})
    return Session(manifest, runners, bind_weights(manifest, checkpoint, checkpoint))
