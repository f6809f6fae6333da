"""Questions about drawn figures as the tiny checkpoint is trained on them: pixels and prompts as transformers prepares them."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_figures import figure_questions
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

MAX_SOFT_TOKENS = 70


def figure_batches(tokenizer, batch_size: int, seed: int, canvas_length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches: prefix [B, T] left-padded, mask [B, T], canvas [B, C], pixel_values [B, 630, 768] float32 in [0, 1],
    image_position_ids [B, 630, 2].

    The placeholder of the chat template becomes the begin-of-image token, one image token a soft token, and the end-of-image
    token.
    """
    processor = Gemma4ImageProcessorPil(max_soft_tokens=MAX_SOFT_TOKENS)
    stream = figure_questions(seed, held_out=False)
    while True:
        asked = [next(stream) for _ in range(batch_size)]
        images = processor([image for _, image in asked], return_tensors="pt")
        prefixes, canvases = [], []
        for (question, _), num_soft_tokens in zip(asked, images["num_soft_tokens_per_image"], strict=True):
            prompt = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
            expanded = prompt.replace("<|image|>", "<|image>" + "<|image|>" * int(num_soft_tokens) + "<image|>")
            prefixes.append(tokenizer(expanded, add_special_tokens=False).input_ids)
            answer = tokenizer(question.answer + question.end, add_special_tokens=False).input_ids
            canvases.append(answer + [tokenizer.pad_token_id] * (canvas_length - len(answer)))
        length = max(map(len, prefixes))
        yield {
            "prefix": torch.tensor([[tokenizer.pad_token_id] * (length - len(prefix)) + prefix for prefix in prefixes]),
            "mask": torch.tensor([[0] * (length - len(prefix)) + [1] * len(prefix) for prefix in prefixes]),
            "canvas": torch.tensor(canvases),
            "pixel_values": images["pixel_values"],
            "image_position_ids": images["image_position_ids"],
        }


def write_processor_config(checkpoint: Path) -> None:
    """Writes processor_config.json as checkpoints of the family have it."""
    image_processor = Gemma4ImageProcessorPil(max_soft_tokens=MAX_SOFT_TOKENS).to_dict()
    described = {"image_processor": image_processor, "image_seq_length": MAX_SOFT_TOKENS, "processor_class": "Gemma4Processor"}
    (checkpoint / "processor_config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
