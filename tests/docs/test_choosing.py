"""The tables and the picture of positions in docs/choosing.md and docs/recipes.md agree with the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import cache_format as cf
from pages import blocks, commands_of, tables
from pipeline.errors import ConfigError
from pipeline.losses import DIVERGENCES, TAIL_POLICIES
from pipeline.student.validation.loss_checks import loss_for_cache
from pipeline.teacher.targets.rules import TARGET_KINDS, TargetRule
from runs import build_cache

CHOOSING, RECIPES = "docs/choosing.md", "docs/recipes.md"


def test_every_case_has_its_commands() -> None:
    cases = [row[0] for row in tables(CHOOSING)[0][1:]]
    assert cases == [str(i + 1) for i in range(len(cases))] == list(commands_of(CHOOSING))[: len(cases)]


def accepted(cache: cf.Cache, **loss: object) -> str | None:
    """The tail policy that a loss is trained with on a cache; None if it is refused."""
    try:
        return loss_for_cache(cache, kd_weight=0.9, **loss).tail  # type: ignore[arg-type]
    except ConfigError:
        return None


@pytest.mark.long
def test_the_table_of_losses_and_targets_is_what_the_code_accepts(
    tmp_path: Path, teacher_dir: Path, text_file: Path
) -> None:
    (table,) = [each for each in tables(CHOOSING) if each[0][0] == "`--divergence`"]
    words = {row[0]: [re.findall(r"(\*\*)?`([^`]+)`", cell) for cell in row] for row in table}
    kinds = [[name for _, name in cell] for cell in words.pop("`--divergence`")[1:]]
    assert sorted(sum(kinds, [])) == sorted(TARGET_KINDS)
    (tempered,) = [words.pop(row) for row in list(words) if row.startswith("another T")]
    listed = [name for divergences, *_ in words.values() for _, name in divergences]
    assert sorted(listed) == sorted(DIVERGENCES)
    full = kinds.index(["hidden"]) + 1
    check_full(build_cache(tmp_path / "hidden", teacher_dir, text_file, targets=TargetRule(kind="hidden")))
    assert all(row[full] == "full" for row in table[1:])
    for column, names in enumerate(kinds, start=1):
        for kind in names if column != full else []:
            cache = cf.open_cache(build_cache(tmp_path / kind, teacher_dir, text_file, targets=TargetRule(kind=kind)))
            for divergences, *cells in words.values():
                for _, name in divergences:
                    tails = {tail for tail in TAIL_POLICIES if accepted(cache, divergence=name, tail=tail)}
                    assert tails == {tail for _, tail in cells[column - 1]}, (kind, name)
                    bold = [tail for mark, tail in cells[column - 1] if mark]
                    assert bold == [tail for tail in [accepted(cache, divergence=name)] if tail], (kind, name)
            tails = {tail for tail in TAIL_POLICIES if accepted(cache, temperature=2.0, tail=tail)}
            assert tails == {tail for _, tail in tempered[column]}, kind


def test_targets_that_may_lack_exact_entries_serve_only_their_sample(
    tmp_path: Path, teacher_dir: Path, text_file: Path
) -> None:
    headless = TargetRule(kind="threshold", top_k=0)
    cache = cf.open_cache(build_cache(tmp_path / "headless", teacher_dir, text_file, targets=headless))
    assert {tail for tail in TAIL_POLICIES if accepted(cache, tail=tail)} == {"sampled", "realized"}
    for name in DIVERGENCES:
        assert accepted(cache, divergence=name) == ("sampled" if name == "forward-kl" else None)


def test_comparing_entries_needs_two_of_them(tmp_path: Path, teacher_dir: Path, text_file: Path) -> None:
    one = cf.open_cache(build_cache(tmp_path / "one", teacher_dir, text_file, targets=TargetRule(top_k=1)))
    assert {name for name in DIVERGENCES if accepted(one, divergence=name) is None} == {"logit-mse", "pairwise"}


def check_full(path: Path) -> None:
    """Every divergence and temperature is accepted, and no tail policy."""
    cache = cf.open_cache(path)
    for name in DIVERGENCES:
        assert accepted(cache, divergence=name, temperature=2.0) and accepted(cache, divergence=name)
        assert not any(accepted(cache, divergence=name, tail=tail) for tail in TAIL_POLICIES)


def test_the_picture_of_positions_has_the_labels_of_a_row() -> None:
    (block,) = [each for each in blocks(CHOOSING, "text") if each.startswith("position t")]
    cells = [line[29:].split() for line in block.splitlines()]
    positions, tokens, causal, shown, masked = cells
    assert positions == [str(t) for t in range(5)] and len(tokens) == 5
    targets = cf.SparseTargets(*(np.zeros(n) for n in (5, 0, 0, 5, 5, 5)))  # labels do not depend on targets
    row = {"row": 0, "segment_lengths": np.array([5], np.int32), "targets": targets}
    everywhere = cf.CacheRow(input_ids=np.arange(5), loss_mask=np.ones(5, bool), **row)
    hidden = np.array([word == "[MASK]" for word in shown])
    input_ids = np.where(hidden, 99, np.arange(5))
    one = cf.CacheRow(input_ids=input_ids, loss_mask=hidden, labels=np.arange(5, dtype=np.int32), **row)
    assert hidden.sum() == 1 and [t for t, h in zip(tokens, hidden, strict=True) if not h] == [
        word for word in shown if word != "[MASK]"
    ]
    for found, said in ((everywhere, causal), (one, masked)):
        assert [tokens[i] if i >= 0 else "-" for i in found.label_ids] == said


def options(words: list[str]) -> set[tuple[str, str]]:
    """Each option with its value, or with an empty string."""
    values = [*words[1:], ""]
    return {(a, "" if b.startswith("--") else b) for a, b in zip(words, values, strict=True) if a.startswith("--")}


def recipe_tables() -> list[list[list[str]]]:
    return [table for table in tables(RECIPES) if table[0][0] == "recipe"]


def test_every_recipe_has_commands_with_its_options() -> None:
    of_recipe: dict[str, list[list[str]]] = {}
    for names, found in commands_of(RECIPES).items():
        for name in names.split(", "):
            of_recipe.setdefault(name, []).extend(found)
    rows = [row for table in recipe_tables() for row in table[1:]]
    assert len(rows) > 25 and {row[0] for row in rows} == set(of_recipe)
    for name, _, _, made_by, _ in rows:
        groups = [options(shlex.split(group)) for group in re.findall(r"`([^`]+)`", made_by)]
        given = [options(words) for words in of_recipe[name]]
        assert groups and all(any(group <= each for each in given) for group in groups), name


def test_every_recipe_names_its_source() -> None:
    for table in recipe_tables():
        for name, paper, *_ in table[1:]:
            links = re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/(\d{4}\.\d{5})\)", paper)
            assert all(shown == linked for shown, linked in links), name
            assert links or paper in ("this package", 'baseline of the same ("naive fix")') or "of the same" in paper
