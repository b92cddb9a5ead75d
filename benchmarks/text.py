"""Real English prose and real code without a network: Python's own manual and its standard library.

Prose: the topics of `help()` (`pydoc_data.topics`), chapters of the language reference. Code: sources of the standard
library. Every Python installation has both, identical for the same Python version.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MODULES = (
    *("argparse", "ast", "datetime", "difflib", "doctest", "fractions", "heapq", "inspect", "ipaddress", "mailbox"),
    *("optparse", "pickle", "shutil", "statistics", "tarfile", "textwrap", "turtle", "typing", "zipfile"),
)
EOS = "<|endoftext|>"
DOCUMENT_CHARACTERS = 1200  # some 300 tokens


def prose(characters: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Documents of about `characters` characters, cut at blank lines."""
    for name in sorted(topics):
        yield from _documents(topics[name], characters)


def code() -> Iterator[str]:
    """Documents of Python source code."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        yield from _documents((library / f"{name}.py").read_text(encoding="utf-8"), DOCUMENT_CHARACTERS)


def token_rows(tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> np.ndarray:
    """int64 [rows, length]: windows of running text, alternating prose and code."""
    streams = [windows(tokenizer, list(documents), -(-rows // 2), length) for documents in (prose(), code())]
    return np.stack(streams, axis=1).reshape(-1, length)[:rows]


def windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], rows: int, length: int) -> np.ndarray:
    """int64 [rows, length]: consecutive windows of all documents."""
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= rows * length:
            break
        tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return np.resize(np.array(tokens, np.int64), (rows, length))  # repeats a text that is too short


def byte_pair_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


def _documents(text: str, characters: int) -> Iterator[str]:
    document = ""
    for paragraph in text.split("\n\n"):
        document += paragraph + "\n\n"
        if len(document) >= characters:
            yield document
            document = ""
    if document.strip():
        yield document
