"""transformers' own model on the same weights: one denoising step and one whole `generate`, timed in the same run."""

import statistics
import time
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

from builder.weights import bindings, text_weights
from contract.model_config import ModelConfig

VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def shared_model(checkpoint: Path, weights: dict[str, torch.Tensor]) -> DiffusionGemmaForBlockDiffusion:
    """The text model around the tensors of `weights`, without a copy; its vision tower has no weights."""
    config = DiffusionGemmaConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    device = next(iter(weights.values())).device
    for parent in list(model.modules()):  # buffers that no checkpoint holds
        for name, child in list(parent.named_children()):
            if "RotaryEmbedding" in type(child).__name__ and "Vision" not in type(child).__name__:
                setattr(parent, name, type(child)(config.text_config, device=device))
            elif hasattr(child, "embed_scale") and child.embed_scale.is_meta:
                child.embed_scale = torch.tensor(config.text_config.hidden_size**0.5, device=device)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if left := [name for name, tensor in tensors.items() if tensor.is_meta and not name.startswith(VISION)]:
        raise ValueError(f"transformers' model: got no weights for {', '.join(left[:5])} … ({len(left)} in all), expected all")
    return model.eval()


def checkpoint_tensors(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by name, as views of the engine's weights."""
    shapes = text_weights(config)
    tensors = {}
    for binding, names in bindings(shapes).items():
        tensors |= zip(names, weights[binding].split([shapes[name][0] for name in names]), strict=True)
    return tensors


@torch.no_grad()
def time_transformers(checkpoint: Path, config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Milliseconds: the forward pass of a step after a prompt of 128 tokens, and `generate` of one canvas of 48 steps."""
    model = shared_model(checkpoint, checkpoint_tensors(config, weights))
    text, length = model.config.text_config, model.config.canvas_length
    prompt = torch.randint(5, 1000, (1, 128), device="cuda")
    cache = DynamicCache(config=model.config.get_text_config())
    model.model.encoder(  # cache= from transformers 5.24 on, which takes the old name, too; GPU machines may have one before
        input_ids=prompt,
        past_key_values=cache,
        position_ids=torch.arange(128, device="cuda").unsqueeze(0),
        attention_mask=torch.ones(1, 128, dtype=torch.bool, device="cuda"),
    )
    canvas = torch.randint(text.vocab_size, (1, length), device="cuda")
    previous, times = None, {}
    for name, runs in (("first step's forward", 3), ("forward with self-conditioning", 8)):
        each = []
        for _ in range(runs):
            torch.cuda.synchronize()
            started = time.perf_counter()
            logits = model(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=previous).logits
            torch.cuda.synchronize()
            each.append(1e3 * (time.perf_counter() - started))
        previous, times[name] = logits, round(statistics.median(each), 2)
        print(f"  transformers, {name}: {times[name]} ms", flush=True)
    del previous, logits
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            prompt,
            max_new_tokens=length,
            max_denoising_steps=48,
            confidence_threshold=1e-30,
            eos_token_id=None,
            pad_token_id=None,
        )
        torch.cuda.synchronize()
        times["generate, 48 steps"] = round(1e3 * (time.perf_counter() - started), 1)
        print(f"  transformers, generate: {times['generate, 48 steps']} ms", flush=True)
    return times
