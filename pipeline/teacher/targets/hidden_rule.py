"""Options of stored hidden states; a part of `cache_config`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pipeline.errors import ConfigError
from pipeline.options import check_ranges, option

if TYPE_CHECKING:
    import cache_format as cf

HIDDEN = "Hidden states"


class Layered(Protocol):
    """A teacher, or its head."""

    def layers(self) -> tuple[int, int]:
        """The number of layers, and the width of their states."""
        ...


@dataclass(frozen=True, kw_only=True)
class HiddenRule:
    """Which hidden states are stored; `spec` resolves it for a given teacher."""

    PREFIX: ClassVar = "hidden_"

    layers: str | None = option(
        None,
        name="hidden_states",
        help="Store hidden states too: last, all, or layers such as 6,12,18.",
        group=HIDDEN,
        metavar="LAYERS",
    )  # None: only the states that hidden targets consist of
    dtype: Literal["float16", "float32", "int8"] = option(
        "float16", help="Data type of stored states; int8 has one scale per position.", group=HIDDEN
    )
    every: int = option(1, help="Store hidden states at every N-th position only.", group=HIDDEN, minimum=1)

    def __post_init__(self) -> None:
        named = self.layers not in (None, "last", "all")
        if named and not all(word.strip().isdecimal() for word in str(self.layers).split(",")):
            raise ConfigError(f"`hidden_states` {self.layers}: expected last, all, or layers such as 6,12,18.")
        check_ranges(self, self.PREFIX)

    def has_inner_layers(self, last: int) -> bool:
        """Whether states of layers before the last are stored."""
        named = {word.strip() for word in str(self.layers).split(",")}
        return self.layers is not None and named not in ({"last"}, {str(last)})

    def spec(self, teacher: Layered) -> cf.HiddenSpec:
        """Raises: ConfigError for layers that this teacher does not have; ModelError if it gives no states."""
        import cache_format as cf

        last, width = teacher.layers()
        if self.layers == "last":
            layers = [last]
        elif self.layers == "all":
            layers = list(range(1, last + 1))
        else:
            layers = sorted({int(word) for word in str(self.layers).split(",")})
        if layers[-1] > last:
            raise ConfigError(
                f"`hidden_states` {self.layers}: this teacher has layers 0 (the output of the embeddings) to {last}. "
                "Choose among them."
            )
        return cf.HiddenSpec(layers=tuple(layers), teacher_layers=last, width=width, dtype=self.dtype, every=self.every)
