"""A cache for a student with another tokenizer: rows in the student's tokens, with what of the targets it can use.

    cache row ─▶ text of each document ─▶ the student's tokens ─▶ aligned positions ─▶ targets there ─▶ the usual losses

**project.** At an aligned position (`retokenise`) each exact entry goes to the student's token of the same bytes; what
has none joins the residual, with the tail. The result is an ordinary row over the student's vocabulary, and every loss
with a class for the rest takes it as it is. With identical tokenizers nothing is lost and nothing changes.

**uld.** At an aligned position sorted probabilities are compared with sorted probabilities, see `pipeline.losses.uld`.

A document that is longer than the student takes becomes several, each as long as it can be and with the document's
BOS, if it has one; they end where a token of the teacher's does. The teacher had read all that went before.

What is lost: the first token of such a piece, which nothing predicts; the teacher's word at positions that are not
aligned (they learn from the label alone: their teacher is all residual, whose divergence is 0); entries that the
student has no token for; and, where a token is the beginning of another one, the difference between "ends here" and
"begins so": the student's ` run` is on the way to ` running`, the teacher's was not. Sampled entries are left out.

Runs at some 30,000 tokens/s and core at K = 64; `--num-workers` hides it behind the training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cache_format import Cache, CacheRow, SparseTargets
from pipeline.errors import ConfigError
from pipeline.losses.uld import SortedTargets
from pipeline.student.data.dataset import Batch, CacheDataset, collate
from pipeline.student.data.document_pieces import LOST, documents_of
from pipeline.student.data.retokenise import Retokeniser, TokenText, same_tokens
from pipeline.student.validation.compatibility import load_cache_tokenizer
from pipeline.student.validation.suitability import exact_entries, without_exact

METHODS = ("project", "uld")
PROBED_ROWS = 32


@dataclass(frozen=True)
class Coverage:
    """What the student can use of some rows.

    Attributes:
        teacher_tokens, student_tokens: counted positions of either.
        aligned: share of the student's that end with one of the teacher's.
        mass: share of what the teacher's exact entries hold there that the student has tokens for.
        lost: why -> share of the bytes to be learned that no counted token of the student's says.
    """

    teacher_tokens: int
    student_tokens: int
    aligned: float
    mass: float
    lost: dict[str, float]


@dataclass(frozen=True, eq=False)
class ConvertedRow(CacheRow):
    """A row in the student's tokens. `aligned`: [T'] the teacher's position that ends where this one does, else -1."""

    aligned: np.ndarray = None  # type: ignore[assignment]
    teacher: SparseTargets = None  # type: ignore[assignment]


class CrossTokenizerDataset(CacheDataset):
    """The rows of a cache in another tokenizer's tokens.

    Args:
        teacher, student: tokenizers.
        method: "project" or "uld".
        max_length: positions that the student takes; longer documents become several.

    Raises: ConfigError if a tokenizer does not say what text its tokens are.
    """

    def __init__(
        self,
        cache: Cache,
        teacher: PreTrainedTokenizerBase,
        student: PreTrainedTokenizerBase,
        method: str = "project",
        max_length: int | None = None,
    ) -> None:
        super().__init__(cache)
        self.method, self.max_length = method, max_length
        self.retokeniser = Retokeniser(TokenText(teacher, "teacher"), TokenText(student, "student"))
        same = same_tokens(self.retokeniser.teacher, self.retokeniser.student)
        self.projected = np.full(cache.metadata.vocab_size, -1, np.int64)  # teacher's id -> student's
        for ours, theirs in same.items():
            if ours < len(self.projected):
                self.projected[ours] = theirs

    def __getitem__(self, index: int) -> ConvertedRow:
        return self.convert(super().__getitem__(index))

    def collate(self, rows: Sequence[ConvertedRow]) -> Batch:
        """As `data.collate`; for uld with uld_logprobs [B, T, K], descending, uld_residual and uld_aligned [B, T]."""
        batch = collate(rows)
        if self.method == "uld":
            batch |= _sorted_batch(rows, batch["input_ids"].shape[1])
        return batch

    def convert(self, row: CacheRow) -> ConvertedRow:
        """The row in the student's tokens, with the teacher's targets where they are aligned."""
        ids: list[int] = []
        counted: list[bool] = []
        aligned: list[int] = []
        lengths: list[int] = []
        for document in documents_of(row, self.retokeniser, self.max_length):
            for piece in document.pieces:
                ids += [token.id for token in piece.tokens]
                counted += piece.counted
                aligned += piece.teachers.tolist()
                lengths.append(len(piece.tokens))
        if not ids:  # nothing that the student has tokens for
            ids, counted, aligned, lengths = [0], [False], [-1], [1]
        return ConvertedRow(
            row=row.row,
            input_ids=np.asarray(ids, np.int64),
            loss_mask=np.asarray(counted),
            segment_lengths=np.asarray(lengths, np.int32),
            targets=self._project(row.targets, aligned),
            aligned=np.asarray(aligned),
            teacher=row.targets,
        )

    def _project(self, targets: SparseTargets, aligned: Sequence[int]) -> SparseTargets:
        """Exact entries over the student's tokens; all is residual where there is no teacher."""
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
            np.logaddexp.at(merged, place, logprobs.astype(np.float64))  # of one entry: its own value
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
        """Of up to 32 rows from all over the cache."""
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
    def counted_tokens(self) -> float:
        """The student's; of a cache of more than 32 rows, by what those have for each of the teacher's."""
        found = self.coverage
        return self.cache.num_counted_tokens * found.student_tokens / max(1, found.teacher_tokens)

    def describe(self) -> str:
        """`coverage` in words."""
        found = self.coverage
        some = "some " if len(self) > PROBED_ROWS else ""
        words = (
            f"{some}{self.counted_tokens:,.0f} of the student's tokens count ({self.cache.num_counted_tokens:,} of the "
            f"teacher's); {found.aligned:.0%} of its positions end with one of the teacher's, and there it has tokens "
            f"for {found.mass:.0%} of what the teacher's exact entries hold"
        )
        if found.lost:
            reasons = ", ".join(f"{share:.1%} {LOST[why]}" for why, share in found.lost.items())
            words += f"; not learned of the text: {reasons}"
        if "piece" in found.lost:
            words += f" (its longest is {self.max_length:,} positions)"
        return words


def check_cross_tokenizer(
    cache: Cache,
    method: str = "project",
    *,
    tail: str | None = None,
    divergence: str = "forward-kl",
    temperature: float | None = None,
    scheduled_temperature: bool = False,
    position_weighting: str = "uniform",
    resample: bool = False,
) -> str:
    """The tail policy to use.

    Raises: ConfigError for what re-tokenised targets cannot serve, with the reason.
    """
    option, targets = f"--cross-tokenizer {method}", cache.metadata.targets
    if method not in METHODS:
        raise ConfigError(f"{option}: expected {' or '.join(METHODS)}.")
    if cache.metadata.alignment != "next":
        raise ConfigError(
            f"{option}: {cache.path} has targets about masked tokens, and what is hidden among the teacher's is not "
            "among the student's. Use a student with the teacher's tokenizer."
        )
    if exact_entries(cache)[0] == 0:
        raise ConfigError(
            f"{option}: {cache.path} has {without_exact(cache)}, and a sample loses what makes it "
            "unbiased where tokens have no counterpart. Cache with --targets top-k."
        )
    if targets["kind"] == "hidden":
        raise ConfigError(
            f"{option}: {cache.path} has hidden targets, without entries that could be carried over to other tokens. "
            "Make some of them: distill convert --top-k 64."
        )
    allowed = ("bucket", "renormalise") if method == "project" else ("bucket",)
    if tail is not None and tail not in allowed:
        raise ConfigError(
            f"{option}: --tail {tail} gives meaning to entries that have no counterpart. Use {' or '.join(allowed)}."
        )
    if resample:
        raise ConfigError(f"{option}: sampled entries are left out, so there is nothing to --resample. Leave it out.")
    if position_weighting == "teacher-entropy":
        raise ConfigError(
            f"{option}: --position-weighting teacher-entropy, and most positions have no teacher. Use student-entropy."
        )
    if method == "uld":
        captured = float(targets["temperature"])
        if divergence != "forward-kl":
            raise ConfigError(f"{option}: it is the divergence; found --divergence {divergence} too. Leave one out.")
        if (
            captured != 1.0
            or temperature not in (None, 1.0)
            or scheduled_temperature
            or position_weighting != "uniform"
        ):
            raise ConfigError(
                f"{option}: it compares probabilities at temperature 1, positions alike. Use targets captured at "
                f"temperature 1 (here {captured:g}), and neither --temperature nor --position-weighting."
            )
    return tail or "bucket"


def for_foreign_student(
    tokenizer: PreTrainedTokenizerBase, method: str, max_length: int | None
) -> tuple[Callable[[Cache], CrossTokenizerDataset], int]:
    """What reads a cache for a student with this tokenizer, and the size of its vocabulary."""

    def dataset_of(cache: Cache) -> CrossTokenizerDataset:
        return CrossTokenizerDataset(cache, load_cache_tokenizer(cache), tokenizer, method, max_length)

    return dataset_of, 1 + max(tokenizer.get_vocab().values())


def _sorted_batch(rows: Sequence[ConvertedRow], length: int) -> Batch:
    width = max(1, max(int(np.max(row.teacher.exact_counts, initial=0)) for row in rows))
    logprobs = np.full((len(rows), length, width), -np.inf, np.float32)
    residual = np.zeros((len(rows), length), np.float32)
    aligned = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        offsets, exact = row.teacher.offsets, np.asarray(row.teacher.exact_counts, np.int64)
        for s in np.flatnonzero(row.aligned >= 0):
            t = row.aligned[s]
            entries = np.sort(row.teacher.logprobs[offsets[t] : offsets[t] + exact[t]])[::-1]
            logprobs[i, s, : len(entries)] = entries
            residual[i, s] = row.teacher.residual_logprob[t]
            aligned[i, s] = True
    return {
        "uld_logprobs": torch.from_numpy(logprobs),
        "uld_residual": torch.from_numpy(residual),
        "uld_aligned": torch.from_numpy(aligned),
    }


def sorted_targets_of(batch: Batch) -> SortedTargets:
    """The flattened targets [N = B·T] of a batch for uld."""
    return SortedTargets(
        batch["uld_logprobs"].flatten(0, 1), batch["uld_residual"].flatten(), batch["uld_aligned"].flatten()
    )
