"""`cache-teacher --generate` on tiny teachers, in this process, and what it says against the teacher alone.

summary = generate(teacher_dir, data, tmp / "cache", answers_per_prompt=3)    # keywords of GenerationConfig
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import cache_format as cf
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.progress import GenerationSummary
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig

K = 16
OF_CACHE = {
    "targets",
    "running",
    "device",
    "dtype",
    "batch_size",
    "rows_per_shard",
    "overwrite",
    "tokenizer",
    "encoding",
    "workers",
}
OF_DATA = {
    "seq_len",
    "sample_by",
    "keep_columns",
    "text_column",
    "max_documents",
    "chat_template_kwargs",
    "template_date",
}


def generate(teacher: Path, data: Path, output: Path, **options: Any) -> GenerationSummary:
    """Answers of up to 24 tokens, 16 exact entries."""
    callbacks = {name: options.pop(name) for name in list(options) if name.startswith("on_")}
    of_cache = {"targets": TargetRule(top_k=K), "rows_per_shard": 16, "device": "cpu"}
    of_cache |= {name: options.pop(name) for name in OF_CACHE & set(options)}
    of_data = {"seq_len": 256} | {name: options.pop(name) for name in OF_DATA & set(options)}
    config = CacheTeacherConfig(
        teacher=str(teacher),
        data=DataConfig(data=str(data), **of_data),
        output=str(output),
        generation=GenerationConfig(**{"max_new_tokens": 24, **options}),
        **of_cache,
    )
    return generate_cache(config, **callbacks)


def load(teacher: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype).eval()


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, input_ids: np.ndarray, vocab: int, temperature: float = 1.0) -> np.ndarray:
    """[T, V] float64, by one plain forward pass over one text alone."""
    logits = model(input_ids=torch.from_numpy(np.asarray(input_ids, np.int64))[None], use_cache=False).logits
    return (logits[0, :, :vocab].double() / temperature).log_softmax(dim=1).numpy()


def truncated_distribution(logits: np.ndarray, temperature: float, top_p: float, most: int) -> np.ndarray:
    """[V] fp64, one token at a time: the likeliest first, until there are `most`, or their mass reaches top_p."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")[: most or len(p)]
    p = p / p[order].sum()
    kept, mass = np.zeros(len(p)), 0.0
    for token in order:
        if mass >= top_p:
            break
        kept[token] = p[token]
        mass += p[token]
    return kept / kept.sum()


def answers_of(path: Path) -> list[dict[str, Any]]:
    return list(cf.open_cache(path).answers())


def token_ids(path: Path) -> dict[tuple[int, int], list[int]]:
    """(document, answer) -> tokens of the answer."""
    cache = cf.open_cache(path)
    return {
        (line["document"], line["answer"]): row.input_ids[line["prompt_tokens"] :].tolist()
        for line, row in zip(answers_of(path), cache.iter_rows(), strict=True)
    }


def write_predicates(path: Path) -> Path:
    """Functions for --gen-keep-if, good and bad, of prompts that have a `number`."""
    path.write_text(
        "def odd(example, answer):\n"
        "    return (example['number'] + answer.index) % 2 == 1\n"
        "def none(example, answer):\n"
        "    return False\n"
        "def breaks(example, answer):\n"
        "    return example['number'] < 5 or 1 / 0 > 0\n"
        "def forgets(example, answer):\n"
        "    example['number'] % 2 == 1\n"
        "def lonely(example):\n"
        "    return True\n"
        "def told(example, answer):\n"
        "    assert set(example) == {'prompt', 'completion', 'number'}\n"
        "    assert answer.stop_reason in ('eos', 'length') and answer.mean_logprob < 0\n"
        "    assert 1 <= len(answer.token_ids) <= 8 and isinstance(answer.text, str) and 0 <= answer.index < 3\n"
        "    return True\n"
        "number = 7\n"
    )
    return path
