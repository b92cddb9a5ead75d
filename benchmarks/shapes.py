"""Models of the sizes that people train and distil, with random weights, and what a token costs them.

    FLOPs of a forward pass, per token    2·(P + D·V) + 2·L·H·C·T̄      P weights of the body without embeddings
    of training                           three times that              T̄ = ΣT²/ΣT over the documents of a row
    of a gradient through the head        6·D·V

The first sum is the usual count of matrix products (Kaplan et al. 2020, arXiv:2001.08361, table 1): two operations per
weight; the last term is attention over the tokens before, for queries with keys and weights with values. A document of
T tokens has T²/2 pairs of them, so T̄ is the mean length over tokens, not over documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def mean_length(documents: Iterable[int]) -> float:
    """T̄: the length of the document that a token is in, on average over tokens."""
    lengths = np.fromiter(documents, np.float64)
    return float((lengths**2).sum() / lengths.sum())


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool = False

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def body_weights(self) -> int:
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * self.head_width
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def weights(self) -> int:
        return self.body_weights + (1 if self.tied else 2) * self.width * self.vocab

    def forward_flops(self, mean_length: float) -> float:
        """Operations per token of the forward pass, if documents have `mean_length` tokens on average."""
        return 2 * (self.body_weights + self.width * self.vocab) + 2 * self.layers * self.width * mean_length

    def training_flops(self, mean_length: float) -> float:
        return 3 * self.forward_flops(mean_length)

    def model(self, device: torch.device, dtype: torch.dtype, positions: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.inner,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=positions,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM._from_config(config, dtype=dtype).eval()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One word for each token."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        words = Tokenizer(WordLevel({f"w{i}": i for i in range(self.vocab)}, unk_token="w0"))
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")


# Dimensions of SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B and 70B.
SMALL = Shape("0.1B", 576, 30, 9, 3, 1536, 49_152, tied=True)
ONE = Shape("1B", 2048, 16, 32, 8, 8192, 128_256, tied=True)
EIGHT = Shape("8B", 4096, 32, 32, 8, 14_336, 128_256)
SEVENTY = Shape("70B", 8192, 80, 64, 8, 28_672, 128_256)
TINY = Shape("tiny", 64, 2, 4, 2, 128, 512, tied=True)
TINY_TEACHER = Shape("tiny teacher", 96, 2, 4, 2, 192, 512)
