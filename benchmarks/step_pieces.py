"""What a denoising step is made of, each ready to be timed alone."""

from collections.abc import Callable, Sequence

import torch

from backend.kv_cache import PagedKVCache
from backend.session import Session
from plugins.vocabulary.feedback import soft_embeddings
from plugins.vocabulary.launch import accept_and_renoise, vocabulary_pass


def pieces_of(session: Session, cache: PagedKVCache, slots: Sequence[int]) -> dict[str, Callable[[], object]]:
    """By name, on a canvas of random tokens for each of `slots`."""
    model, device = session.manifest.model, session.device
    batch, length = len(slots), model.canvas_length
    rows = batch * length
    canvas = torch.randint(model.vocab_size, (batch, length), dtype=torch.int32, device=device)
    soft = torch.randn(batch, length, model.hidden_size, device=device).to(session.dtype)
    prefix = torch.tensor([cache.length[slot] for slot in slots], dtype=torch.int32, device=device)
    tables = cache.tables(slots)
    hidden = session.denoise(canvas, soft, prefix, tables).flatten(0, 1)
    logits = session.head(hidden)

    each = torch.arange(rows, device=device)
    drawn = {"seeds": each * 977, "canvas_indices": each * 0, "steps": each * 0}
    numbers = {"cap": model.final_logit_softcapping, "temperature": torch.full((rows,), 0.6, device=device)}
    greedy = torch.zeros(rows, dtype=torch.bool, device=device)
    bound, counts = torch.full((batch,), 0.1, device=device), torch.zeros(batch, dtype=torch.int64, device=device)

    def sample():
        return vocabulary_pass(logits, **numbers, greedy=greedy, positions=each, **drawn)

    result = sample()
    of_canvas = {name: getattr(result, name).view(batch, length) for name in ("argmax", "sampled", "entropy")}

    def accept():
        return accept_and_renoise(
            **of_canvas,
            **{name: value[:batch] for name, value in drawn.items()},
            bound=bound,
            confidence_threshold=bound,
            previous_argmax=of_canvas["argmax"],
            stable_steps=counts,
            stability_threshold=counts,
            vocab_size=model.vocab_size,
        )

    def feed_back():
        scale = model.hidden_size**0.5
        return soft_embeddings(
            logits, **numbers, argmax=result.argmax, embedding=session.embedding, embed_scale=scale
        )  # overwrites the logits, and then its own weights: the time is the same

    return {
        f"denoise, {rows} rows": lambda: session.denoise(canvas, soft, prefix, tables),
        f"head, {rows} rows": lambda: session.head(hidden),
        f"vocabulary pass, {rows} rows": sample,
        f"acceptance, {rows} rows": accept,
        f"soft embeddings, {rows} rows": feed_back,
    }
