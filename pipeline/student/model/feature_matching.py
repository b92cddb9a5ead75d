"""Feature distillation: the student's hidden states are drawn to the teacher's, layer by layer, through projections.

    γ · Σ_positions N · mean_pairs f(P_s·h_s, h_t) / number of counted positions

`--hidden-loss` is f (`pipeline.losses.feature_losses`), `--hidden-weight` γ, `--layer-map` the pairs, and N the
`--hidden-every` of the cache, so that the sum is what it would be with states at every position. Where the widths
differ, P_s is a matrix that is learned with the student; where they are the same there is none.

Positions are the counted ones. Those of a cache that was made with --all-positions are all of them, prompts and what a
masked model sees too, and N has another factor: the share of the cache's positions that count. The sum divided by the
counted positions of a step is then, on average, the mean over all. (Not by the number of positions of the step itself:
one factor for every position keeps the loss one sum, whose scale micro-batches, processes and rows share.)

The projections are a submodule of the student while it is trained: whatever wraps the student (DDP, autocast) wraps
them, and its optimizer steps them. In no state dict of the student do they appear: a checkpoint is a plain transformers
directory, with `projections.safetensors` in it to be resumed from, and so is the trained student.

Layers are numbered as transformers does: 0 is the embeddings' output, i that of layer i, the last one what the head is
applied to. States come with the rows of a batch and go with them.

Shapes: B rows of T positions, n positions that have states, D_s and D_t the widths.
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
from pipeline.losses import IGNORE_INDEX
from pipeline.losses.feature_losses import FEATURE_LOSSES, FeatureLoss, feature_losses
from pipeline.models.head import Head

PROJECTIONS = "projections.safetensors"
MODULE = "distill_features"  # the student's attribute while it is trained

Pair = tuple[int, int]  # student's layer, teacher's layer


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """What is asked for, checked against the cache; `pairs` says what it means for a given student."""

    loss: FeatureLoss
    weight: float
    layer_map: str
    spec: cf.HiddenSpec
    everywhere: bool = False  # at all positions, not the counted ones

    def __post_init__(self) -> None:
        if self.loss not in FEATURE_LOSSES:
            raise ConfigError(f"--hidden-loss {self.loss}: expected one of {', '.join(FEATURE_LOSSES)}.")
        if not 0.0 < self.weight < math.inf:
            raise ConfigError(f"--hidden-weight {self.weight}: expected a positive number.")
        if self.layer_map == "last" and self.spec.teacher_layers not in self.spec.layers:
            raise self._not_stored(self.spec.teacher_layers)
        for _, teacher in self._given or ():
            if teacher not in self.spec.layers:
                raise self._not_stored(teacher)

    @classmethod
    def for_cache(
        cls, cache: cf.Cache, *, loss: str | None, weight: float | None, layer_map: str | None
    ) -> FeatureRecipe | None:
        """None if no `loss` is asked for. Raises: ConfigError for what this cache cannot serve."""
        if loss is None:
            if weight is not None or layer_map is not None:
                raise ConfigError(
                    "--hidden-weight and --layer-map belong to --hidden-loss: expected cosine, mse or normalized-mse."
                )
            return None
        spec = cache.metadata.hidden
        if spec is None or not spec.of_layers:
            raise ConfigError(
                f"--hidden-loss {loss}: {cache.path} holds no hidden states. Cache the text with --hidden-states last "
                "(or all, or some layers)."
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
        """The factor of a position, for so many counted ones among so many."""
        return counted / tokens if self.everywhere and tokens else 1.0

    @property
    def teacher_layers(self) -> list[int]:
        """Whose states a student may be drawn to; for `uniform`, how many of them depends on the student."""
        if self.layer_map == "last":
            return [self.spec.teacher_layers]
        return sorted({teacher for _, teacher in self._given}) if self._given else list(self.spec.layers)

    def serves(self, cache: cf.Cache) -> bool:
        """Whether another cache has the same states, so that a student can be measured on it."""
        other, ours = cache.metadata.hidden, self.spec
        if other is None or not set(ours.layers) <= set(other.layers) or states_everywhere(cache) != self.everywhere:
            return False
        return (other.teacher_layers, other.width, other.every) == (ours.teacher_layers, ours.width, ours.every)

    def pairs(self, student_layers: int) -> tuple[Pair, ...]:
        """Which of the student's layers 0 … L_s is drawn to which of the teacher's.

        uniform: each stored layer of the teacher to the student's layer at the same share of its depth; where several
        share one, that which lies nearest.

        Raises: ConfigError for layers that the student does not have.
        """
        teacher_layers = self.spec.teacher_layers
        if self._given is not None:
            if (bad := max(student for student, _ in self._given)) > student_layers:
                raise ConfigError(
                    f"--layer-map {self.layer_map}: the student has layers 0 (the embeddings' output) to "
                    f"{student_layers}, not {bad}. Choose among them."
                )
            return self._given
        if self.layer_map == "last":
            return ((student_layers, teacher_layers),)
        best: dict[int, tuple[float, int]] = {}
        for layer in self.spec.layers:
            depth = layer * student_layers / teacher_layers
            student = min(max(math.floor(depth + 0.5), min(layer, 1)), student_layers)
            best[student] = min(best.get(student, (math.inf, 0)), (abs(depth - student), layer))
        return tuple((student, layer) for student, (_, layer) in sorted(best.items()))

    @property
    def _given(self) -> tuple[Pair, ...] | None:
        if self.layer_map in ("uniform", "last"):
            return None
        pairs = []
        for word in self.layer_map.split(","):
            numbers = word.strip().split(":")
            if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
                raise ConfigError(
                    f"--layer-map {self.layer_map}: found {word.strip()!r}, expected uniform, last, or pairs "
                    "STUDENT:TEACHER as in 3:6,6:12."
                )
            pair = int(numbers[0]), int(numbers[1])
            if pair in pairs:
                raise ConfigError(
                    f"--layer-map {self.layer_map}: found {word.strip()} twice, expected each pair once. Leave one out."
                )
            pairs.append(pair)
        return tuple(pairs)

    def _not_stored(self, layer: int) -> ConfigError:
        stored = ", ".join(map(str, self.spec.layers))
        return ConfigError(
            f"--layer-map {self.layer_map}: the cache has states of layers {stored} of {self.spec.teacher_layers}, not "
            f"of {layer}. Choose among them, or cache the text with more --hidden-states."
        )


def states_everywhere(cache: cf.Cache) -> bool:
    """Whether it was made with --all-positions."""
    return cache.metadata.targets.get("positions") == "all"


class Features(nn.Module):
    """The loss, and the projections that are learned with it.

    Args:
        widths: D_s, D_t.
        every: N, of the cache that is trained on.
        everywhere: at all positions that have states, not only at those that count.
        shares: a further factor of the sums in training, in evaluation: `FeatureRecipe.share`.
        seed: of the projections' first values.
    """

    def __init__(
        self,
        loss: FeatureLoss,
        weight: float,
        pairs: tuple[Pair, ...],
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
                self.maps[_name(pair)] = nn.Parameter(start)

    @classmethod
    def of(cls, recipe: FeatureRecipe, head: Head, seed: int, shares: tuple[float, float] = (1.0, 1.0)) -> Features:
        """For the student of `head`. Raises: ConfigError, ModelError if it has not the layers or does not give them."""
        last, width = head.layers()
        widths = width, recipe.spec.width
        factors = {"every": recipe.spec.every, "everywhere": recipe.everywhere, "shares": shares}
        return cls(recipe.loss, recipe.weight, recipe.pairs(last), widths, seed=seed, **factors)

    @property
    def student_layers(self) -> list[int]:
        return sorted({student for student, _ in self.pairs})

    def are_in(self, batch: dict[str, Tensor]) -> bool:
        """Whether a batch has the teacher's states of every layer."""
        return all(f"hidden_{teacher}" in batch for _, teacher in self.pairs)

    def forward(self, states: dict[int, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """[B] sums over the counted positions of each row that have states; with `everywhere` over all that have, of
        rows with something that counts: the others only fill up a batch.

        Args:
            states: layer -> [B, T, D_s] of the student.
            batch: collated, with the teacher's states.
        """
        labels = batch["labels"]
        index = batch["hidden_index"]
        counts = labels != IGNORE_INDEX
        if self.everywhere:
            counts = counts.any(dim=1, keepdim=True).expand_as(counts)
        counts = counts.flatten()[index]
        index = index[counts]
        total = None
        with torch.autocast(labels.device.type, enabled=False):
            for pair in self.pairs:
                student, teacher = pair
                mine, theirs = states[student].flatten(0, 1)[index], batch[f"hidden_{teacher}"][counts]
                theirs = theirs.to(torch.promote_types(mine.dtype, torch.float32))
                if (scale := batch.get(f"hidden_{teacher}_scale")) is not None:
                    theirs = theirs * scale[counts][:, None]
                if len(self.maps):
                    # Of no position too: data-parallel training waits for a gradient of every projection.
                    projection = self.maps[_name(pair)]
                    mine = mine.to(torch.promote_types(mine.dtype, projection.dtype)) @ projection.T.to(theirs.dtype)
                found = feature_losses(self.loss, mine, theirs)
                total = found if total is None else total + found
        assert total is not None
        rows = torch.zeros(len(labels), dtype=total.dtype, device=total.device)
        rows = rows.index_add(0, index // labels.shape[1], total)
        return rows * (self.every * self.shares[0 if self.training else 1] / len(self.pairs))

    def attach(self, model: PreTrainedModel) -> None:
        """Makes the projections part of `model` for training: `detach` undoes it."""
        model.add_module(MODULE, self)
        self._hook = model.register_state_dict_post_hook(_without_projections)

    def detach(self, model: PreTrainedModel) -> None:
        self._hook.remove()
        delattr(model, MODULE)

    def save(self, folder: str | Path) -> None:
        """Nothing where there are no projections."""
        if len(self.maps):
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file({name: each.detach().cpu().contiguous() for name, each in self.maps.items()}, _file(folder))

    def load(self, folder: str | Path) -> None:
        """Raises: ConfigError if they are not those of this run."""
        if not len(self.maps):
            return
        try:
            found = load_file(_file(folder))
        except OSError as error:
            raise ConfigError(
                f"{_file(folder)}: cannot be read ({error}), so training cannot go on from there. Start again with "
                "--overwrite."
            ) from error
        with torch.no_grad():
            for name, each in self.maps.items():
                each.copy_(found[name])


def _without_projections(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{MODULE}.")]:
        del state[name]


def _name(pair: Pair) -> str:
    return f"{pair[0]}-{pair[1]}"


def _file(folder: str | Path) -> Path:
    return Path(folder) / PROJECTIONS
