"""One position of a real teacher as bar charts in text: the pictures of docs/choosing.md.

    text ─▶ teacher ─▶ distribution of the next token ─▶ hard and soft targets, stored targets, temperatures

    python -m benchmarks.position                           print the pictures
    python -m benchmarks.position --page docs/choosing.md   replace the pictures in a page

Only the bars are computed here. The teacher's head, the selection of entries (with the random numbers of this position
in row 0 of a cache) and the codebooks are those of stage one. A picture is a ```text block that begins with its title.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.measure import Settings
from benchmarks.teacher import open_teacher
from cache_format import default_codebooks
from pipeline.models.head import open_head
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import draws, sparse_targets
from pipeline.terminal.tables import bar

TEXT, LABEL = "We crossed the river on a narrow wooden", " plank"
KD_WEIGHT = 0.9  # default of train-student
SHOWN = 6  # number of most likely tokens in a picture
WIDTH = 16  # characters of the bar for probability 1
TOP_K = 64
TEMPERATURES = (1.0, 2.0, 4.0)
RULES = {
    "top-k 64": TargetRule(top_k=TOP_K),
    "threshold 1/20": TargetRule(kind="threshold", tail_threshold=1 / 20),
    "random 50": TargetRule(kind="random", draws=50),
}


@dataclass(frozen=True, eq=False)
class Position:
    """A teacher's distribution of the next token after a text."""

    logits: Tensor  # [V] float32
    label: int
    name: Callable[[int], str]  # token id -> its text
    index: int  # position in the row

    def probs(self, temperature: float = 1.0) -> np.ndarray:
        """[V] float64"""
        return torch.softmax(self.logits.double() / temperature, dim=0).numpy()


@dataclass(frozen=True, eq=False)
class Stored:
    """The position as a cache stores it: probabilities of exact entries and weights of sampled entries, by token id."""

    exact: dict[int, float]
    sampled: dict[int, float]
    tail_mass: float


@torch.inference_mode()
def look(directory: Path, text: str = TEXT, label: str = LABEL) -> Position:
    """The teacher at the last token of `text`, whose true continuation is `label`."""
    model, tokenizer = open_teacher(directory)
    head = open_head(model, real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    states = head.hidden_states(torch.tensor([ids]), torch.arange(len(ids))[None])
    logits = head.logits(states[0, -1:])[0].float()
    following = tokenizer(label, add_special_tokens=False)["input_ids"][0]

    def name(token: int) -> str:
        word = tokenizer.decode([token])
        return word[1:] if word[:1] == " " and word.strip() else f"…{word!r}".replace("'", "")

    return Position(logits, following, name, len(ids) - 1)


def stored(position: Position, rule: TargetRule) -> Stored:
    """The position as a cache stores it, rounded to the values of its codebooks."""
    random = draws(rule, np.zeros(1, np.int64), np.array([position.index]))
    found = sparse_targets(position.logits[None], rule, random)
    ids = found.ids[0][found.ids[0] >= 0].tolist()
    codebook = rule.codebook()
    weights = np.exp(codebook.decode(codebook.encode(found.logprobs[0][found.ids[0] >= 0].numpy()))).tolist()
    tail_codebook = default_codebooks(len(position.logits))["residual_logprob"]
    tail_mass = float(np.exp(tail_codebook.decode(tail_codebook.encode(found.residual_logprob.numpy()))[0]))
    pairs, exact = list(zip(ids, weights, strict=True)), int(found.exact_counts)
    return Stored(dict(pairs[:exact]), dict(pairs[exact:]), tail_mass)


def pictures(position: Position) -> list[str]:
    """The pictures of the page, each beginning with its title."""
    return [hard_and_soft(position), kinds(position), temperatures(position)]


def hard_and_soft(position: Position) -> str:
    probs = position.probs()
    label = np.eye(1, len(probs), position.label)[0]
    targets = (label, probs, KD_WEIGHT * probs + (1 - KD_WEIGHT) * label)
    shown = most_likely(probs)
    rows = [[position.name(i), *(column(float(p[i])) for p in targets)] for i in shown]
    rest = (column(max(0.0, float(1 - p[shown].sum()))) for p in targets)
    rows.append([f"{len(probs) - len(shown):,} others", *rest])
    heads = ["", "hard: the text", "soft: the teacher", f"both: α = {KD_WEIGHT:g}"]
    return "\n".join(["Hard and soft targets", *table(heads, rows)])


def temperatures(position: Position) -> str:
    probs = {t: position.probs(t) for t in TEMPERATURES}
    shown = most_likely(probs[1.0])
    rows = [[position.name(i), *(column(float(p[i])) for p in probs.values())] for i in shown]
    rows.append(["all others", *(column(float(1 - p[shown].sum())) for p in probs.values())])
    held = [number(float(np.sort(p)[::-1][:TOP_K].sum())) for p in probs.values()]
    rows.append([f"{TOP_K} most likely", *held])
    rows.append(["entropy", *(f"{entropy(p):.2f} nats" for p in probs.values())])
    rows.append(["uniform", f"{math.log(len(position.logits)):.2f} nats"])
    return "\n".join(["Temperature", *table(["", *(f"T = {t:g}" for t in TEMPERATURES)], rows)])


def kinds(position: Position) -> str:
    probs = position.probs()
    found = {name: stored(position, rule) for name, rule in RULES.items()}
    shown = {*most_likely(probs), *found["threshold 1/20"].sampled}
    rows = [
        [position.name(i), number(float(probs[i])), *(cell(kind, i) for kind in found.values())]
        for i in sorted(shown, key=lambda i: -probs[i])
    ]
    rows.append(["other entries", "", *(count(kind, shown) for kind in found.values())])
    rows.append(["tail mass", "", *("" if kind.sampled else number(kind.tail_mass) for kind in found.values())])
    sums = [sum([*k.exact.values(), *k.sampled.values()]) + (0.0 if k.sampled else k.tail_mass) for k in found.values()]
    rows.append(["sum", number(1.0), *map(number, sums)])
    rows.append(["entries", f"{len(probs):,}", *(count(kind) for kind in found.values())])
    return "\n".join(["What is stored: █ exact, ▒ sampled", *table(["", "teacher", *found], rows)])


def count(kind: Stored, excluded: Collection[int] = ()) -> str:
    """Number of exact and sampled entries, without the excluded tokens."""
    groups = {"exact": kind.exact, "sampled": kind.sampled}
    counts = {name: sum(token not in excluded for token in entries) for name, entries in groups.items()}
    return " + ".join(f"{n} {name}" for name, n in counts.items() if n)


def most_likely(probs: np.ndarray) -> list[int]:
    return [int(i) for i in np.argsort(-probs, kind="stable")[:SHOWN]]


def entropy(probs: np.ndarray) -> float:
    """nats"""
    return float(-(probs * np.log(np.where(probs > 0, probs, 1.0))).sum())


def cell(kind: Stored, token: int) -> str:
    if token in kind.exact:
        return column(kind.exact[token])
    return column(kind.sampled[token], sampled=True) if token in kind.sampled else ""


def column(value: float, *, sampled: bool = False) -> str:
    """A number and its bar."""
    length = "▒" * math.ceil(value * WIDTH - 0.5) if sampled else bar(value, WIDTH)
    return f"{number(value)} {length}".rstrip()


def number(value: float) -> str:
    if value in (0.0, 1.0):
        return f"{value:.0f}"
    return "<.001" if value < 0.0005 else f"{value:.3f}".removeprefix("0")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in [heads, *rows] if i < len(row)) for i in range(len(heads))]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=False)).rstrip()
        for row in [heads, *rows]
    ]


def replace_pictures(page: str, blocks: Sequence[str]) -> str:
    """The page with its ```text blocks of the same titles replaced. Raises: click.ClickException if one is missing."""
    for block in blocks:
        title = block.splitlines()[0]
        old = re.findall(rf"^```text\n({re.escape(title)}\n.*?)\n```$", page, flags=re.MULTILINE | re.DOTALL)
        if len(old) != 1:
            raise click.ClickException(f"found {len(old)} ```text blocks that begin with {title!r}, expected 1")
        page = page.replace(old[0], block)
    return page


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), default=Settings.teacher, show_default=True)
@click.option("--text", default=TEXT, show_default=True, help="Text before the position.")
@click.option("--label", default=LABEL, show_default=True, help="Continuation; its first token is the label.")
@click.option("--page", type=click.Path(path_type=Path, exists=True), help="Replace the pictures in this file.")
def main(teacher: Path, text: str, label: str, page: Path | None) -> None:
    """Draw a teacher's distribution after a text, and how caches store it."""
    logging.disable_progress_bar()
    blocks = pictures(look(teacher, text, label))
    if page is None:
        click.echo("\n\n".join(blocks))
    else:
        page.write_text(replace_pictures(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.position")
