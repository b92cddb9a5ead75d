"""Every command and every Python block of the pages in docs/ runs, in order, where the files that they name are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pages import ROOT, commands, linked_files, play, sections, text
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache
from tiny import conversations, english, tiny_llama, tiny_tokenizer, write_jsonl
from tiny_masked import tiny_masked

RECIPES = "docs/recipes.md"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))


def models_and_texts(root: Path) -> None:
    """A teacher, students, one of them with another tokenizer, some chats and others, prose."""
    tiny_llama(root / "models/teacher", tiny_tokenizer(), layers=2, hidden=32)
    tiny_llama(root / "models/student", tiny_tokenizer(), layers=1, hidden=16, seed=1)
    tiny_llama(root / "models/foreign", tiny_tokenizer(350, seed=3), layers=1, hidden=16)
    (root / "data/book.txt").write_text(english(40), encoding="utf-8")
    for name, count in (("chats", 20), ("heldout", 8)):
        write_jsonl(root / f"data/{name}.jsonl", conversations(count, seed=count))


def causal_models(root: Path) -> None:
    """And the caches of both; of one a list of likely tokens too."""
    models_and_texts(root)
    for name in ("chats", "heldout"):
        build_cache(root / "caches" / name, root / "models/teacher", root / f"data/{name}.jsonl", targets=TargetRule())
    build_cache(root / "caches/lists", root / "models/teacher", root / "data/chats.jsonl")


def masked_models(root: Path) -> None:
    tiny_masked(root / "models/bert", "bert")
    tiny_masked(root / "models/small-bert", "bert", layers=1, hidden=16, seed=1)
    (root / "data/book.txt").write_text(english(40), encoding="utf-8")
    (root / "data/heldout.txt").write_text(english(8, seed=1), encoding="utf-8")


def questions(root: Path) -> None:
    causal_models(root)
    write_questions(root)


def write_questions(root: Path) -> None:
    write_jsonl(root / "data/questions.jsonl", [{"prompt": record["messages"][-2:-1]} for record in conversations(12)])
    sums = [{"prompt": f"{i % 10} + 0 =", "solution": str(i % 10)} for i in range(20)]
    write_jsonl(root / "data/sums.jsonl", sums)


def everything(root: Path) -> None:
    """Models of both kinds, texts, questions, files of settings; and a held-out cache."""
    models_and_texts(root)
    masked_models(root)
    write_questions(root)
    build_cache(root / "caches/heldout", root / "models/teacher", root / "data/heldout.jsonl", targets=TargetRule())
    (root / "data/config.json").write_bytes((root / "models/student/config.json").read_bytes())
    (root / "data/wsd.json").write_text(json.dumps({"lr_scheduler_kwargs": {"num_decay_steps": 1}}))


SETTINGS: dict[str, Callable[[Path], None]] = {
    "docs/choosing.md": everything,
    "docs/divergences.md": causal_models,
    "docs/features.md": causal_models,
    "docs/full.md": causal_models,
    "docs/generation.md": questions,
    "docs/masked.md": masked_models,
    RECIPES: everything,
    "docs/scaling.md": causal_models,
    "docs/stopping.md": causal_models,
    "docs/students.md": causal_models,
    "docs/training-data.md": causal_models,
}


INDEPENDENT = sections(RECIPES)  # each with a cache of its own, and seconds of commands


def page_runs() -> list[object]:
    """In `make test-slow`; the README is run by test_readme.py."""
    pages = [page for page in [*PAGES, *INDEPENDENT] if commands(page) and page != RECIPES]
    return [pytest.param(page, marks=pytest.mark.slow) for page in pages]


@pytest.mark.parametrize("page", page_runs())
def test_every_command_and_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("models", "data", "caches"):
        (tmp_path / folder).mkdir()
    SETTINGS[page.partition("#")[0]](tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert play(page) == commands(page) and {words[0] for words in commands(page)} == {"distill"}


def test_the_sections_of_the_recipes_are_all_of_them() -> None:
    assert sum(map(commands, INDEPENDENT), []) == commands(RECIPES)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page: str) -> None:
    assert [name for name in set(linked_files(page)) if not (ROOT / name).exists()] == []
    assert "@@" not in text(page)


def test_every_page_is_found_from_the_readme() -> None:
    assert set(PAGES) <= set(linked_files("README.md"))


def test_every_page_is_in_the_list_of_pages() -> None:
    assert set(PAGES) - {"docs/README.md"} <= set(linked_files("docs/README.md"))
