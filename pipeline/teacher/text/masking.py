"""What a masked model is asked: which tokens of a row are to be found, and what stands in their place.

    chosen      a token that may be masked, with --mask-probability
    of these    --mask-replace-prob become the mask token, --random-replace-prob another token, the rest stay

With .15, .8 and .1 this is BERT's way (Devlin et al., 2019, https://arxiv.org/abs/1810.04805). Special tokens are never
chosen, nor drawn as another token. A row in which chance chose nothing gets the token with the smallest number, as BERT
asked for one at least: a row without a question would cost a forward pass and teach nothing.

What happens to a token depends on the seed, the number of its row, and its place there (`philox`), and on nothing else:
any batch size, any number of processes and any interruption give the same masks. The numbers are of another stream than
those that sample the tail of a distribution; from the same ones, the tail at masked positions would be biased.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.teacher.cache_config import MaskRule
from pipeline.teacher.targets.philox import uniforms

STREAM = 1  # of the random numbers; the sampled tail has 0


class Masker:
    """A rule, and what it needs of a vocabulary.

    Raises: ModelError if the tokenizer has no mask token.
    """

    def __init__(self, rule: MaskRule, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"{tokenizer.name_or_path or 'teacher'}: its tokenizer has no mask token, which a masked language "
                "model is asked with. Set one (mask_token in tokenizer_config.json)."
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
        """bool [T]: which tokens are not special."""
        return self._may_be_masked[input_ids]

    def mask(self, row: int, input_ids: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row as the model sees it, int32 [T], and bool [T]: which of its tokens are to be found.

        Args:
            row: its number in the corpus.
            input_ids: int32 [T], the text.
            allowed: bool [T], tokens that may be chosen; at least one.
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
        """Of all that decides the pattern, the vocabulary included."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        digest.update(self._may_be_masked.tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the cache's metadata: all that decides the pattern, beside the text."""
        return {**asdict(self.rule), "mask_token_id": self.mask_id}
