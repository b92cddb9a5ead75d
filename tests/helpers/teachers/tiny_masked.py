"""Tiny masked language models and their tokenizers; `tiny.py` has the causal ones.

path = tiny_masked(folder, "roberta", layers=2)     # a directory with model and tokenizer
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

from tiny import english

VOCAB, WINDOW = 400, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# Settings that differ from BERT's. Positions of a RoBERTa begin after its padding token.
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": WINDOW + 2},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "electra": {"embedding_size": 16},
}


def wordpiece_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer like BERT's with exactly `vocab_size` tokens: lower case, [CLS] text [SEP].

    Tokens are characters, beginnings of words and whole words, the most frequent first, because the library's trainer
    is not deterministic.
    """
    text = english(800, seed=1000).lower()
    letters = sorted(
        {c for c in unicodedata.normalize("NFD", text) if not c.isspace() and not unicodedata.combining(c)}
    )
    words = Counter(re.findall(r"[a-z]+", text))
    pieces = Counter({word[:n]: count for word, count in words.items() for n in (len(word), len(word) // 2) if n > 1})
    frequent = [piece for piece, _ in sorted(pieces.items(), key=lambda item: (-item[1], item[0]))]
    vocabulary = [*SPECIAL, *letters, *(f"##{c}" for c in letters), *frequent]
    vocabulary += [f"[unused{i}]" for i in range(vocab_size - len(vocabulary))]
    ids = {piece: i for i, piece in enumerate(vocabulary[:vocab_size])}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(SPECIAL)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _wrapped(core, "[CLS]", "[SEP]", mask_token="[MASK]", **names)


def bpe_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer like RoBERTa's: bytes, <s> text </s>, padding token 1, mask token last."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator([english(400, seed=1000)], trainer)
    core.add_special_tokens(["<mask>"])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    return _wrapped(core, "<s>", "</s>", mask_token="<mask>", bos_token="<s>", eos_token="</s>", **names)


def _wrapped(core: Tokenizer, begin: str, end: str, **names: str) -> PreTrainedTokenizerFast:
    special = [(token, core.token_to_id(token)) for token in (begin, end)]
    core.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=WINDOW, clean_up_tokenization_spaces=False, **names
    )


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return bpe_tokenizer() if kind == "roberta" else wordpiece_tokenizer()


def tiny_masked(
    path: Path, kind: str, *, layers: int = 2, hidden: int = 32, pad_vocab: int = 0, seed: int = 0, **config: Any
) -> Path:
    """Writes a random masked language model of `kind` and its tokenizer to `path` and returns it.

    Args:
        pad_vocab: embedding rows beyond the vocabulary.
    """
    tokenizer = tokenizer_of(kind)
    settings = masked_config(kind, layers=layers, hidden=hidden, vocab_size=len(tokenizer) + pad_vocab, **config)
    settings.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(settings).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # zero biases would not show that one is ignored
                torch.nn.init.normal_(parameter, mean=float("orm" in name and "weight" in name), std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def masked_config(kind: str, *, layers: int = 2, hidden: int = 32, vocab_size: int = VOCAB, **config: Any) -> Any:
    """The configuration of a tiny model of `kind`."""
    own = dict(KINDS[kind])
    if kind == "distilbert":
        own |= {"dim": hidden, "hidden_dim": 2 * hidden, "n_layers": layers}
    special = {f"{name}_token_id": number for name, number in (("pad", 0), ("bos", 2), ("eos", 3), ("cls", 2))}
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.3,
        "sep_token_id": 3,
    }
    return AutoConfig.for_model(kind, **{**shape, **special, **own, **config})
