"""What a run trains on and what it trains: datasets in the student's tokens, the student, hidden-state matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.adapters import attach
from pipeline.models.head import Head, open_head
from pipeline.models.isolation.padding_free import or_padded, without_padding
from pipeline.models.loading import config_fingerprint, model_name, weights_fingerprint
from pipeline.models.objective import objective_for
from pipeline.student.data.cross_tokenizer import CrossTokenizerDataset, for_foreign_student, vocab_size_of
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.data.mixed_dataset import MixedDataset, Rows
from pipeline.student.model.hidden_state_matching import HiddenStateMatching
from pipeline.student.model.initialization import freeze_embeddings, load_student
from pipeline.student.model.pruning import calibration_batches, prune
from pipeline.student.model.student_limits import student_limits
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.run_record import check_student_unchanged
from pipeline.student.validation.compatibility import check_isolation
from pipeline.student.validation.run_checks import CheckedRun

# Trainer changes these in the configuration of a loaded model, which may be given again to resume.
SET_BY_TRAINER = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
BY_LAYERS = "TRANSFORMER_BASED_WRAP"
"""How FSDP divides a model by default."""


@dataclass(frozen=True)
class RunData:
    """Datasets of the run, in the student's tokens."""

    parts: list[CacheDataset]  # one per training cache
    train: Rows
    held_out: Rows | None
    vocab_size: int

    @classmethod
    def open(cls, run: CheckedRun) -> RunData:
        config, mix = run.config, run.mix
        vocab_size = mix.first.metadata.vocab_size
        dataset_of: Callable[[cf.Cache], CacheDataset] = CacheDataset
        if config.cross_tokenizer is not None:
            limits = student_limits(
                config.student,
                config.trust_remote_code,
                revision=config.revision,
                config_file=config.student_config,
                vocab_size=vocab_size_of(run.tokenizer),
            )
            dataset_of, vocab_size = for_foreign_student(run.tokenizer, config.cross_tokenizer, limits)
        parts = [dataset_of(cache) for cache in mix.caches]
        train = parts[0] if len(parts) == 1 else MixedDataset(parts, [each.rows for each in mix.portions])
        held_out = None if run.held_out is None else dataset_of(run.held_out)
        return cls(parts, train, held_out, vocab_size)

    def stages(self) -> list[str]:
        """One line per cache with the result of re-tokenising; empty if the student has the teacher's tokenizer."""
        lines = []
        for part in self.parts:
            if isinstance(part, CrossTokenizerDataset):
                source = "" if len(self.parts) == 1 else f" of {part.cache.path}"
                lines.append(f"re-tokenising the text{source}: {part.describe()}")
        return lines


@dataclass(frozen=True)
class RunStudent:
    """The student that is trained, and how its logits are computed."""

    model: nn.Module
    head: Head
    fingerprint: str  # of the configuration of the model, without adapters
    base_weights: str | None  # fingerprint of the model that adapters are trained on
    adapted: nn.Module | None  # the model with its adapter
    parameters: int  # without the projections of hidden-state distillation, which are added later


def load_run_student(run: CheckedRun, data: RunData, on_stage: Callable[[str], None]) -> RunStudent:
    config, arguments = run.config, run.arguments
    on_stage("loading the student")
    objective = objective_for(run.mix.first.metadata.alignment)
    model = load_student(
        config.student,
        layers=config.student_layers,
        config_file=config.student_config,
        random=config.student_random,
        sizes=config.sizes,
        vocab_size=data.vocab_size,
        seed=arguments.seed,
        objective=objective,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    # Before pruning, which measures activity: rounding, and so the kept parts, may differ on another device.
    base_weights = None if config.lora is None else weights_fingerprint(model)
    if config.sizes and not config.student_random:
        on_stage("measuring which parts of the student to keep")
        model = prune(model.to(arguments.device), config.sizes, calibration_batches(data.train))
    fingerprint = config_fingerprint(model.config, ignoring=SET_BY_TRAINER)
    if run.resume_from is not None:
        check_student_unchanged(config, fingerprint, base_weights)
    if config.freeze_embeddings:
        freeze_embeddings(model)
    adapted = None
    if config.lora is not None:
        adapted = attach(model, config.lora, base=_base_name(config), revision=config.revision, seed=arguments.seed)
    if arguments.fsdp:
        _check_sharded_layers(arguments.fsdp_config or {}, adapted or model)
    head = open_head(model, data.vocab_size, masked=objective == "masked")
    together = max(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
    caches = run.mix.caches if run.held_out is None else [*run.mix.caches, run.held_out]
    longest = max(cache.metadata.corpus.get("window_length") or 0 for cache in caches)
    head = without_padding(head, longest, wanted=config.padding_free, device=arguments.device)
    if head.padding_free and _stays_whole_on_cuda(arguments):
        model.to(arguments.device)
        head = or_padded(head, wanted=config.padding_free, dtype=torch.bfloat16 if arguments.bf16 else None)
    for cache in caches:
        check_isolation(cache, head, batch_size=together)
    return RunStudent(model, head, fingerprint, base_weights, adapted, sum(p.numel() for p in model.parameters()))


def _stays_whole_on_cuda(arguments: TrainingArguments) -> bool:
    """Whether every process trains the whole model, on a CUDA device of its own."""
    sharded = arguments.fsdp or getattr(arguments, "hf_deepspeed_config", None) is not None
    return arguments.device.type == "cuda" and not sharded


def match_hidden_states(run: CheckedRun, head: Head) -> HiddenStateMatching | None:
    if (loss := run.hidden_loss) is None:
        return None
    measured = run.held_out or run.mix.first
    shares = (
        loss.share(run.mix.loss_tokens, run.mix.tokens),
        loss.share(measured.num_loss_tokens, measured.num_tokens),
    )
    matching = HiddenStateMatching.for_student(loss, head, run.arguments.seed, shares)
    if run.arguments.fsdp and len(matching.maps):
        raise ConfigError(
            f"`hidden_loss` {loss.loss}: the hidden states of student and teacher have different widths, and the "
            "projections between them cannot be sharded. Train without fsdp, or choose a student of the teacher's "
            "width."
        )
    return matching


def _base_name(config: TrainStudentConfig) -> str:
    """How an adapter names its base model: an absolute path, or a hub name. Empty for a student that the run creates,
    which is nowhere to be loaded from."""
    student = config.student
    if student is None or config.creates_student:
        return ""
    name = student.name_or_path if isinstance(student, PreTrainedModel) else model_name(student)
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _check_sharded_layers(config: Mapping[str, Any], model: nn.Module) -> None:
    """accelerate itself would miss them only after the old output was deleted."""
    if str(config.get("auto_wrap_policy", BY_LAYERS)).upper() != BY_LAYERS:
        return
    usual = list(getattr(model, "_no_split_modules", None) or ())
    wanted = config.get("transformer_layer_cls_to_wrap") or usual
    there = {type(module).__name__ for module in model.modules()}
    if missing := [name for name in wanted if name not in there]:
        raise ConfigError(
            f"`training_args`: transformer_layer_cls_to_wrap of fsdp_config: found {', '.join(missing)}, but the "
            f"student has no such layer (it has {', '.join(each for each in usual if each in there) or 'others'}). "
            "Correct it."
        )
