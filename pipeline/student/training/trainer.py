"""transformers' Trainer with the distillation loss and its held-out evaluation.

**Scale.** The loss of an optimizer step is a sum over the loss tokens of all its micro-batches and processes, divided
once by their number. Each micro-batch's sum is scaled by processes / tokens, because DDP averages over processes. So
1×8, 2×4 and two processes give the same gradient, whatever the padding and masks.
"""

from __future__ import annotations

import contextlib
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
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from pipeline.errors import DivergedError
from pipeline.evaluation.metrics import Evaluation, sum_over
from pipeline.losses import DistillLoss, HeadOutput
from pipeline.models.head import Head, evaluating
from pipeline.student.data.batches_ahead import BatchesAhead
from pipeline.student.data.dataset import Batch, CacheDataset, LocalShuffle, to_device, without_loss_tokens
from pipeline.student.data.mixed_dataset import MixedShuffle, Rows
from pipeline.student.data.rank_sampler import DividedByPlace, share_of
from pipeline.student.model.hidden_state_matching import HiddenStateMatching
from pipeline.student.training.checkpoints import remove_old_checkpoints
from pipeline.student.training.early_stopping import EarlyStopping
from pipeline.student.training.forward import FeatureOutput, install_distillation_forward
from pipeline.student.training.output_directory import last_checkpoint, saving

METRICS = ("loss", "kl", "ce", "perplexity", "agreement")


def _local(weight: Tensor) -> Tensor:
    """This process's shard of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@contextlib.contextmanager
def _same_use_cache(config: PreTrainedConfig) -> Iterator[None]:
    """Trainer turns `use_cache` off, which would be saved: the student would generate without a cache. Our forward pass
    turns it off itself."""
    before = vars(config).get("use_cache")
    yield
    if before is None:
        vars(config).pop("use_cache", None)
    else:
        config.use_cache = before


@contextlib.contextmanager
def _without_rotation(arguments: TrainingArguments) -> Iterator[None]:
    """Trainer does not remove old checkpoints: `remove_old_checkpoints` does."""
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    try:
        yield
    finally:
        arguments.save_total_limit = limit


def held_out_metrics(loss: DistillLoss) -> tuple[str, ...]:
    """Names of the metrics that an evaluation with this loss reports, without eval_."""
    return METRICS if loss.trains_kl or loss.kd_weight == 0.0 else (*METRICS, "soft")


class DistillTrainer(Trainer):
    """Trains a student on a `CacheDataset` or a `MixedDataset`.

    Args:
        head: the student's head, from `open_head`.
        model: a wrapper around `head.model` to train and save instead.
        loss: with its schedules.
        eval_loss: the loss on the held-out targets; default: `loss` at the last step, with uniform weights.
        matching: the hidden-state loss; becomes part of `head.model`.
        resample: use a different stored sample of the tail in each epoch.
        train_dataset: the rows of the batches.
        Others: as for `Trainer`; `args.remove_unused_columns` must be False.
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole optimizer step, see compute_loss

    def __init__(
        self,
        *,
        head: Head,
        loss: DistillLoss,
        eval_loss: DistillLoss | None = None,
        resample: bool = False,
        model: nn.Module | None = None,
        matching: HiddenStateMatching | None = None,
        args: TrainingArguments,
        train_dataset: Rows,
        **kwargs: Any,
    ) -> None:
        self.loss, self.resample = loss, resample
        # With weighted positions the sum of D cannot be recovered from the sums of the loss and the CE.
        self._logs_soft = not loss.trains_kl and loss.position_weighting == "uniform"
        self.eval_loss = eval_loss or replace(loss.at(1, 1), position_weighting="uniform")
        self.matching = matching
        if matching is not None:
            matching.attach(head.model)
        model = model or head.model
        install_distillation_forward(model, head, loss, matching)
        self.batches = BatchesAhead(train_dataset, pinned=args.dataloader_pin_memory)
        try:
            with _same_use_cache(head.model.config):
                super().__init__(
                    model=model, args=args, train_dataset=self.batches, data_collator=self.batches.collate, **kwargs
                )
        except BaseException:
            if matching is not None:
                matching.detach(head.model)
            raise
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens of a step
        # Sums of this process, on the device so that adding does not wait: [loss, kl, ce, agreement, count, tokens].
        self._sums = torch.zeros(len(HeadOutput._fields) + 1, device=self.args.device)  # since the last log
        self._features = torch.zeros((), device=self.args.device)  # since the last log: the sum that γ weights
        self._loss_sum = torch.zeros((), device=self.args.device)  # over all steps of this call of train()
        self._soft = torch.zeros(2, device=self.args.device)  # since the last log: sum of T²·D, its positions
        self._since = time.perf_counter()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        count = num_items_in_batch
        if count is None:
            count = inputs["targets"].loss_mask.sum()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        scale = processes / torch.as_tensor(count, device=inputs["labels"].device).clamp(min=1)
        loss = self.loss.at(self.state.global_step, self.state.max_steps)
        # Through the wrapper: DDP averages gradients there.
        output: HeadOutput = model(scale=scale, loss=loss, **inputs)
        hidden_part = torch.zeros((), device=scale.device)
        if isinstance(output, FeatureOutput):
            hidden_part = self.matching.weight * output.features
            self._features += output.features
        if self._logs_soft and loss.kd_weight > 0.0:
            on_logits = output.loss.detach() / scale - hidden_part
            soft = (on_logits - (1.0 - loss.kd_weight) * output.ce) / loss.kd_weight
            self._soft += torch.stack([soft, output.count])
        self._sums += torch.stack([*output[: len(HeadOutput._fields)], inputs["num_tokens"]]).detach()
        self._loss_sum += output.loss.detach() / processes
        return (output.loss, output) if return_outputs else output.loss

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        # accelerate's loader moves the targets; Trainer moves tensors only, where accelerate leaves placement to it.
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "targets": inputs["targets"].to(self.args.device)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds KL, CE and agreement since the last log, over all processes, to the training logs.

        Also `features`, the hidden-state loss without its weight; `soft`, T²·D, if D is not the reported KL; and the
        values of schedules at the last step.
        """
        if "loss" in logs:
            _, kl, ce, agreement, count, tokens = self._reduce(self._sums)
            seconds = time.perf_counter() - self._since
            if count:
                logs |= {"kl": kl / count, "ce": ce / count, "agreement": agreement / count}
            if self.matching is not None:
                (distance,) = self._reduce(self._features[None])
                logs |= {"features": distance / count} if count else {}
                self._features.zero_()
            if self._logs_soft:
                soft, positions = self._reduce(self._soft)
                logs |= {"soft": soft / positions} if positions else {}
            done = self.loss.at(self.state.global_step - 1, self.state.max_steps)
            if self.loss.kd_schedule is not None:
                logs["kd_weight"] = done.kd_weight
            if self.loss.temperature_schedule is not None:
                logs["temperature"] = done.temperature
            logs["tokens_per_s"] = tokens / seconds
            self._sums.zero_()
            self._soft.zero_()
            self._since = time.perf_counter()
        if "train_loss" in logs and (mean := self.mean_loss()) is not None:
            logs["train_loss"] = mean  # Trainer's own omits the other processes since the last log
        super().log(logs, start_time)
        # The loss is that of all processes, so all of them stop.
        self._check_finite(math.isfinite(logs.get("loss", 0.0)) and math.isfinite(logs.get("train_loss", 0.0)), "loss")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Refuses NaN and Inf weights: such a checkpoint would replace one that training can resume from."""
        bad = torch.zeros((), device=self.args.device)
        for weight in self.model.parameters():
            bad += ~torch.isfinite(_local(weight.detach())).all()
        self._check_finite(not any(self._reduce(bad[None])), "weights")
        step, limit = self.state.global_step, self.args.save_total_limit
        with saving(self.args.output_dir, step if self.args.should_save else None), _without_rotation(self.args):
            if self.args.should_save:
                # Before shards are written, Trainer looks whether this directory exists, to note the best checkpoint.
                # A process that looks too early would load its shard of an earlier one.
                Path(self.args.output_dir, f"checkpoint-{step}").mkdir(exist_ok=True)
            super()._save_checkpoint(*args, **kwargs)
        if limit is not None and limit > 0 and self.args.should_save:
            kept = {step} if self.state.best_global_step is None else {step, self.state.best_global_step}
            remove_old_checkpoints(self.args.output_dir, limit=limit, kept=kept)

    def _check_finite(self, fine: bool, what: str) -> None:
        if fine:
            return
        output = Path(self.args.output_dir)
        last = last_checkpoint(output)
        kept = "There is no checkpoint yet" if last is None else f"{last}, from before, is kept"
        again = "start again" if last is None else "start again, or continue from it with `resume=True`"
        raise DivergedError(
            f"{output}: at step {self.state.global_step} of {self.state.max_steps} the {what} became NaN or Inf: "
            f"training has diverged. {kept}. Lower `learning_rate` or lengthen `warmup`, and {again}."
        )

    def mean_loss(self) -> float | None:
        """Mean over the optimizer steps of this call of train(); None if there were none."""
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

        The metric `eval_loss` is the loss at the last step, with uniform weights. `eval_kl` is what `distill evaluate`
        reports, at the temperature of the loss, or of the targets if they are a sample.
        """
        started = time.perf_counter()
        dataset = eval_dataset or self.eval_dataset
        stopping = self.early_stopping
        if stopping is not None and stopping.needs_rows:
            rows = self._row_sums(dataset)
            # Not strict: the sums of hidden states, if any, come last and have no name.
            stopping.rows = dict(zip(HeadOutput._fields, rows.numpy(), strict=False))
            loss, kl, ce, agreement, count, *distance = rows.sum(dim=1).tolist()
        else:
            loss, kl, ce, agreement, count, *distance = self._sums_over(dataset)
        result = Evaluation.from_sums(kl, ce, agreement, count, self.eval_loss.kl_estimate_kind)
        metrics = {
            "loss": loss / max(count, 1.0),
            "kl": result.kl,
            "ce": result.ce,
            "perplexity": result.perplexity,
            "agreement": result.agreement,
        }
        hidden_part = 0.0
        if distance and self.matching is not None:  # the held-out cache has states as well
            metrics["features"] = distance[0] / max(count, 1.0)
            hidden_part = self.matching.weight * metrics["features"]
        kd_weight = self.eval_loss.kd_weight
        if "soft" in held_out_metrics(self.eval_loss):
            metrics["soft"] = (metrics["loss"] - hidden_part - (1.0 - kd_weight) * result.ce) / kd_weight
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self._since += time.perf_counter() - started  # training speed does not include this
        return metrics

    @property
    def early_stopping(self) -> EarlyStopping | None:
        """The callback of that class; Trainer may have replaced the object that it was given."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, EarlyStopping)), None)

    def _sums_over(self, dataset: CacheDataset) -> list[float]:
        model = self._model_to_evaluate()
        with evaluating(model):
            sums = sum_over(lambda batch: model(loss=self.eval_loss, **batch), self._eval_batches(dataset))
        return self._reduce(torch.tensor(sums, dtype=torch.float64))

    @torch.no_grad()
    def _row_sums(self, dataset: CacheDataset) -> Tensor:
        """[5, R] float64 on the CPU: `HeadOutput` of every row, on every process; [6, R] with hidden states."""
        model, found = self._model_to_evaluate(), []
        with evaluating(model):
            for batch in self._eval_batches(dataset):
                found.append(torch.stack(model(loss=self.eval_loss, by_row=True, **batch)).double().cpu())
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        here = torch.cat(found, dim=1)
        rows = torch.zeros((len(here), len(dataset)), dtype=torch.float64)
        share = share_of(len(dataset), processes, rank)
        mine = rows[:, share.start : share.stop]
        mine.copy_(here[:, : mine.shape[1]])  # without filler rows
        return rows if processes == 1 else torch.tensor(self._reduce(rows.flatten())).view_as(rows)

    def _model_to_evaluate(self) -> nn.Module:
        return self.model_wrapped if self.is_fsdp_enabled else self.accelerator.unwrap_model(self.model_wrapped)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Trainer can only keep the best checkpoint if it exists, so save it outside of `save_steps` too.
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best
        return best

    def _eval_batches(self, dataset: CacheDataset) -> Iterator[Batch]:
        """This process's share of the rows. Every process gets the same number of batches, because the forward pass of
        a sharded model is collective; the last ones may have no loss tokens."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_eval_batch_size
        rows = share_of(len(dataset), processes, rank)
        batches = math.ceil(len(share_of(len(dataset), processes, 0)) / size)
        shares = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        batch = None
        with contextlib.closing(BatchesAhead(dataset, shares, pinned=self.args.dataloader_pin_memory)) as ahead:
            loader = DataLoader(
                ahead,
                batch_sampler=shares,
                collate_fn=ahead.collate,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
            for batch in loader:
                batch = to_device(batch, self.args.device)
                yield batch
        for _ in range(batches - len(shares)):
            yield without_loss_tokens(batch or to_device(dataset.collate([dataset[0]]), self.args.device))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student as a whole, also if checkpoints are in shards: Trainer would save nothing."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.matching is not None and self.args.should_save:
            self.matching.save(
                output_dir or self.args.output_dir
            )  # before the state, which marks a complete checkpoint
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.matching is not None:
            self.matching.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.matching is not None:
            self.matching.load(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Does not warn of tensors that a checkpoint has under another name, such as a head tied to the embeddings, nor
        of those in a file of their own."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in named.items() if name not in missing}
        loaded |= set() if self.matching is None else set(map(id, self.matching.parameters()))
        really = [name for name in load_result.missing_keys if id(named.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=really))

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        self.batches.order = loader.batch_sampler
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        dataset = self.batches.rows
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        processes, size = self.accelerator.num_processes, self._train_batch_size
        if processes == 1:
            # In the order of the windows, which a single reader needs one at a time. If rows were sorted, a step that
            # reaches into the next window would alternate between both, and the reader would decode them again.
            self._order: LocalShuffle | MixedShuffle | DividedByPlace = dataset.sampler(
                seed=seed, resample=self.resample
            )
        else:
            self._order = DividedByPlace(
                dataset.sampler(seed=seed, resample=self.resample, multiple_of=processes * size),
                rows=len(dataset),
                processes=processes,
                accumulation=self.args.gradient_accumulation_steps,
                batch_size=size,
            )
        return self._order

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with contextlib.closing(self.batches):
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # Trainer does not reach the sampler of several processes in an epoch that is resumed after some batches: it
        # would continue in the order of the first epoch.
        self._order.set_epoch(epoch)
        # Trainer checks these only after a step: resumed from its last one, it would train another.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _reduce(self, sums: Tensor) -> list[float]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return sums.tolist()  # not on the device: MPS has no float64
        return self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
