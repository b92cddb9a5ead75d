"""`distill cache-teacher`: text and teacher in, cache out; with `--generate` the teacher's own answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from cache_format.wording import quantity
from pipeline.commands.push_command import check_repository, public_option, push
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.engine_config import rows_per_pass
from pipeline.terminal.click_options import build_config, config_options, distill_command, interrupted, json_option


@distill_command(
    "cache-teacher",
    "distill cache-teacher --teacher models/teacher --data data/train.jsonl --output caches/train",
    "distill cache-teacher --teacher model.gguf --data book.txt --output caches/book --seq-len 512",
    "distill cache-teacher --teacher models/teacher --data prompts.jsonl --output caches/answers \\",
    "    --generate --gen-answers-per-prompt 4 --gen-keep-if checks.py:is_correct",
    "distill cache-teacher --teacher models/teacher --data prompts.jsonl --output caches/round-1 \\",
    "    --generate --writer students/first",
    config=CacheTeacherConfig,
)
@config_options(CacheTeacherConfig)
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload the finished cache, as distill push does.")
@public_option()
@json_option()
def command(
    config_file: str | None, push_to_hub: str | None, public: bool | None, json_file: str | None, **given: Any
) -> None:
    """Run a teacher over a text and cache its targets.

    The text comes from a column of strings, chat messages or token ids, or from prompt and completion columns. After an
    interruption, the same command continues where it stopped. On several GPUs: torchrun --nproc-per-node N --no-python
    distill cache-teacher …

    With --generate, the data contains prompts: a prompt column, messages (a final answer is dropped), or text to
    continue. With --writer, another model answers them, and the teacher scores its answers.
    """
    config = build_config(CacheTeacherConfig, given, config_file)
    check_repository(config.output, push_to_hub, public)
    check_inputs(config)
    if config.generation is not None:
        return _generate(config, push_to_hub, bool(public), json_file)
    _capture(config, push_to_hub, bool(public), json_file)


def check_inputs(config: CacheTeacherConfig) -> None:
    """Finds a wrong path in a fraction of a second, before torch is imported."""
    from pipeline.models.paths import TOKENIZER_FILES, check_model_path
    from pipeline.teacher.text.reading.data_paths import local_paths

    if "://" in config.output:
        from cache_format.storage.directory import open_directory

        open_directory(config.output)
    if not config.on_server:
        check_model_path(config.teacher)
    check_model_path(config.tokenizer, TOKENIZER_FILES)
    if config.generation is not None:
        check_model_path(config.generation.writer_source[0])
    local_paths(config.data.data)


def _capture(config: CacheTeacherConfig, push_to_hub: str | None, public: bool, json_file: str | None) -> None:
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    quiet_libraries()
    from pipeline.teacher.capture import cache_teacher
    from pipeline.teacher.progress import CaptureProgress
    from pipeline.terminal.capture_views import capture_view

    def show(progress: CaptureProgress) -> None:
        facts = []
        if progress.exact_mass == progress.exact_mass:  # not before the first record batch
            facts.append(f"exact mass {progress.exact_mass:.3f}")
        if progress.bytes_per_token == progress.bytes_per_token:
            facts.append(f"{progress.bytes_per_token:.1f} bytes/token")
        if progress.batch_tokens is not None:
            facts.append(f"{quantity(progress.batch_tokens, 'token')} per pass")
        else:
            facts += _reduced(progress.batch_size, config)
        rate = f"{progress.tokens_per_s:,.0f} tokens/s"
        left = progress.seconds_left
        status.step(progress.rows, progress.total_rows, "rows", facts=facts, rate=rate, seconds_left=left)

    with Status() as status:
        try:
            summary = cache_teacher(config, on_stage=status.stage, on_progress=show, on_warning=status.warn)
        except KeyboardInterrupt:
            interrupted(f"complete shards are kept in {config.output}. Run {_again(config)} to continue.")
    if push_to_hub is not None:
        # Only one of several processes finishes the cache, and that one pushes it.
        by_hand = f"distill push {config.output} {push_to_hub}{' --public' if public else ''}"
        if summary.wrote_manifest:
            push(config.output, push_to_hub, public)
        elif summary.finished:
            status.line(f"Not pushed: another process finished the cache and pushes it. If it did not: {by_hand}")
        else:
            status.line(f"Not pushed: the cache is not finished yet. Once it is: {by_hand}")
    if not status.silent:
        show_result(lambda: capture_view(summary, config.targets.to_json()), lambda: asdict(summary), json_file)


def _generate(config: CacheTeacherConfig, push_to_hub: str | None, public: bool, json_file: str | None) -> None:
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    quiet_libraries()
    from pipeline.teacher.generation.answer_store import store_location
    from pipeline.teacher.generation.generate import generate_cache
    from pipeline.teacher.progress import GenerationProgress
    from pipeline.terminal.capture_views import generation_view

    assert config.generation is not None
    judged = config.generation.keep_if is not None

    def show(progress: GenerationProgress) -> None:
        facts = [] if progress.passed is None else [f"{progress.passed:,} accepted"]
        if progress.usage is not None:
            facts.append(
                f"{quantity(progress.usage.prompt_tokens, 'token')} sent, {progress.usage.completion_tokens:,} received"
            )
        facts += _reduced(progress.batch_size, config)
        rate = f"{progress.tokens_per_s:,.0f} tokens/s"
        left = progress.seconds_left
        status.step(progress.answers, progress.total_answers, "answers", facts=facts, rate=rate, seconds_left=left)

    with Status() as status:
        try:
            summary = generate_cache(config, on_stage=status.stage, on_progress=show, on_warning=status.warn)
        except KeyboardInterrupt:
            interrupted(f"answers are kept in {store_location(config.output)}. Run {_again(config)} to continue.")
    if push_to_hub is not None:
        push(config.output, push_to_hub, public)
    show_result(
        lambda: generation_view(summary, config.targets.to_json(), judged=judged), lambda: asdict(summary), json_file
    )


def _reduced(batch_size: int, config: CacheTeacherConfig) -> list[str]:
    return [f"batch size {batch_size} (out of memory)"] if batch_size < rows_per_pass(config) else []


def _again(config: CacheTeacherConfig) -> str:
    return "the same command without --overwrite" if config.overwrite else "the same command again"
