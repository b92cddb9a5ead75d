"""How far a student is from its teacher, on a cache that it was not trained on.

    kl          KL(teacher‖student), nats per token, whatever the student was trained on. On hidden targets the full
                divergence itself; on sampled ones an unbiased estimate of it; on exact ones with the rest of the
                vocabulary as one class: a lower bound, tight where they keep most of the mass
    ce          cross-entropy with the true token, nats; perplexity = exp(ce)
    agreement   how often the student's most likely token is the teacher's

Means over counted positions: of a masked model, the masked ones. The same loop serves `distill evaluate` and the
evaluation during training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

import cache_format as cf
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.losses import IGNORE_INDEX, HeadOutput
from pipeline.models.head import evaluating, open_head
from pipeline.models.loading import load_model, resolve_device
from pipeline.models.objective import objective_for
from pipeline.student.data.cross_tokenizer import check_cross_tokenizer, for_foreign_student
from pipeline.student.data.dataset import Batch, CacheDataset
from pipeline.student.training.forward import distillation_output
from pipeline.student.training.recipe import KlIs, LossRecipe
from pipeline.student.validation.compatibility import check_isolation, check_student, longest_row


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over `tokens` counted positions; nats."""

    kl: float
    ce: float
    perplexity: float
    agreement: float
    tokens: int
    kl_is: KlIs  # of the divergence of the whole distributions
    compared: float | None = None  # across tokenizers: share of them that have a teacher; KL and agreement: 0 elsewhere

    @classmethod
    def from_sums(cls, kl: float, ce: float, agreement: float, count: float, kl_is: KlIs) -> Evaluation:
        count = count or math.nan
        return cls(
            kl=kl / count,
            ce=ce / count,
            perplexity=math.exp(min(ce / count, 700.0)),
            agreement=agreement / count,
            tokens=0 if math.isnan(count) else int(count),
            kl_is=kl_is,
        )


def evaluate(
    config: EvaluateConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Runs a student over a cache.

    Raises:
        MismatchError: the student's tokenizer is not the cache's. ModelError, CacheError: either cannot be read.
    """
    copies = cf.ReadCache.of(config.cache_dir, config.cache_dir_gb)
    cache = cf.open_cache(config.cache, hidden_layers=[], read_cache=copies).with_states()
    tokenizer, _ = check_student(
        [cache],
        config.student,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        cross_tokenizer=config.cross_tokenizer is not None,
        otherwise="Or compare where tokens of both end together: `cross_tokenizer=project`.",
    )
    dataset, vocab_size, tail = CacheDataset(cache), cache.metadata.vocab_size, None
    if config.cross_tokenizer:
        tail = check_cross_tokenizer(cache)
        limit = longest_row(config.student, config.trust_remote_code)
        dataset_of, vocab_size = for_foreign_student(tokenizer, config.cross_tokenizer, limit)
        dataset = dataset_of(cache)
        on_stage(f"re-tokenising the text: {dataset.describe()}")
    on_stage("loading the student")
    objective = objective_for(cache.metadata.alignment)
    model = load_model(
        config.student,
        objective=objective,
        dtype=config.dtype,
        device=resolve_device(config.device),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    head = open_head(model, vocab_size, masked=objective == "masked")
    check_isolation(cache, head)
    rows = min(len(cache), config.max_rows or len(cache))
    on_stage(f"evaluating on {rows:,} rows")
    loader = DataLoader(dataset, batch_size=config.batch_size, sampler=range(rows), collate_fn=dataset.collate)

    compared = 0

    def batches() -> Iterable[Batch]:
        nonlocal compared
        for i, batch in enumerate(loader):
            compared += int(((batch["labels"] != IGNORE_INDEX) & (batch["target_exact_counts"] > 0)).sum())
            yield {name: tensor.to(model.device) for name, tensor in batch.items()}
            on_progress(min(rows, (i + 1) * config.batch_size), rows)

    recipe = LossRecipe.for_cache(cache, kd_weight=1.0, tail=tail, exact_alone=config.cross_tokenizer is not None)
    recipe = replace(recipe, uld=config.cross_tokenizer == "uld")
    with evaluating(model):
        _, kl, ce, agreement, count = sum_over(lambda batch: distillation_output(head, batch, recipe), batches())
    found = Evaluation.from_sums(kl, ce, agreement, count, recipe.kl_is)
    return replace(found, compared=compared / max(1, found.tokens)) if config.cross_tokenizer else found


@torch.no_grad()
def sum_over(forward: Callable[[Batch], tuple[torch.Tensor, ...]], batches: Iterable[Batch]) -> list[float]:
    """Totals of `HeadOutput`, or what begins with it, over batches, in float64: [loss, kl, ce, agreement, count]."""
    totals: list[float] = []
    for batch in batches:
        values = torch.stack([value.float() for value in forward(batch)]).tolist()
        totals = [total + value for total, value in zip(totals or [0.0] * len(values), values, strict=True)]
    return totals or [0.0] * len(HeadOutput._fields)
