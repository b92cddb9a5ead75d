"""A cache for a student with another tokenizer: rows in the student's tokens, with what of the targets it can use.

    cache row ─▶ text of each document ─▶ the student's tokens ─▶ aligned positions ─▶ targets there ─▶ the usual losses

**project.** At an aligned position (`retokenise`) each exact entry goes to the student's token of the same bytes; what
has none joins the residual, with the tail. The result is an ordinary row over the student's vocabulary, and every loss
with a class for the rest takes it as it is. With identical tokenizers nothing is lost and nothing changes.

**uld.** At an aligned position sorted probabilities are compared with sorted probabilities, see `pipeline.losses.uld`.

What is lost: the teacher's word at positions that are not aligned (they learn from the label alone: their teacher is
all residual, whose divergence is 0); entries that the student has no token for; and, where a token is the beginning of
another one, the difference between "ends here" and "begins so": the student's ` run` is on the way to ` running`, the
teacher's was not. Sampled entries are left out.

Runs at some 30,000 tokens/s and core at K = 64; `--num-workers` hides it behind the training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cache_format import Cache, CacheRow, SparseTargets
from pipeline.errors import ConfigError
from pipeline.losses.uld import SortedTargets
from pipeline.student.checks import load_cache_tokenizer
from pipeline.student.data import Batch, CacheDataset, collate
from pipeline.student.retokenise import Retokeniser, TokenText, same_tokens
from pipeline.student.suitability import exact_entries, without_exact

METHODS = ("project", "uld")
PROBED_ROWS = 32


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
        max_length: positions that the student takes; longer documents are cut there.

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
        ends = np.cumsum(row.segment_lengths)
        for start, stop in zip(ends - row.segment_lengths, ends, strict=True):
            document = self.retokeniser.document(row.input_ids[start:stop])
            tokens = document.tokens[: self.max_length]
            if not tokens:
                continue
            learned = _learned_atoms(document.ends, row.loss_mask[start:stop])
            here = [
                b.end > b.start and bool(learned[b.start : b.end].all()) for b in tokens[1:]
            ] + [False]  # whether the token that follows is to be learned; the last one's is not there  # fmt: skip
            teachers = np.full(len(document.tokens), -1)
            for s, t in document.aligned():
                teachers[s] = start + t
            teachers = teachers[: len(tokens)]
            teachers[~np.asarray(here)] = -1
            ids += [token.id for token in tokens]
            counted += here
            aligned += teachers.tolist()
            lengths.append(len(tokens))
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

    def describe(self) -> str:
        """`coverage` in words."""
        aligned, mass = self.coverage()
        return (
            f"{aligned:.0%} of its positions end with one of the teacher's, and there it has tokens for {mass:.0%} of "
            "what the teacher's exact entries hold"
        )

    def coverage(self) -> tuple[float, float]:
        """Of some rows: the share of counted positions that are aligned, of the exact mass there that has tokens."""
        rows = np.linspace(0, len(self) - 1, min(PROBED_ROWS, len(self))).round().astype(int)
        counted = aligned = 0
        before, after = 0.0, 0.0
        for row in (self[int(i)] for i in rows):
            here = row.aligned[row.aligned >= 0]
            counted += int(row.loss_mask.sum())
            aligned += len(here)
            before += float(-np.expm1(row.teacher.residual_logprob[here].astype(np.float64)).sum())
            after += float(-np.expm1(row.targets.residual_logprob[row.aligned >= 0].astype(np.float64)).sum())
        return aligned / max(1, counted), after / before if before else 0.0


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


def _learned_atoms(ends: Sequence[int], loss_mask: np.ndarray) -> np.ndarray:
    """[atoms] whether an atom belongs to a token that the teacher's row has a prediction to learn for."""
    sizes = np.diff([0, *ends])
    learned = np.concatenate([[False], loss_mask[:-1]])  # the prediction of token t + 1 is made from t
    return np.repeat(learned, sizes)


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
