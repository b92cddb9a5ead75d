"""The teacher of each track and its tokenizer: a transformers directory, or a model that is trained here once.

The teacher of track 2 learns from the labels of the same text, in the same loop as the students, with more epochs and
more parameters. The report shows how much better it is than a student trained on labels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.quality.corpora import TRAIN, Corpus
from benchmarks.quality.objectives import labels_objective, order
from benchmarks.quality.sources import Domain
from benchmarks.quality.tracks import Shape, Track
from benchmarks.quality.train import train
from benchmarks.text import byte_pair_tokenizer
from pipeline.models.head import Head, open_head
from pipeline.models.loading import load_model

SEED = 0


def bpe_tokenizer(vocab_size: int, domains: Sequence[Domain], directory: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the training documents, or loaded from `directory` if it exists."""
    if not (directory / "tokenizer.json").exists():
        documents = (d.text for domain in domains if domain.trained_on for d in domain.documents if not d.held_out)
        byte_pair_tokenizer(documents, vocab_size).save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def new_model(shape: Shape, vocab_size: int, window: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(shape.config(vocab_size, window))


def trained_teacher(track: Track, corpus: Corpus, vocab_size: int, directory: Path) -> PreTrainedModel:
    """The model in `directory`; trained and saved there the first time."""
    assert track.teacher is not None and corpus.name == TRAIN
    if not (directory / "config.json").exists():
        began = time.monotonic()
        print(f"teacher: training on {corpus.loss_tokens.sum():,} tokens, {track.teacher_epochs} epochs", flush=True)
        head = open_head(new_model(track.teacher, vocab_size, track.window, SEED), vocab_size)
        curve = train(
            head,
            labels_objective(corpus),
            order(len(corpus.rows), track.record_batch_rows, SEED, 1),
            epochs=track.teacher_epochs,
            batch_rows=track.batch_rows,
            learning_rate=track.teacher_rate,
        )
        partial = directory.with_name(directory.name + ".partial")
        head.model.save_pretrained(partial)
        facts = {"seconds": time.monotonic() - began, "train_loss": curve}
        (partial / "training.json").write_text(json.dumps(facts))
        print(f"teacher: trained in {facts['seconds']:,.0f} s", flush=True)
        partial.rename(directory)
    return load_model(str(directory))


def describe(head: Head) -> str:
    parameters = sum(p.numel() for p in head.model.parameters())
    body = parameters - head.weight.numel()
    config = head.model.config
    return (
        f"{parameters / 1e6:.2f}M parameters ({body / 1e6:.2f}M without the tied embedding), "
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary {head.vocab_size:,}"
    )
