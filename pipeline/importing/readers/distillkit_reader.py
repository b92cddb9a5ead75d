"""DistillKit's columns `compressed_logprobs` and `bytepacked_indices`, which compression_config.yaml describes.

Bytes of a position, in order: `exact_k` values; coefficients of the terms; for each bin of residuals a scale and packed
integers. The values after the exact ones are Σ coefficient·term(t) + residual, t = 0, 1, … (or 0 to 1). With
`delta_encoding` all of them are differences, and a cumulative sum gives the log-probabilities. Arithmetic is in the
dtypes that the configuration names, as where the data was written. Indices are packed in ⌈log2 d⌉ bits.
Source: https://github.com/arcee-ai/DistillKit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.importing.readers.foreign_rows import BadRow, ForeignRow, Ints
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.nested_values import integers, rectangle
from pipeline.importing.readers.source_files import Record, records

CONFIG = "compression_config.yaml"
LOGPROBS, INDICES = "compressed_logprobs", "bytepacked_indices"
COLUMNS = ("input_ids", "attention_mask", "labels", LOGPROBS, INDICES)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
MOST_BITS = 57  # of a packed integer: it then lies within 8 bytes, wherever it begins


@dataclass(frozen=True)
class Bin:
    scale_dtype: torch.dtype
    element_bits: int
    num_elements: int

    @property
    def packed_bytes(self) -> int:
        return -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True)
class Compression:
    """Contents of compression_config.yaml."""

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype = torch.float32
    terms: tuple[int | Literal["sqrt", "exp"], ...] = ()
    term_dtype: torch.dtype = torch.float32
    bins: tuple[Bin, ...] = ()
    delta: bool = True
    unit_interval: bool = False

    @classmethod
    def from_yaml(cls, path: Path) -> Compression:
        """Raises: ConfigError for a file that is not such a configuration."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            terms = tuple(data.get("polynomial_terms") or ())
            bins = [
                Bin(DTYPES[each["scale_dtype"]], int(each["element_bits"]), int(each["num_elements"]))
                for each in data.get("residual_bins") or ()
            ]
            found = cls(
                d=int(data["d"]),
                k=int(data["k"]),
                exact_k=int(data["exact_k"]),
                exact_dtype=DTYPES[data.get("exact_dtype", "float32")],
                terms=terms,
                term_dtype=DTYPES[data.get("term_dtype", "float32")],
                bins=tuple(bins),
                delta=bool(data.get("delta_encoding", True)),
                unit_interval=bool(data.get("normalize_t", False)),
            )
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"`layout` {path}: it cannot be read: {error}. Check the file.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"`layout` {path}: missing or unexpected {error}, expected DistillKit's {CONFIG} with d, k and exact_k."
            ) from error
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        elements = sum(each.num_elements for each in self.bins)
        for wrong, problem in (
            (self.d < 2, f"d is {self.d}, expected at least 2"),
            (not 0 <= self.exact_k <= self.k or self.k < 1, f"exact_k {self.exact_k} of k {self.k}"),
            (elements > self.k - self.exact_k, f"{elements} residuals, expected at most k - exact_k"),
            (
                any(type(term) is not int and term not in ("sqrt", "exp") for term in self.terms),
                f"polynomial_terms {list(self.terms)}, expected powers, sqrt or exp",
            ),
            (
                any(not (1 <= each.element_bits <= MOST_BITS and each.num_elements > 0) for each in self.bins),
                f"element_bits of a residual bin, expected 1 to {MOST_BITS}, and num_elements at least 1",
            ),
        ):
            if wrong:
                raise ConfigError(f"`layout` {path}: {problem}. Correct the file.")

    @property
    def index_bits(self) -> int:
        return math.ceil(math.log2(self.d))

    @property
    def index_bytes(self) -> int:
        return -(-self.k * self.index_bits // 8)

    @property
    def logprob_bytes(self) -> int:
        parts = [(self.exact_dtype, self.exact_k), (self.term_dtype, len(self.terms))]
        values = sum(dtype.itemsize * number for dtype, number in parts)
        return values + sum(each.scale_dtype.itemsize + each.packed_bytes for each in self.bins)

    @cached_property
    def _terms(self) -> Tensor:  # [k - exact_k, terms]
        number = self.k - self.exact_k
        if self.unit_interval:
            t = torch.linspace(0, 1, number, dtype=self.term_dtype)
        else:
            t = torch.arange(number, dtype=self.term_dtype)
        columns = [t**term if isinstance(term, int) else getattr(torch, term)(t) for term in self.terms]
        return torch.stack(columns, dim=1)

    def logprobs(self, data: NDArray[np.uint8]) -> Tensor:
        """[P, k] log-probabilities from [P, logprob_bytes]."""
        parts = _Parts(data)
        values = parts.take(self.exact_dtype, self.exact_k)  # [P, exact_k]
        fit = None
        if self.terms:
            coefficients = parts.take(self.term_dtype, len(self.terms))
            fit = (self._terms * coefficients[:, None, :]).sum(dim=-1)
        residual = torch.zeros(len(data), self.k - self.exact_k, dtype=torch.float32)
        place = 0
        for each in self.bins:
            scale = parts.take(each.scale_dtype, 1)
            packed = unpack_integers(parts.take_bytes(each.packed_bytes), each.element_bits, each.num_elements)
            steps = torch.from_numpy(_centred(packed, each.element_bits).astype(np.float32)) * scale
            residual = residual.to(torch.promote_types(residual.dtype, steps.dtype))
            residual[:, place : place + each.num_elements] = steps
            place += each.num_elements
        approximate = residual.to(self.exact_dtype)
        if fit is not None:
            approximate = fit + approximate
        joined = torch.cat([values, approximate], dim=1)  # in the wider of the two dtypes
        return joined.float().cumsum(dim=1).to(self.exact_dtype) if self.delta else joined

    def ids(self, data: NDArray[np.uint8]) -> Ints:
        """[P, k] tokens from [P, index_bytes]."""
        return unpack_integers(data, self.index_bits, self.k)


class _Parts:
    """Consecutive parts of the bytes of each position."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.place = data, 0

    def take_bytes(self, number: int) -> NDArray[np.uint8]:
        found = self.data[:, self.place : self.place + number]
        self.place += number
        return np.ascontiguousarray(found)

    def take(self, dtype: torch.dtype, number: int) -> Tensor:
        data = torch.from_numpy(self.take_bytes(number * dtype.itemsize))
        return data.view(dtype) if number else torch.zeros(len(data), 0, dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _centred(packed: Ints, bits: int) -> Ints:
    return packed * 2 - 1 if bits == 1 else packed - 2 ** (bits - 1)


def unpack_integers(data: NDArray[np.uint8], bits: int, number: int) -> Ints:
    """[P, number] integers of `bits` bits each from [P, B] bytes, most significant bit first.

    Each integer is cut out of the 8 bytes from the one where it begins.
    """
    starts = np.arange(number) * bits
    padded = np.concatenate([data, np.zeros((len(data), 8), np.uint8)], axis=1)
    window = np.zeros((len(data), number), np.uint64)
    for i in range((bits + 14) // 8):  # bytes that an integer can touch
        window |= padded[:, starts // 8 + i].astype(np.uint64) << np.uint64(56 - 8 * i)
    shifted = window >> (64 - starts % 8 - bits).astype(np.uint64)
    return (shifted & np.uint64(2**bits - 1)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class DistillKitReader(Reader):
    compression: Compression

    @property
    def description(self) -> Mapping[str, Any]:
        c = self.compression
        return {
            **{"d": c.d, "k": c.k, "exact_k": c.exact_k, "terms": list(c.terms), "delta_encoding": c.delta},
            **{"exact_dtype": _name(c.exact_dtype), "term_dtype": _name(c.term_dtype), "normalize_t": c.unit_interval},
            "bins": [[_name(each.scale_dtype), each.element_bits, each.num_elements] for each in c.bins],
        }

    def records(self) -> Iterator[Record]:
        return records(self.files, [*COLUMNS, *self.keep_columns])

    def decode(self, record: Record) -> ForeignRow:
        compression = self.compression
        logprob_bytes = rectangle(record.column(LOGPROBS), LOGPROBS)
        index_bytes = rectangle(record.column(INDICES), INDICES)
        if len(logprob_bytes) != len(index_bytes):
            raise BadRow(f"{len(logprob_bytes)} positions in {LOGPROBS}, {len(index_bytes)} in {INDICES}")
        for name, data, expected in (
            (LOGPROBS, logprob_bytes, compression.logprob_bytes),
            (INDICES, index_bytes, compression.index_bytes),
        ):
            if len(data) and data.shape[1] != expected:
                raise BadRow(
                    f"column {name!r}: {data.shape[1]} bytes per position, expected {expected} by `layout` "
                    f"(d {compression.d}, k {compression.k}, exact_k {compression.exact_k})"
                )
        positions = len(logprob_bytes)
        attention, labels = record.get("attention_mask"), record.get("labels")
        none = positions == 0
        return ForeignRow(
            input_ids=integers(record.column("input_ids"), "input_ids"),
            counts=np.full(positions, compression.k, np.int64),
            ids=np.zeros(0, np.int64) if none else compression.ids(index_bytes).ravel(),
            values=np.zeros(0) if none else compression.logprobs(logprob_bytes).double().numpy().ravel(),
            shift=self.shift,
            documents=None if attention is None else integers(attention, "attention_mask"),
            token_mask=None if labels is None else integers(labels, "labels") >= 0,
        )


def find_layout(given: str | None, files: Sequence[Path]) -> Path:
    """compression_config.yaml: the file that is given, or the one beside the data or above it. Raises: ConfigError."""
    if given is not None:
        return Path(given).expanduser()
    for folder in files[0].resolve().parents[:3]:
        if (found := folder / CONFIG).is_file():
            return found
    raise ConfigError(
        f"`layout`: found no {CONFIG} beside {files[0]}, expected one, because it says how the bytes are to be read. "
        "Take it from the data set's files or card, and name it with `layout`."
    )
