"""head.safetensors: the teacher's vocabulary head, which turns a hidden state into the teacher's full distribution.

    logits = c·tanh(s·(W·h + b) / c)         s: logit_scale, 1 in most models; c: softcap; without it s·(W·h + b)
    log p  = logits − logsumexp(logits)

A cache of hidden targets has no entries: h is a column (`hidden_30`); W and b are stored once, in this file, in the
narrowest dtype that represents all their values exactly. The file is in the safetensors format, read and written
without that package.

Cost: V·D numbers on disk and in memory; products are float32, one block of the vocabulary at a time.
Shapes: n positions, V vocabulary size, D input width of W.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.cache_errors import FormatError
from cache_format.manifest.fields import HEAD as HEAD_FIELDS
from cache_format.manifest.fields import check_fields

HEAD = "head.safetensors"
"""File of the vocabulary head, in caches of hidden targets."""
DTYPES = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}
"""Name -> its name in safetensors, and the numpy type of its bytes (uint16 for bfloat16, which numpy lacks)."""

VOCAB_BLOCK = 8192
MAX_HEADER_BYTES = 2**16
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """`targets.head` of a manifest, which may have more keys."""

    layer: int  # layer whose states are multiplied by W: the last one, or the output of the head's transform
    dtype: str
    bias: bool
    logit_scale: float
    softcap: float | None
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"head of {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if type(self.layer) is not int or self.layer < 0 or type(self.bytes) is not int or self.bytes < 0:
            raise ValueError(f"head of layer {self.layer!r} and {self.bytes!r} bytes")
        numbers = [self.logit_scale] if self.softcap is None else [self.logit_scale, self.softcap]
        if not all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers):
            raise ValueError(f"head with scale {self.logit_scale!r} and soft-cap {self.softcap!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadSpec:
        """Raises: ValueError."""
        check_fields(data, HEAD_FIELDS, "targets.head")
        known: dict[str, Any] = {f.name: data.get(f.name) for f in fields(cls)}
        return cls(**known)


@dataclass(frozen=True, eq=False)
class StoredHead:
    """The head of a cache, in the file's dtype.

    Attributes:
        weight: [V, D] of `spec.dtype`; bfloat16 as uint16, the upper half of a float32.
        bias: [V] likewise, or None.
    """

    spec: HeadSpec
    weight: NDArray[Any]
    bias: NDArray[Any] | None

    def logits(self, states: FloatArray) -> FloatArray:
        """[n, D] → [n, V] float32, a block of the vocabulary at a time."""
        found = np.empty((len(states), len(self.weight)), np.float32)
        for start in range(0, len(self.weight), VOCAB_BLOCK):
            here = slice(start, start + VOCAB_BLOCK)
            np.matmul(states, self.rows(here).T, out=found[:, here])
        return self.finished(found)

    def rows(self, tokens: slice) -> FloatArray:
        """Rows of `weight` as float32."""
        return widened(self.weight[tokens], self.spec.dtype)

    def finished(self, products: FloatArray) -> FloatArray:
        """Applies bias, scale and soft-cap to W·h [n, V], in place."""
        if self.bias is not None:
            products += widened(self.bias, self.spec.dtype)
        if self.spec.logit_scale != 1.0:
            products *= self.spec.logit_scale
        if self.spec.softcap is not None:
            products /= self.spec.softcap
            np.tanh(products, out=products)
            products *= self.spec.softcap
        return products

    def logprobs(self, states: FloatArray) -> FloatArray:
        """[n, D] → [n, V]: the teacher's full distribution, as log-probabilities."""
        found = self.logits(states)
        found -= found.max(axis=1, keepdims=True)
        found -= np.log(np.exp(found).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
        return found

    @classmethod
    def of(cls, data: pa.Buffer, spec: HeadSpec, vocab_size: int, width: int, where: str) -> StoredHead:
        """From the contents of the file. Raises: FormatError, naming `where`, if they are not what `spec` says."""
        shapes = {"weight": (vocab_size, width), **({"bias": (vocab_size,)} if spec.bias else {})}
        try:
            found = _tensors(memoryview(data), spec.dtype, shapes)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise FormatError(
                f"{where}: not the head that the manifest describes ({reason}). Restore it from a copy, or make the "
                "cache again."
            ) from error
        return cls(spec, found["weight"], found.get("bias"))


def head_contents(weight: NDArray[Any], bias: NDArray[Any] | None, dtype: str) -> bytes:
    """The contents of the file; deterministic.

    Args:
        weight, bias: [V, D] and [V] of `dtype`; bfloat16 as uint16.
    """
    parts = [] if bias is None else [bias]
    header, size = _header(weight.shape[0], weight.shape[1], dtype, bias is not None)
    data = [np.ascontiguousarray(each, DTYPES[dtype][1]) for each in [*parts, weight]]
    assert sum(each.nbytes for each in data) == size
    return b"".join([header, *(each.tobytes() for each in data)])


def head_file_bytes(vocab_size: int, width: int, dtype: str, *, bias: bool) -> int:
    """Size of the file that `head_contents` would make."""
    header, size = _header(vocab_size, width, dtype, bias)
    return len(header) + size


def widened(values: NDArray[Any], dtype: str) -> FloatArray:
    """As float32."""
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    found: FloatArray = values.astype(np.float32, copy=False)
    return found


def _header(vocab_size: int, width: int, dtype: str, bias: bool) -> tuple[bytes, int]:
    """The header with its length prefix, and the number of data bytes after it."""
    name, kind = DTYPES[dtype]
    shapes = {**({"bias": [vocab_size]} if bias else {}), "weight": [vocab_size, width]}
    entries, start = {}, 0
    for tensor, shape in shapes.items():
        stop = start + math.prod(shape) * np.dtype(kind).itemsize
        entries[tensor] = {"dtype": name, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return struct.pack("<Q", len(text)) + text, start


def _tensors(data: memoryview, dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(bytes(data[8 : 8 + length]))
    numbers = data[8 + length :]
    name, kind = DTYPES[dtype]
    if found := sorted(set(header) - {"__metadata__"} ^ set(shapes)):
        raise ValueError(f"{', '.join(found)} not in both")
    tensors = {}
    for tensor, shape in shapes.items():
        entry = header[tensor]
        start, stop = entry["data_offsets"]
        if entry["dtype"] != name or list(entry["shape"]) != list(shape):
            raise ValueError(f"{tensor} of {entry['dtype']} {entry['shape']}, expected {name} {list(shape)}")
        size = math.prod(shape) * np.dtype(kind).itemsize
        if not (type(start) is int and 0 <= start and stop - start == size and stop <= len(numbers)):
            raise ValueError(f"{tensor} at {start!r} to {stop!r} of {len(numbers)} bytes, expected {size}")
        array = np.frombuffer(numbers[start:stop], kind).reshape(shape)
        tensors[tensor] = np.require(array, requirements=["A"])
    return tensors
