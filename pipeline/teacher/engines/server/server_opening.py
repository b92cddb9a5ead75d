"""Opens a teacher on a server: finds out what it is, and checks that it can be one before anything is written."""

from __future__ import annotations

import importlib.util

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.engines.server.http_client import HttpClient
from pipeline.teacher.engines.server.preflight import (
    check_distributions,
    check_length,
    check_tokenizer,
    local_tokens,
)
from pipeline.teacher.engines.server.server_config import ServerConfig, server_root
from pipeline.teacher.engines.server.server_engine import ServerEngine, entries
from pipeline.teacher.engines.server.server_kinds import dialect_of, find_server
from pipeline.teacher.targets.rules import TargetRule

MOST_TOKENS = 2**24


def check_client() -> None:
    """Raises: ConfigError if the HTTP client is not installed."""
    if importlib.util.find_spec("httpx2") is None:
        raise ConfigError("`engine` server: httpx2 is not installed. Run: pip install 'distill[server]'.")


def open_server(
    url: str,
    config: ServerConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rule: TargetRule,
    seq_len: int,
    all_positions: bool,
    generates: bool = False,
    cache: str | None = None,
) -> ServerEngine:
    """A teacher on a server.

    Args:
        tokenizer: of the model that the server runs.
        rule: of a kind that lists of the most likely tokens are enough for.
        seq_len: tokens of the longest document.
        all_positions: whether the last position of a document gets targets too.
        generates: the teacher will write answers.
        cache: one whose rows are to be computed again; errors name it instead of options.

    Raises: ConfigError, ModelError, each with what to change, on the server or here.
    """
    check_client()
    vocab_size = real_vocab_size(tokenizer, MOST_TOKENS)
    client = HttpClient(
        server_root(url),
        api_key=config.api_key(),
        key_hint=f"Set the API key in the environment variable {config.api_key_env} (`server_api_key_env`).",
        concurrency=config.concurrency,
        timeout=config.timeout,
        patience=config.patience,
    )
    try:
        facts = find_server(client, config)
        if facts.slots is not None:  # further requests would only wait there, each with a connection and its thread
            client.limit(facts.slots)
        dialect = dialect_of(facts, tokenizer)
        rule.check_vocabulary(vocab_size)
        more = 0 if generates else 2 if all_positions else 1  # tokens of a request beyond its document
        check_length(facts, dialect, seq_len, seq_len + more, cache)
        check_tokenizer(client, dialect, tokenizer)
        k, probe = entries(rule, vocab_size), local_tokens(tokenizer)[: seq_len - 1]
        subject = f"`top_k` {k}" if cache is None else f"{cache}, {k} entries"
        check_distributions(client, dialect, probe, k, vocab_size, subject, generates=generates)
    except BaseException:
        client.close()
        raise
    return ServerEngine(client, dialect, facts, concurrency=config.concurrency, vocab_size=vocab_size)
