"""From domains to token rows: one training corpus with equal shares of the domains, one held-out corpus per domain.

Documents are added in a fixed random order until a corpus has its tokens, and packed into rows by stage one, so that
documents in one row do not attend to one another.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.files import write_json_lines
from benchmarks.quality.sources import Domain, cut
from benchmarks.quality.tracks import Track
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import TokenRow, build_corpus

TRAIN = "train"
PIECE = 1200  # characters of held-out text


@dataclass(frozen=True)
class Corpus:
    name: str  # `TRAIN`, or a domain's
    trained_on: bool
    rows: Sequence[TokenRow]
    sha256: str

    @property
    def loss_tokens(self) -> np.ndarray:
        """[rows] int64: number of loss tokens of each row."""
        return np.array([int(row.loss_mask.sum()) for row in self.rows])


def build_corpora(
    track: Track, domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase, directory: Path
) -> tuple[list[Corpus], list[dict[str, str | int]]]:
    """The training corpus, then the held-out ones; and the documents and tokens used of each domain."""
    chosen, sizes = _choose(track, domains, tokenizer)
    corpora = []
    for name, (trained_on, documents, tokens) in chosen.items():
        file = directory / "text" / f"{name}.jsonl"
        write_json_lines(file, ({"text": text} for text in documents))
        corpus = build_corpus(DataConfig(data=str(file), seq_len=track.window), tokenizer)
        rows = len(corpus)
        if name == TRAIN:  # complete record batches, also in the share of an arm of several epochs
            rows -= rows % (track.most_epochs * track.record_batch_rows)
        else:
            rows = min(rows, -(-track.held_out_tokens // track.window))
        if not rows:
            raise click.ClickException(f"{file}: {tokens:,} tokens are too few for a row. Give more text with --text.")
        kept = [corpus[i] for i in range(rows)]
        corpora.append(Corpus(name, trained_on, kept, corpus.token_stream_sha256))
    return corpora, sizes


def _choose(
    track: Track, domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, tuple[bool, list[str], int]], list[dict[str, str | int]]]:
    """Corpus -> (trained on, texts, tokens). Domains have equal shares of the training tokens as far as they last."""

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1  # EOS

    training = [domain for domain in domains if domain.trained_on]
    pools = {domain.name: _shuffled(d.text for d in domain.documents if not d.held_out) for domain in training}
    taken, used, texts = dict.fromkeys(pools, 0), dict.fromkeys(pools, 0), []
    while pools and sum(taken.values()) < track.train_tokens:
        name = min(pools, key=lambda name: taken[name])
        text = pools[name].pop()
        taken[name] += length(text)
        used[name] += 1
        texts.append(text)
        if not pools[name]:
            del pools[name]
    random.Random(1).shuffle(texts)
    chosen = {TRAIN: (True, texts, sum(taken.values()))}
    sizes: list[dict[str, str | int]] = []
    for domain in domains:
        held_out: list[str] = []
        tokens = 0
        # Cut into pieces, so that a few thousand tokens come from many documents.
        pieces = (piece for d in domain.documents if d.held_out for piece in cut(d.text.split("\n\n"), PIECE))
        for text in _shuffled(pieces):
            if tokens > 1.1 * track.held_out_tokens:  # packing does not fill its first rows
                break
            held_out.append(text)
            tokens += length(text)
        chosen[domain.name] = (domain.trained_on, held_out, tokens)
        sizes.append(
            {
                "domain": domain.name,
                "training documents": used.get(domain.name, 0),
                "training tokens": taken.get(domain.name, 0),
                "held-out pieces": len(held_out),
                "held-out tokens": min(tokens, track.held_out_tokens),
            }
        )
    return chosen, sizes


def _shuffled(texts: Iterable[str]) -> list[str]:
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    return shuffled
