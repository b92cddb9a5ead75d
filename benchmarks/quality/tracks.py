"""The two tracks: amount of text, models, arms. Every setting that affects a number is here.

An **arm** is a training method: the targets that the student sees, and the tail policy of the loss. Distillation arms
learn from the teacher alone (kd_weight 1), the labels arm from the labels alone (kd_weight 0), because mixing the two
would hide part of the difference. All arms of a track share one learning rate, found by a small search on labels and
full; arms with n times the rows per step use √n times that rate, as is usual for Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import LlamaConfig

from pipeline.losses import TailPolicy
from pipeline.teacher.targets.rules import TargetRule

SEARCH_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str  # also in file names
    title: str
    source: Literal["labels", "full", "cache"] = "cache"
    rule: TargetRule | None = None  # targets of the cache
    tail: TailPolicy | None = None
    epochs: int = 1  # several epochs go over proportionally fewer rows, so that all arms see the same number of tokens
    resample: bool = False  # use a different stored sample in each epoch
    step_rows: int | None = None  # default: the track's
    share: float = 1.0  # of the text
    perturbation: float = 0.0  # relative change of the initial weights
    seeds: int | None = None  # default: the track's; fewer for side questions

    @property
    def is_reference(self) -> bool:
        """Whether other arms are compared with it: labels, or the full distribution."""
        return self.rule is None and not self.perturbation

    @property
    def regime(self) -> tuple[int, int | None, float]:
        """Epochs, rows per step and share of the text. An arm is compared with the references of the same regime."""
        return self.epochs, self.step_rows, self.share

    @property
    def is_usual(self) -> bool:
        """Whether it has the default regime of the track."""
        return self.regime == LABELS.regime


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with tied embeddings."""

    width: int
    layers: int
    heads: int

    def config(self, vocab_size: int, window: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=window,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )


@dataclass(frozen=True, kw_only=True)
class Track:
    number: int
    vocab_size: int | None  # tokens of the BPE trained here; None: the given teacher's own
    teacher: Shape | None
    teacher_epochs: int
    teacher_rate: float
    student: Shape
    train_tokens: int  # approximate
    held_out_tokens: int  # approximate, per domain
    window: int  # tokens per row
    batch_rows: int
    search_rates: tuple[float, ...]  # candidates for the learning rate, see `runs.chosen_rate`
    search_share: float  # share of the training tokens that the search uses
    seeds: int
    gradient_rows: int
    record_batch_rows: int  # in the caches; about 32,768 tokens, the default of `cache-teacher`
    shard_rows: int
    arms: tuple[Arm, ...]

    @property
    def name(self) -> str:
        return f"track{self.number}"

    @property
    def most_epochs(self) -> int:
        return max(arm.epochs for arm in self.arms)


def _slug(title: str) -> str:
    return title.replace(" ", "-").replace("/", "-").replace(",", "").replace("×", "x")


def arm(title: str, **parts: object) -> Arm:
    return Arm(name=_slug(title), title=title, **parts)  # type: ignore[arg-type]


def top_k(k: int, *tails: TailPolicy) -> list[Arm]:
    names = {"renormalise": "renormalised", "bucket": "bucket", "label": "tail to label"}
    rule = TargetRule(kind="top-k", top_k=k)
    return [arm(f"{names[tail]} top-{k}", rule=rule, tail=tail) for tail in tails]


def random(draws: int) -> Arm:
    return arm(f"random {draws} draws", rule=TargetRule(kind="random", draws=draws), tail="sampled")


def threshold(denominator: int, how: str = "", **parts: object) -> Arm:
    rule = TargetRule(kind="threshold", tail_threshold=1 / denominator)
    return arm(f"threshold 1/{denominator}{how}", rule=rule, tail="sampled", **parts)


LABELS, FULL = arm("labels", source="labels"), arm("full", source="full")
# A run that differs from `full` only by rounding: smaller differences between arms mean nothing.
FULL_AGAIN = arm("full, perturbed", source="full", perturbation=1e-6, seeds=1)


def several_epochs(epochs: int, denominator: int) -> list[Arm]:
    """The same sample in every epoch, a different one in every epoch, and all samples together."""
    one = TargetRule(kind="threshold", tail_threshold=1 / denominator)
    more = replace(one, samples=epochs)
    name = f"threshold 1/{denominator}"
    return [
        arm(f"labels ×{epochs}", source="labels", epochs=epochs),
        arm(f"full ×{epochs}", source="full", epochs=epochs),
        arm(f"{name} ×{epochs}, one sample", rule=one, tail="sampled", epochs=epochs),
        arm(f"{name} ×{epochs}, resample", rule=more, tail="sampled", epochs=epochs, resample=True),
        arm(f"{name} ×{epochs}, {epochs} samples together", rule=more, tail="sampled", epochs=epochs),
    ]


def trained_as(how: str, denominator: int, **regime: object) -> list[Arm]:
    """A threshold arm and its references in another regime."""
    return [
        arm(f"labels, {how}", source="labels", **regime),
        arm(f"full, {how}", source="full", **regime),
        threshold(denominator, f", {how}", **regime),
    ]


def planned(arms: Sequence[Arm], seeds: Sequence[int]) -> list[tuple[Arm, int]]:
    """All runs of these arms, seed by seed, so that tables fill evenly."""
    return [(arm, seed) for seed in seeds for arm in arms if arm.seeds is None or seed < arm.seeds]


TRACK_1 = Track(
    number=1,
    vocab_size=None,
    teacher=None,
    teacher_epochs=0,
    teacher_rate=0.0,
    student=Shape(width=128, layers=4, heads=4),
    train_tokens=600_000,
    held_out_tokens=8_192,
    window=256,
    batch_rows=4,
    search_rates=(1e-3, 2e-3, 4e-3),
    search_share=0.25,
    seeds=2,
    gradient_rows=8,
    record_batch_rows=128,
    shard_rows=1024,
    arms=(
        FULL,
        LABELS,
        *top_k(50, "renormalise", "bucket"),
        *top_k(16, "label"),
        random(50),
        *map(threshold, (8, 20, 50)),
        # More and smaller steps: does the noise of a sample need large steps to average out?
        *trained_as("1 row per step", 20, step_rows=1, seeds=1),
    ),
)

TRACK_2 = replace(
    TRACK_1,
    number=2,
    search_share=0.5,
    vocab_size=4096,
    teacher=Shape(width=192, layers=4, heads=6),
    teacher_epochs=2,
    teacher_rate=2e-3,
    student=Shape(width=64, layers=2, heads=4),
    train_tokens=3_200_000,
    held_out_tokens=32_768,
    batch_rows=16,
    search_rates=(2e-3, 4e-3, 8e-3, 16e-3),
    seeds=5,
    arms=(
        FULL,
        LABELS,
        FULL_AGAIN,
        *top_k(16, "renormalise", "bucket", "label"),
        *top_k(50, "renormalise", "bucket"),
        *top_k(64, "renormalise", "bucket"),
        *map(random, (13, 50)),
        *map(threshold, (4, 8, 13, 20, 50, 200)),
        *several_epochs(4, 8),
        *trained_as("4 rows per step", 20, step_rows=4, seeds=2),
        *trained_as("1/8 of the text, 4 rows per step", 20, step_rows=4, share=1 / 8),
    ),
)
TRACKS = {1: TRACK_1, 2: TRACK_2}


def quick(track: Track) -> Track:
    """The same track with tiny sizes, as a smoke test: seconds each, the numbers mean nothing."""
    return replace(
        track,
        vocab_size=track.vocab_size and 300,
        teacher=track.teacher and Shape(width=16, layers=1, heads=2),
        teacher_epochs=1,
        student=Shape(width=8, layers=1, heads=2),
        train_tokens=2048,
        held_out_tokens=128,
        window=32,
        batch_rows=4,
        search_rates=(1e-3, 1e-2),
        seeds=min(track.seeds, 2),
        gradient_rows=4,
        record_batch_rows=4,
        shard_rows=16,
    )
