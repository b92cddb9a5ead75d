"""The command line: options become one frozen config, one call, and a table. Nothing is computed here.

    distill cache-teacher   text + teacher ─▶ cache          distill inspect   one row, token by token
    distill train-student   cache + student ─▶ checkpoint    distill stats     sizes and distributions
    distill evaluate        held-out cache + student         distill verify    checksums, values, teacher
    distill plan            bytes and time, beforehand       distill convert   other encoding, shards, fewer entries
    distill merge           shards of several machines       distill push      cache ─▶ hub

Results go to stdout, progress and errors to stderr. An error that the user can act on is one line and status 1, wrong
usage 2, an interrupt 130; a bug keeps its traceback. Heavy imports happen inside the commands: `--help` takes no torch.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from cache_format.cache_errors import DistillError

# Paths and tokens are printed as they are: "[b]" in one is not markup.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True)

LINE_EVERY_S = 30.0

CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (AWS_ENDPOINT_URL for other servers)",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "Log in (hf auth login)",
}
"""What to do by the kind of store that refuses."""


class _Commands(click.Group):
    """Turns what a user can act on into one line; lists commands in the order of the flow."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except DistillError as error:
            raise click.ClickException(_of_rank() + " ".join(str(error).split("\n"))) from error
        except KeyboardInterrupt:
            _stopped("nothing was changed.")
        except BrokenPipeError:
            raise
        except OSError as error:
            # The environment, not a bug: no space, no permission, a name that is too long.
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{_of_rank()}{where}{error.strerror or error}. {_remedy(error)}") from error


def _of_rank() -> str:
    """Which of several processes speaks: those beside the first are otherwise silent."""
    return f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space and run the same command again."
    if error.errno == errno.EACCES and "://" in str(error.filename):
        protocol = str(error.filename).partition("://")[0]
        credentials = CREDENTIALS.get(protocol, "Set the credentials that this store wants")
        return f"{credentials}, and check that they allow this."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Change its permissions, or choose another path."
    if error.errno in (errno.EIO, errno.ETIMEDOUT):
        return "Check the connection (or the disk), and run the same command again."
    return "Check the path."


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="distill", prog_name="distill")
def main() -> None:
    """Offline knowledge distillation of language models.

    A large teacher runs once over a text and leaves a cache of sparse soft targets; any number of students are trained
    from the cache, on machines that never see the teacher.
    """


class Status:
    """Stages and progress on stderr: a live bar in a terminal, now and then a line in a log."""

    def __init__(self) -> None:
        self.silent = int(os.environ.get("RANK", "0")) != 0  # under torchrun, the first process speaks
        self.progress: Progress | None = None
        self.task: Any = None
        self.last_line = 0.0

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def stage(self, text: str) -> None:
        self._stop()
        if not self.silent:
            err.print(Text(text, style="bold"), "…")

    def warn(self, text: str) -> None:
        if not self.silent:
            err.print(Text("warning:", style="yellow"), text)

    def line(self, text: str) -> None:
        if not self.silent:
            err.print(text)

    def step(self, done: float, total: float, text: str = "") -> None:
        """`text`: facts beside the bar."""
        if self.silent:
            return
        if not err.is_terminal and text:
            now = time.monotonic()
            if now - self.last_line >= LINE_EVERY_S or done >= total:
                self.last_line = now
                err.print(f"{done:,.0f}/{total:,.0f} {text}")
        if not err.is_terminal:
            return
        if self.progress is None:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            self.progress = Progress(*columns, console=err, transient=False)
            self.task = self.progress.add_task("", total=total)
            self.progress.start()
        self.progress.update(self.task, completed=done, total=total, description=text)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def print_json(data: Any, file: str | None = None) -> None:
    """To stdout, or to `file`."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if file in (None, "-"):
        click.echo(text)
    else:
        with open(str(file), "w", encoding="utf-8") as stream:
            stream.write(text + "\n")


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries underneath would tear ours apart."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _examples(*commands: str) -> str:
    return "Example:\n\n\b\n" + "\n".join(f"  {command}" for command in commands)


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, in the order given."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


MODEL_OPTIONS = options(
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a hub model. Off by default."),
)
MASK_OPTIONS = options(
    click.option("--mask-probability", type=float, help="Of a masked teacher: share of the tokens. Default: 0.15."),
    click.option("--mask-replace-prob", type=float, help="Of these, share replaced by the mask token. Default: 0.8."),
    click.option("--random-replace-prob", type=float, help="Of these, share replaced by any token. Default: 0.1."),
    click.option("--mask-seed", type=int, help="Of the masks; they depend on row and position besides. Default: 0."),
    click.option("--mask-copies", type=int, help="Rows per window of text, each masked anew. Default: 1."),
)
HIDDEN_OPTIONS = options(
    click.option("--hidden-states", help="Store hidden states too: last, all, or layers such as 6,12,18."),
    click.option(
        "--hidden-dtype",
        type=click.Choice(["float16", "float32", "int8"]),
        help="Of --hidden-states, or of --targets hidden. int8: a scale each. Default: float16.",
    ),
    click.option("--hidden-every", type=int, help="Of one in so many positions. Default: 1."),
)
ENCODING_OPTION = click.option(
    "--encoding",
    default="columns",
    show_default=True,
    type=click.Choice(["columns", "packed"]),
    help="columns: any Arrow reader shows the targets. packed: 2/3 to 4/5 of the bytes, read by distill.",
)
GENERATION_OPTIONS = options(
    click.option("--generate", is_flag=True, help="Let the teacher answer --data, and cache what it wrote."),
    click.option(
        "--gen-temperature",
        type=float,
        help="T of the sampling; 0: the likeliest token. Targets are not tempered by it. Default: 1.",
    ),
    click.option("--gen-top-p", type=float, help="Sample among the fewest tokens with this mass. Default: 1, all."),
    click.option("--gen-top-k", type=int, help="Sample among so many likely tokens. Default: 0, all."),
    click.option("--gen-seed", type=int, help="Of the answers; they depend on prompt and number besides. Default: 0."),
    click.option("--answers-per-prompt", type=click.IntRange(1), help="Default: 1."),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        help="Tokens of an answer; with its prompt at most --seq-len. Default: 256.",
    ),
    click.option("--stop", multiple=True, help="End answers with this string; may be given several times."),
    click.option(
        "--keep-if", metavar="FUNCTION", help="Keep answers for which module:function (or file.py:function) is true."
    ),
    click.option(
        "--keep",
        type=click.Choice(["all", "first", "best"]),
        help="Of the answers to a prompt that pass: all, the first, or the likeliest. Default: all.",
    ),
)
READING_OPTIONS = options(
    click.option("--cache-dir", help="Keep local copies of what is read of a cache on an object store."),
    click.option(
        "--cache-dir-gb", default=100.0, show_default=True, type=click.FloatRange(0.001), help="At most so much."
    ),
)
DEVICE_OPTIONS = options(
    click.option("--device", default="auto", show_default=True, help="auto (CUDA, MPS, CPU), cpu, cuda, cuda:1, mps."),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="auto: float32 on a CPU, the checkpoint's own elsewhere.",
    ),
)

PLACEMENT_OPTIONS = options(
    click.option(
        "--device-map",
        metavar="auto|FILE",
        help="Spread the teacher over all devices, CPU and disk: auto (accelerate), or JSON of modules and devices.",
    ),
    click.option(
        "--tp", "tensor_parallel", is_flag=True, help="Split the teacher over the processes of torchrun (transformers)."
    ),
)
STALE_OPTION = click.option(
    "--stale-after",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds of silence after which a writer on another machine counts as gone.",
)
WORKER_OPTIONS = options(
    click.option(
        "--num-workers",
        type=click.IntRange(1),
        help="So many processes write this cache together, each started by itself. Default: as torchrun says.",
    ),
    click.option("--worker-index", type=click.IntRange(0), help="Which of them this is, from 0."),
    click.option("--shard-range", metavar="A:B", help="Write these shards only: from A, before B."),
    click.option(
        "--allow-rounding",
        is_flag=True,
        help="Continue on another kind of device, or with other threads, batch size or library versions.",
    ),
    STALE_OPTION,
)


@main.command(
    "cache-teacher",
    epilog=_examples(
        "distill cache-teacher --teacher models/teacher --data data/train.jsonl --output caches/train",
        "distill cache-teacher --teacher model.gguf --data book.txt --output caches/book --seq-len 512",
        "distill cache-teacher --teacher models/teacher --data prompts.jsonl --output caches/answers \\",
        "    --generate --answers-per-prompt 4 --keep-if checks.py:is_correct",
    ),
)
@click.option("--teacher", required=True, help="transformers directory, hub name, or .gguf file.")
@click.option(
    "--data", required=True, help="File, glob or directory (.txt .jsonl .parquet .csv .arrow), or hub dataset."
)
@click.option("--output", required=True, help="Cache directory or fsspec URL; an unfinished run in it is continued.")
@click.option(
    "--objective",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "causal", "masked"]),
    help="What the teacher predicts: the next token, or masked ones. auto: what it was trained for.",
)
@click.option(
    "--targets",
    "kind",
    type=click.Choice(["threshold", "top-k", "top-p", "random", "hidden"]),
    help="What is kept of each distribution. threshold: exact head, sampled tail, unbiased. hidden: the state that the "
    "vocabulary head makes all of it from. Default: the kind that --tail-threshold, --top-k, --top-p or --draws "
    "belongs to, if one is given; else threshold.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    help="So many of the most likely tokens, exact. Default of top-k: 64; of threshold: 1, besides those above τ.",
)
@click.option("--top-p", type=float, help="Mass of the exact entries of top-p. Default: 0.95.")
@click.option("--max-entries", type=int, help="At most so many for top-p. Default: 128.")
@click.option(
    "--tail-threshold", type=float, help="τ of threshold: others are kept with probability p/τ. Default: 0.05."
)
@click.option("--draws", type=int, help="Draws with replacement of random. Default: 50.")
@click.option("--samples", type=int, help="Samples of the tail per position, for train-student --resample. Default: 1.")
@click.option("--seed", type=int, help="Of the sample; it depends on row and position besides. Default: 0.")
@click.option("--temperature", default=1.0, show_default=True, type=float, help="T of the teacher's softmax.")
@click.option("--seq-len", default=1024, show_default=True, type=click.IntRange(2), help="Tokens per row, at most.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Rows per forward pass.")
@DEVICE_OPTIONS
@PLACEMENT_OPTIONS
@click.option("--text-column", help="Column of strings or chat messages. Default: messages, prompt+completion, text.")
@click.option(
    "--loss-on",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "all", "assistant", "completion"]),
    help="Tokens to learn. auto: all of a text, answers of a chat, completions of prompts.",
)
@click.option(
    "--packing/--no-packing", default=None, help="Several short documents per row. Default: for causal teachers."
)
@click.option(
    "--append-eos/--no-append-eos", default=None, help="End every text with EOS. Default: for causal teachers."
)
@MASK_OPTIONS
@click.option(
    "--sample-by",
    default="document",
    show_default=True,
    type=click.Choice(["document", "paragraph", "line"]),
    help="What one document of a .txt file is.",
)
@click.option("--split", default="train", show_default=True, help="Split of the dataset, also as train[:10%].")
@click.option("--data-config", help="Configuration of a hub dataset.")
@click.option("--max-documents", type=click.IntRange(1), help="Only the first so many documents.")
@click.option("--num-proc", type=click.IntRange(1), help="Processes for tokenising.")
@HIDDEN_OPTIONS
@click.option("--all-positions", is_flag=True, help="Targets also where the loss mask is off (prompts).")
@click.option("--rows-per-shard", type=click.IntRange(1), help="Default: some 262,144 tokens per shard.")
@ENCODING_OPTION
@click.option("--compression-level", default=9, show_default=True, type=click.IntRange(1, 22), help="zstd.")
@GENERATION_OPTIONS
@click.option("--overwrite", is_flag=True, help="Delete the cache that is in --output first.")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Then upload the cache, as distill push does.")
@WORKER_OPTIONS
@MODEL_OPTIONS
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def cache_teacher_command(as_json: bool, seq_len: int, **given: Any) -> None:
    """Run a teacher over a text and cache its targets.

    Text comes from a column of strings, of chat messages, or from prompt and completion columns. Interrupted, the same
    command continues where it stopped. On several GPUs: torchrun --nproc-per-node N --no-python distill cache-teacher …
    With --generate the text is prompts: a prompt column, messages (a last answer is dropped), or text to go on with.
    """
    generate = _generation_options(given)
    _quiet_libraries()
    from pipeline.teacher.capture import cache_teacher
    from pipeline.teacher.progress import CaptureProgress
    from pipeline.terminal.views import describe_targets, duration, pairs, size

    repository = given.pop("push_to_hub")
    if repository is not None:
        from pipeline.hub import check_push

        check_push(given["output"], repository)
    config = _cache_teacher_config(seq_len, given)
    if generate is not None:
        return _generate(config, generate, repository, as_json)

    def show(p: CaptureProgress) -> None:
        facts = f"rows · {p.tokens_per_s:,.0f} tokens/s · {duration(p.seconds_left)} left"
        if p.exact_mass == p.exact_mass:  # not before the first record batch
            facts += f" · exact mass {p.exact_mass:.3f}"
        if p.bytes_per_token == p.bytes_per_token:
            facts += f" · {p.bytes_per_token:.1f} bytes/token"
        if p.batch_size < config.batch_size:
            facts += f" · batch size {p.batch_size} (out of memory)"
        status.step(p.rows, p.total_rows, facts)

    with Status() as status:
        try:
            summary = cache_teacher(config, on_stage=status.stage, on_progress=show, on_warning=status.warn)
        except KeyboardInterrupt:
            again = "the same command without --overwrite" if config.overwrite else "the same command again"
            kept = f"complete shards are kept in {config.output}, what there is of the next one is not"
            _stopped(f"{kept}. Run {again} to continue.")
    if repository is not None:
        # Of several processes one pushes; which one ends the cache is not known before.
        if summary.wrote_manifest:
            _push(config.output, repository, private=False)
        elif not status.silent:
            by_hand = f"distill push {config.output} {repository}"
            if summary.finished:
                status.line(
                    f"Not pushed by this process, but by the one that finished the cache. If it did not: {by_hand}"
                )
            else:
                status.line(f"Not pushed: the cache is not finished yet. When it is: {by_hand}")
    if status.silent:
        return
    if as_json:
        return print_json(asdict(summary))
    kept = "see distill stats" if summary.exact_mass is None else f"{summary.exact_mass:.4f} (mean)"
    if config.targets.kind == "hidden":
        kept = "all: whole distributions follow from states and head"
    left_out = {name: count for name, count in summary.corpus_report.items() if count and name in LEFT_OUT}
    title = f"Cached {summary.output}"
    if not summary.finished:
        title = f"Not all of {summary.output} is there yet: the last process to end, or distill merge, finishes it"
    out.print(
        pairs(
            title,
            [
                ("targets", describe_targets(config.targets.to_json())),
                ("rows", f"{summary.rows:,}"),
                ("tokens", f"{summary.tokens:,}, of which {summary.counted_tokens:,} count"),
                ("left out or cut", ", ".join(f"{LEFT_OUT[n]}: {c:,}" for n, c in left_out.items()) or "nothing"),
                ("exact mass", kept),
                ("size", f"{size(summary.bytes)}, {summary.bytes / summary.tokens:.1f} bytes per token"),
                ("time", _time_taken(summary, "tokens/s")),
            ],
        )
    )


def _time_taken(summary: Any, unit: str) -> str:
    if not summary.tokens_per_s:
        return "none: everything was there"
    from pipeline.terminal.views import duration

    return f"{duration(summary.seconds)}, {summary.tokens_per_s:,.0f} {unit}"


HIDDEN_PARTS = {"layers": "states", "dtype": "dtype", "every": "every"}  # of HiddenRule, and of --hidden-…


def _cache_teacher_config(seq_len: int, given: dict[str, Any]) -> Any:
    """The config that the options of cache-teacher make."""
    from pipeline.teacher.cache_config import CacheTeacherConfig
    from pipeline.teacher.targets.hidden_states import HiddenRule
    from pipeline.teacher.targets.rules import TargetRule
    from pipeline.teacher.text.corpus import DataConfig
    from pipeline.teacher.text.masking import FLAGS, MaskRule
    from pipeline.teacher.writing.workers import WorkerConfig

    def take(part: Any) -> dict[str, Any]:
        return {name: given.pop(name) for name in list(given) if name in part.__dataclass_fields__}

    data, rule = DataConfig(window_length=seq_len, **take(DataConfig)), TargetRule(**take(TargetRule))
    states = {name: given.pop(f"hidden_{option}") for name, option in HIDDEN_PARTS.items()}
    states = {name: value for name, value in states.items() if value is not None}
    if rule.kind == "hidden":
        states.setdefault("layers", None)
    elif states and "layers" not in states:
        raise click.UsageError("--hidden-dtype and --hidden-every belong to --hidden-states: name the layers.")
    hidden = HiddenRule(**states) if states else None
    masks = {name: given.pop(flag[2:].replace("-", "_")) for name, flag in FLAGS.items()}
    masks = {name: value for name, value in masks.items() if value is not None}
    masking = MaskRule(**masks) if masks else None
    workers = WorkerConfig(**take(WorkerConfig))
    return CacheTeacherConfig(data=data, targets=rule, masking=masking, hidden=hidden, workers=workers, **given)


GENERATION_NAMES = {
    "gen_temperature": "temperature",
    "gen_top_p": "top_p",
    "gen_top_k": "top_k",
    "gen_seed": "seed",
    **{name: name for name in ("answers_per_prompt", "max_new_tokens", "stop", "keep_if", "keep")},
}
"""Option -> field of GenerationConfig."""

NOT_GENERATED = {
    "with --generate each answer is a row of its own, and the loss is on it": (
        *("packing", "append_eos", "loss_on", "num_proc", "all_positions"),
    ),
    "with --generate one process writes": ("num_workers", "worker_index", "shard_range", "tensor_parallel"),
    "states are kept of texts, not of what is being written": ("hidden_states", "hidden_dtype", "hidden_every"),
    "nothing is masked for a teacher that writes": (
        *("mask_probability", "mask_replace_prob", "random_replace_prob", "mask_seed", "mask_copies"),
    ),
}
"""Why not -> options of cache-teacher."""


def _generation_options(given: dict[str, Any]) -> dict[str, Any] | None:
    """Takes the options of --generate out of `given`; None without it."""
    fields = {field: given.pop(name) for name, field in GENERATION_NAMES.items()}
    fields = {field: value for field, value in fields.items() if value not in (None, ())}
    if given.pop("generate"):
        for because, names in NOT_GENERATED.items():
            if name := next(filter(_was_given, names), None):
                option = "--tp" if name == "tensor_parallel" else f"--{name.replace('_', '-')}"
                raise click.UsageError(f"{option}: {because}. Leave it out.")
        return fields
    if fields:
        option = next(name for name, field in GENERATION_NAMES.items() if field in fields)
        raise click.UsageError(f"--{option.replace('_', '-')}: only with --generate. Add it, or leave this out.")
    return None


def _generate(config: Any, fields: dict[str, Any], repository: str | None, as_json: bool) -> None:
    from pipeline.teacher.generation.answer_store import store_location
    from pipeline.teacher.generation.answering import GenerationProgress
    from pipeline.teacher.generation.answers import GenerationConfig
    from pipeline.teacher.generation.generate import generate_cache
    from pipeline.terminal.views import describe_targets, duration, pairs, size

    def show(p: GenerationProgress) -> None:
        facts = f"answers · {p.tokens_per_s:,.0f} tokens/s · {duration(p.seconds_left)} left"
        if p.passed is not None:
            facts += f" · {p.passed:,} passed"
        if p.batch_size < config.batch_size:
            facts += f" · batch size {p.batch_size} (out of memory)"
        status.step(p.answers, p.total_answers, facts)

    generation = GenerationConfig(**fields)
    with Status() as status:
        try:
            summary = generate_cache(config, generation, on_stage=status.stage, on_progress=show)
        except KeyboardInterrupt:
            again = "the same command without --overwrite" if config.overwrite else "the same command again"
            _stopped(f"answers are kept in {store_location(config.output)}. Run {again} to continue.")
    if repository is not None:
        _push(config.output, repository, private=False)
    if as_json:
        return print_json(asdict(summary))
    left_out = {name: count for name, count in summary.corpus_report.items() if count and name in LEFT_OUT}
    ended = ", ".join(f"{count:,} by {reason}" for reason, count in summary.stop_reasons.items() if count)
    passed = (
        "" if generation.keep_if is None else f", {summary.passed:,} passed ({summary.passed / summary.answers:.1%})"
    )
    out.print(
        pairs(
            f"Cached {summary.output}",
            [
                ("targets", describe_targets(config.targets.to_json())),
                ("answers", f"{summary.answers:,} to {summary.prompts:,} prompts, ended {ended}"),
                ("kept", f"{summary.rows:,} for {summary.prompts_kept:,} prompts{passed}"),
                ("tokens", f"{summary.tokens:,}, of which {summary.counted_tokens:,} count"),
                ("left out", ", ".join(f"{LEFT_OUT[n]}: {c:,}" for n, c in left_out.items()) or "nothing"),
                ("log-prob.", f"{summary.mean_logprob:.3f} nats per token of the answers kept (mean)"),
                (
                    "exact mass",
                    "see distill stats" if summary.exact_mass is None else f"{summary.exact_mass:.4f} (mean)",
                ),
                ("size", f"{size(summary.bytes)}, {summary.bytes / summary.tokens:.1f} bytes per token"),
                ("time", _time_taken(summary, "tokens/s written")),
            ],
        )
    )


# corpus report -> words; what a user should know happened to the text
LEFT_OUT = {
    "documents_cut": "documents cut into windows",
    "empty_documents": "empty documents dropped",
    "single_token_pieces": "pieces of one token dropped",
    "windows_without_targets": "windows without anything to learn dropped",
    "ignored_files": "files of other types ignored",
    "empty_prompts": "empty prompts",
    "long_prompts": "prompts that leave no room for an answer",
}


@main.command(
    "plan",
    epilog=_examples(
        "distill plan --teacher models/teacher --data data/train.jsonl --output caches/train",
        "distill plan --teacher models/teacher --data data/train.jsonl --output caches/train \\",
        "    --targets threshold --tail-threshold 0.02 --cost-per-hour 2.5",
    ),
)
@click.option(
    "--rows", type=click.IntRange(1), help="Rows to run, from all over the text. Default: some 32,768 tokens' worth."
)
@click.option("--cost-per-hour", type=float, help="Price of this machine, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(rows: int | None, cost_per_hour: float | None, seq_len: int, as_json: bool, **given: Any) -> None:
    """Predict bytes and time of a cache, before the days of work.

    Takes the options of cache-teacher, runs the teacher on a few rows, and shows other kinds of targets beside the one
    asked for. Nothing is written to --output.
    """
    _quiet_libraries()
    from pipeline.teacher.plan import plan_cache
    from pipeline.terminal.views import plan_view, size

    with Status() as status:
        plan = plan_cache(
            _cache_teacher_config(seq_len, given),
            sample_rows=rows,
            cost_per_hour=cost_per_hour,
            on_stage=status.stage,
            on_progress=lambda done, total: status.step(done, total, "rows"),
        )
        if status.silent:
            return
        if as_json:
            print_json({**asdict(plan), "fits": plan.fits})
        else:
            out.print(plan_view(plan))
        if not plan.fits:
            status.warn(
                f"{given.get('output')}: {size(plan.free_bytes or 0)} are free there, the cache will take about "
                f"{size(plan.chosen.bytes[plan.encoding])}. Choose another place, or fewer bytes."
            )


# The same words as for the real thing, but for what only that can do.
_OF_WRITING = {
    "overwrite",
    "push_to_hub",
    "as_json",
    "generate",
    *GENERATION_NAMES,
    "num_workers",
    "worker_index",
    "shard_range",
    "allow_rounding",
    "stale_after",
}
plan_command.params[:0] = [p for p in cache_teacher_command.params if p.name not in _OF_WRITING]


@main.command(
    "train-student",
    epilog=_examples(
        "distill train-student --cache caches/train --student models/student --output students/first",
        "distill train-student --cache caches/train --eval-cache caches/heldout \\",
        "    --student models/teacher --student-layers 6 --output students/six-layers",
    ),
)
@click.option(
    "--cache",
    "caches",
    required=True,
    multiple=True,
    metavar="PATH[:WEIGHT]",
    help="Cache directory or URL. Several are mixed, by their weights as in a:0.7 b:0.3 or in proportion to size.",
)
@click.option("--student", help="transformers directory, hub name, or .gguf file.")
@click.option("--student-layers", type=click.IntRange(1), help="Keep so many of its layers, evenly spaced.")
@click.option("--student-width", type=click.IntRange(1), help="Keep so many channels of its hidden state.")
@click.option("--student-intermediate", type=click.IntRange(1), help="Keep so many neurons of each MLP.")
@click.option("--student-heads", type=click.IntRange(1), help="Keep so many attention heads of each layer.")
@click.option("--student-random", is_flag=True, help="Only its architecture, with random weights.")
@click.option("--student-config", help="config.json of a student with random weights, instead of --student.")
@click.option("--lora-rank", type=click.IntRange(1), help="Train adapters (LoRA) of this rank; needs distill[peft].")
@click.option("--lora-alpha", type=float, help="Adapters count alpha/rank. Default: twice the rank.")
@click.option("--lora-dropout", type=float, help="Of what enters an adapter. Default: 0.")
@click.option("--lora-targets", default="auto", show_default=True, help="q_proj,v_proj,…; auto: all linear layers.")
@click.option("--dora", is_flag=True, help="Adapt direction and length of weights apart (DoRA).")
@click.option("--lora-head", is_flag=True, help="Adapt the vocabulary head too.")
@click.option("--merge-adapter", is_flag=True, help="Save a plain model instead of an adapter.")
@click.option("--freeze-embeddings", is_flag=True, help="Do not train token embeddings, nor a head tied to them.")
@click.option(
    "--cross-tokenizer",
    type=click.Choice(["project", "uld"]),
    help="For a student with another tokenizer: targets of the tokens both have, or sorted probabilities.",
)
@click.option("--output", required=True, help="Directory for checkpoints and the trained student.")
@click.option("--eval-cache", help="Held-out cache: evaluated during training, the best checkpoint is kept.")
@READING_OPTIONS
@click.option("--kd-weight", default=0.9, show_default=True, type=float, help="α: 0 hard labels only, 1 teacher only.")
@click.option("--temperature", type=float, help="T of the soft loss, scaled by T². Default: that of the cache.")
@click.option(
    "--tail",
    type=click.Choice(["sampled", "realized", "bucket", "renormalise", "label"]),
    help="Mass outside the exact entries: by its sample, by the teacher's own text, one class, ignored, or given "
    "to the label. Default: sampled if the cache has a sample and the divergence can use it, else bucket.",
)
@click.option(
    "--divergence",
    default="forward-kl",
    show_default=True,
    help="What the soft loss measures: forward-kl, reverse-kl, js(0.5), skew-forward-kl(0.1), skew-reverse-kl(0.1), "
    "tvd, alpha-beta(0.5,0.5), logit-mse, pairwise, my_module.my_function; sums as forward-kl:0.7,reverse-kl:0.3.",
)
@click.option(
    "--kd-schedule",
    help="α over the run, for --kd-weight: linear:FROM:TO, wsd:FROM:PEAK:TO[:WARMUP:DECAY], constant:V.",
)
@click.option("--temperature-schedule", help="T over the run, for --temperature; as --kd-schedule.")
@click.option(
    "--position-weighting",
    default="uniform",
    show_default=True,
    type=click.Choice(["uniform", "teacher-entropy", "student-entropy"]),
    help="Weight of a position: 1, or entropy / log V.",
)
@click.option(
    "--hidden-loss",
    type=click.Choice(["cosine", "mse", "normalized-mse"]),
    help="Draw hidden states to those in the cache (cache-teacher --hidden-states).",
)
@click.option("--hidden-weight", type=float, help="γ, the weight of --hidden-loss. Default: 1.")
@click.option("--layer-map", help="Which layers: uniform, last, or STUDENT:TEACHER as in 3:6,6:12. Default: uniform.")
@click.option("--resample", is_flag=True, help="Every epoch another of the cache's several samples.")
@click.option(
    "--batch-size",
    "per_device_train_batch_size",
    type=click.IntRange(1),
    help="Rows per device and forward. Default: 8.",
)
@click.option(
    "--gradient-accumulation-steps", type=click.IntRange(1), help="Forward passes per optimizer step. Default: 1."
)
@click.option("--learning-rate", type=float, help="Default: 3e-4.")
@click.option("--lr-scheduler", "lr_scheduler_type", help="Default: cosine.")
@click.option("--warmup", "warmup_steps", type=float, help="Steps, or a fraction of them if below 1. Default: 0.05.")
@click.option("--weight-decay", type=float, help="Default: 0.")
@click.option("--epochs", "num_train_epochs", type=click.FloatRange(0, min_open=True), help="Default: 1.")
@click.option("--max-steps", type=click.IntRange(1), help="Optimizer steps, instead of epochs.")
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens of input to train on, instead of either.")
@click.option("--seed", type=int, help="Order of rows, random weights, dropout. Default: 0.")
@click.option("--bf16/--no-bf16", default=None, help="bfloat16 autocast; weights stay float32.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="Less memory, more time.")
@click.option("--logging-steps", type=click.IntRange(1), help="Default: 10.")
@click.option("--eval-steps", type=click.IntRange(1), help="With --eval-cache. Default: 100.")
@click.option("--save-steps", type=click.IntRange(1), help="Default: as --eval-steps, or 500.")
@click.option(
    "--early-stopping",
    multiple=True,
    metavar="METRIC:MIN_DELTA:PATIENCE",
    help="Stop when a held-out metric has not improved by MIN_DELTA (0.01, 0.5% or noise) in PATIENCE evaluations; "
    "may be given several times. default: kl:0.5%:3 with ce:noise:3.",
)
@click.option(
    "--early-stopping-mode",
    default="all",
    show_default=True,
    type=click.Choice(["all", "any"]),
    help="How many of several conditions must hold.",
)
@click.option(
    "--num-workers",
    "dataloader_num_workers",
    type=click.IntRange(0),
    help="Processes that read the cache. Default: 0; of a URL 1.",
)
@click.option("--training-args", help="JSON file of any transformers.TrainingArguments; flags win over it.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in --output.")
@click.option("--overwrite", is_flag=True, help="Delete the student that is in --output first.")
@MODEL_OPTIONS
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train_student_command(as_json: bool, caches: tuple[str, ...], **given: Any) -> None:
    """Train a student on a cache.

    The result is an ordinary transformers directory with tokenizer. On several GPUs: torchrun --nproc-per-node N
    --no-python distill train-student …
    """
    _quiet_libraries()
    from pipeline.student.training.output_directory import last_checkpoint
    from pipeline.student.training.train import TrainStudentConfig, train_student
    from pipeline.terminal.views import mixture_lines, training_view

    if given["kd_schedule"] is not None and _was_given("kd_weight"):
        raise click.UsageError("--kd-schedule takes the place of --kd-weight: give one of them.")
    cache = caches[0] if len(caches) == 1 else caches
    config = TrainStudentConfig(cache=cache, **given)
    facts = ""

    def features(name: str, logs: dict[str, Any]) -> str:
        return f" · features {logs[name]:.4f}" if name in logs else ""

    def log(logs: dict[str, Any]) -> None:
        nonlocal facts
        if "loss" in logs:
            facts = (
                f"steps · loss {logs['loss']:.4f} · KL {logs['kl']:.4f} · CE {logs['ce']:.4f} · "
                f"agreement {logs['agreement']:.1%}{features('features', logs)} · {logs['tokens_per_s']:,.0f} tokens/s"
            )
        elif "eval_kl" in logs:
            status.line(
                f"step {logs['step']:,} held out: loss {logs['eval_loss']:.4f} · KL {logs['eval_kl']:.4f} · "
                f"CE {logs['eval_ce']:.4f} · perplexity {logs['eval_perplexity']:,.2f} · "
                f"agreement {logs['eval_agreement']:.1%}{features('eval_features', logs)}"
            )
        elif "mixture" in logs:
            for line in mixture_lines(logs["mixture"]):
                status.line(line)
        elif "stopped" in logs:
            status.line(f"step {logs['step']:,} stopped early: {'; '.join(logs['stopped'])}")

    with Status() as status:
        report: dict[str, Any] = {
            "on_stage": status.stage,
            "on_step": lambda step, total: status.step(step, total, facts),
            "on_log": log,
            "on_warning": status.warn,
        }
        try:
            summary = train_student(config, **report)
        except KeyboardInterrupt:
            if last_checkpoint(config.output) is None:
                _stopped(f"no checkpoint was saved in {config.output} yet. Start again with --overwrite.")
            _stopped(f"checkpoints are kept in {config.output}. Continue from the last one with --resume.")
    if status.silent:
        return
    if as_json:
        return print_json(asdict(summary))
    out.print(training_view(asdict(summary)))


@main.command(
    epilog=_examples("distill evaluate --cache caches/heldout --student students/first --student models/student")
)
@click.option("--cache", required=True, help="Held-out cache directory or URL.")
@click.option(
    "--student", "students", required=True, multiple=True, help="Student directory; may be given several times."
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Rows per forward pass.")
@click.option("--max-rows", type=click.IntRange(1), help="Only the first so many rows.")
@click.option("--cross-tokenizer", is_flag=True, help="Students have another tokenizer: compare where tokens agree.")
@READING_OPTIONS
@DEVICE_OPTIONS
@MODEL_OPTIONS
@click.option(
    "--json", "json_file", is_flag=False, flag_value="-", metavar="[FILE]", help="Write JSON to FILE or stdout."
)
def evaluate(students: tuple[str, ...], json_file: str | None, **given: Any) -> None:
    """Compare students with their teacher on a held-out cache."""
    _quiet_libraries()
    from pipeline.evaluation.held_out import EvaluateConfig
    from pipeline.evaluation.held_out import evaluate as run
    from pipeline.terminal.views import evaluation_view

    results = {}
    with Status() as status:
        for student in students:
            result = run(
                EvaluateConfig(student=student, **given),
                on_stage=lambda text, student=student: status.stage(f"{student}: {text}"),
                on_progress=lambda done, total: status.step(done, total, "rows"),
            )
            results[student] = asdict(result)
    if json_file != "-":
        out.print(evaluation_view(f"Held out: {given['cache']}", results))
    if json_file is not None:
        print_json({"cache": given["cache"], "students": results}, json_file)


@main.command("inspect", epilog=_examples("distill inspect caches/train --row 3"))
@click.argument("cache")
@click.option("--row", default=0, show_default=True, type=int, help="Which row; negative counts from the end.")
@click.option("--start", default=0, show_default=True, type=click.IntRange(0), help="First position shown.")
@click.option("--positions", default=32, show_default=True, type=click.IntRange(1), help="How many positions.")
@click.option("--candidates", default=4, show_default=True, type=click.IntRange(1), help="Candidates per position.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(cache: str, row: int, start: int, positions: int, candidates: int, as_json: bool) -> None:
    """Show one row, token by token, with what the teacher expected next."""
    _quiet_libraries()
    import cache_format as cf
    from pipeline.student.validation.compatibility import load_cache_tokenizer
    from pipeline.terminal.views import inspect_row, inspect_view

    opened = cf.open_cache(cache, hidden_layers=[]).with_states()
    if not -len(opened) <= row < len(opened):
        raise click.BadParameter(f"{cache} has rows 0 to {len(opened) - 1}", param_hint="--row")
    tokenizer = load_cache_tokenizer(opened)
    shown = inspect_row(
        opened,
        row % len(opened),
        lambda token: tokenizer.decode([token]),
        candidates=candidates,
        start=start,
        positions=positions,
    )
    print_json(shown) if as_json else out.print(inspect_view(shown))


@main.command(epilog=_examples("distill stats caches/train", "distill stats caches/train --json"))
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stats(cache: str, as_json: bool) -> None:
    """Show sizes, bytes per token by column, file and packed stream, exact mass and the teacher's entropy."""
    import cache_format as cf
    from pipeline.terminal.cache_statistics import cache_stats, stats_view

    found = cache_stats(cf.open_cache(cache, hidden_layers=[]))
    print_json(found) if as_json else out.print(stats_view(found))


@main.command(
    epilog=_examples(
        "distill verify caches/train",
        "distill verify caches/train --deep --against-teacher models/teacher --rows 16",
    )
)
@click.argument("cache")
@click.option("--checksums", is_flag=True, help="Every byte against its checksum: the default.")
@click.option("--deep", is_flag=True, help="Every value too: counts, ids, order, sums of probabilities, entropy.")
@click.option("--against-teacher", metavar="TEACHER", help="Compute some rows again, and compare.")
@click.option("--rows", type=click.IntRange(1), help="How many rows for --against-teacher. Default: 8.")
@DEVICE_OPTIONS
@PLACEMENT_OPTIONS
@MODEL_OPTIONS
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    cache: str, checksums: bool, deep: bool, against_teacher: str | None, rows: int | None, as_json: bool, **given: Any
) -> None:
    """Check a cache: every byte, on demand every value, and some rows against the teacher.

    Status 1 if anything is wrong, with the file and the place.
    """
    del checksums  # always
    if rows is not None and against_teacher is None:
        raise click.UsageError("--rows: only the rows for --against-teacher are counted. Name the teacher.")
    if against_teacher is None and (given["device_map"] or given["tensor_parallel"]):
        raise click.UsageError("--device-map and --tp: only the teacher of --against-teacher is spread. Name it.")
    import cache_format as cf
    from pipeline.terminal.views import pairs, size

    with Status() as status:
        summary = cf.verify_cache(cache, lambda done, total: status.step(done, total, "rows checked"), deep=deep)
        found = None
        if against_teacher is not None:
            _quiet_libraries()
            from pipeline.teacher.verification import TeacherCheckConfig, verify_against_teacher

            found = verify_against_teacher(
                TeacherCheckConfig(cache=cache, teacher=against_teacher, rows=rows or 8, **given),
                on_stage=status.stage,
                on_progress=lambda done, total: status.step(done, total, "rows computed"),
            )
    if status.silent:  # one of several processes that compute together: the first one says what came out
        return
    if as_json:
        teacher = {} if found is None else {"teacher": {**asdict(found), "allowed": found.allowed}}
        print_json({"ok": found is None or found.agrees, **asdict(summary), **teacher})
    else:
        out.print(
            f"{cache}: intact. {summary.rows:,} rows, {summary.tokens:,} tokens, {summary.entries:,} entries, "
            f"{size(summary.bytes)} in {summary.shards:,} shards: every checksum holds"
            + (", and every rule." if deep else ".")
        )
        if found is not None:
            out.print(pairs(f"Against {against_teacher}", _teacher_check(found)))
    if found is not None and not found.agrees:
        raise click.ClickException(
            f"{cache}: it is not what {against_teacher} says: off by up to {found.deviation:.2g} nats at "
            f"{found.deviation_at} (allowed {found.allowed:.2g}), same entries at {found.same_entries:.1%} of the "
            f"positions (this teacher with itself: {found.same_entries_noise:.1%}). Was it cached with other weights, "
            "another dtype or device? If not, make it again."
        )


def _teacher_check(found: Any) -> list[tuple[str, str]]:
    return [
        ("compared", f"{found.rows:,} rows, {found.positions:,} positions, {found.entries:,} log-probabilities"),
        ("deviation", f"{found.deviation:.2g} nats beyond rounding, allowed {found.allowed:.2g}"),
        ("noise", f"{found.noise:.2g} nats between two runs of the teacher on this machine"),
        ("same entries", f"{found.same_entries:.2%} of the positions; two runs: {found.same_entries_noise:.2%}"),
        ("weights", "the same" if found.same_weights else "not the same by fingerprint (or another dtype)"),
    ]


@main.command(
    epilog=_examples(
        "distill convert caches/train caches/train-packed --encoding packed",
        "distill convert caches/train caches/thinner --tail-threshold 0.125",
        "distill convert caches/top-64 caches/top-16 --top-k 16",
    )
)
@click.argument("cache")
@click.argument("output")
@click.option("--encoding", type=click.Choice(["columns", "packed"]), help="packed takes 2/3 to 4/5 of the bytes.")
@click.option(
    "--compression-level", type=click.IntRange(1, 22), help="zstd; 19 saves 5 to 10 % of columns, and is slow."
)
@click.option("--levels", type=click.IntRange(36, 256), help="Values that a log-probability may take.")
@click.option(
    "--top-k",
    type=click.IntRange(1),
    help="Keep the most likely entries; the others join the residual. Of hidden targets, make them.",
)
@click.option("--samples", type=click.IntRange(1), help="Keep the first so many samples of the tail.")
@click.option(
    "--tail-threshold", type=float, help="Thin threshold targets to this larger τ: fewer entries, still unbiased."
)
@click.option("--drop-hidden", is_flag=True, default=None, help="Without the hidden states.")
@click.option("--rows-per-shard", type=click.IntRange(1), help="Rows of a file.")
@click.option("--rows-per-record-batch", type=click.IntRange(1), help="Rows that are compressed together.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def convert(cache: str, output: str, as_json: bool, **changes: Any) -> None:
    """Write a cache again in another form: encoding, codebook, shards, fewer entries.

    What is not named stays as it is. Interrupted, the same command continues where it stopped.
    """
    import cache_format as cf
    from pipeline.terminal.views import pairs, size

    source = cf.open_cache(cache)
    with Status() as status:
        try:
            for done in cf.convert_cache(cache, output, cf.Conversion(**changes)):
                status.step(done, len(source), "rows")
        except KeyboardInterrupt:
            _stopped(f"complete shards are kept in {output}. Run the same command again to continue.")
    sizes = {path: cf.open_cache(path).manifest.stored_bytes for path in (cache, output)}
    if as_json:
        return print_json({"rows": len(source), "tokens": source.num_tokens, "bytes": sizes})
    before, after = sizes[cache], sizes[output]
    out.print(
        pairs(
            f"Converted {output}",
            [
                ("rows", f"{len(source):,}"),
                ("tokens", f"{source.num_tokens:,}"),
                ("size", f"{size(after)}, {after / source.num_tokens:.1f} bytes per token"),
                ("before", f"{size(before)}, {before / source.num_tokens:.1f} bytes per token"),
            ],
        )
    )


@main.command(epilog=_examples("distill merge caches/train"))
@click.argument("cache")
@STALE_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def merge(cache: str, stale_after: float, as_json: bool) -> None:
    """Finish a cache whose shards are all there: write its manifest.

    The last of several processes does so by itself; this is for shards that were written apart (cache-teacher
    --shard-range) and then brought together in one directory. A finished cache stays as it is.
    """
    import cache_format as cf
    from pipeline.terminal.views import size

    manifest = cf.finish_cache(cache, stale_after_s=stale_after)
    if as_json:
        summary = {"rows": manifest.num_rows, "tokens": manifest.num_tokens, "shards": len(manifest.shards)}
        return print_json({**summary, "bytes": manifest.stored_bytes})
    out.print(
        f"{cache}: finished. {manifest.num_rows:,} rows, {manifest.num_tokens:,} tokens, "
        f"{size(manifest.stored_bytes)} in {len(manifest.shards):,} shards."
    )


@main.command(epilog=_examples("distill push caches/train owner/name --private"))
@click.argument("cache")
@click.argument("repository")
@click.option("--private", is_flag=True, help="A new repository can be seen by its owner only.")
def push(cache: str, repository: str, private: bool) -> None:
    """Upload a cache to the Hugging Face hub, as a dataset.

    REPOSITORY is OWNER/NAME. Every byte is checked first. Read it as hf://datasets/OWNER/NAME, or with
    datasets.load_dataset.
    """
    _push(cache, repository, private)


def _push(cache: str, repository: str, private: bool) -> None:
    from pipeline.hub import push_cache

    with Status() as status:
        address = push_cache(
            cache,
            repository,
            private=private,
            on_stage=status.stage,
            on_progress=lambda done, total: status.step(done, total, "rows checked"),
        )
    err.print(f"Pushed to {address}")


def _was_given(parameter: str) -> bool:
    source = click.get_current_context().get_parameter_source(parameter)
    return source is not click.core.ParameterSource.DEFAULT


def _stopped(what_is_kept: str) -> NoReturn:
    if int(os.environ.get("RANK", "0")) == 0:
        err.print(f"Interrupted: {what_is_kept}")
    sys.exit(130)


if __name__ == "__main__":
    main()
