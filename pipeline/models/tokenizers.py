"""When two tokenizers are the same, and the tokenizer of a cache: its fingerprint, its files, and loading it.

Soft targets are distributions over token ids, so teacher and student need the same **vocabulary**. They also need the
same **segmentation**: with other merges or another pre-tokenizer, the student would be used on token sequences that it
was never trained on. Special tokens and chat template may differ, as between a base model and its instruct version; the
cache holds tokens, so that is only a warning.

The embedding matrix of a model often has more rows than there are tokens (151,936 for 151,669), padded to a round
number that differs within a family. V is the number of tokens.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.models.loading import reason

# Files with settings that save_pretrained writes next to the vocabulary.
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# Case, accents, digits, spaces, code and other scripts, where the settings of slow tokenizers differ.
_PROBE = " The  Café cost 1,234.50€ in İstanbul,\n\tif x != y: 東京 is 10°C\n"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """sha256 (hex) of the canonical JSON of each component; the same after saving and loading.

    Components: vocabulary (token → id), segmentation (how text is split), special_tokens, chat_template. To compare two
    loaded tokenizers, use `check_same_tokenizer`: another version of the tokenizers library may serialise the same
    segmentation differently.
    """
    components = {
        "vocabulary": tokenizer.get_vocab(),
        "segmentation": _segmentation(tokenizer),
        "special_tokens": _special_tokens(tokenizer),
        "chat_template": tokenizer.chat_template,
    }
    return {name: _sha256_json(value) for name, value in components.items()}


def real_vocab_size(tokenizer: PreTrainedTokenizerBase, head_rows: int) -> int:
    """V: the number of rows of the vocabulary head that belong to a token, at most `head_rows`."""
    return min(head_rows, 1 + max(tokenizer.get_vocab().values()))


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """File name → contents, as written by `save_pretrained`."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def load_cache_tokenizer(cache: cf.Cache) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, from the files in the cache (checked against the manifest).

    Code in the cache is never run: `trust_remote_code` is about models that the user named.

    Raises: FormatError if it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, data in cache.tokenizer_files().items():
            file = Path(folder) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.get_vocab()  # not every loaded object has one
            return tokenizer
        except Exception as error:  # the parsers of several libraries, on untrusted files
            why = reason(error).replace(folder, "tokenizer/")
            if "trust_remote_code" in str(error):
                why = "it needs custom code, and code in a cache is never run"
            raise cf.FormatError(
                f"{cache.path}: its tokenizer cannot be loaded: {why}. Restore it from a copy, or cache the text "
                "again with a tokenizer that transformers supports."
            ) from error


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    *,
    vocab_size: int | None = None,
    role: str = "student",
) -> list[str]:
    """Check that vocabulary and segmentation are the same; return warnings about other differences.

    Args:
        vocab_size: ids from here on are not compared; default: the teacher's last token + 1.
        role: of the other model, as messages call it.

    Raises:
        cf.MismatchError: they differ.
    """
    size = 1 + max(teacher.get_vocab().values())
    size = min(size, vocab_size or size)
    _check_vocabulary(_by_id(teacher, size), _by_id(student, size), role)
    ours, theirs = _segmentation(teacher, size), _segmentation(student, size)
    differing = [part for part in sorted(ours | theirs) if ours.get(part) != theirs.get(part)]
    if differing:
        raise cf.MismatchError(
            f"the {role}'s tokenizer has the teacher's vocabulary but splits text differently: "
            f"{', '.join(differing)} differ, expected the same. Give the {role} the teacher's "
            f"tokenizer files, or choose a {role} of the teacher's family."
        )
    warnings = []
    if extra := [token for token, id_ in student.get_vocab().items() if id_ >= size]:
        warnings.append(
            f"the {role}'s tokenizer has {len(extra)} tokens beyond the teacher's {size:,}, such "
            f"as {min(extra)!r}: they are not trained."
        )
    ours, theirs = _special_tokens(teacher), _special_tokens(student)
    for name in sorted(ours | theirs):
        if ours.get(name) != theirs.get(name):
            warnings.append(
                f"{name} is {_token(theirs.get(name))} for the {role}, {_token(ours.get(name))} for the teacher."
            )
    if teacher.chat_template != student.chat_template:
        warnings.append(f"the {role}'s chat template differs from the teacher's.")
    return warnings


def _check_vocabulary(teacher: dict[int, str], student: dict[int, str], role: str) -> None:
    differing = [i for i in sorted(teacher | student) if teacher.get(i) != student.get(i)]
    if differing:
        shown = ", ".join(f"{i} is {student.get(i)!r} instead of {teacher.get(i)!r}" for i in differing[:3])
        raise cf.MismatchError(
            f"the {role}'s tokenizer is not the teacher's: found {len(student):,} tokens, "
            f"expected {len(teacher):,}; {len(differing):,} ids differ (id {shown}), but "
            f"soft targets are over the teacher's ids. Choose a {role} of the teacher's family, or build one with the "
            "teacher's tokenizer."
        )


def _segmentation(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> dict[str, Any]:
    """Part → description of how text is split into tokens; added tokens only if their id is below `size`."""
    if not tokenizer.is_fast:  # its rules are code and settings: take its files and the tokens of a sample text
        files = tokenizer_files(tokenizer).items()
        return {
            "class": type(tokenizer).__name__,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files if name not in _SETTINGS_FILES},
            "probe": tokenizer(_PROBE)["input_ids"],
        }
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for usage in ("version", "truncation", "padding"):
        parts.pop(usage, None)
    if isinstance(parts["model"].get("vocab"), dict):  # unigram has a list with scores, which decide the split
        del parts["model"]["vocab"]
    parts["added_tokens"] = [token for token in parts["added_tokens"] if size is None or token["id"] < size]
    return parts


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """bos_token, eos_token, … → [token, id]."""
    return {
        name: [str(token), tokenizer.convert_tokens_to_ids(str(token))]
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def _by_id(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    return {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ < size}


def _token(entry: list[Any] | None) -> str:
    return "not set" if entry is None else f"{entry[0]!r} (id {entry[1]})"


def _sha256_json(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
