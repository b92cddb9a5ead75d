"""Exact targets of a real teacher on real text: the input of the benchmarks on targets.

The forward pass takes minutes, so its last hidden states are stored in float16 under `benchmarks/work`. The teacher's
distribution is defined as the head applied to these states. Everything after the forward pass takes seconds.

Shapes: N positions, K entries, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import Settings
from benchmarks.text import token_rows
from pipeline.models.head import open_head
from pipeline.models.loading import load_model, load_tokenizer, weights_fingerprint
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import sparse_targets

TOP_K = 64
ROW_TOKENS = 512
TEMPERATURES = (2.0, 4.0)
CHUNK = 128
WORK = Path(__file__).parent / "work"


@dataclass(frozen=True, eq=False)
class TextTargets:
    """Exact targets at every position of `rows` rows of `row_tokens` tokens, N = rows · row_tokens positions."""

    input_ids: np.ndarray  # [rows, row_tokens]
    ids: np.ndarray  # [N, K] ascending
    logprobs: np.ndarray  # [N, K] float32, exact
    residual_logprob: np.ndarray  # [N] float32
    entropy: np.ndarray  # [N] float32, nats
    tempered_tail: Mapping[float, np.ndarray]  # T -> [N] log mass outside the entries after the softmax at T
    tempered_entries: Mapping[float, np.ndarray]  # T -> [N, K] log-probabilities at T
    vocab_size: int
    teacher: str  # architecture, size and fingerprint

    @property
    def num_positions(self) -> int:
        return len(self.entropy)


def open_teacher(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer. Raises: click.ClickException if the directory has none."""
    check_teacher(directory)
    return load_model(str(directory)), load_tokenizer(str(directory))


def check_teacher(directory: Path) -> None:
    """Raises: click.ClickException if the directory has no teacher."""
    if not (directory / "config.json").is_file():
        raise click.ClickException(
            f"{directory}: found no teacher, expected a transformers directory. Run `make demo`, which creates one, "
            "or name another with --teacher."
        )


def describe(model: PreTrainedModel) -> str:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__} {parameters:.0f}M {weights_fingerprint(model)[:8]}"


def text_targets(settings: Settings) -> TextTargets:
    """65,536 positions of prose and code, half each; 1,024 if quick."""
    return _text_targets(settings.teacher, 4 if settings.quick else 128, 256 if settings.quick else ROW_TOKENS)


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, input_ids: np.ndarray) -> np.ndarray:
    """[rows, T, D] float16 at every position, one document per row; stored on disk for the next run."""
    text = hashlib.sha256(np.ascontiguousarray(input_ids, np.int64).tobytes()).hexdigest()[:8]
    file = WORK / f"states-{weights_fingerprint(model)[:8]}-{text}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        head = open_head(model, model.get_output_embeddings().weight.shape[0])
        positions = torch.arange(input_ids.shape[1])[None]
        found = [head.hidden_states(row[None], positions)[0].half().numpy() for row in torch.from_numpy(input_ids)]
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.save(stream, np.stack(found))
        partial.rename(file)
    return np.load(file, mmap_mode="r")


@functools.lru_cache(1)
@torch.inference_mode()
def _text_targets(directory: Path, rows: int, length: int) -> TextTargets:
    model, tokenizer = open_teacher(directory)
    length = min(length, getattr(model.config, "max_position_embeddings", length))
    head = open_head(model, real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]))
    input_ids = token_rows(tokenizer, rows, length)
    rule = TargetRule(top_k=TOP_K)
    # Reused buffers: large temporary chunks allocated between small lasting results would fragment the heap.
    logits, scratch, probs = torch.empty(3, CHUNK, head.vocab_size)
    parts: list[list[np.ndarray]] = []
    for row in hidden_states(model, input_ids):
        for states in torch.from_numpy(row.astype(np.float32)).split(CHUNK):
            chunk = head.logits(states, out=logits)
            exact = sparse_targets(chunk, rule, scratch=scratch)
            ids = exact.ids.long()
            found = [ids, exact.logprobs, exact.residual_logprob, exact.entropy]
            for temperature in TEMPERATURES:
                torch.div(chunk, temperature, out=scratch[: len(chunk)])
                tempered = torch.softmax(scratch[: len(chunk)], dim=1, out=probs[: len(chunk)])
                found.append(tempered.gather(1, ids).log())
                found.append(tempered.scatter_(1, ids, 0.0).sum(dim=1).log())
            parts.append([tensor.numpy() for tensor in found])
    ids, logprobs, residual, entropy, *tempered_parts = map(np.concatenate, zip(*parts, strict=True))
    return TextTargets(
        input_ids=input_ids,
        ids=ids,
        logprobs=logprobs,
        residual_logprob=residual,
        entropy=entropy,
        tempered_entries=dict(zip(TEMPERATURES, tempered_parts[::2], strict=True)),
        tempered_tail=dict(zip(TEMPERATURES, tempered_parts[1::2], strict=True)),
        vocab_size=head.vocab_size,
        teacher=describe(model),
    )
