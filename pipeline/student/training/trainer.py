"""transformers' Trainer for distillation: everything of it stays, the loss and the evaluation are ours.

**Scale.** One optimizer step sees some number of counted tokens, over all its micro-batches and all processes. The loss
is the sum over them divided by that number, once: each micro-batch's sum is scaled by processes / tokens (DDP averages
over processes), so that 1×8, 2×4 and two processes give the same gradient whatever the padding and masks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

from pipeline.errors import DivergedError
from pipeline.evaluation.held_out import Evaluation, sum_over
from pipeline.losses import HeadOutput
from pipeline.models.head import Head, evaluating
from pipeline.student.data.dataset import Batch, CacheDataset, uncounted
from pipeline.student.data.rank_sampler import DividedByPlace, share_of
from pipeline.student.model.hidden_state_matching import HiddenStateMatching
from pipeline.student.training.early_stopping import EarlyStopping
from pipeline.student.training.forward import FeatureOutput, install_distillation_forward
from pipeline.student.training.output_directory import last_checkpoint
from pipeline.student.training.recipe import LossRecipe

METRICS = ("loss", "kl", "ce", "perplexity", "agreement")


def _local(weight: Tensor) -> Tensor:
    """This process's part of a sharded weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def held_out_metrics(recipe: LossRecipe) -> tuple[str, ...]:
    """What an evaluation by this recipe reports, without eval_."""
    return METRICS if recipe.trains_kl or recipe.kd_weight == 0.0 else (*METRICS, "soft")


class DistillTrainer(Trainer):
    """Trains a student on a `CacheDataset` or a `MixedDataset`.

    Args:
        head: the student's head, from `open_head`.
        model: what is trained and saved, if it is a wrapper around `head.model`.
        recipe: the loss, with its schedules.
        eval_recipe: the loss on the held-out targets, if they are of another kind.
        features: what hidden states are drawn together by; part of `head.model` from now on.
        resample: with several samples of the tail, every epoch uses one alone.
        Everything else: as for `Trainer`; `args.remove_unused_columns` must be False.
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole optimizer step, see compute_loss

    def __init__(
        self,
        *,
        head: Head,
        recipe: LossRecipe,
        eval_recipe: LossRecipe | None = None,
        resample: bool = False,
        model: nn.Module | None = None,
        features: HiddenStateMatching | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.resample = recipe, resample
        # Weighted positions leave no way back from the sum of the loss to that of its parts.
        self._logs_soft = not recipe.trains_kl and recipe.position_weighting == "uniform"
        self.eval_recipe = eval_recipe or replace(recipe.at(1, 1), position_weighting="uniform")
        self.features = features
        if features is not None:
            features.attach(head.model)
        model = model or head.model
        install_distillation_forward(model, head, recipe, features)
        super().__init__(model=model, data_collator=kwargs["train_dataset"].collate, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens of a step
        # Of this process, on the device, where adding does not wait for it: [loss, kl, ce, agreement, count, tokens].
        self._sums = torch.zeros(len(HeadOutput._fields) + 1, device=self.args.device)  # since the last log
        self._features = torch.zeros((), device=self.args.device)  # since the last log: the sum that γ weights
        self._loss_sum = torch.zeros((), device=self.args.device)  # over all steps of this call of train
        self._soft = torch.zeros(2, device=self.args.device)  # since the last log: sum of T²·D, its positions
        self._since = time.perf_counter()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        counted = num_items_in_batch
        if counted is None:
            counted = (inputs["labels"] != -100).sum()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        scale = processes / torch.as_tensor(counted, device=inputs["labels"].device).clamp(min=1)
        recipe = self.recipe.at(self.state.global_step, self.state.max_steps)
        # Through the wrapper: DDP averages gradients there.
        output: HeadOutput = model(scale=scale, recipe=recipe, **inputs)
        of_features = torch.zeros((), device=scale.device)
        if isinstance(output, FeatureOutput):
            of_features = self.features.weight * output.features
            self._features += output.features
        if self._logs_soft and recipe.kd_weight > 0.0:
            own = output.loss.detach() / scale - of_features
            soft = (own - (1.0 - recipe.kd_weight) * output.ce) / recipe.kd_weight
            self._soft += torch.stack([soft, output.count])
        self._sums += torch.stack([*output[: len(HeadOutput._fields)], inputs["num_tokens"]]).detach()
        self._loss_sum += output.loss.detach() / processes
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds KL, CE and agreement since the last log, over all processes, to the training logs.

        `features`, if there are any, without their weight; `soft`, T²·D, if what is trained is not that KL;
        what a schedule gave at the last step.
        """
        if "loss" in logs:
            _, kl, ce, agreement, count, tokens = self._reduce(self._sums)
            seconds = time.perf_counter() - self._since
            if count:
                logs |= {"kl": kl / count, "ce": ce / count, "agreement": agreement / count}
            if self.features is not None:
                (drawn,) = self._reduce(self._features[None])
                logs |= {"features": drawn / count} if count else {}
                self._features.zero_()
            if self._logs_soft:
                soft, positions = self._reduce(self._soft)
                logs |= {"soft": soft / positions} if positions else {}
            done = self.recipe.at(self.state.global_step - 1, self.state.max_steps)
            if self.recipe.kd_schedule is not None:
                logs["kd_weight"] = done.kd_weight
            if self.recipe.temperature_schedule is not None:
                logs["temperature"] = done.temperature
            logs["tokens_per_s"] = tokens / seconds
            self._sums.zero_()
            self._soft.zero_()
            self._since = time.perf_counter()
        if "train_loss" in logs and (mean := self.mean_loss()) is not None:
            logs["train_loss"] = mean  # Trainer's own leaves out what other processes did since the last log
        super().log(logs, start_time)
        # Loss and sums are those of all processes: none goes on alone.
        self._check_finite(math.isfinite(logs.get("loss", 0.0)) and math.isfinite(logs.get("train_loss", 0.0)), "loss")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Never one with weights that are no numbers: it would take the place of one that can be gone on from."""
        bad = torch.zeros((), device=self.args.device)
        for weight in self.model.parameters():
            bad += ~torch.isfinite(_local(weight.detach())).all()
        self._check_finite(not any(self._reduce(bad[None])), "weights")
        super()._save_checkpoint(*args, **kwargs)

    def _check_finite(self, fine: bool, what: str) -> None:
        if fine:
            return
        output = Path(self.args.output_dir)
        last = last_checkpoint(output)
        kept = "There is no checkpoint yet" if last is None else f"{last} is from before and is kept"
        again = "start again" if last is None else "start again, or go on from there with --resume"
        raise DivergedError(
            f"{output}: at step {self.state.global_step} of {self.state.max_steps} the {what} of the student "
            f"{'is' if what == 'loss' else 'are'} not finite: training has diverged. {kept}. Take a lower "
            f"--learning-rate or a longer --warmup, and {again}."
        )

    def mean_loss(self) -> float | None:
        """Over the optimizer steps of this call of train; None if it had none to do."""
        steps = self.state.global_step - self._initial_global_step
        (total,) = self._reduce(self._loss_sum[None])
        return total / steps if steps else None

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Means over the held-out cache, the same on every process: loss, kl, ce, perplexity, agreement, and features
        and soft as in `log`.

        `eval_loss` is the mean of the objective as it is at the last step, with positions that count alike; `eval_kl`
        at the same temperature, or of a sample at its own, by `LossRecipe.kl_tail`: as in `distill evaluate`.
        """
        started = time.perf_counter()
        dataset = eval_dataset or self.eval_dataset
        stopping = self.early_stopping
        if stopping is not None and stopping.needs_rows:
            rows = self._row_sums(dataset)
            stopping.rows = dict(zip(HeadOutput._fields, rows.numpy(), strict=False))  # features, if any, come last
            loss, kl, ce, agreement, count, *drawn = rows.sum(dim=1).tolist()
        else:
            loss, kl, ce, agreement, count, *drawn = self._sums_over(dataset)
        result = Evaluation.from_sums(kl, ce, agreement, count, self.eval_recipe.kl_is)
        metrics = {
            "loss": loss / max(count, 1.0),
            "kl": result.kl,
            "ce": result.ce,
            "perplexity": result.perplexity,
            "agreement": result.agreement,
        }
        of_features = 0.0
        if drawn and self.features is not None:  # the held-out cache has states as well
            metrics["features"] = drawn[0] / max(count, 1.0)
            of_features = self.features.weight * metrics["features"]
        kd_weight = self.eval_recipe.kd_weight
        if "soft" in held_out_metrics(self.eval_recipe):
            metrics["soft"] = (metrics["loss"] - of_features - (1.0 - kd_weight) * result.ce) / kd_weight
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started  # training speed does not include this
        return metrics

    @property
    def early_stopping(self) -> EarlyStopping | None:
        """The one among the callbacks; Trainer may have put another in the place of the one that it was given."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, EarlyStopping)), None)

    def _sums_over(self, dataset: CacheDataset) -> list[float]:
        model = self._model_to_evaluate()
        with evaluating(model):
            sums = sum_over(lambda batch: model(recipe=self.eval_recipe, **batch), self._eval_batches(dataset))
        return self._reduce(torch.tensor(sums, dtype=torch.float64))

    @torch.no_grad()
    def _row_sums(self, dataset: CacheDataset) -> Tensor:
        """[5, R] float64 on the CPU: `HeadOutput` of every row, on every process; [6, R] with features."""
        model, found = self._model_to_evaluate(), []
        with evaluating(model):
            for batch in self._eval_batches(dataset):
                found.append(torch.stack(model(recipe=self.eval_recipe, by_row=True, **batch)).double().cpu())
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        here = torch.cat(found, dim=1)
        rows = torch.zeros((len(here), len(dataset)), dtype=torch.float64)
        share = share_of(len(dataset), processes, rank)
        mine = rows[:, share.start : share.stop]
        mine.copy_(here[:, : mine.shape[1]])  # without what only filled up
        return rows if processes == 1 else torch.tensor(self._reduce(rows.flatten())).view_as(rows)

    def _model_to_evaluate(self) -> nn.Module:
        return self.model_wrapped if self.is_fsdp_enabled else self.accelerator.unwrap_model(self.model_wrapped)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Trainer can only keep the best checkpoint if there is one: also between two --save-steps.
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best
        return best

    def _eval_batches(self, dataset: CacheDataset) -> Iterator[Batch]:
        """This process's share of the rows. Every process gets the same number of batches, since a sharded model's
        forward is collective; the last ones may hold nothing that counts."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_eval_batch_size
        rows = share_of(len(dataset), processes, rank)
        batches = math.ceil(len(share_of(len(dataset), processes, 0)) / size)
        shares = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        loader = DataLoader(dataset, batch_sampler=shares, collate_fn=dataset.collate)
        batch = None
        for batch in loader:
            batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            yield batch
        for _ in range(batches - len(shares)):
            filler = batch or {k: v.to(self.args.device) for k, v in dataset.collate([dataset[0]]).items()}
            yield uncounted(filler)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.features is not None and self.args.should_save:
            self.features.save(output_dir or self.args.output_dir)  # before the state, which says that all is there
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.features is not None:
            self.features.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.features is not None:
            self.features.load(self.state.best_model_checkpoint)

    def _get_train_sampler(self, train_dataset: CacheDataset | None = None) -> Sampler[int]:
        dataset = train_dataset or self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        processes, size = self.accelerator.num_processes, self._train_batch_size
        if processes == 1:
            # In the order of the windows, of which one reader needs one at a time. Sorted, a step that reaches into the
            # next window would go through both from end to end, and a reader that keeps one decode them again.
            return dataset.sampler(seed=seed, resample=self.resample)
        return DividedByPlace(
            dataset.sampler(seed=seed, resample=self.resample, multiple_of=processes * size),
            rows=len(dataset),
            processes=processes,
            accumulation=self.args.gradient_accumulation_steps,
            batch_size=size,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks at these only after a step: resumed from its last one, it would train another.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _reduce(self, sums: Tensor) -> list[float]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return sums.tolist()  # not by way of the device: MPS has no float64
        return self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
