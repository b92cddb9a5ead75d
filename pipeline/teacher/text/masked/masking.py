"""Masks for masked language models: which tokens of a row are predicted, and what replaces them in the input.

    chosen      each token that is not special, with probability `mask_probability`
    replaced    a share `mask_replace_prob` of these by the mask token, `random_replace_prob` by another token

With 0.15, 0.8 and 0.1 this is BERT's rule (Devlin et al., 2019, https://arxiv.org/abs/1810.04805). Special tokens are
neither chosen nor drawn. If no token of a row was chosen, the one with the smallest random number is: BERT predicts at
least one too, and a row without loss tokens would cost a forward pass for nothing.

The mask depends only on the seed, the row and the position (`philox`), so it is the same for any batch size, number of
processes and interruption. Its random numbers come from another stream than those that sample the tail: with the same
numbers, the tail at masked positions would be biased.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.text.masked.mask_rule import MaskRule

STREAM = 1  # of random numbers; tail sampling uses 0


class Masker:
    """Applies a rule with the tokens of a vocabulary.

    Raises:
        ModelError: the tokenizer has no mask token.
    """

    def __init__(self, rule: MaskRule, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"{tokenizer.name_or_path or 'teacher'}: its tokenizer has no mask token, expected one for a masked "
                "language model. Set one (mask_token in tokenizer_config.json)."
            )
        self.rule = rule
        self.mask_id = int(tokenizer.mask_token_id)
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        ids = np.array(sorted(tokenizer.get_vocab().values()), np.int64)
        self._may_be_masked = np.zeros(ids[-1] + 1, bool)
        self._may_be_masked[ids] = True
        self._may_be_masked[sorted(special)] = False
        self._others = np.flatnonzero(self._may_be_masked).astype(np.int32)

    def may_be_masked(self, input_ids: np.ndarray) -> np.ndarray:
        """bool [T]: the tokens that are not special."""
        return self._may_be_masked[input_ids]

    def mask(self, row: int, input_ids: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The masked input, int32 [T], and the loss mask, bool [T].

        Args:
            row: number of the row in the corpus.
            input_ids: int32 [T], the text.
            allowed: bool [T], tokens that may be chosen; at least one is True.
        """
        rule, length = self.rule, len(input_ids)
        draws = uniforms(rule.seed, np.full(length, row), np.arange(length), 3, stream=STREAM)  # [T, 3]
        chosen = allowed & (draws[:, 0] < rule.probability)
        if not chosen.any():
            chosen[np.where(allowed, draws[:, 0], np.inf).argmin()] = True
        masked = np.array(input_ids, np.int32)
        hidden = chosen & (draws[:, 1] < rule.mask_replace_prob)
        masked[hidden] = self.mask_id
        changed = chosen & ~hidden & (draws[:, 1] < rule.mask_replace_prob + rule.random_replace_prob)
        masked[changed] = self._others[(draws[changed, 2] * len(self._others)).astype(np.int64)]
        return masked, chosen

    def fingerprint(self) -> str:
        """sha256 of everything that decides the masks, including the vocabulary."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        digest.update(self._may_be_masked.tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Everything except the text and vocabulary that decides the masks, for the cache's metadata."""
        return {**asdict(self.rule), "mask_token_id": self.mask_id}
