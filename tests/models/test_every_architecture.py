"""All causal language models of transformers, tiny, through both stages: `make test-architectures`.

Each outcome is a line of benchmarks/work/architectures.jsonl, from which `python -m benchmarks.architectures` writes
the results and `make docs` the table of docs/architectures.md. Of several lines of an architecture the last counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architecture_sweep import LENGTHS, documents_of, try_architecture
from tiny_architectures import VARIANTS

# Outcomes that are no errors that a user can act on, and why.
KNOWN = {"reformer": "in training, transformers takes rows of one length only, and says so in the first step"}

OUTCOMES = Path(__file__).resolve().parents[2] / "benchmarks/work/architectures.jsonl"


@pytest.fixture(scope="module")
def documents(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    found = documents_of(tokenizer)
    assert [len(tokenizer(text)["input_ids"]) + 1 for text in found] == list(LENGTHS)
    return found


@pytest.mark.architectures
@pytest.mark.parametrize("name", [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])
def test_architecture(name: str, tmp_path: Path, documents: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    outcome = try_architecture(name, tmp_path, documents, tokenizer)
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    with OUTCOMES.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, **outcome}, ensure_ascii=False) + "\n")
    if "built" in outcome:
        pytest.skip(outcome["built"])
    if name in KNOWN:
        pytest.xfail(KNOWN[name])
    assert not [each for each in outcome.values() if each.startswith(("wrong", "fails"))], outcome
