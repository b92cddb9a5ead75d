"""Every command and Python block of the pages in docs/ runs, in order, in a directory with the files they name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from foreign_files import made_up_rows, nested, write_distillkit, write_llama_cpp, write_parquet
from pages import ROOT, anchors, blocks, commands, linked_anchors, linked_files, play, sections, text
from pipeline.commands import main
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache
from tiny import conversations, english, tiny_llama, tiny_tokenizer, write_jsonl
from tiny_masked import tiny_masked

RECIPES = "docs/recipes.md"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
(CHECKS,) = [code for code in blocks("docs/tutorials/reasoning-data.md", "python") if code.startswith("# checks.py")]


def models_and_texts(root: Path) -> None:
    """A teacher, two students of which one has another tokenizer, chats, and prose."""
    tiny_llama(root / "models/teacher", tiny_tokenizer(), layers=2, hidden=32)
    tiny_llama(root / "models/student", tiny_tokenizer(), layers=1, hidden=16, seed=1)
    tiny_llama(root / "models/foreign", tiny_tokenizer(350, seed=3), layers=1, hidden=16)
    (root / "data/book.txt").write_text(english(40), encoding="utf-8")
    for name, count in (("chats", 20), ("heldout", 8)):
        write_jsonl(root / f"data/{name}.jsonl", conversations(count, seed=count))


def causal_models(root: Path) -> None:
    """Also a training cache and a held-out cache of the chats, and a cache of top-k lists."""
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
    (root / "checks.py").write_text(CHECKS, encoding="utf-8")


def everything(root: Path) -> None:
    """Causal and masked models, texts, questions, configuration files, and a held-out cache."""
    models_and_texts(root)
    masked_models(root)
    write_questions(root)
    build_cache(root / "caches/heldout", root / "models/teacher", root / "data/heldout.jsonl", targets=TargetRule())
    (root / "data/config.json").write_bytes((root / "models/student/config.json").read_bytes())
    (root / "data/wsd.json").write_text(json.dumps({"lr_scheduler_kwargs": {"num_decay_steps": 1}}))


def models_and_config(root: Path) -> None:
    causal_models(root)
    (root / "data/config.json").write_bytes((root / "models/student/config.json").read_bytes())


def new_caches(root: Path) -> None:
    """As `causal_models`, for pages that write caches/chats, caches/lists or caches/heldout themselves."""
    models_and_texts(root)
    write_questions(root)


def files_of_other_tools(root: Path) -> None:
    models_and_texts(root)
    rows = made_up_rows(4)
    write_distillkit(root / "data/distillkit", rows)
    (root / "data/layout.yaml").write_bytes((root / "data/distillkit/compression_config.yaml").read_bytes())
    write_llama_cpp(root / "data/base.kld", rows)
    write_parquet(root / "data/rows.parquet", nested(rows, 8))
    content = [{"token": f"token_id:{i}", "logprob": -0.1, "top_logprobs": []} for i in (7, 8, 9)]
    content = [{**each, "top_logprobs": [{"token": each["token"], "logprob": -0.1}]} for each in content]
    response = {"choices": [{"logprobs": {"content": content}}]}
    write_jsonl(root / "data/responses.jsonl", [{"prompt_token_ids": [5, 6], **response}])
    write_jsonl(root / "data/batch_requests.jsonl", [{"custom_id": "1", "body": {"prompt": [5, 6]}}])
    write_jsonl(root / "data/batch_responses.jsonl", [{"custom_id": "1", "response": {"body": response}}])


def downloaded_models(root: Path) -> None:
    """What the tutorials download. They make their data themselves."""
    tiny_llama(root / "models/teacher", tiny_tokenizer(), layers=24, hidden=16)
    tiny_llama(root / "models/student", tiny_tokenizer(), layers=1, hidden=16, seed=1)


def two_domains(root: Path) -> None:
    """Two teachers and a student. The page makes its text itself."""
    tiny_llama(root / "models/code-teacher", tiny_tokenizer(), layers=2, hidden=32)
    tiny_llama(root / "models/chat-teacher", tiny_tokenizer(), layers=2, hidden=32, seed=2)
    tiny_llama(root / "models/student", tiny_tokenizer(), layers=1, hidden=16, seed=1)


def with_domains(root: Path) -> None:
    """As `causal_models`, and text with a column for its domain."""
    causal_models(root)
    lines = english(20).splitlines()
    rows = [{"text": text, "domain": ("web", "books")[i % 2]} for i, text in enumerate(lines)]
    write_jsonl(root / "data/labelled.jsonl", rows)


def a_cache(root: Path) -> None:
    models_and_texts(root)
    build_cache(root / "caches/train", root / "models/teacher", root / "data/chats.jsonl", targets=TargetRule())


SETTINGS: dict[str, Callable[[Path], None]] = {
    "docs/caches.md": causal_models,
    "docs/choosing.md": everything,
    "docs/configuration.md": causal_models,
    "docs/data.md": new_caches,
    "docs/divergences.md": causal_models,
    "docs/evaluation.md": with_domains,
    "docs/full-distributions.md": causal_models,
    "docs/generation.md": questions,
    "docs/getting-started.md": causal_models,
    "docs/hidden-states.md": causal_models,
    "docs/import.md": files_of_other_tools,
    "docs/masked.md": masked_models,
    "docs/on-policy.md": questions,
    "docs/other-tokenizers.md": causal_models,
    "docs/python.md": new_caches,
    RECIPES: everything,
    "docs/report.md": causal_models,
    "docs/scaling.md": causal_models,
    "docs/stopping.md": causal_models,
    "docs/students.md": models_and_config,
    "docs/targets.md": new_caches,
    "docs/teacher-prompts.md": models_and_texts,
    "docs/training-data.md": causal_models,
    "docs/troubleshooting.md": causal_models,
    "docs/tutorials/chat-data.md": downloaded_models,
    "docs/tutorials/draft-model.md": downloaded_models,
    "docs/tutorials/first-cache.md": downloaded_models,
    "docs/tutorials/many-machines.md": downloaded_models,
    "docs/tutorials/one-gpu.md": causal_models,
    "docs/tutorials/quantised-student.md": causal_models,
    "docs/tutorials/reading-caches.md": a_cache,
    "docs/tutorials/reasoning-data.md": models_and_texts,
    "docs/tutorials/several-teachers.md": two_domains,
}


INDEPENDENT = sections(RECIPES)  # each section makes its own cache, and takes seconds


def runnable(page: str) -> bool:
    return bool(commands(page) or blocks(page, "python"))


def page_runs() -> list[object]:
    """For `make test-slow`; test_readme.py runs the README."""
    pages = [page for page in [*PAGES, *INDEPENDENT] if runnable(page) and page != RECIPES]
    return [pytest.param(page, marks=pytest.mark.long) for page in pages]


@pytest.mark.parametrize("page", page_runs())
def test_every_command_and_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("models", "data", "caches"):
        (tmp_path / folder).mkdir()
    SETTINGS[page.partition("#")[0]](tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert play(page) == commands(page)


def test_the_sections_of_the_recipes_have_all_commands() -> None:
    assert sum(map(commands, INDEPENDENT), []) == commands(RECIPES)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page: str) -> None:
    assert [name for name in set(linked_files(page)) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_heading_it_links_to_exists(page: str) -> None:
    assert [link for link in linked_anchors(page) if link[1] not in anchors(link[0])] == []


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_commands_need_no_module_of_the_checkout_and_extras_no_package_index(page: str) -> None:
    assert [word for words in commands(page) for word in words if word.startswith("benchmarks.")] == []
    assert re.findall(r"pip install '?distill\[", text(page)) == []


def test_the_index_lists_every_page() -> None:
    assert set(PAGES) - {"docs/README.md"} <= set(linked_files("docs/README.md"))
    assert "docs/README.md" in linked_files("README.md")


def test_every_option_in_the_pages_exists() -> None:
    """Also in prose and tables, which are not run."""
    context = click.Context(main)
    options = [option for name in main.list_commands(context) for option in main.get_command(context, name).params]
    known = {flag for option in options for flag in [*option.opts, *option.secondary_opts]}
    known |= {"--help", "--help-all", "--version"}
    others = {"--nproc-per-node", "--no-python", "--max-restarts"}  # torchrun
    others |= {"--array", "--gres", "--cpus-per-task", "--requeue"}  # Slurm
    others |= {"--count"}  # benchmarks
    others |= {"--max-logprobs", "--logprobs-mode", "--no-enable-prefix-caching"}  # vllm serve
    others |= {"--context-length", "--disable-radix-cache"}  # SGLang
    others |= {"--ctx-size", "--parallel", "--kl-divergence-base"}  # llama.cpp
    others |= {"--exclude", "--local-dir"}  # hf download
    others |= {"--constraint", "--no-deps"}  # pip
    for page in ["README.md", *PAGES]:
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text(page)))
        assert found - known - others == set(), page
