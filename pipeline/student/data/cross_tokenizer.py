"""A cache for a student with another tokenizer: rows in the student's tokens, with the targets that it can use.

    cache row ─▶ text of each document ─▶ the student's tokens ─▶ aligned positions ─▶ targets there ─▶ loss

    project    at an aligned position (`retokenise.py`) each exact entry becomes the student's token of the same bytes;
               entries without one join the tail mass. The result is an ordinary row of the student's vocabulary.
    uld        at an aligned position sorted probabilities are compared, see `pipeline.losses.uld`.

Lost are: sampled entries; entries without a counterpart; the teacher's targets at positions that are not aligned, which
learn from the label only; the first token of each further piece of a long document, which nothing predicts; and the
difference between a token and the beginning of a longer one (` run` and ` running`).

Speed: about 30,000 tokens/s per core at K = 64; loader workers (`dataloader_num_workers`) hide it behind training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cache_format import Cache, CacheRow, SparseTargets
from pipeline.losses import RaggedTargets, SortedTargets
from pipeline.models.tokenizers import load_cache_tokenizer
from pipeline.student.data.dataset import Batch, CacheDataset
from pipeline.student.data.document_pieces import LOST, documents_of
from pipeline.student.data.retokenise import Retokeniser, TokenText, same_tokens
from pipeline.student.model.student_limits import StudentLimits

METHODS = ("project", "uld")
PROBED_ROWS = 32


@dataclass(frozen=True)
class Coverage:
    """The part of some rows that the student can use.

    Attributes:
        teacher_tokens, student_tokens: numbers of loss tokens.
        aligned: share of the student's loss tokens that end where one of the teacher's does.
        mass: share of the probability of the teacher's exact entries there that goes to tokens of the student.
        lost: reason -> share of the bytes to be learned that are in no loss token of the student.
    """

    teacher_tokens: int
    student_tokens: int
    aligned: float
    mass: float
    lost: dict[str, float]


@dataclass(frozen=True, eq=False)
class ConvertedRow(CacheRow):
    """A row in the student's tokens.

    Attributes:
        aligned: [T'] the teacher's position that ends at the same place in the text, else -1.
        teacher: the teacher's own targets.
        documents: [S'] the document of the teacher's row that each of the student's is a piece of.
    """

    aligned: np.ndarray = None  # type: ignore[assignment]
    teacher: SparseTargets = None  # type: ignore[assignment]
    documents: np.ndarray = None  # type: ignore[assignment]


class CrossTokenizerDataset(CacheDataset):
    """The rows of a cache in another tokenizer's tokens.

    Args:
        teacher, student: tokenizers.
        method: "project" or "uld".
        max_length: most positions that the student accepts; longer documents are split.
        vocab_size: number of tokens that the student knows; default: all of its tokenizer.

    Raises: ConfigError if the bytes of a tokenizer's tokens are unknown.
    """

    def __init__(
        self,
        cache: Cache,
        teacher: PreTrainedTokenizerBase,
        student: PreTrainedTokenizerBase,
        method: str = "project",
        max_length: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(cache)
        self.method, self.max_length = method, max_length
        self.retokeniser = Retokeniser(TokenText(teacher, "teacher"), TokenText(student, "student", vocab_size))
        same = same_tokens(self.retokeniser.teacher, self.retokeniser.student)
        self.projected = np.full(cache.metadata.vocab_size, -1, np.int64)  # teacher's id -> student's
        for ours, theirs in same.items():
            if ours < len(self.projected):
                self.projected[ours] = theirs

    def __getitem__(self, index: int) -> ConvertedRow:
        return self.convert(super().__getitem__(index))

    def collate(self, rows: Sequence[ConvertedRow]) -> Batch:  # type: ignore[override]
        """As `CacheDataset.collate`; for uld the targets are `SortedTargets`."""
        batch = super().collate(rows)
        if self.max_length is not None:  # only padding goes on beyond it
            batch["position_ids"] %= self.max_length
        if self.method == "uld":
            batch["targets"] = _sorted_targets(rows, batch["targets"], batch["input_ids"].shape[1])
        return batch

    def convert(self, row: CacheRow) -> ConvertedRow:
        """The row in the student's tokens, with the teacher's targets at aligned positions."""
        ids: list[int] = []
        counted: list[bool] = []
        aligned: list[int] = []
        lengths: list[int] = []
        documents: list[int] = []
        for number, document in enumerate(documents_of(row, self.retokeniser, self.max_length)):
            for piece in document.pieces:
                ids += [token.id for token in piece.tokens]
                counted += piece.counted
                aligned += piece.teachers.tolist()
                lengths.append(len(piece.tokens))
                documents.append(number)
        if not ids:  # the student has no token for any of it
            ids, counted, aligned, lengths, documents = [0], [False], [-1], [1], [0]
        return ConvertedRow(
            row=row.row,
            input_ids=np.asarray(ids, np.int64),
            loss_mask=np.asarray(counted),
            segment_lengths=np.asarray(lengths, np.int32),
            targets=self._project(row.targets, aligned),
            aligned=np.asarray(aligned),
            teacher=row.targets,
            documents=np.asarray(documents),
        )

    def _project(self, targets: SparseTargets, aligned: Sequence[int]) -> SparseTargets:
        """Exact entries as the student's tokens; at a position that is not aligned the tail has all the mass."""
        offsets, exact = targets.offsets, np.asarray(targets.exact_counts, np.int64)
        all_ids: list[np.ndarray] = [np.zeros(0, np.int64)]
        all_logprobs: list[np.ndarray] = [np.zeros(0, np.float32)]
        counts = np.zeros(len(aligned), np.int64)
        residual, entropy = np.zeros((2, len(aligned)), np.float32)
        for s, t in enumerate(aligned):
            if t < 0:
                continue
            entries = slice(offsets[t], offsets[t] + exact[t])
            ids = self.projected[targets.ids[entries].astype(np.int64)]
            logprobs = targets.logprobs[entries]
            kept = ids >= 0
            residual[s], entropy[s] = targets.residual_logprob[t], targets.entropy[t]
            if not kept.all():
                lost = np.logaddexp.reduce(logprobs[~kept].astype(np.float64))
                residual[s] = min(0.0, np.logaddexp(float(residual[s]), lost))
                ids, logprobs = ids[kept], logprobs[kept]
            unique, place = np.unique(ids, return_inverse=True)
            merged = np.full(len(unique), -np.inf, np.float64)
            np.logaddexp.at(merged, place, logprobs.astype(np.float64))  # a single entry keeps its value
            all_ids.append(unique)
            all_logprobs.append(np.minimum(merged, 0.0).astype(np.float32))
            counts[s] = len(unique)
        return SparseTargets(
            counts=counts,
            ids=np.concatenate(all_ids),
            logprobs=np.concatenate(all_logprobs),
            exact_counts=counts,
            residual_logprob=residual,
            entropy=entropy,
        )

    @functools.cached_property
    def coverage(self) -> Coverage:
        """Measured on up to 32 rows, spread over the cache."""
        rows = np.linspace(0, len(self) - 1, min(PROBED_ROWS, len(self))).round().astype(int)
        theirs = ours = aligned = total = 0
        before, after = 0.0, 0.0
        lost = dict.fromkeys(LOST, 0)
        for given in (super(CrossTokenizerDataset, self).__getitem__(int(i)) for i in rows):
            row = self.convert(given)
            here = row.aligned[row.aligned >= 0]
            theirs += int(given.loss_mask.sum())
            ours += int(row.loss_mask.sum())
            aligned += len(here)
            before += float(-np.expm1(row.teacher.residual_logprob[here].astype(np.float64)).sum())
            after += float(-np.expm1(row.targets.residual_logprob[row.aligned >= 0].astype(np.float64)).sum())
            for document in documents_of(given, self.retokeniser, self.max_length):
                total += int(document.learned.sum())
                for why, atoms in document.lost(self.retokeniser.teacher.special).items():
                    lost[why] += atoms
        return Coverage(
            teacher_tokens=theirs,
            student_tokens=ours,
            aligned=aligned / max(1, ours),
            mass=after / before if before else 0.0,
            lost={why: atoms / total for why, atoms in lost.items() if atoms},
        )

    @property
    def loss_tokens(self) -> float:
        """Number of the student's loss tokens, extrapolated from the rows of `coverage`."""
        found = self.coverage
        return self.cache.num_loss_tokens * found.student_tokens / max(1, found.teacher_tokens)

    def describe(self) -> str:
        """`coverage` as text."""
        found = self.coverage
        some = "about " if len(self) > PROBED_ROWS else ""
        text = (
            f"{some}{self.loss_tokens:,.0f} loss tokens of the student ({self.cache.num_loss_tokens:,} of the "
            f"teacher); {found.aligned:.0%} of them end where one of the teacher's does, and there the student has "
            f"tokens for {found.mass:.0%} of the probability of the teacher's exact entries"
        )
        if found.lost:
            reasons = ", ".join(f"{share:.1%} {LOST[why]}" for why, share in found.lost.items())
            text += f"; text that is not learned: {reasons}"
        if "piece" in found.lost:
            text += f" (at most {self.max_length:,} positions each)"
        return text


def vocab_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return 1 + max(tokenizer.get_vocab().values())


def for_foreign_student(
    tokenizer: PreTrainedTokenizerBase, method: str, limits: StudentLimits
) -> tuple[Callable[[Cache], CrossTokenizerDataset], int]:
    """The dataset class for a student with this tokenizer, as a function of a cache, and the vocabulary size."""
    vocab_size = vocab_size_of(tokenizer)
    if limits.tokens is not None:
        vocab_size = min(vocab_size, limits.tokens)

    def dataset_of(cache: Cache) -> CrossTokenizerDataset:
        teacher = load_cache_tokenizer(cache)
        return CrossTokenizerDataset(cache, teacher, tokenizer, method, limits.positions, vocab_size)

    return dataset_of, vocab_size


def _sorted_targets(rows: Sequence[ConvertedRow], targets: RaggedTargets, length: int) -> SortedTargets:
    """Targets for uld of rows padded to `length`, flattened to N = len(rows) · length."""
    width = max(1, max(int(np.max(row.teacher.exact_counts, initial=0)) for row in rows))
    logprobs = np.full((len(rows), length, width), -np.inf, np.float32)
    residual = np.zeros((len(rows), length), np.float32)
    aligned = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        offsets, exact = row.teacher.offsets, np.asarray(row.teacher.exact_counts, np.int64)
        for s in np.flatnonzero(row.aligned >= 0):
            t = row.aligned[s]
            exact_logprobs = np.sort(row.teacher.logprobs[offsets[t] : offsets[t] + exact[t]])[::-1]
            logprobs[i, s, : len(exact_logprobs)] = exact_logprobs
            residual[i, s] = row.teacher.residual_logprob[t]
            aligned[i, s] = True
    return SortedTargets(
        logprobs=torch.from_numpy(logprobs).flatten(0, 1),
        residual_logprob=torch.from_numpy(residual).flatten(),
        aligned=torch.from_numpy(aligned).flatten(),
        entries=targets.rectangular(),
        loss_tokens=targets.loss_tokens,
    )
