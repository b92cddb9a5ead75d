"""Losses on the teacher's targets, from one `DistillLoss`: a plain reference and its fused twin.

`sparse_kl` takes logits and is the definition; `fused_head_loss` takes hidden states and the head's weight, never
builds all logits, and equals it within rounding.

    spec.py              DistillLoss: what is minimised
    targets.py           Targets: what the walk needs of the teacher
    entries.py, sparse_targets.py, full_targets.py, uld.py    its implementations
    tails.py, divergences.py, divergence_sum.py, weighting.py  the parts of the loss
    fused.py, reference.py   the walk over chunks, and the definition
    feature_losses.py    distances of hidden states
"""

from pipeline.losses.divergence_sum import DIVERGENCES, DivergenceSum
from pipeline.losses.entries import IGNORE_INDEX
from pipeline.losses.full_targets import FullTargets
from pipeline.losses.fused import HeadOutput, fused_head, fused_head_loss, general_head
from pipeline.losses.reference import sparse_kl
from pipeline.losses.sparse_targets import RaggedTargets, SparseTargetBatch
from pipeline.losses.spec import DistillLoss, KlEstimateKind
from pipeline.losses.tails import TAIL_POLICIES, UNBIASED, TailPolicy
from pipeline.losses.targets import Targets
from pipeline.losses.uld import SortedTargets
from pipeline.losses.weighting import POSITION_WEIGHTINGS, PositionWeighting

__all__ = [
    "DIVERGENCES",
    "IGNORE_INDEX",
    "POSITION_WEIGHTINGS",
    "TAIL_POLICIES",
    "UNBIASED",
    "DistillLoss",
    "DivergenceSum",
    "FullTargets",
    "HeadOutput",
    "KlEstimateKind",
    "PositionWeighting",
    "RaggedTargets",
    "SortedTargets",
    "SparseTargetBatch",
    "TailPolicy",
    "Targets",
    "fused_head",
    "fused_head_loss",
    "general_head",
    "sparse_kl",
]
