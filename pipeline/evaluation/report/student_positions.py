"""A student at every loss token of a cache: how far it is from the teacher there, and what it predicts.

One pass over the batches. Sums of KL, CE and agreement are those of `distill evaluate`, which the plain loss
(`losses/reference.py`) gives position by position.

Shapes: n positions of a chunk, L loss tokens, K teacher's and J student's candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.report.teacher_positions import CHUNK_POSITIONS, Floats, TeacherPositions
from pipeline.evaluation.report.teacher_positions import TOP as CANDIDATES
from pipeline.losses import DistillLoss, FullTargets, SparseTargetBatch, sparse_kl
from pipeline.losses.divergences import forward_kl
from pipeline.losses.sparse_targets import agreement
from pipeline.models.head import Head
from pipeline.student.data.dataset import Batch

TOP = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentPositions:
    """A student at L loss tokens.

    Attributes:
        kl: [L] KL(teacher ‖ student), nats, as `distill evaluate` reports it: may be an estimate, or a lower bound.
        ce: [L] −log q of the true token, nats.
        agrees: [L] 1 where its most likely token is the teacher's, 1/m where it is one of m equally likely ones.
        confidence: [L] probability of its most likely token.
        right: [L] whether that is the true token.
        top_ids, top_probs: [L, J] its most likely tokens, at the temperature of the cache.
        at_teacher: [L, K] probabilities of the teacher's candidates, at that temperature.
        label_probs: [L] probability of the true token, at that temperature.
        evaluation: the means.
    """

    kl: Floats
    ce: Floats
    agrees: Floats
    confidence: Floats
    right: NDArray[np.bool_]
    top_ids: NDArray[np.int64]
    top_probs: Floats
    at_teacher: Floats
    label_probs: Floats
    evaluation: Evaluation


@torch.no_grad()
def student_positions(
    head: Head, batches: Iterable[Batch], teacher: TeacherPositions, loss: DistillLoss
) -> StudentPositions:
    """One pass of the student over collated batches, whose loss tokens are those of `teacher` in the same order."""
    found: list[dict[str, Tensor]] = []
    candidates = torch.from_numpy(teacher.top_ids)
    seen = 0
    for batch in batches:
        inputs = batch["input_ids"], batch["position_ids"], batch.get("attention_mask")
        targets = batch["targets"].prepare(loss)
        kept = targets.loss_mask.nonzero().squeeze(1)
        states = head.hidden_states(*inputs, documents=batch.get("documents")).flatten(0, 1)
        for start in range(0, len(kept), CHUNK_POSITIONS):
            here = kept[start : start + CHUNK_POSITIONS]
            logits = head.logits(states[here]).float()
            ids = candidates[seen : seen + len(here)].to(logits.device)
            found.append({name: each.cpu() for name, each in _chunk(logits, targets[here], ids, loss).items()})
            seen += len(here)
    joined = {name: torch.cat([each[name] for each in found]).numpy() for name in found[0]} if found else _nothing()
    kl, ce, agreement = (float(joined[name].sum(dtype=np.float64)) for name in ("kl", "ce", "agrees"))
    evaluation = Evaluation.from_sums(kl, ce, agreement, float(seen), loss.kl_estimate_kind)
    return StudentPositions(**joined, evaluation=evaluation)


def _chunk(logits: Tensor, targets: Any, candidates: Tensor, loss: DistillLoss) -> dict[str, Tensor]:
    """The fields of `StudentPositions` for logits [n, V]."""
    label = targets.labels[:, None]
    tempered = (logits / loss.temperature).softmax(dim=1)
    best = tempered.topk(min(TOP, logits.shape[1]), dim=1)
    likeliest = logits.amax(dim=1)
    kl, agrees = kl_and_agreement(logits, targets, loss)
    return {
        "kl": kl,
        "ce": cross_entropy(logits, targets.labels, reduction="none"),
        "agrees": agrees,
        "confidence": (likeliest - logits.logsumexp(dim=1)).exp(),
        "right": logits.gather(1, label).squeeze(1) >= likeliest,
        "top_ids": best.indices,
        "top_probs": best.values,
        "at_teacher": tempered.gather(1, candidates.clamp(min=0)),
        "label_probs": tempered.gather(1, label).squeeze(1),
    }


def kl_and_agreement(
    logits: Tensor, targets: SparseTargetBatch | FullTargets, loss: DistillLoss
) -> tuple[Tensor, Tensor]:
    """[n] KL and [n] agreement, whose sums are those of `HeadOutput`.

    Args:
        logits: [n, V] float32. targets: n loss tokens, prepared for `loss`.
    """
    temperature = loss.temperature
    if isinstance(targets, FullTargets):
        teacher = targets.logits(logits.dtype)
        agrees = (logits.argmax(dim=1) == teacher.argmax(dim=1)).to(logits.dtype)
        sides = (each.div(temperature).log_softmax(dim=1) for each in (teacher, logits))
        return forward_kl(*sides), agrees
    targets = targets.to(dtype=logits.dtype)
    kl = sparse_kl(logits, targets, temperature=temperature, tail=loss.kl_tail, reduction="none") / temperature**2
    return kl, agreement(targets, targets.ids == logits.argmax(dim=1, keepdim=True))


def _nothing() -> dict[str, NDArray[Any]]:
    """The fields of `StudentPositions` without a loss token."""
    names = {
        "kl": (),
        "ce": (),
        "confidence": (),
        "agrees": (),
        "label_probs": (),
        "top_probs": (TOP,),
        "at_teacher": (CANDIDATES,),
    }
    return {
        **{name: np.zeros((0, *shape), np.float32) for name, shape in names.items()},
        "right": np.zeros(0, bool),
        "top_ids": np.zeros((0, TOP), np.int64),
    }
