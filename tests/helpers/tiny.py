"""Tiny tokenizers, models and corpora, built in a second without a network.

They are small but real: a trained byte-level BPE tokenizer and a randomly initialised Llama, in a directory that
`from_pretrained` reads. A test with them runs the same code as one with SmolLM2 (`make test-real`).

    from tiny import tiny_llama, tiny_tokenizer, english
    tokenizer = tiny_tokenizer()                      # 400 tokens, every byte covered
    tiny_llama(path, tokenizer, layers=2, hidden=32)  # a directory with model and tokenizer
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, IM_START, IM_END]

# ChatML as in SmolLM2 and Qwen. Like theirs it has no {% generation %} block, so that the assistant's tokens must be
# found without help from the template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SUBJECTS = (
    *("the miller", "a tired clerk", "my sister", "the old captain"),
    *("every child", "a grey heron", "the baker", "Anna"),
)
_VERBS = (
    *("carried", "counted", "forgot", "painted", "sold"),
    *("watched", "repaired", "described", "borrowed", "found"),
)
_OBJECTS = (
    *("three baskets", "a broken clock", "the harbour map", "nine apples"),
    *("her letters", "a wooden boat", "the bill", "snow"),
)
_PLACES = (
    *("near the river", "before noon", "in the market", "without a word"),
    *("at the station", "by candlelight", "after rain"),
)
_LINKS = ("and then", "because", "although", "while", "so that", "but", "until")


def sentence(rng: random.Random) -> str:
    """One sentence of simple English, sometimes with a number, a quotation or an accent."""

    def clause() -> str:
        return " ".join(rng.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES))

    parts = [clause()]
    while rng.random() < 0.35 and len(parts) < 3:
        parts += [rng.choice(_LINKS), clause()]
    text = " ".join(parts)
    flavour = rng.random()
    if flavour < 0.1:
        text += f", for {rng.randint(2, 400)} crowns"
    elif flavour < 0.2:
        text = f"“{text},” said Zoë"
    return text[0].upper() + text[1:] + rng.choice("...!?")


def english(sentences: int = 80, seed: int = 0) -> str:
    """English text: one document per line, with one to five sentences of about 70 bytes."""
    rng = random.Random(seed)
    documents: list[str] = []
    written = 0
    while written < sentences:
        length = min(rng.randint(1, 5), sentences - written)
        documents.append(" ".join(sentence(rng) for _ in range(length)))
        written += length
    return "\n".join(documents) + "\n"


def conversations(count: int = 12, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """`{"messages": [...]}` records: one to three turns, every third with a system message."""
    rng = random.Random(seed)
    records = []
    for index in range(count):
        messages = []
        if index % 3 == 0:
            messages.append({"role": "system", "content": "Answer in one sentence."})
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": f"What happened when {sentence(rng)[:-1]}?"})
            messages.append({"role": "assistant", "content": sentence(rng)})
        records.append({"messages": messages})
    return records


def completions(count: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """`{"prompt": ..., "completion": ...}` records."""
    rng = random.Random(seed)
    return [{"prompt": f"Go on: {sentence(rng)}", "completion": " " + sentence(rng)} for _ in range(count)]


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
    )
    return path


def tiny_tokenizer(vocab_size: int = 400, *, add_bos: bool = False, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocab_size` tokens: 5 special tokens, 256 bytes, the rest merges.

    Another `seed` gives other merges: a tokenizer that differs although its size is the same.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([english(400, seed=1000 + seed)], trainer)
    if core.get_vocab_size() != vocab_size:
        raise ValueError(f"trained {core.get_vocab_size()} tokens instead of {vocab_size}")
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tiny_sentencepiece(seed: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: ▁ for a space and before every text, bytes as <0x41>, <s> at the beginning."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=names, show_progress=False)
    core.train_from_iterator([english(200, seed=seed)], trainer)
    trained = json.loads(core.to_str())["model"]
    vocab = {name: i for i, name in enumerate([*names, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for token in sorted(trained["vocab"], key=trained["vocab"].__getitem__):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in trained["merges"]]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_llama(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int = 2,
    hidden: int = 32,
    tie: bool = True,
    pad_vocab: int = 0,
    seed: int = 0,
    scale: float = 0.3,
    **config: object,
) -> Path:
    """Writes a random Llama and its tokenizer to `path` and returns it.

    Args:
        pad_vocab: embedding rows beyond the vocabulary, as real models have. They get large logits, so that code that
            does not cut them off fails.
        scale: standard deviation of the weights. With the usual 0.02 all probabilities are near 1/V; with 0.3 the
            top-1 probability is 0.04 to 0.3 and the entropy 4.6 nats.
        config: further `LlamaConfig` fields.
    """
    vocab = len(tokenizer)
    settings = LlamaConfig(
        vocab_size=vocab + pad_vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=tie,
        initializer_range=scale,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings).eval()
        if pad_vocab:
            with torch.no_grad():
                model.lm_head.weight[vocab:] = 2 * model.lm_head.weight[:pad_vocab]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 3.0 * i for i in range(8)],
    "original_max_position_embeddings": 32,
}
"""Rotary embeddings of 16 dimensions per attention head, with other frequencies for more than 32 tokens."""


def tiny_phi3(path: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Path:
    """Writes a random Phi-3 with `LONGROPE` and its tokenizer to `path` and returns it."""
    settings = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters=LONGROPE,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Phi3ForCausalLM(settings).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
