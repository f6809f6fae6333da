"""The canvas loop of an engine whose CPU operators are compiled: what follows the head is two operators in C++.

The definitions are those of `canvas_loop`. Soft embeddings are made of weights that are not normalised: they are divided after
the product with the embedding, where there are few numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from backend import sampler
from backend.canvas_loop import CanvasLoop
from plugins import vocabulary_op


class CompiledLoop(CanvasLoop):
    """As `CanvasLoop`, float32."""

    def _advance(self, rows: Tensor, argmax: Tensor, sampled: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return vocabulary_op.advance_cpu(
            entropy,
            argmax,
            sampled,
            self._entropy_bound[rows],
            self._confidence[rows],
            self._argmax[rows],
            self._stable_steps[rows],
            self._stability[rows],
            self._seed[rows],
            self._canvas_index[rows],
            self._step[rows],
            self._model.vocab_size,
        )

    def with_extras(self, slots: Sequence[int]) -> list[int]:
        """Those of `slots` that have extras, which only the plain loop's arithmetic knows of. The others must not get it for
        their sake: it rounds differently, and a request's tokens are those that it gives alone."""
        return [slot for slot in slots if slot in self._extras]

    def _vocabulary(self, slots: Sequence[int], rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        apart = self.with_extras(slots)
        if apart and len(apart) < len(slots):
            return self._by_parts(slots, apart, rows, hidden)
        if apart:
            return super()._vocabulary(slots, rows, hidden)
        batch, length = hidden.shape[:2]
        hidden = hidden.flatten(0, 1)
        steps, num_steps = self._step[rows], self._num_steps[rows]
        temperature = sampler.temperature_schedule(self._t_min[rows], self._t_max[rows], num_steps - steps, num_steps)
        of_rows = (temperature, self._greedy[rows], self._seed[rows], self._canvas_index[rows], steps)
        each = [*(value.repeat_interleave(length) for value in of_rows), self._within.repeat(batch)]
        passes, soft_embeds = [], torch.empty_like(hidden)
        for begin in range(0, batch * length, self._chunk_rows):
            chunk = slice(begin, begin + self._chunk_rows)
            weights = self._session.head(hidden[chunk])  # logits, until they are passed over
            *passed, total = vocabulary_op.vocabulary_cpu(
                weights, self._model.final_logit_softcapping or 0.0, *(value[chunk] for value in each)
            )
            passes.append(passed)
            soft = torch.mm(weights, self._session.embedding, out=soft_embeds[chunk])
            soft.mul_((self._embed_scale / total).unsqueeze(1))
        self._soft_embeds[rows] = soft_embeds.view(batch, length, -1)
        argmax, sampled, entropy = (torch.cat(parts).view(batch, length) for parts in zip(*passes, strict=True))
        return argmax, sampled, entropy

    def _by_parts(
        self, slots: Sequence[int], apart: Sequence[int], rows: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_vocabulary` of the slots in `apart` and of the others, in the order of `slots`."""
        places = [[place for place, slot in enumerate(slots) if (slot in apart) == is_apart] for is_apart in (False, True)]
        parts = [self._vocabulary([slots[place] for place in part], rows[part], hidden[part]) for part in places]
        back = torch.tensor([*places[0], *places[1]]).argsort()
        argmax, sampled, entropy = (torch.cat(both)[back] for both in zip(*parts, strict=True))
        return argmax, sampled, entropy
