"""Pieces of text to show: how documents are cut, which pieces are chosen, and what is known of each token.

A token is shown with the prediction *of* it: a causal model's at the position before, a masked model's at its own.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.evaluation.report.student_positions import StudentPositions
from pipeline.evaluation.report.teacher_positions import TeacherPositions, TextPositions
from pipeline.models.tokenizers import load_cache_tokenizer
from pipeline.student.data.retokenise import TokenText

MOST_TOKENS = 256
LEAST_LOSS_TOKENS = 8
"""A mean over fewer is noise: such passages are neither the best nor the worst, unless there are no others."""

UNKNOWN = -1
PROBABILITY, NATS = 10_000, 1_000
"""Units of the numbers behind a token: integers are a third of the size of fractions."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Passage:
    """Tokens `start` to `stop` of the text; loss tokens `first` to `last` are about them (the last one excluded)."""

    row: int
    document: int
    offset: int  # of its first token in the row
    start: int
    stop: int
    first: int
    last: int

    @property
    def loss_tokens(self) -> slice:
        return slice(self.first, self.last)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Passages in groups: those with the highest and the lowest score, and others spread over the text in between."""

    worst: tuple[Passage, ...]
    best: tuple[Passage, ...]
    others: tuple[Passage, ...]

    @property
    def all(self) -> tuple[Passage, ...]:
        return (*self.worst, *self.best, *self.others)


def cut(text: TextPositions) -> list[Passage]:
    """Documents in equally long pieces of at most `MOST_TOKENS`; pieces without a loss token are left out."""
    passages = []
    before = np.concatenate([[0], np.cumsum(text.predictions >= 0)])  # loss tokens about tokens in front of each
    first_document = dict(zip(*(each.tolist() for each in np.unique(text.rows, return_index=True)), strict=True))
    for document, row in enumerate(text.rows.tolist()):
        start, stop = int(text.documents[document]), int(text.documents[document + 1])
        pieces = -(-(stop - start) // MOST_TOKENS)
        edges = np.linspace(start, stop, pieces + 1).round().astype(int).tolist()
        for a, b in zip(edges, edges[1:], strict=False):
            if before[b] > before[a]:
                passages.append(
                    Passage(
                        row=row,
                        document=document - first_document[row],
                        offset=a - int(text.documents[first_document[row]]),
                        start=a,
                        stop=b,
                        first=int(before[a]),
                        last=int(before[b]),
                    )
                )
    return passages


def choose(passages: Sequence[Passage], score: NDArray[Any], count: int) -> Chosen:
    """A third of `count` passages with the highest mean `score` [L], a third with the lowest, and others.

    If there are no more than `count`, all of them are chosen, the others being those in the middle.
    """
    long = [each for each in passages if each.last - each.first >= LEAST_LOSS_TOKENS] or list(passages)
    ranked = sorted(long, key=lambda each: -float(score[each.loss_tokens].mean()))
    most = min(-(-count // 3), -(-len(ranked) // 3))
    worst = ranked[:most]
    best = ranked[most:][::-1][: min(most, max(0, count - most))]
    taken = {each.start for each in (*worst, *best)}
    rest = [each for each in passages if each.start not in taken]
    spread = np.unique(np.linspace(0, len(rest) - 1, min(len(rest), count - len(taken))).round().astype(int))
    return Chosen(worst=tuple(worst), best=tuple(best), others=tuple(rest[i] for i in spread))


def token_texts(cache: cf.Cache) -> Callable[[int], str]:
    """The text of a token by its id; bytes that are not a character alone are written as \\xe2.

    WordPiece has no spaces: in front of every token that does not continue a word, one is shown.
    """
    tokenizer = load_cache_tokenizer(cache)
    continuing = getattr(getattr(tokenizer.backend_tokenizer, "model", None), "continuing_subword_prefix", None)
    try:
        known = TokenText(tokenizer, "teacher").bytes
    except ConfigError:
        known = {}

    def text(token: int) -> str:
        raw = known.get(token)
        decoded = tokenizer.decode([token]) if raw is None else codecs.decode(raw, "utf-8", "backslashreplace")
        if continuing and not decoded.startswith(continuing):
            decoded = f" {decoded}"
        return "".join(c if c in "\n\t" or c.isprintable() else _escaped(c) for c in decoded)

    return text


def _escaped(character: str) -> str:
    """Invisible characters as their code, since one that turns text around would hide what a token is."""
    return character if character.isspace() and character not in "\r\v\f" else ascii(character)[1:-1]


def details(
    passages: Sequence[Passage],
    teacher: TeacherPositions,
    students: Mapping[str, StudentPositions],
    text: Callable[[int], str],
) -> dict[str, Any]:
    """What is behind the loss tokens of `passages`, one after the other, as columns of integers.

    texts       of all tokens that occur; the other columns have indices into it, -1 for none
    label       the true token; entropy in 1/1000 nats, with its name; tail in 1/10,000, null where it is unknown
    top         the teacher's K candidates; topProbs in 1/10,000; -2 − weight for a sampled one; -1 for none
    labelProbs  in 1/10,000; -1 where the token is in the tail
    students    kl, ce in 1/1000 nats; labelProbs, atTeacher (K) and topProbs (J) in 1/10,000; top (J candidates)
    """
    chosen = np.concatenate([np.zeros(0, np.int64), *(np.arange(each.first, each.last) for each in passages)])
    candidates = [
        teacher.labels[chosen],
        teacher.top_ids[chosen],
        *(each.top_ids[chosen] for each in students.values()),
    ]
    every = np.concatenate([np.ravel(each) for each in candidates])
    ids, counts = np.unique(every[every >= 0], return_counts=True)
    by_count = np.argsort(-counts, kind="stable")  # frequent ones first: their indices are short
    places = np.append(np.argsort(by_count), UNKNOWN)

    def index(tokens: NDArray[Any]) -> Any:
        return places[np.where(tokens < 0, len(ids), np.searchsorted(ids, tokens))].ravel().tolist()

    sampled = teacher.sampled[chosen]
    top_probs = _scaled(teacher.top_probs[chosen], PROBABILITY)
    return {
        "texts": [text(int(i)) for i in ids[by_count]],
        "label": index(teacher.labels[chosen]),
        "entropy": _scaled(teacher.entropy[chosen], NATS).tolist(),
        "entropyName": teacher.entropy_name,
        "tail": _scaled(teacher.tail[chosen], PROBABILITY).tolist() if teacher.tail_known else None,
        "top": index(teacher.top_ids[chosen]),
        "topProbs": np.where(sampled, -2 - top_probs, top_probs).ravel().tolist(),
        "labelProbs": _scaled(teacher.label_probs[chosen], PROBABILITY).tolist(),
        "students": [
            {
                "name": label,
                "kl": _scaled(each.kl[chosen], NATS).tolist(),
                "ce": _scaled(each.ce[chosen], NATS).tolist(),
                "labelProbs": _scaled(each.label_probs[chosen], PROBABILITY).tolist(),
                "atTeacher": _scaled(each.at_teacher[chosen], PROBABILITY).ravel().tolist(),
                "top": index(each.top_ids[chosen]),
                "topProbs": _scaled(each.top_probs[chosen], PROBABILITY).ravel().tolist(),
            }
            for label, each in students.items()
        ],
    }


def _scaled(values: NDArray[Any], unit: int) -> NDArray[np.int64]:
    """In units of 1/`unit`, rounded; NaN is `UNKNOWN`."""
    known = ~np.isnan(values)
    return np.where(known, np.round(np.where(known, values, 0.0).astype(np.float64) * unit), UNKNOWN).astype(np.int64)
