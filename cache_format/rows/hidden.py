"""Hidden states of the teacher: optional columns of every shard.

    hidden_mask        list<bool> [T]                      positions that have states, P per row
    hidden_6           list<fixed_size_list<float16, D>>   [P] states of layer 6
    hidden_6_scale     list<float32> [P]                   int8 only: state = integer · scale

Layers are numbered as in transformers: 0 is the output of the embeddings, i that of layer i, the last one is the input
of the head. One more is the input of the head's matrix, if the head transforms the states first. A reader decodes only
the layers it is asked for. Shapes: N positions, P of them with states, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.manifest.fields import HIDDEN, check_fields

PREFIX = "hidden_"  # of every optional column of a version 1 shard
MASK = "hidden_mask"
DTYPES: dict[str, type[np.float16] | type[np.float32] | type[np.int8]] = {
    "float16": np.float16,
    "float32": np.float32,
    "int8": np.int8,
}
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class HiddenSpec:
    """The hidden states of a cache: `targets.hidden` of its manifest (unknown keys are ignored)."""

    layers: tuple[int, ...]
    teacher_layers: int  # L, the number of the last one
    width: int  # D
    dtype: str  # float16, float32 or int8
    every: int = 1  # one in this number of positions has states

    def __post_init__(self) -> None:
        layers = self.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > self.teacher_layers + 1:
            raise ValueError(
                f"hidden layers {list(layers)}, expected ascending numbers from 0 to {self.teacher_layers}, or one more"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"hidden states as {self.dtype!r}, expected {' or '.join(DTYPES)}")

    @property
    def of_layers(self) -> tuple[int, ...]:
        """Layers without the transformed input of the head."""
        return tuple(layer for layer in self.layers if layer <= self.teacher_layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one state, without its scale."""
        return self.width * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def bytes_per_position(self) -> int:
        """Bytes of a position that has states, before compression."""
        return len(self.layers) * (self.state_bytes + 4 * (self.dtype == "int8"))

    def columns(self, layers: Sequence[int] | None = None) -> list[str]:
        """Column names in schema order; with `layers`, only the columns of these."""
        chosen = self.layers if layers is None else [layer for layer in self.layers if layer in set(layers)]
        names = [MASK] if chosen else []
        for layer in chosen:
            names += [states_column(layer), *([scale_column(layer)] if self.dtype == "int8" else [])]
        return names

    def types(self) -> dict[str, pa.DataType]:
        """Item type of each column's lists."""
        value = pa.from_numpy_dtype(DTYPES[self.dtype])
        states = pa.list_(pa.field("item", value, nullable=False), self.width)
        kinds = {MASK: pa.bool_()}
        for layer in self.layers:
            kinds[states_column(layer)] = states
            kinds[scale_column(layer)] = pa.float32()
        return {name: kinds[name] for name in self.columns()}

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "teacher_layers": self.teacher_layers,
            "width": self.width,
            "dtype": self.dtype,
            "every": self.every,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HiddenSpec:
        """Raises: ValueError."""
        check_fields(data, HIDDEN, "targets.hidden")
        return cls(**{f.name: data[f.name] for f in fields(cls)} | {"layers": tuple(data["layers"])})


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """States of some layers, of one or several consecutive rows.

    Attributes:
        mask: [N] bool, positions that have states.
        states: layer -> [P, D] float16, float32 or int8.
        scales: layer -> [P] float32, with int8 only.
    """

    mask: NDArray[np.bool_]
    states: Mapping[int, NDArray[Any]]
    scales: Mapping[int, FloatArray] = field(default_factory=dict)

    def values(self, layer: int) -> FloatArray:
        """[P, D] float32."""
        states = self.states[layer].astype(np.float32)
        return states * self.scales[layer][:, None] if layer in self.scales else states

    def only(self, layers: Sequence[int]) -> HiddenStates | None:
        """The states of these layers; None if `layers` is empty."""
        return (
            HiddenStates(
                self.mask,
                {layer: each for layer, each in self.states.items() if layer in layers},
                {layer: each for layer, each in self.scales.items() if layer in layers},
            )
            if layers
            else None
        )

    def cut(self, tokens: slice) -> HiddenStates:
        """The states of consecutive positions, as views."""
        first = int(np.count_nonzero(self.mask[: tokens.start]))
        here = slice(first, first + int(np.count_nonzero(self.mask[tokens])))
        return HiddenStates(
            mask=self.mask[tokens],
            states={layer: states[here] for layer, states in self.states.items()},
            scales={layer: scales[here] for layer, scales in self.scales.items()},
        )

    def problem(self, tokens: int, where: str) -> str | None:
        """The first inconsistency as text, or None."""
        if self.mask.shape != (tokens,):
            return f"{where}: hidden states for {len(self.mask)} positions, expected {tokens}"
        count = int(np.count_nonzero(self.mask))
        for layer, states in self.states.items():
            scales = self.scales.get(layer)
            if states.ndim != 2 or len(states) != count or (scales is not None and scales.shape != (count,)):
                return f"{where}: {len(states)} hidden states of layer {layer}, its mask names {count} positions"
        return None


def joined(parts: Sequence[HiddenStates]) -> HiddenStates:
    """Inverse of `cut`."""
    first = parts[0]
    return HiddenStates(
        mask=np.concatenate([part.mask for part in parts]),
        states={layer: np.concatenate([part.states[layer] for part in parts]) for layer in first.states},
        scales={layer: np.concatenate([part.scales[layer] for part in parts]) for layer in first.scales},
    )


def find_invalid_state(hidden: HiddenStates) -> tuple[int, str] | None:
    """(position, problem) of the first state that is not finite, or None."""
    positions = np.flatnonzero(hidden.mask)
    for layer, states in hidden.states.items():
        if states.dtype == np.float16:
            # All exponent bits set means infinity or NaN; np.isfinite would convert every number first.
            bad = ((states.view(np.uint16) & 0x7C00) == 0x7C00).any(axis=1)
        elif states.dtype == np.float32:
            bad = ~np.isfinite(states).all(axis=1)
        elif layer in hidden.scales:
            bad = ~(np.isfinite(hidden.scales[layer]) & (hidden.scales[layer] >= 0))
        else:
            continue  # int8 without scales is never written
        if bad.any():
            return int(positions[bad.argmax()]), f"the hidden state of layer {layer} is not finite"
    return None


def states_column(layer: int) -> str:
    return f"{PREFIX}{layer}"


def scale_column(layer: int) -> str:
    return f"{PREFIX}{layer}_scale"


def to_arrow(
    name: str, hidden: HiddenStates, spec: HiddenSpec, offsets: NDArray[np.int64], kind: pa.DataType
) -> pa.Array:
    """One column of a record batch.

    Args:
        offsets: [R + 1] of each row's positions.
        kind: type of the column.

    Raises: ValueError for states of another dtype or width than the metadata say.
    """
    if (tuple(hidden.scales) if spec.dtype == "int8" else spec.layers) != spec.layers:
        raise ValueError(
            f"scales of layers {list(hidden.scales)}, the metadata name int8 states of {list(spec.layers)}"
        )
    if tuple(hidden.states) != spec.layers:
        raise ValueError(f"hidden states of layers {list(hidden.states)}, the metadata name {list(spec.layers)}")
    if name == MASK:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(hidden.mask), type=kind)
    starts = pa.array(_state_offsets(hidden.mask, offsets).astype(np.int32))
    layer = int(name.removeprefix(PREFIX).removesuffix("_scale"))
    if name == scale_column(layer):
        return pa.ListArray.from_arrays(starts, pa.array(hidden.scales[layer], pa.float32()), type=kind)
    states = hidden.states[layer]
    if states.dtype != DTYPES[spec.dtype] or states.shape[1:] != (spec.width,):
        raise ValueError(
            f"hidden states of layer {layer} are {states.dtype} of width {states.shape[1:]}, the metadata say "
            f"{spec.dtype} of {spec.width}"
        )
    items = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(states).ravel()), type=kind.value_type)
    return pa.ListArray.from_arrays(starts, items, type=kind)


def from_arrow(columns: Mapping[str, pa.ListArray], spec: HiddenSpec, tokens: NDArray[np.int64]) -> HiddenStates | None:
    """Inverse of `to_arrow`, of the columns that are there.

    Args:
        tokens: [R + 1] offsets of each row's positions.

    Raises: ValueError if the columns disagree in length or hold nulls.
    """
    if MASK not in columns:
        return None
    for name, column in columns.items():
        items = column.values
        inner = items.values if pa.types.is_fixed_size_list(items.type) else items
        if column.null_count or items.null_count or inner.null_count:
            raise ValueError(f"column {name} holds nulls, expected none")
    mask, starts = _list(columns[MASK])
    mask = mask.to_numpy(zero_copy_only=False)
    if not np.array_equal(starts, tokens):
        raise ValueError(f"the lists of {MASK} and input_ids differ in length")
    expected = _state_offsets(mask, tokens)
    states, scales = {}, {}
    for layer in spec.layers:
        for name in (states_column(layer), scale_column(layer)):
            if name not in columns:
                continue
            items, starts = _list(columns[name])
            if not np.array_equal(starts, expected):
                raise ValueError(f"the lists of {name} do not have a state for each position of {MASK}")
            if name == scale_column(layer):
                scales[layer] = items.to_numpy()
            else:
                states[layer] = items.flatten().to_numpy().reshape(-1, spec.width)
    for array in (mask, *states.values(), *scales.values()):
        array.setflags(write=False)
    return HiddenStates(mask, states, scales)


def _list(column: pa.ListArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """Items and offsets from 0 of a list column."""
    starts = column.offsets.to_numpy().astype(np.int64)
    return column.values.slice(starts[0], starts[-1] - starts[0]), starts - starts[0]


def _state_offsets(mask: NDArray[np.bool_], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[R + 1] offsets of the positions that have states."""
    before: NDArray[np.int64] = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    return before[tokens]
