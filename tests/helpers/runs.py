"""Caches and training runs of tiny models, each in about a second.

cache = build_cache(tmp / "cache", teacher_dir, text_file)      # stage one, in this process
train(tmp / "student", cache, student=student_dir, ...)         # stage two
distance(weights(a), weights(b))                                # 0.0 if bitwise equal
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import cache_format as cf
from cli import main
from dense import dense_kl
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.train import TrainSummary, train_student
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig

ROOT = Path(__file__).resolve().parents[2]

# Plain SGD without clipping, so that a step is proportional to the gradient. Adam would hide a wrong scale of the loss.
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}


def command(*words: object, status: int = 0) -> Result:
    """Runs the command line in this process and checks its exit status."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == status, (result.output, result.exc_info)
    return result


def on_two_processes(folder: Path, *words: str) -> None:
    """Runs a script with arguments on two processes of torchrun, in `folder`, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    paths = [str(ROOT), str(ROOT / "tests/helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


def build_cache(
    output: Path,
    teacher: Path,
    data: Path,
    *,
    top_k: int = 16,
    targets: TargetRule | None = None,
    hidden: HiddenRule | None = None,
    seq_len: int = 48,
    rows_per_shard: int = 32,
    packing: bool = True,
    encoding: str = "columns",
) -> Path:
    """A cache of packed rows; documents are lines, or conversations with loss tokens in the answers.

    Args:
        targets: default: the `top_k` most likely tokens.
    """
    text = DataConfig(data=str(data), seq_len=seq_len, sample_by="line", packing=packing)
    cache_teacher(
        CacheTeacherConfig(
            teacher=str(teacher),
            data=text,
            output=str(output),
            targets=targets or TargetRule(top_k=top_k),
            hidden=hidden,
            batch_size=4,
            device="cpu",
            rows_per_shard=rows_per_shard,
            encoding=encoding,
        )
    )
    return output


def settings(teacher: Path, text: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    """A run of stage one: lines as documents, eight entries, small batches and shards."""
    return CacheTeacherConfig(
        teacher=str(teacher),
        data=DataConfig(data=str(text), sample_by="line", seq_len=48),
        output=str(output),
        targets=TargetRule(top_k=8),
        batch_size=4,
        device="cpu",
        **{"rows_per_shard": 8, **options},
    )


def train(
    output: Path,
    cache: Path,
    *,
    student: Path | PreTrainedModel | None = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> TrainSummary:
    """`train_student` on the CPU. Keywords that begin with on_ are its callbacks.

    Args:
        arguments: contents of the file for `training_args`.
    """
    callbacks = {name: options.pop(name) for name in list(options) if name.startswith("on_")}
    if arguments is not None:
        file = output.with_name(f"{output.name}-arguments.json")
        file.write_text(json.dumps(arguments))
        options["training_args"] = str(file)
    student = str(student) if isinstance(student, Path) else student
    config = TrainStudentConfig(cache=str(cache), output=str(output), student=student, device="cpu", **options)
    return train_student(config, **callbacks)


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference of any weight."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def log_history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@torch.no_grad()
def dense_logits(model: PreTrainedModel, row: cf.CacheRow, vocab: int) -> np.ndarray:
    """[T, V] float64 logits of the model's own forward, one document at a time, without padding."""
    documents = np.split(np.asarray(row.input_ids, np.int64), np.cumsum(row.segment_lengths)[:-1])
    logits = [model(input_ids=torch.from_numpy(document)[None]).logits[0, :, :vocab] for document in documents]
    return torch.cat(logits).double().numpy()


def dense_evaluation(
    model: PreTrainedModel, rows: list[cf.CacheRow], vocab: int, *, tail: str = "bucket", temperature: float = 1.0
) -> dict[str, float]:
    """Means of kl, ce and agreement over loss tokens, from full logits in float64.

    Args:
        temperature: of the rows and of the divergence.
    """
    kl, ce, agreement = [], [], []
    for row in rows:
        logits = dense_logits(model, row, vocab)
        for t in np.flatnonzero(row.loss_mask):
            ids, logprobs = row.targets.at(t)
            known = np.arange(len(ids)) < (row.targets.exact_counts[t] or len(ids))
            likeliest = ids[known][logprobs[known] == logprobs[known].max()]
            if tail != "sampled":
                ids, logprobs = (part[: row.targets.exact_counts[t]] for part in (ids, logprobs))
            label = int(row.input_ids[t + 1])
            z = logits[t]
            p, residual = np.exp(logprobs.astype(np.float64)), np.exp(float(row.targets.residual_logprob[t]))
            more = {"entropy": float(row.targets.entropy[t]), "captured": temperature}
            kl.append(dense_kl(z, ids.astype(int), p, residual, label, temperature, tail, **more))
            ce.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[label])
            agreement.append((z.argmax() in likeliest) / len(likeliest))
    return {"kl": np.mean(kl), "ce": np.mean(ce), "agreement": np.mean(agreement)}


class Stop:
    """Raises KeyboardInterrupt after a step; for `on_step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, step: int, total: int) -> None:
        if step == self.step:
            raise KeyboardInterrupt
