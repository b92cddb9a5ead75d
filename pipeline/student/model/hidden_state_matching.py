"""Hidden-state distillation: match the student's hidden states with the teacher's, layer by layer.

    γ · Σ_positions N · mean_pairs f(P·h_student, h_teacher) / loss tokens

f is `hidden_loss` (pipeline.losses.feature_losses), γ `hidden_weight`, the pairs of layers `layer_map`, and N the
`hidden_every` of the cache, so that the sum estimates the sum over all positions. P is a learned [D_t, D_s] matrix, or
the identity where the widths are equal.

Layers are numbered as in transformers: 0 is the output of the embeddings, i the output of layer i, and the last one is
the input of the head. Shapes: B rows, T positions, n positions with stored states, D_s and D_t widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.losses.feature_losses import FEATURE_LOSSES, FeatureLoss, feature_losses
from pipeline.models.head import Head

PROJECTIONS_FILE = "projections.safetensors"
ATTRIBUTE = "distill_hidden_state_matching"  # of the student, while it is trained

LayerPair = tuple[int, int]  # student layer, teacher layer


@dataclass(frozen=True, kw_only=True)
class HiddenStateLoss:
    """Specification of the loss, checked against the cache; `pairs` resolves it for a student.

    Raises: ConfigError for values out of range, or for layers that the cache does not store.
    """

    loss: FeatureLoss
    weight: float  # γ
    layer_map: str
    spec: cf.HiddenSpec  # states in the cache
    everywhere: bool = False  # match at all positions, not only at loss tokens

    def __post_init__(self) -> None:
        if self.loss not in FEATURE_LOSSES:
            raise ConfigError(f"`hidden_loss` {self.loss}: expected one of {', '.join(FEATURE_LOSSES)}.")
        if not 0.0 < self.weight < math.inf:
            raise ConfigError(f"`hidden_weight` {self.weight}: expected a positive number.")
        if self.layer_map == "last" and self.spec.teacher_layers not in self.spec.layers:
            raise self._not_stored(self.spec.teacher_layers)
        for _, teacher in self._explicit_pairs or ():
            if teacher not in self.spec.layers:
                raise self._not_stored(teacher)

    @classmethod
    def for_cache(
        cls, cache: cf.Cache, *, loss: str | None, weight: float | None, layer_map: str | None
    ) -> HiddenStateLoss | None:
        """The loss on a cache's hidden states; None without `loss`.

        Raises: ConfigError if options are missing, or the cache does not have the states.
        """
        if loss is None:
            if weight is not None or layer_map is not None:
                option = f"`hidden_weight` {weight}" if weight is not None else f"`layer_map` {layer_map}"
                raise ConfigError(
                    f"{option}: found no `hidden_loss`, which it belongs to. Set it to {', '.join(FEATURE_LOSSES)}, "
                    "or leave both out."
                )
            return None
        spec = cache.metadata.hidden
        if spec is None or not spec.of_layers:
            raise ConfigError(
                f"`hidden_loss` {loss}: {cache.path} has no hidden states of layers. Cache the text with "
                "`hidden_states=last` (or all, or a list of layers)."
            )
        weight = 1.0 if weight is None else weight
        spec = replace(spec, layers=spec.of_layers)
        return cls(
            loss=loss,  # type: ignore[arg-type]
            weight=weight,
            layer_map="uniform" if layer_map is None else layer_map,
            spec=spec,
            everywhere=states_everywhere(cache),
        )

    def share(self, counted: float, tokens: float) -> float:
        """Factor of each position: loss tokens / tokens if states at all positions are matched, else 1.

        The sum divided by the loss tokens of a step is then on average the mean over all positions. A constant factor,
        rather than the ratio of each step, keeps the loss one sum over micro-batches, processes and rows.
        """
        return counted / tokens if self.everywhere and tokens else 1.0

    @property
    def teacher_layers(self) -> list[int]:
        """Teacher layers that the loss may read. With `uniform` the pairs of a student may use fewer."""
        if self.layer_map == "last":
            return [self.spec.teacher_layers]
        return sorted({teacher for _, teacher in self._explicit_pairs or ()}) or list(self.spec.layers)

    def serves(self, cache: cf.Cache) -> bool:
        """Whether this loss can be computed on another cache too: same layers, width, spacing and positions."""
        other, ours = cache.metadata.hidden, self.spec
        if other is None or not set(ours.layers) <= set(other.layers) or states_everywhere(cache) != self.everywhere:
            return False
        return (other.teacher_layers, other.width, other.every) == (ours.teacher_layers, ours.width, ours.every)

    def pairs(self, student_layers: int) -> tuple[LayerPair, ...]:
        """The (student, teacher) layers to match, for a student with layers 0 … `student_layers`.

        uniform: each stored teacher layer is paired with the student layer at the same relative depth; if several
        teacher layers fall on one student layer, the nearest is used.

        Raises: ConfigError for layers that the student does not have.
        """
        teacher_layers = self.spec.teacher_layers
        if (explicit := self._explicit_pairs) is not None:
            if (largest := max(student for student, _ in explicit)) > student_layers:
                raise ConfigError(
                    f"`layer_map` {self.layer_map}: the student has layers 0 (the output of the embeddings) to "
                    f"{student_layers}, not {largest}. Choose among them."
                )
            return explicit
        if self.layer_map == "last":
            return ((student_layers, teacher_layers),)
        nearest: dict[int, tuple[float, int]] = {}
        for layer in self.spec.layers:
            depth = layer * student_layers / teacher_layers
            student = min(max(math.floor(depth + 0.5), min(layer, 1)), student_layers)
            nearest[student] = min(nearest.get(student, (math.inf, 0)), (abs(depth - student), layer))
        return tuple((student, layer) for student, (_, layer) in sorted(nearest.items()))

    @property
    def _explicit_pairs(self) -> tuple[LayerPair, ...] | None:
        if self.layer_map in ("uniform", "last"):
            return None
        pairs: list[LayerPair] = []
        for item in self.layer_map.split(","):
            numbers = item.strip().split(":")
            if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
                raise ConfigError(
                    f"`layer_map` {self.layer_map}: found {item.strip()!r}, expected uniform, last, or pairs "
                    "STUDENT:TEACHER such as 3:6,6:12."
                )
            pair = int(numbers[0]), int(numbers[1])
            if pair in pairs:
                raise ConfigError(
                    f"`layer_map` {self.layer_map}: found {item.strip()} twice, expected each pair once. Remove one."
                )
            pairs.append(pair)
        return tuple(pairs)

    def _not_stored(self, layer: int) -> ConfigError:
        stored = ", ".join(map(str, self.spec.layers))
        return ConfigError(
            f"`layer_map` {self.layer_map}: found teacher layer {layer}, the cache has states of layers {stored} (of "
            f"{self.spec.teacher_layers}). Choose among them, or cache the text with more layers in `hidden_states`."
        )


def states_everywhere(cache: cf.Cache) -> bool:
    """Whether the cache has hidden states at all positions (option `all_positions`), not only at loss tokens."""
    return cache.metadata.targets.get("positions") == "all"


class HiddenStateMatching(nn.Module):
    """The loss as a module, with the projections that are learned together with the student.

    While a student is trained this is one of its submodules, so that its optimizer and its wrappers (DDP, autocast) see
    the projections. They never enter its state dict: checkpoints stay plain transformers directories, with the
    projections in a file next to the weights.

    Args:
        widths: D_s, D_t.
        every: N of the training cache.
        everywhere: match at all positions with states, not only at loss tokens.
        shares: `HiddenStateLoss.share` in training and in evaluation.
        seed: for the initial projections.
    """

    def __init__(
        self,
        loss: FeatureLoss,
        weight: float,
        pairs: tuple[LayerPair, ...],
        widths: tuple[int, int],
        *,
        every: int = 1,
        everywhere: bool = False,
        shares: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.loss, self.weight, self.pairs, self.every = loss, weight, pairs, every
        self.everywhere, self.shares = everywhere, shares
        self.maps = nn.ParameterDict()
        if widths[0] != widths[1]:
            generator = torch.Generator().manual_seed(seed)
            for pair in pairs:
                start = torch.randn(widths[1], widths[0], generator=generator) / math.sqrt(widths[0])
                self.maps[_map_name(pair)] = nn.Parameter(start)

    @classmethod
    def for_student(
        cls, spec: HiddenStateLoss, head: Head, seed: int, shares: tuple[float, float] = (1.0, 1.0)
    ) -> HiddenStateMatching:
        """The module for the student that `head` belongs to.

        Raises: ConfigError, ModelError if the student does not have the layers or does not return their states.
        """
        last, width = head.layers()
        return cls(
            spec.loss,
            spec.weight,
            spec.pairs(last),
            (width, spec.spec.width),
            every=spec.spec.every,
            everywhere=spec.everywhere,
            shares=shares,
            seed=seed,
        )

    @property
    def student_layers(self) -> list[int]:
        return sorted({student for student, _ in self.pairs})

    def are_in(self, batch: dict[str, Tensor]) -> bool:
        """Whether a batch has the teacher's states of every paired layer."""
        return all(f"hidden_{teacher}" in batch for _, teacher in self.pairs)

    def forward(self, states: dict[int, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """[B] loss sums, over the loss tokens with stored states of each row.

        With `everywhere`, over all positions with stored states; rows without any loss token (they only fill up a
        batch) contribute 0.

        Args:
            states: student layer -> [B, T, D_s].
            batch: a collated batch with the teacher's states.
        """
        labels = batch["labels"]
        selected = batch["hidden_loss_rows" if self.everywhere else "hidden_loss_tokens"]
        index = batch["hidden_index"][selected]
        total = None
        with torch.autocast(labels.device.type, enabled=False):
            for pair in self.pairs:
                student, teacher = pair
                mine = states[student].flatten(0, 1).index_select(0, index)
                theirs = batch[f"hidden_{teacher}"][selected]
                theirs = theirs.to(torch.promote_types(mine.dtype, torch.float32))
                if (scale := batch.get(f"hidden_{teacher}_scale")) is not None:
                    theirs = theirs * scale[selected][:, None]
                if len(self.maps):
                    # Also without any position: DDP waits for a gradient of every projection.
                    projection = self.maps[_map_name(pair)]
                    mine = mine.to(torch.promote_types(mine.dtype, projection.dtype)) @ projection.T.to(theirs.dtype)
                losses = feature_losses(self.loss, mine, theirs)
                total = losses if total is None else total + losses
        assert total is not None
        rows = torch.zeros(len(labels), dtype=total.dtype, device=total.device)
        rows = rows.index_add(0, index // labels.shape[1], total)
        return rows * (self.every * self.shares[0 if self.training else 1] / len(self.pairs))

    def attach(self, model: PreTrainedModel) -> None:
        """Makes this a submodule of `model`, outside its state dict; `detach` undoes it."""
        model.add_module(ATTRIBUTE, self)
        self._hook = model.register_state_dict_post_hook(_drop_projections)

    def detach(self, model: PreTrainedModel) -> None:
        self._hook.remove()
        delattr(model, ATTRIBUTE)

    def save(self, folder: str | Path) -> None:
        """Writes the projections, if there are any."""
        if len(self.maps):
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = Path(folder) / PROJECTIONS_FILE
            save_file({name: each.detach().cpu().contiguous() for name, each in self.maps.items()}, file)

    def load(self, folder: str | Path) -> None:
        """Reads the projections of a checkpoint, if there are any. Raises: ConfigError if the file is unreadable."""
        if not len(self.maps):
            return
        file = Path(folder) / PROJECTIONS_FILE
        try:
            loaded = load_file(file)
        except OSError as error:
            raise ConfigError(
                f"{file}: cannot be read ({error}), so training cannot continue from this checkpoint. Start again with "
                "`overwrite=True`."
            ) from error
        with torch.no_grad():
            for name, each in self.maps.items():
                each.copy_(loaded[name])


def _drop_projections(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{ATTRIBUTE}.")]:
        del state[name]


def _map_name(pair: LayerPair) -> str:
    return f"{pair[0]}-{pair[1]}"
