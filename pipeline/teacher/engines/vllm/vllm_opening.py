"""Opens a teacher in vLLM: the version, the arguments, and a comparison with vLLM's own log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, ModelError
from pipeline.models.loading import load_config, reason
from pipeline.teacher.engines.vllm.vllm_engine import VllmEngine, closed_on_error
from pipeline.teacher.engines.vllm.vllm_version import installed

TESTED_VERSIONS = ("0.32",)
EXTENSION = "pipeline.teacher.engines.vllm.vllm_worker.TargetsExtension"
SPECULATIVE = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
OWN_ARGUMENTS = {"model", "worker_extension_cls", "enable_prefix_caching", "logprobs_mode"}


def open_vllm(
    teacher: str,
    *,
    vocab_size: int,
    seq_len: int,
    dtype: str,
    engine_args: Mapping[str, Any],
    revision: str | None = None,
    trust_remote_code: bool = False,
    store_head: bool = False,
    allow_untested: bool = False,
    timed: bool = False,
    generates: bool = False,
    inner_layers: bool = False,
) -> VllmEngine:
    """A teacher in vLLM, compared with vLLM's own prompt log-probabilities.

    Args:
        vocab_size: V.
        seq_len: tokens of the longest document.
        dtype: auto is float32 on a CPU, as in the other engine, and the checkpoint's own elsewhere.
        engine_args: other arguments of vLLM's `EngineArgs`; they win over what is chosen here.
        generates: the teacher will write answers.
        inner_layers: hidden states of layers before the last will be stored.

    Raises:
        ConfigError: vLLM is missing or of another version, or an argument is one that it does not know or that the
            engine has to choose itself.
        ModelError: vLLM cannot load the teacher, or the targets do not agree with its own log-probabilities.
    """
    check_installed(allow_untested=allow_untested)
    if taken := sorted(set(engine_args) & OWN_ARGUMENTS):
        raise ConfigError(f"`engine_args`: {taken[0]} is set by distill. Leave it out.")
    check_arguments(engine_args, generates=generates, inner_layers=inner_layers)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, so that runs can be repeated
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    known = {each.name for each in fields(EngineArgs)}
    if unknown := sorted(set(engine_args) - known):
        raise ConfigError(
            f"`engine_args`: {unknown[0]} is not an argument of {' '.join(installed() or ())}. Names are those of the "
            "options of vllm serve, with underscores."
        )
    on_cpu = current_platform.is_cpu()
    arguments = {
        "model": teacher,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": _dtype(teacher, revision, trust_remote_code, on_cpu=on_cpu) if dtype == "auto" else dtype,
        "max_model_len": seq_len + 1,  # vLLM always generates a token
        "enforce_eager": on_cpu or inner_layers,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # On a CPU, vLLM fails on a part of a prompt whose answer has a seed.
        **({"enable_chunked_prefill": False} if on_cpu and generates else {}),
        **engine_args,
        "worker_extension_cls": EXTENSION,
        "enable_prefix_caching": False,  # a position whose state is not computed has no targets
    }
    try:
        engine = VllmEngine(arguments, vocab_size=vocab_size, store_head=store_head, timed=timed)
    except (ValueError, RuntimeError, OSError, NotImplementedError, AssertionError) as error:
        raise ModelError(f"{teacher}: vLLM cannot load it: {reason(error)}. Use `engine=transformers`.") from error
    with closed_on_error(engine):
        engine.check()
    return engine


def check_arguments(engine_args: Mapping[str, Any], *, generates: bool, inner_layers: bool) -> None:
    """Raises: ConfigError for arguments with which vLLM would compute what is to be stored otherwise."""
    guesses = [name for name in SPECULATIVE if engine_args.get(name) is not None]
    if generates and guesses:
        raise ConfigError(
            f"`engine_args`: {guesses[0]} cannot be combined with `generate`: vLLM computes positions of guessed "
            "tokens that it then rejects, so targets would belong to other tokens. Leave it out."
        )
    if inner_layers and not engine_args.get("enforce_eager", True):
        raise ConfigError(
            "`engine_args`: enforce_eager is false, but `hidden_states` of layers before the last can only be read "
            "from a model that is not compiled. Leave it out, or store the states of the last layer only."
        )


def _dtype(teacher: str, revision: str | None, trust_remote_code: bool, *, on_cpu: bool) -> str:
    """The dtype that "auto" stands for; vLLM's own "auto" would round a float32 checkpoint to bfloat16."""
    if on_cpu:
        return "float32"
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = load_config(teacher, revision=revision, trust_remote_code=trust_remote_code)
    saved = ModelArchConfigConvertorBase.get_torch_dtype(config, teacher, revision=revision, config_format="hf")
    return "float32" if saved == torch.float32 else "auto"


def check_installed(*, allow_untested: bool = False) -> None:
    """Raises: ConfigError if vLLM is missing or of a version that was not tested."""
    found = installed()
    if found is None:
        raise ConfigError("`engine` vllm: vLLM is not installed. Run: pip install 'distill[vllm]'.")
    if not allow_untested and not found[1].startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS)):
        raise ConfigError(
            f"`engine` vllm: found {' '.join(found)}, tested with {', '.join(TESTED_VERSIONS)}. The engine uses "
            "private interfaces, which change. Install a tested version, or use `allow_untested`."
        )


def check_rotary(config: PreTrainedConfig, name: str, max_model_len: int) -> None:
    """Raises: ConfigError for rotary embeddings that vLLM fixes for all lengths; they depend on a document's length.

    longrope (Phi-3): vLLM takes the long frequencies for every document if any may be long. dynamic NTK: it takes those
    of the longest possible document.
    """
    given: Any = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [given, *(each for each in given.values() if isinstance(each, dict))]
    for each in kinds:
        kind, limit = each.get("rope_type"), each.get("original_max_position_embeddings")
        if kind == "dynamic" or (kind == "longrope" and limit is not None and max_model_len > limit):
            use = f" or documents of at most {limit - 1:,} tokens" if kind == "longrope" else ""
            raise ConfigError(
                f"`engine` vllm: {name} has rotary embeddings of kind {kind}, which depend on the length of a "
                f"document; vLLM uses those of long documents for all. Use `engine=transformers`{use}."
            )
