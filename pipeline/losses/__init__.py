"""Losses on sparse teacher targets: a plain reference and its fused twin.

`sparse_kl` takes logits and is the definition; `fused_head_loss` takes hidden states and the head's weight, never
builds the logits, and equals it within rounding. Both read a `TargetBatch`; the fused one `FullTargets` as well, where
the teacher's distribution is whole. See `tails` for the policies, `mixture` for the names of divergences, `weighting`
for the weights of positions.
"""

from pipeline.losses.divergence_sum import DIVERGENCES, Mixture
from pipeline.losses.full_targets import FullTargets
from pipeline.losses.fused import HeadOutput, fused_head, fused_head_loss, general_head
from pipeline.losses.reference import sparse_kl
from pipeline.losses.sparse_targets import IGNORE_INDEX, TargetBatch
from pipeline.losses.tails import TAIL_POLICIES, UNBIASED, TailPolicy
from pipeline.losses.weighting import POSITION_WEIGHTINGS, PositionWeighting

__all__ = [
    "DIVERGENCES",
    "IGNORE_INDEX",
    "POSITION_WEIGHTINGS",
    "TAIL_POLICIES",
    "UNBIASED",
    "FullTargets",
    "HeadOutput",
    "Mixture",
    "PositionWeighting",
    "TailPolicy",
    "TargetBatch",
    "fused_head",
    "fused_head_loss",
    "general_head",
    "sparse_kl",
]
