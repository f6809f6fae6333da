"""The canvas loop of an engine whose CPU operators are compiled: what follows the head is two operators in C++.

The definitions are those of `canvas_loop`. Soft embeddings are made of weights that are not normalised: they are divided after
the product with the embedding, where there are few numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from backend import sampler
from backend.table_loop import TableLoop
from plugins import vocabulary_op


class CompiledLoop(TableLoop):
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

    def _vocabulary(self, slots: Sequence[int], rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length = hidden.shape[:2]
        hidden = hidden.flatten(0, 1)
        steps, num_steps = self._step[rows], self._num_steps[rows]
        temperature = sampler.temperature_schedule(self._t_min[rows], self._t_max[rows], num_steps - steps, num_steps)
        of_rows = (self._greedy[rows], self._seed[rows], self._canvas_index[rows], steps)
        slot, temperature, *drawn = (value.repeat_interleave(length) for value in (rows, temperature, *of_rows))
        drawn.append(self._within.repeat(batch))
        slot = self._tables.slots(slot, drawn[-1])
        extras = (*self._tables.filters, *self._tables.logprob_tables)
        passes, soft_embeds = [], torch.empty_like(hidden)
        for chunk in self._chunks(batch * length):
            weights = self._session.head(hidden[chunk])  # logits, until they are passed over
            *passed, total = vocabulary_op.vocabulary_cpu(
                weights,
                self._model.final_logit_softcapping or 0.0,
                temperature[chunk],
                *self._tables.adjustment(slot[chunk]),
                *(each[chunk] for each in drawn),
                *extras,
            )
            passes.append(passed)
            soft = torch.mm(weights, self._session.embedding, out=soft_embeds[chunk])
            soft.mul_((self._embed_scale / total).unsqueeze(1))
            del weights  # before the next chunk's
        self._soft_embeds[rows] = soft_embeds.view(batch, length, -1)
        argmax, sampled, entropy = (torch.cat(parts).view(batch, length) for parts in zip(*passes, strict=True))
        return argmax, sampled, entropy
