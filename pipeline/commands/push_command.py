"""`distill push`: a cache becomes a dataset on the Hugging Face hub, a student a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from pipeline.terminal.click_options import distill_command, interrupted, json_option


def public_option() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--public/--private`, named as by the hub's own command line."""
    return click.option(
        "--public/--private",
        default=None,
        help="Visibility of a new repository; an existing one keeps its own.  [default: private]",
    )


@distill_command(
    "push",
    "distill push caches/train owner/name",
    "distill push students/first owner/student",
)
@click.argument("directory")
@click.argument("repository")
@public_option()
@json_option()
def command(directory: str, repository: str, public: bool | None, json_file: str | None) -> None:
    """Upload a cache (as a dataset) or a trained student (as a model) to the Hugging Face hub.

    REPOSITORY is OWNER/NAME. Every byte of a cache is checked first. Others can read the cache as
    hf://datasets/OWNER/NAME, or with datasets.load_dataset. A student is uploaded without its checkpoints.
    """
    from pipeline.hub import is_student
    from pipeline.terminal.console import show_result

    kind = "student" if is_student(directory) else "cache"
    address = (upload_student if kind == "student" else push)(directory, repository, bool(public))
    if json_file is not None:
        show_result(lambda: "", lambda: {kind: directory, "repository": repository, "address": address}, json_file)


def push(cache: str, repository: str, public: bool) -> str:
    from pipeline.hub import push_cache
    from pipeline.terminal.console import Status, err

    with Status() as status, _interrupt_said(cache, repository, public):
        address = push_cache(
            cache,
            repository,
            private=not public,
            on_stage=status.stage,
            on_progress=lambda done, total: status.step(done, total, "rows checked"),
        )
    err.print(f"Pushed to {address}")
    return address


def upload_student(student: str, repository: str, public: bool) -> str:
    from pipeline.hub import push_student
    from pipeline.terminal.console import Status, err

    with Status() as status, _interrupt_said(student, repository, public):
        address = push_student(student, repository, private=not public, on_stage=status.stage)
    err.print(f"Pushed to {address}")
    return address


@contextmanager
def _interrupt_said(directory: str, repository: str, public: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        again = f"distill push {directory} {repository}{' --public' if public else ''}"
        interrupted(
            f"{directory} is complete and unchanged, the upload to {repository} is not complete. To continue: {again}"
        )


def check_repository(output: str, repository: str | None, public: bool | None) -> None:
    """Before days of work rather than after."""
    check_visibility(repository, public)
    if repository is not None:
        from pipeline.hub import check_push

        check_push(output, repository)


def check_visibility(repository: str | None, public: bool | None) -> None:
    """Raises: click.UsageError for a visibility without a repository."""
    if repository is None and public is not None:
        flag = "--public" if public else "--private"
        raise click.UsageError(f"{flag}: only with --push-to-hub. Add it, or leave this out.")
