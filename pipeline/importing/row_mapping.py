"""One mapper for all formats: ForeignRow ─▶ arrays of a cache row, with every check of shift, values and tokens.

    list p of a row  ─▶  the prediction from position t = p − shift, about token t + 1
    values           ─▶  natural log-probabilities, at most 1 in sum; the rest is the tail mass
    masks, documents ─▶  loss tokens: t and t + 1 in one document, t + 1 to be predicted, and at least one entry

Entries of other positions are dropped before anything is checked, since padding may hold anything. Shapes: T tokens of
the source, t ≤ T kept ones, E entries.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import cache_format as cf
from cache_format.rows.types import joint_index
from pipeline.importing.readers.foreign_rows import BadRow, Floats, ForeignRow, Ints, UnusableRow, Values
from pipeline.importing.shift_evidence import ShiftEvidence

MOST_MASS = 1.02
"""Largest sum of the probabilities of a position: 16-bit values and lossy encodings overshoot 1 by a per cent. Values
of a codebook may exceed it, see `_most_mass`."""

MOST_FOREIGN = 1e-3
"""Largest probability of a token outside the vocabulary: padding rows of an embedding get next to nothing."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MappedRow:
    """A cache row without its number, and what was found on the way.

    Attributes:
        changed: what was adjusted or left out -> how often.
        evidence: of the shift.
    """

    input_ids: Ints
    loss_mask: Mask
    segment_lengths: Ints
    targets: cf.SparseTargets
    changed: Counter[str]
    evidence: ShiftEvidence

    def numbered(self, row: int) -> cf.CacheRow:
        return cf.CacheRow(
            row=row,
            input_ids=self.input_ids,
            loss_mask=self.loss_mask,
            segment_lengths=self.segment_lengths,
            targets=self.targets,
        )


@dataclass(frozen=True, kw_only=True)
class RowMapper:
    """
    Args:
        vocab_size: V; tokens of the text must be below it.
        values: what the values of entries are.
        renormalised: whether they sum to 1 over the listed tokens, whatever the teacher's tail mass was.
        top_k: entries to keep per position, most likely first; None for all.
        bos_id: token that begins a text, if the tokenizer has one.
        drop_repeated_bos: remove the first of two at the beginning of a document.
        max_error: of the square roots of the probabilities, as by a codebook.
    """

    vocab_size: int
    values: Values
    renormalised: bool = False
    top_k: int | None = None
    bos_id: int | None = None
    drop_repeated_bos: bool = False
    max_error: float = 0.0

    def map(self, row: ForeignRow) -> MappedRow:
        """Raises: BadRow for an invalid row, UnusableRow for one without loss tokens."""
        changed: Counter[str] = Counter()
        text = self._text(row, changed)
        entries = self._entries(row, text, changed)
        loss = text.wanted & (entries.counts > 0)
        changed["positions without entries"] += int(text.wanted.sum() - loss.sum())
        if not loss.any():
            raise UnusableRow("no loss tokens")
        evidence = ShiftEvidence.of(row.input_ids, loss, entries.position, entries.ids, entries.logprobs, entries.tail)
        entropy = cf.entropy_lower_bound(entries.position, entries.logprobs, entries.tail)
        if self.top_k is not None:
            entries = _most_likely(entries, self.top_k)
        kept = text.kept
        zero_outside = np.where(loss, entries.tail, 0.0)
        return MappedRow(
            input_ids=row.input_ids[kept],
            loss_mask=loss[kept],
            segment_lengths=text.segment_lengths,
            targets=cf.SparseTargets(
                counts=entries.counts[kept],
                ids=entries.ids,
                logprobs=entries.logprobs.astype(np.float32),
                exact_counts=entries.counts[kept],
                residual_logprob=zero_outside[kept].astype(np.float32),
                entropy=np.where(loss, entropy, 0.0)[kept].astype(np.float32),
            ),
            changed=+changed,
            evidence=evidence,
        )

    # ---- text

    def _text(self, row: ForeignRow, changed: Counter[str]) -> _Text:
        ids, number = row.input_ids, len(row.input_ids)
        documents = np.ones(number, np.int64) if row.documents is None else row.documents
        for name, values in (("attention", documents), ("mask", row.token_mask), ("position_mask", row.position_mask)):
            if values is not None and len(values) != number:
                raise BadRow(f"{len(values)} values of {name} for {number} tokens")
        if (documents < 0).any():
            raise BadRow(f"attention {documents.min()}, expected 0 for padding or the number of a document")
        there = np.flatnonzero(documents)
        if len(there) < 2:
            raise UnusableRow("fewer than two tokens")
        if there[-1] - there[0] + 1 != len(there):
            bad = there[:-1][np.diff(there) > 1][0] + 1
            raise BadRow(f"position {bad}: padding between tokens, expected it at the ends only")
        kept = documents > 0
        if (bad := kept & ((ids < 0) | (ids >= self.vocab_size))).any():
            position = int(bad.argmax())
            raise BadRow(
                f"position {position}: token {ids[position]}, expected 0 to {self.vocab_size - 1} by the tokenizer"
            )
        begins = np.ones(number, np.bool_)
        begins[1:] = documents[1:] != documents[:-1]
        repeated = np.zeros(number, np.bool_)
        if self.bos_id is not None:
            bos = ids == self.bos_id
            repeated[:-1] = begins[:-1] & ~begins[1:] & bos[:-1] & bos[1:] & kept[:-1]
        changed["documents that begin with two BOS tokens"] += int(repeated.sum())
        if self.drop_repeated_bos:
            kept &= ~repeated
            begins[1:] |= repeated[:-1]
        wanted = np.zeros(number, np.bool_)
        wanted[:-1] = kept[:-1] & kept[1:] & ~begins[1:]
        if row.token_mask is not None:
            wanted[:-1] &= row.token_mask[1:]
        if row.position_mask is not None:
            wanted &= row.position_mask
        starts = np.flatnonzero(begins[kept])
        return _Text(kept, wanted, np.diff(np.append(starts, kept.sum())))

    # ---- entries

    def _entries(self, row: ForeignRow, text: _Text, changed: Counter[str]) -> _Entries:
        position, ids, values, normaliser = _at_positions(row, text.wanted)
        number = len(row.input_ids)
        if (bad := ~np.isfinite(values)).any():
            place = int(bad.argmax())
            raise BadRow(f"position {position[place]}: value {values[place]} of token {ids[place]}, expected a number")
        if (bad := ids < 0).any():
            raise BadRow(f"position {position[bad.argmax()]}: entry {ids[bad.argmax()]}, expected a token")
        order = np.argsort(joint_index(position, ids, int(ids.max(initial=0)) + 1), kind="stable")
        position, ids, values = position[order], ids[order], values[order]
        twice = (position[1:] == position[:-1]) & (ids[1:] == ids[:-1])
        if twice.any():
            place = int(twice.argmax())
            raise BadRow(f"position {position[place]}: token {ids[place]} is listed twice, expected each token once")
        kind = _kind(self.values, values)
        logprobs = _logprobs(kind, values, position, number, normaliser)
        likely = np.ones(len(ids), np.bool_)
        if (foreign := ids >= self.vocab_size).any():
            if (bad := foreign & (logprobs > np.log(MOST_FOREIGN))).any():
                place = int(bad.argmax())
                raise BadRow(
                    f"position {position[place]}: token {ids[place]} has probability {np.exp(logprobs[place]):.3g}, "
                    f"expected tokens below {self.vocab_size} by the tokenizer"
                )
            changed["entries outside the vocabulary"] += int(foreign.sum())
            likely &= ~foreign
        if (zero := np.isneginf(logprobs)).any():
            changed["entries of probability 0"] += int((zero & ~foreign).sum())
            likely &= ~zero
        if not likely.all():
            position, ids, logprobs = position[likely], ids[likely], logprobs[likely]
            if self.renormalised:
                logprobs = _logprobs("logits", logprobs, position, number, None)
        changed["entries whose token is not known"] += row.unknown_entries
        counts = np.bincount(position, minlength=number).astype(np.int64)
        logprobs, tail = self._normalised(position, logprobs, counts, changed)
        return _Entries(position, ids, logprobs, counts, tail)

    def _normalised(
        self, position: Ints, logprobs: Floats, counts: Ints, changed: Counter[str]
    ) -> tuple[Floats, Floats]:
        """Log-probabilities, rescaled where their sum is a little above 1, and the log of the tail mass [T]."""
        number = len(counts)
        with np.errstate(over="ignore"):  # of logits given as log-probabilities
            mass = np.bincount(position, np.exp(logprobs), number)
        limit = _most_mass(counts, self.max_error)
        if (bad := mass > limit).any():
            place = int(bad.argmax())
            hint = ""
            if self.values == "logprobs":
                positive = logprobs[position == place].max() > 0
                hint = "; logits, perhaps (`values=logits`)" if positive else ""
            raise BadRow(
                f"position {place}: its probabilities sum to {mass[place]:.5g}, expected at most "
                f"{limit[place]:.4g}{hint}"
            )
        over = mass > 1.0
        changed["positions whose probabilities summed to more than 1"] += int((mass > 1.0 + 1e-4).sum())
        logprobs = np.minimum(logprobs - np.log(np.where(over, mass, 1.0))[position], 0.0)
        tail = np.full(number, -np.inf)
        open_ = ~over & (mass < 1.0) & (counts < self.vocab_size)
        if not self.renormalised:
            tail[open_] = np.log1p(-mass[open_])
        return logprobs, tail


@dataclass(frozen=True, eq=False)
class _Text:
    kept: Mask  # [T]
    wanted: Mask  # [T] positions that get targets if there are entries
    segment_lengths: Ints


@dataclass(frozen=True, eq=False)
class _Entries:
    """Sorted by position and token."""

    position: Ints  # [E]
    ids: Ints
    logprobs: Floats
    counts: Ints  # [T]
    tail: Floats  # [T] log of the tail mass


def _at_positions(row: ForeignRow, wanted: Mask) -> tuple[Ints, Ints, Floats, Floats | None]:
    """Position, token and value of each entry at the positions that get targets, and the normaliser there [T]."""
    number, lists_ = len(row.input_ids), len(row.counts)
    allowed = (number - 1, number) if row.shift == 0 else (number,)
    if lists_ not in allowed:
        raise BadRow(
            f"{lists_} lists of entries for {number} tokens, expected {' or '.join(map(str, allowed))} "
            f"(`shift={row.shift}`)"
        )
    if not len(row.ids) == len(row.values) == row.counts.sum():
        raise BadRow(f"{len(row.ids)} tokens and {len(row.values)} values of entries, expected {row.counts.sum()}")
    about = np.repeat(np.arange(lists_) - row.shift, row.counts)
    chosen = (about >= 0) & wanted[np.maximum(about, 0)]
    normaliser = None
    if row.log_normaliser is not None:
        if len(row.log_normaliser) != lists_:
            raise BadRow(f"{len(row.log_normaliser)} normalisers for {lists_} lists of entries")
        normaliser = np.full(number, np.nan)
        normaliser[: lists_ - row.shift] = row.log_normaliser[row.shift :]
        if (bad := wanted & ~np.isfinite(normaliser)).any():
            raise BadRow(f"position {int(bad.argmax())}: normaliser {normaliser[bad.argmax()]}, expected a number")
    return about[chosen], row.ids[chosen], row.values[chosen], normaliser


def _kind(values: Values, found: Floats) -> Values | str:
    """`renormalised` values are probabilities if none is negative, else log-probabilities: both rescale alike."""
    if values != "renormalised":
        return values
    return "weights" if len(found) and found.min() >= 0 and found.max() > 0 else "logits"


def _logprobs(kind: str, values: Floats, position: Ints, number: int, normaliser: Floats | None) -> Floats:
    if kind == "probabilities" or kind == "weights":
        if (bad := values < 0).any():
            place = int(bad.argmax())
            raise BadRow(f"position {position[place]}: probability {values[place]:.4g}, expected 0 to 1")
        with np.errstate(divide="ignore"):
            values = np.log(values)
    if kind == "logits" and normaliser is not None:
        return values - normaliser[position]
    if kind in ("logits", "weights"):
        largest = np.full(number, -np.inf)
        np.maximum.at(largest, position, values)
        shifted = values - np.where(np.isfinite(largest), largest, 0.0)[position]
        with np.errstate(divide="ignore"):
            return shifted - np.log(np.bincount(position, np.exp(shifted), number))[position]
    return values


def _most_mass(counts: Ints, max_error: float) -> Floats:
    """[T] largest sum of the probabilities of a position: n numbers p with Σ p ≤ 1, each off by at most e in √p, have
    a sum of at most (1 + e·√n)² (Cauchy–Schwarz)."""
    return np.maximum(MOST_MASS, np.square(1 + max_error * np.sqrt(counts)))


def _most_likely(entries: _Entries, top_k: int) -> _Entries:
    """The `top_k` most likely entries of each position; the mass of the others joins the tail."""
    if entries.counts.max(initial=0) <= top_k:
        return entries
    order = np.lexsort((entries.ids, -entries.logprobs, entries.position))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(entries.counts) - entries.counts, entries.counts)
    kept = np.sort(order[rank < top_k])  # entries are sorted by position and token
    dropped = np.ones(len(order), np.bool_)
    dropped[kept] = False
    number = len(entries.counts)
    mass = np.bincount(entries.position[dropped], np.exp(entries.logprobs[dropped]), number)
    with np.errstate(divide="ignore"):
        tail = np.minimum(np.logaddexp(entries.tail, np.log(mass)), 0.0)
    counts = np.minimum(entries.counts, top_k)
    return _Entries(entries.position[kept], entries.ids[kept], entries.logprobs[kept], counts, tail)
