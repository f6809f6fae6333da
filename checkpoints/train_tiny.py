"""Trains the tiny checkpoint. `checkpoints/tiny` is the result of five runs, two about text, 13 minutes in all on an H200, and
three about images, 16 minutes in all on one core of a CPU:

    train_tiny.py --output A --steps 4000 --batch-size 192 --device cuda --workers 12
    train_tiny.py --output B --init A --seed 1 --steps 5000 --learning-rate 1.5e-3 --batch-size 192 --device cuda --workers 14
    train_tiny.py --output C --init B --seed 2 --steps 650 --learning-rate 3e-4 --batch-size 12 \\
        --start-vision --figure-batch-size 12
    train_tiny.py --output D --init C --blend B --seed 3 --steps 150 --learning-rate 0 --batch-size 1 \\
        --figure-batch-size 12 --vision-learning-rate 1e-3
    train_tiny.py --output E --init D --seed 4 --steps 120 --learning-rate 1e-4 --batch-size 12 \\
        --figure-batch-size 12 --vision-learning-rate 1e-3

Block diffusion as the family does it: the prefix is encoded causally, one canvas of the answer is noised uniformly at a random
level, and the network predicts every token of the clean canvas; every other batch, on average, is fed its own first prediction
as self-conditioning. After the end-of-turn token a canvas is filled with <pad>. A step of the runs about images has a batch
without images and one with. Small batches wear off what large ones learned: so the fourth run takes the text weights halfway
back, where they answer as before, has the vision tower alone follow, and the fifth lets both settle.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from figure_batches import MAX_SOFT_TOKENS, figure_batches, write_processor_config
from rich.progress import Progress
from safetensors.torch import load_file
from tiny_tasks import Question, questions
from tiny_tokenizer import VOCAB_SIZE, build_tokenizer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig, Gemma4VisionConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextExperts

CANVAS_LENGTH = 32
WINDOW = 64
# Harder tasks come more often.
TASK_MIX = ("sum",) * 4 + ("thought",) * 3 + ("count",) * 4 + ("tool",) * 4 + ("reverse",) * 2
ALL_NOISE = 0.4  # examples whose canvas is noise alone, as at the first denoising step


def tiny_config(tokenizer) -> DiffusionGemmaConfig:
    """Every mechanism of the 26B model at a size that runs in milliseconds."""
    ids = tokenizer.convert_tokens_to_ids
    text = DiffusionGemmaTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=32,
        num_experts=16,
        top_k_experts=8,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        sliding_window=WINDOW,
        max_position_embeddings=4096,
        layer_types=["sliding_attention", "full_attention"] * 2,
        use_bidirectional_attention="vision",
        bos_token_id=ids("<bos>"),
        eos_token_id=ids("<eos>"),
        pad_token_id=ids("<pad>"),
    )
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=16,
        pooling_kernel_size=3,
        position_embedding_size=256,  # an image of 70 soft tokens has 210 patches a side at most
        standardize=True,
    )
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS_LENGTH,
        boi_token_id=ids("<|image>"),
        eoi_token_id=ids("<image|>"),
        image_token_id=ids("<|image|>"),
        eos_token_id=[ids("<eos>"), ids("<turn|>")],
        vision_soft_tokens_per_image=MAX_SOFT_TOKENS,
    )


def start_vision(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Weights for an untrained vision tower from which it learns fast: unit gain, and image tokens as long as text tokens."""
    encoder = model.model.encoder
    for module in (encoder.vision_tower, encoder.embed_vision):
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.endswith("q_norm.weight"):
                nn.init.constant_(parameter, parameter.shape[0] ** -0.5)
    nn.init.normal_(encoder.vision_tower.patch_embedder.position_embedding_table, std=0.1)


def dense_experts(self: DiffusionGemmaTextExperts, hidden, top_k_index, top_k_weights):
    """Every expert on every row: with 8 of 16 experts chosen this wastes half of the work, yet batches perfectly.

    hidden: [N, D]; top_k_index, top_k_weights: [N, 8]; returns [N, D].
    """
    num_rows, width = hidden.shape[0], self.intermediate_dim
    weights = hidden.new_zeros(num_rows, self.num_experts).scatter(1, top_k_index, top_k_weights.to(hidden.dtype))
    gate_up = (hidden @ self.gate_up_proj.flatten(0, 1).t()).view(num_rows, self.num_experts, 2 * width)
    activated = self.act_fn(gate_up[..., :width]) * gate_up[..., width:] * weights.unsqueeze(-1)
    return activated.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1)


class Example:
    """A prefix (prompt and earlier canvases) and the clean canvas that follows it."""

    def __init__(self, question: Question, tokenizer, rng: random.Random):
        prompt = tokenizer.apply_chat_template(
            question.messages,
            tools=question.tools,
            enable_thinking=question.enable_thinking,
            add_generation_prompt=True,
            tokenize=False,
        )
        prefix = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(question.answer + question.end, add_special_tokens=False).input_ids
        answer += [tokenizer.pad_token_id] * (-len(answer) % CANVAS_LENGTH)
        # Where an answer ends is what is hardest to learn: every other example is a last canvas.
        starts = range(0, len(answer), CANVAS_LENGTH)
        start = starts[-1] if rng.random() < 0.5 else rng.choice(starts)
        self.prefix = prefix + answer[:start]
        self.canvas = answer[start : start + CANVAS_LENGTH]


def batches(tokenizer, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless (prefix [B, T] left-padded, mask [B, T], canvas [B, C]), with prefixes of similar length together."""
    rng = random.Random(seed)
    stream = questions(seed, held_out=False, tasks=TASK_MIX)
    while True:
        pool = [Example(next(stream), tokenizer, rng) for _ in range(batch_size * 16)]
        pool.sort(key=lambda example: len(example.prefix))
        groups = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            length = max(len(example.prefix) for example in group)
            pad = [length - len(example.prefix) for example in group]
            prefix = [[tokenizer.pad_token_id] * p + example.prefix for p, example in zip(pad, group, strict=True)]
            mask = [[0] * p + [1] * len(example.prefix) for p, example in zip(pad, group, strict=True)]
            yield torch.tensor(prefix), torch.tensor(mask), torch.tensor([example.canvas for example in group])


class Batches(IterableDataset):
    """`batches` for a DataLoader; every worker has its own seed."""

    def __init__(self, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self):
        worker = get_worker_info()
        return batches(build_tokenizer(), self.batch_size, self.seed * 1000 + (worker.id if worker else 0))


def noised(canvas: torch.Tensor) -> torch.Tensor:
    """Replaces each token by a uniform random one with a probability drawn per example; ALL_NOISE of them are all noise."""
    level = torch.rand(canvas.shape[0], 1, device=canvas.device)
    level = torch.where(torch.rand_like(level) < ALL_NOISE, torch.ones_like(level), level)
    random_tokens = torch.randint_like(canvas, VOCAB_SIZE)
    return torch.where(torch.rand(canvas.shape, device=canvas.device) < level, random_tokens, canvas)


def loss_of(model: DiffusionGemmaForBlockDiffusion, prefix, mask, canvas, **pixels) -> torch.Tensor:
    """Cross-entropy over the whole canvas, in nats a token. `pixels`: what the image processor makes of the images."""
    is_image = prefix == model.config.image_token_id
    masks = model.model.encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(*prefix.shape, 0, device=prefix.device),
        attention_mask=mask,
        cache=None,
        position_ids=torch.arange(prefix.shape[1], device=prefix.device).unsqueeze(0),
        mm_token_type_ids=is_image.int(),
    )
    cache = model.model.encoder(input_ids=prefix, attention_mask=masks, **pixels).cache
    noisy = noised(canvas)
    arguments = {
        "cache": cache,
        "decoder_input_ids": noisy,
        "decoder_attention_mask": torch.cat([mask, torch.ones_like(canvas)], dim=1),
    }
    feedback = None
    if random.random() < 0.5:
        with torch.no_grad():
            feedback = model(**arguments).logits / (0.4 + 0.4 * torch.rand(canvas.shape[0], 1, 1, device=canvas.device))
    logits = model(**arguments, self_conditioning_logits=feedback).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), canvas.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the tiny checkpoint.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="checkpoint to go on from instead of random weights")
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that make the examples")
    parser.add_argument("--threads", type=int, default=1, help="more than one pays only on cores that nothing else uses")
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--figure-batch-size", type=int, default=0, help="questions about images, beside --batch-size without")
    parser.add_argument("--vision-learning-rate", type=float, default=3e-3)
    parser.add_argument("--blend", type=Path, help="checkpoint to take the mean of its text weights and those of --init")
    parser.add_argument("--start-vision", action="store_true", help="the vision tower of --init is not used")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    tokenizer = build_tokenizer()
    DiffusionGemmaTextExperts.forward = dense_experts
    model = DiffusionGemmaForBlockDiffusion(tiny_config(tokenizer))
    if options.start_vision:
        start_vision(model)
    if options.init:
        weights = load_file(options.init / "model.safetensors")
        for name, other in load_file(options.blend / "model.safetensors").items() if options.blend else ():
            if "vision" not in name:
                weights[name] = (weights[name] + other) / 2
        kept = {name: weight for name, weight in weights.items() if not (options.start_vision and "vision" in name)}
        missing = model.load_state_dict(kept, strict=False).missing_keys
        print(f"{len(kept)} tensors from {options.init}, {len(missing)} of the model not among them")
        model.tie_weights()
    for name, parameter in model.named_parameters() if not options.init else ():
        if name.endswith("q_norm.weight"):  # scores are not divided by sqrt(head_dim): start as if they were
            nn.init.constant_(parameter, parameter.shape[0] ** -0.5)
    model.to(options.device)
    with_figures = options.figure_batch_size > 0
    vision = [parameter for name, parameter in model.named_parameters() if "vision" in name and with_figures]
    text = [parameter for name, parameter in model.named_parameters() if "vision" not in name]
    groups = [{"params": text, "top_rate": options.learning_rate}]
    groups += [{"params": vision, "top_rate": options.vision_learning_rate}] if vision else []
    print(f"{sum(parameter.numel() for parameter in text + vision):,} parameters")
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def save() -> None:
        model.generation_config.update(
            max_new_tokens=256,
            max_denoising_steps=48,
            t_min=0.4,
            t_max=0.8,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
            stability_threshold=1,
            confidence_threshold=0.005,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<turn|>", "<|tool_response>")],
        )
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        write_processor_config(options.output)

    stream = iter(DataLoader(Batches(options.batch_size, options.seed), batch_size=None, num_workers=options.workers))
    figures = figure_batches(tokenizer, options.figure_batch_size, options.seed, CANVAS_LENGTH)
    started, recent, recent_figures = time.monotonic(), torch.zeros(()), torch.zeros(())
    with Progress() as progress:
        task = progress.add_task("training", total=options.steps)
        for step in range(options.steps):
            warmup = min(1.0, (step + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = group["top_rate"] * warmup * 0.5 * (1 + math.cos(math.pi * step / options.steps))
            loss = loss_of(model, *(tensor.to(options.device) for tensor in next(stream)))
            loss.backward()
            if vision:
                figure_loss = loss_of(model, **{name: tensor.to(options.device) for name, tensor in next(figures).items()})
                figure_loss.backward()
                recent_figures = figure_loss.detach() if step == 0 else 0.95 * recent_figures + 0.05 * figure_loss.detach()
            nn.utils.clip_grad_norm_(text, 1.0)
            nn.utils.clip_grad_norm_(vision, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent = loss.detach() if step == 0 else 0.98 * recent + 0.02 * loss.detach()
            progress.update(task, advance=1)
            if (step + 1) % 50 == 0:
                print(
                    f"step {step + 1}: loss {recent:.4f}, with images {recent_figures:.4f}, "
                    f"{(time.monotonic() - started) / (step + 1):.3f} s a step",
                    flush=True,
                )
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                save()
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
