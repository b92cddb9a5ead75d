"""Token-by-token decoding: one forward pass over the prompts, then one position at a time with the key-value cache.

`model.generate` does not fit: it keeps all sequences in the batch until the last has ended, its random state is shared
by the batch, and a model's own generation settings would silently change the distributions. Here finished sequences
leave the batch, several answers share one pass over their prompt, and the targets are computed in the same passes, by
the same `Head` as for given text. Tests compare greedy answers with those of `model.generate`.

Prompts of different lengths are padded on the left; an attention mask hides the padding, and position ids start at the
first real token. Not every model honours both, so `check_decoding` tries it.

A model that switches at a length (`models.isolation.length_limits`) has cached keys of the other side there: the cache
is computed again, in one pass, whenever a sequence grows past such a length.

Shapes: b sequences, P longest prompt, D hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.errors import ModelError
from pipeline.models.head import Head, probing
from pipeline.models.isolation.length_limits import by_document, longest_packed_row

PROBE_STEPS = 3


class Decoding:
    """The state of b growing sequences.

    Attributes:
        hidden: [b, D] the last state of each, from which its next token is predicted.
    """

    def __init__(self, head: Head, prompts: Sequence[np.ndarray]) -> None:
        """Args: prompts: token ids of each prompt, none of them empty."""
        width = max(map(len, prompts))
        input_ids, mask = torch.zeros((2, len(prompts), width), dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            input_ids[i, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
            mask[i, width - len(prompt) :] = 1
        self._head = head
        self._decoder = head.body
        self._lengths = [len(prompt) for prompt in prompts]
        self._input_ids, self._mask = input_ids.to(head.device), mask.to(head.device)  # [b, tokens so far]
        self.hidden = self._begin()

    def select(self, which: Sequence[int]) -> None:
        """Continues with only these sequences, in this order; a sequence may be repeated."""
        index = torch.tensor(which, dtype=torch.int64, device=self._mask.device)
        there = functools.cache(index.to)  # one copy for each device that layers are on
        for layer in self._cache.layers:
            layer.batch_select_indices(there(getattr(layer, "device", None) or index.device))
        self._lengths = [self._lengths[i] for i in which]
        self._input_ids, self._mask, self.hidden = self._input_ids[index], self._mask[index], self.hidden[index]

    def advance(self, tokens: Tensor) -> None:
        """Appends a token [b] to each sequence."""
        position_ids = self._mask.sum(dim=1, keepdim=True)
        self._input_ids = torch.cat([self._input_ids, tokens[:, None]], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(position_ids)], dim=1)
        if any(self._head.separates(length, length + 1) for length in self._lengths):
            self.hidden = self._begin()
        else:
            self.hidden = self._run(tokens[:, None], position_ids)
        self._lengths = [length + 1 for length in self._lengths]

    def _begin(self) -> Tensor:
        """[b, D] the last states of the sequences as they are now; fills a new cache."""
        self._cache = DynamicCache(config=self._head.model.config)
        return self._run(self._input_ids, (self._mask.cumsum(dim=1) - 1).clamp(min=0))

    def _run(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        with by_document(self._head.rotaries, position_ids):
            states = self._decoder(
                input_ids=input_ids,
                attention_mask=self._mask,
                position_ids=position_ids,
                past_key_values=self._cache,
                use_cache=True,
            )[0]
        return states[:, -1].to(self._mask.device)


def check_decoding(head: Head, *, padding: bool, longest: int = 0) -> None:
    """Raises ModelError unless token-by-token decoding gives the same states as one pass over the whole text.

    Args:
        padding: whether sequences of different lengths will share a batch.
        longest: tokens of the longest prompt and answer.
    """
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(head.vocab_size, (n,), generator=generator).numpy() for n in (11, 7))
    name, limit = type(head.model).__name__, longest_packed_row(head.model.config)
    if padding and limit is not None and longest > limit:
        raise ModelError(
            f"{name}: found answers of up to {longest:,} tokens with their prompts, expected at most {limit:,} if "
            "prompts of different lengths share a batch, because this model scales its attention by the place in the "
            f"padded row. Use `batch_size` 1, or `seq_len` {limit} or less."
        )
    with probing(head.model):
        for texts in ([first], [first, second]) if padding else ([first],):
            expected = [_whole(head, text) for text in texts]
            try:
                found = _grown(head, texts)
            except (TypeError, AttributeError, ValueError, NotImplementedError, RuntimeError) as error:
                raise ModelError(
                    f"{name} cannot continue a text from its key-value cache ({' '.join(str(error).split())[:200]}): "
                    "this architecture cannot be used with `generate`. Use another teacher."
                ) from error
            largest = max(states.abs().max().item() for states in expected)
            deviation = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
            allowed = max(16 * torch.finfo(head.weight.dtype).eps, 64e-6) * max(1.0, largest)
            if not deviation <= allowed:
                alone = len(texts) == 1
                raise ModelError(
                    f"{name}: states from the key-value cache{'' if alone else ' of a padded batch'} differ from those "
                    f"of one pass by {deviation:.2g} (allowed {allowed:.2g}). "
                    + ("Use another teacher." if alone else "Use `batch_size` 1, or another teacher.")
                )


def _whole(head: Head, text: np.ndarray) -> Tensor:
    """[PROBE_STEPS, D] the states of the last positions, from one pass."""
    ids = torch.from_numpy(text)[None].to(head.device)
    positions = torch.arange(len(text), device=ids.device)[None]
    return head.hidden_states(ids, positions)[0, -PROBE_STEPS:].float()


def _grown(head: Head, texts: Sequence[np.ndarray]) -> list[Tensor]:
    """The same for each text, decoded token by token; the first text leaves the batch before the last step."""
    begun = Decoding(head, [text[: len(text) - PROBE_STEPS] for text in texts])
    states: list[list[Tensor]] = [[] for _ in texts]
    active = list(range(len(texts)))
    for step in range(PROBE_STEPS):
        if step == PROBE_STEPS - 1 and len(active) > 1:
            states[0].append(_whole(head, texts[0])[-1])
            active = active[1:]
            begun.select(active)
        tokens = [int(texts[i][len(texts[i]) - PROBE_STEPS + step]) for i in active]
        begun.advance(torch.tensor(tokens, device=head.device))
        for i, state in zip(active, begun.hidden.float(), strict=True):
            states[i].append(state)
    return [torch.stack(of_text) for of_text in states]
