"""Options of a teacher behind an HTTP API. Standard library only (see `pipeline.options`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args
from urllib.parse import urlsplit

from pipeline.errors import ConfigError
from pipeline.options import check_ranges, flat, option, options_of

if TYPE_CHECKING:
    from pipeline.teacher.cache_config import CacheTeacherConfig

SERVER = "Server"

ServerKind = Literal["vllm", "sglang", "llama.cpp", "openai"]
KINDS: tuple[ServerKind, ...] = get_args(ServerKind)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Which model of a server is asked, and how patiently."""

    PREFIX: ClassVar = "server_"

    model: str | None = option(
        None,
        name="model",
        help="Name of the model on the server, if `teacher` is a URL.",
        group=SERVER,
        default_text="the one model that the server has",
        common=True,
    )
    kind: Literal["auto", "vllm", "sglang", "llama.cpp", "openai"] = option(
        "auto",
        help="Kind of server. auto: ask the server. openai: a hosted API with chat completions; only with `generate`.",
        group=SERVER,
    )
    concurrency: int = option(
        16, help="Number of requests to send at the same time.", group=SERVER, minimum=1, maximum=4096
    )
    timeout: float = option(
        600.0, help="Seconds to wait for an answer before the request is repeated.", group=SERVER, above=0
    )
    patience: float = option(
        600.0,
        help="Seconds to keep trying before the run ends, if the server is down, loading or overloaded.",
        group=SERVER,
        minimum=0,
    )
    api_key_env: str = option(
        "OPENAI_API_KEY",
        help="Environment variable that holds the API key, if the server needs one. The key is never recorded.",
        group=SERVER,
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        check_ranges(self, self.PREFIX)

    def api_key(self) -> str | None:
        """Raises: ConfigError if it cannot be sent; the error does not show it."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"`server_api_key_env` {self.api_key_env}: the variable holds line breaks or letters that no HTTP "
                "header may have, expected an API key. Set it again."
            )
        return key or None


def server_root(url: str, name: str = "teacher") -> str:
    """The URL without the path /v1 and what follows it.

    Args:
        name: of the option that gives it.

    Raises: ConfigError if it names no host or no valid port, or holds a password or key, which would be recorded.
    """
    expected = "expected a URL such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        _ = parts.port  # may be no number
    except ValueError:
        parts = None
    if parts is None or len(url.split()) > 1:
        shown = url.rpartition("@")[2].rpartition("://")[2].partition("?")[0].partition("#")[0]  # without a password
        raise ConfigError(f"`{name}` …{shown}: found a host or port that cannot be, {expected}.")
    if not parts.hostname:
        raise ConfigError(f"`{name}` {url}: found no host, {expected}.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ConfigError(
            f"`{name}` {shown}: found a user name, password or parameters in the URL, which would be recorded with "
            "the cache. Leave them out, and put an API key into the environment variable that `server_api_key_env` "
            "names."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


WITHOUT_SERVER = {
    **dict.fromkeys(("batch_size", "batch_tokens"), ", and set `server_concurrency`"),
    **dict.fromkeys(("device", "dtype", "device_map", "tensor_parallel", "revision"), "; the server has its own"),
    "hidden_states": "; servers give no hidden states",
}
"""Option that cannot be combined with a teacher on a server -> what to do instead."""

WITHOUT_TOKENS = {
    "writer": "it cannot score answers that it did not write",
    "gen_stop": "it does not return the tokens of the string",
    "gen_top_k": "it has no such option",
}
"""Option that cannot be combined with `server_kind=openai` -> why."""

SERVED_KINDS = ("top-k", "top-p")
"""Kinds of targets that lists of the most likely tokens are enough for."""


class ServedConfig(Protocol):
    """Options of a command that takes a teacher."""

    @property
    def teacher(self) -> Any: ...

    @property
    def on_server(self) -> bool:
        """Whether the teacher is the URL of a server."""
        ...

    @property
    def tokenizer(self) -> Any: ...


def check_address(config: ServedConfig, name: str = "teacher") -> None:
    """Checks options against where the teacher is. Args: name: of the option that says it. Raises: ConfigError."""
    given, teacher = flat(config), config.teacher
    if not config.on_server:
        for option_name, declared in options_of(type(config)).items():
            if declared.metadata.group == SERVER and option_name in given:
                raise ConfigError(f"`{option_name}`: only if `{name}` is the URL of a server. Leave it out.")
        return
    server_root(teacher, name)
    for without, instead in WITHOUT_SERVER.items():
        if without in given:
            raise ConfigError(f"`{without}`: cannot be combined with a teacher on a server. Leave it out{instead}.")
    if config.tokenizer is None:
        raise ConfigError(
            f"`tokenizer`: missing, and `{name}` {teacher} is the URL of a server, which takes token ids. Give the "
            "directory or hub name of the tokenizer of its model."
        )


def check_served(config: CacheTeacherConfig) -> None:
    """Checks options against a teacher on a server, if it is on one. Raises: ConfigError."""
    given, engine, teacher = flat(config), config.running.engine, config.teacher
    if engine == "server" and not config.on_server:
        raise ConfigError(f"`engine` server: found `teacher` {teacher}, expected a URL: http://localhost:8000/v1.")
    check_address(config)
    if not config.on_server:
        return
    if engine not in ("auto", "server"):
        raise ConfigError(f"`engine` {engine}: `teacher` {teacher} is the URL of a server. Leave it out.")
    if config.masking is not None or config.objective == "masked":
        raise ConfigError(f"`teacher` {teacher}: a server has no masked language models. Give a directory.")
    if config.server.kind == "openai":
        if config.generation is None:
            raise ConfigError(
                "`server_kind` openai: a hosted API gives log-probabilities of its own answers only. Use `generate`, "
                "or a server that scores given text: vLLM, SGLang or llama.cpp."
            )
        for name, why in WITHOUT_TOKENS.items():
            if name in given:
                raise ConfigError(f"`{name}`: cannot be combined with a hosted API; {why}. Leave it out.")
    if config.targets.kind not in SERVED_KINDS:
        raise ConfigError(
            f"`targets` {config.targets.kind}: a server gives lists of its most likely tokens, expected "
            f"{' or '.join(SERVED_KINDS)}. Use `top_k`, such as `top_k=20`, or run the teacher in this process."
        )
    if config.targets.temperature != 1.0:
        raise ConfigError(
            f"`temperature` {config.targets.temperature:g}: a server gives log-probabilities at temperature 1. "
            "Leave it out."
        )
