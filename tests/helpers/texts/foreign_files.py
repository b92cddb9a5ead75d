"""Files of other tools, written to the letter of their schemas, of a made-up teacher that predicts its text well.

rows = made_up_rows(3)                         # tokens, and [T, V] log-probabilities; row t predicts token t + 1
write_distillkit(tmp / "data", rows, k=16)     # with compression_config.yaml beside
import_rows(tmp / "data", tmp / "cache", tokenizer)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import cache_format as cf
from pipeline.importing.import_cache import ImportSummary, import_cache
from pipeline.importing.import_config import ImportConfig

VOCABULARY = 400  # of the tiny tokenizer


@dataclass(frozen=True)
class MadeUp:
    """ids [T], logprobs [T, V] of the prediction made from each token."""

    ids: np.ndarray
    logprobs: np.ndarray

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """[T, k] tokens and log-probabilities, most likely first."""
        order = np.argsort(-self.logprobs, axis=1, kind="stable")[:, :k]
        return order, np.take_along_axis(self.logprobs, order, axis=1)


def made_up_rows(number: int = 3, *, length: int = 40, seed: int = 0, boost: float = 6.0) -> list[MadeUp]:
    """Args: boost: how much the logit of the next token is above that of an ordinary one; standard deviation 1.5."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        ids = rng.integers(5, VOCABULARY, length)
        logits = rng.normal(0, 1.5, (length, VOCABULARY))
        logits[np.arange(length - 1), ids[1:]] += boost
        rows.append(MadeUp(ids, logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)))
    return rows


def import_rows(source: Path | str, output: Path, tokenizer: Any, **options: Any) -> tuple[cf.Cache, ImportSummary]:
    """Imports, and opens the cache."""
    warnings = options.pop("warnings", [])
    config = ImportConfig(source=str(source), output=str(output), tokenizer=tokenizer, **options)
    summary = import_cache(config, on_warning=warnings.append)
    return cf.open_cache(output), summary


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def nested(rows: Sequence[MadeUp], k: int) -> dict[str, Any]:
    """Columns `tokens` [T], `top` [T][k] and `logprobs` [T][k]."""
    tops = [row.top(k) for row in rows]
    return {
        "tokens": [row.ids.tolist() for row in rows],
        "top": [ids.tolist() for ids, _ in tops],
        "logprobs": [values.tolist() for _, values in tops],
    }


COLUMNS = ("ids=tokens top_ids=top values=logprobs",)
NESTED: dict[str, Any] = {"format": "columns", "column": COLUMNS, "values": "logprobs", "shift": 0}
"""Options that import what `nested` writes."""


def check_entries(cache: cf.Cache, rows: Sequence[MadeUp], k: int, *, first: int = 0) -> None:
    """The cache holds the `k` most likely tokens of the rows from position `first` on, rounded by its codebook."""
    assert len(cache) == len(rows)
    book = cache.metadata.codebooks["target_logprobs"]
    for row, made in zip(cache, rows, strict=True):
        assert row.input_ids.tolist() == made.ids.tolist()
        expected = np.arange(len(made.ids))
        assert row.loss_mask.tolist() == ((expected >= first) & (expected < len(made.ids) - 1)).tolist()
        for t in np.flatnonzero(row.loss_mask):
            ids, logprobs = row.targets.at(t)
            likeliest, values = made.top(k)
            order = np.argsort(likeliest[t])
            assert ids.tolist() == likeliest[t][order].tolist()
            wanted = book.decode(book.encode(values[t][order].astype(np.float32)))
            np.testing.assert_allclose(np.exp(logprobs / 2), np.exp(wanted / 2), atol=0.012)
            tail = 1 - np.exp(values[t]).sum()
            assert abs(np.exp(row.targets.residual_logprob[t] / 2) - np.sqrt(max(tail, 0))) < 0.02


# ---- DistillKit


@dataclass(frozen=True)
class Kit:
    """Contents of compression_config.yaml; bins: (scale dtype, bits, elements)."""

    k: int = 16
    exact_k: int = 16
    d: int = VOCABULARY
    exact_dtype: str = "float32"
    terms: tuple[Any, ...] = ()
    term_dtype: str = "float32"
    bins: tuple[tuple[str, int, int], ...] = ()
    delta: bool = True
    normalize_t: bool = False

    def to_yaml(self) -> dict[str, Any]:
        return {
            "d": self.d,
            "k": self.k,
            "exact_k": self.exact_k,
            "exact_dtype": self.exact_dtype,
            "polynomial_terms": list(self.terms) or None,
            "term_dtype": self.term_dtype,
            "residual_bins": [
                {"scale_dtype": dtype, "element_bits": bits, "num_elements": number}
                for dtype, bits, number in self.bins
            ],
            "delta_encoding": self.delta,
            "error_diffusion": False,
            "normalize_t": self.normalize_t,
        }


def encode(values: np.ndarray, kit: Kit) -> np.ndarray:
    """[P, B] bytes of [P, k] descending log-probabilities, by least squares and rounding; in float64 throughout."""
    work = np.diff(values, prepend=0.0, axis=1) if kit.delta else values
    parts = [_floats(work[:, : kit.exact_k], kit.exact_dtype)]
    rest = work[:, kit.exact_k :]
    if kit.terms:
        t = np.linspace(0, 1, rest.shape[1]) if kit.normalize_t else np.arange(rest.shape[1], dtype=float)
        design = np.stack([t**each if isinstance(each, int) else getattr(np, each)(t) for each in kit.terms], axis=1)
        coefficients = np.linalg.lstsq(design, rest.T, rcond=None)[0].T
        parts.append(_floats(coefficients, kit.term_dtype))
        rest = rest - coefficients @ design.T
    place = 0
    for dtype, bits, number in kit.bins:
        chosen = rest[:, place : place + number]
        scale = np.abs(chosen).max(axis=1, keepdims=True) / (1 if bits == 1 else 2 ** (bits - 1))
        steps = chosen / np.where(scale == 0, 1, scale)
        codes = (steps > 0).astype(int) if bits == 1 else _to_range(steps, bits)
        parts += [_floats(scale, dtype), pack(codes, bits)]
        place += number
    return np.concatenate(parts, axis=1)


def _to_range(steps: np.ndarray, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return np.clip(np.round(steps), -half, half - 1).astype(int) + half


def _floats(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # the upper half of a float32, rounded to nearest
        whole = values.astype("<f4").view("<u4") + 0x7FFF
        return np.ascontiguousarray((whole >> 16).astype("<u2")).view(np.uint8).reshape(len(values), -1)
    data = np.ascontiguousarray(values.astype(np.dtype(dtype).newbyteorder("<")))
    return data.view(np.uint8).reshape(len(values), -1)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[P, n] integers as [P, B] bytes, most significant bit first, padded with zeros."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(((numbers[..., None] >> shifts) & 1).reshape(len(numbers), -1).astype(np.uint8), axis=1)


def write_distillkit(folder: Path, rows: Sequence[MadeUp], kit: Kit | None = None, **columns: Any) -> Path:
    """A file of rows with one list less than tokens, and the configuration. Args: columns: further ones."""
    kit = kit or Kit()
    compressed, indices = [], []
    for row in rows:
        ids, values = row.top(kit.k)
        compressed.append(encode(values[:-1], kit).tolist())
        indices.append(pack(ids[:-1], (kit.d - 1).bit_length()).tolist())
    bytes_ = pa.list_(pa.list_(pa.uint8()))
    write_parquet(
        folder / "data.parquet",
        {
            "input_ids": pa.array([row.ids.tolist() for row in rows], pa.list_(pa.uint64())),
            "compressed_logprobs": pa.array(compressed, bytes_),
            "bytepacked_indices": pa.array(indices, bytes_),
            **columns,
        },
    )
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(kit.to_yaml()))
    return folder


# ---- llama.cpp


def write_llama_cpp(path: Path, rows: Sequence[MadeUp]) -> Path:
    """Rows of equal length as chunks: predictions of the second half of each, 16 bits per token of the vocabulary."""
    n_ctx, vocabulary = rows[0].logprobs.shape
    with path.open("wb") as stream:
        stream.write(b"_logits_" + np.array([n_ctx, vocabulary, len(rows)], "<i4").tobytes())
        stream.write(np.concatenate([row.ids for row in rows]).astype("<i4").tobytes())
        for row in rows:
            for logprobs in row.logprobs[n_ctx // 2 : n_ctx - 1]:
                least = max(logprobs.min(), logprobs.max() - 16)
                scale = np.float32((logprobs.max() - least) / 65535)
                codes = np.clip(np.round((logprobs - least) / scale), 0, 65535).astype("<u2")
                stream.write(np.array([scale, least], "<f4").tobytes() + codes.tobytes())
                stream.write(bytes(2 * (vocabulary % 2)))
    return path
