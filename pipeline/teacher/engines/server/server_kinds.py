"""Which server answers at a URL: its kind, version, model and longest document, found by asking it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, ModelError
from pipeline.teacher.engines.server.chat_dialect import ChatDialect
from pipeline.teacher.engines.server.dialect import Dialect
from pipeline.teacher.engines.server.http_client import HttpClient
from pipeline.teacher.engines.server.llama_cpp_dialect import LlamaCppDialect
from pipeline.teacher.engines.server.server_config import ServerConfig, ServerKind
from pipeline.teacher.engines.server.sglang_dialect import SglangDialect
from pipeline.teacher.engines.server.vllm_dialect import VllmDialect


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server says of itself.

    Attributes:
        version: None if it does not say.
        model: name on the server.
        max_length: tokens of prompt and answer; None if it does not say.
        slots: requests that it works on at once; None if it does not say.
    """

    kind: ServerKind
    version: str | None
    model: str
    max_length: int | None
    slots: int | None = None


def find_server(client: HttpClient, config: ServerConfig) -> ServerFacts:
    """Raises: ConfigError if it does not have the model; ModelError if it is of no known kind, or does not answer."""
    if config.kind == "openai" and config.model is not None:  # not every hosted API lists its models
        return ServerFacts(kind="openai", version=None, model=config.model, max_length=None)
    card = _model_card(client, config.model)
    kind, said = _kind(client, config)
    version, length = said.get("version"), card.get("max_model_len") or said.get("context_length")
    slots = said.get("slots")
    return ServerFacts(
        kind=kind,
        version=None if version is None else str(version),
        model=str(card["id"]),
        max_length=length if isinstance(length, int) else None,
        slots=slots if isinstance(slots, int) and slots > 0 else None,
    )


def dialect_of(facts: ServerFacts, tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """Args: tokenizer: of the model that the server runs."""
    if facts.kind == "vllm":
        return VllmDialect(facts.model)
    if facts.kind == "llama.cpp":
        return LlamaCppDialect(tokenizer)
    return SglangDialect() if facts.kind == "sglang" else ChatDialect(facts.model, tokenizer)


def _model_card(client: HttpClient, wanted: str | None) -> dict[str, Any]:
    found = client.get("/v1/models")
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list) or not cards or not all(isinstance(c, dict) and "id" in c for c in cards):
        raise ModelError(
            f"{client.root}/v1/models: found no list of models, expected an OpenAI-compatible server. Check the URL."
        )
    names = [str(card["id"]) for card in cards]
    if wanted is None and len(names) > 1:
        raise ConfigError(f"`model`: missing, and {client.root} has {len(names)} models: {_listed(names)}. Name one.")
    if wanted is not None and wanted not in names:
        raise ConfigError(f"`model` {wanted}: {client.root} has only {_listed(names)}. Name one of them.")
    return dict(cards[0 if wanted is None else names.index(wanted)])


def _kind(client: HttpClient, config: ServerConfig) -> tuple[ServerKind, dict[str, Any]]:
    """The kind, and what the server says of itself besides."""
    if config.kind in ("auto", "sglang") and isinstance(client.get("/get_model_info"), dict):
        said = client.get("/get_server_info")
        return "sglang", said if isinstance(said, dict) else {}
    if config.kind in ("auto", "vllm"):
        said = client.get("/version")
        if isinstance(said, dict) and "version" in said:
            return "vllm", said
    if config.kind in ("auto", "llama.cpp"):
        said = client.get("/props")
        if isinstance(said, dict) and (settings := said.get("default_generation_settings")):
            about = {"version": said.get("build_info"), "context_length": settings.get("n_ctx")}
            return "llama.cpp", {**about, "slots": said.get("total_slots")}
    if config.kind != "auto":
        return config.kind, {}
    raise ModelError(
        f"{client.root}: found neither vLLM (/version) nor SGLang (/get_model_info) nor llama.cpp (/props). If it is "
        "one of them behind a proxy, name it with `server_kind`. For answers of a hosted API, use `server_kind` openai "
        "and `generate`."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
