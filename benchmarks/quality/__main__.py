"""Command line of the benchmark; the package docstring describes it."""

from __future__ import annotations

import warnings
from pathlib import Path

import click
from transformers.utils import logging

from benchmarks import measure
from benchmarks.demo import unpacked_teacher
from benchmarks.quality import report
from benchmarks.quality.runs import prepare, run_missing, track_directory
from benchmarks.quality.sources import load_domains
from benchmarks.quality.tracks import LABELS, TRACKS, Arm, Track, quick
from benchmarks.teacher import check_teacher

BENCHMARKS = Path(__file__).parents[1]


@click.command()
@click.option("--track", "numbers", multiple=True, type=click.IntRange(1, 2), help="Track to run [default: both]")
@click.option(
    "--work",
    default=BENCHMARKS / "work" / "quality",
    type=click.Path(path_type=Path),
    help="Directory for text, caches and finished runs [default: benchmarks/work/quality]",
)
@click.option(
    "--results", type=click.Path(path_type=Path), help="Directory for the report [default: benchmarks/results]"
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    help="Teacher of track 1, a transformers directory. Default: SmolLM2, unpacked.",
)
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Directory of .txt files, one per domain.")
@click.option("--seeds", type=click.IntRange(1), help="Number of runs per arm [default: 2 in track 1, 5 in track 2]")
@click.option("--arms", multiple=True, help="Run only arms whose name contains this text, and the references.")
@click.option("--quick", "is_quick", is_flag=True, help="Use tiny sizes; the report is written only to --results.")
@click.option("--prepare-only", is_flag=True, help="Only prepare text, teacher and caches.")
@click.option("--report-only", is_flag=True, help="Only write the report of the finished runs.")
def main(
    numbers: tuple[int, ...],
    work: Path,
    results: Path | None,
    teacher: Path | None,
    text: Path | None,
    seeds: int | None,
    arms: tuple[str, ...],
    is_quick: bool,
    prepare_only: bool,
    report_only: bool,
) -> None:
    """Train students on every kind of targets and compare them. Resumes after an interruption.

    Example: python -m benchmarks.quality --track 2 --arms threshold --seeds 1
    """
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    results = results or (None if is_quick else BENCHMARKS / "results")
    tracks = [TRACKS[number] for number in sorted(numbers or TRACKS, reverse=True)]  # the faster one first
    if is_quick:
        work, tracks = work / "quick", [quick(track) for track in tracks]
    plans = [(track, chosen(track, arms), range(seeds or track.seeds)) for track in tracks]
    if not report_only:
        domains = load_domains(work, text)
        if any(track.teacher is None for track in tracks):
            teacher = teacher or unpacked_teacher(work)
            check_teacher(teacher)  # fail before the hours of the other track
        for track, wanted, seed_range in plans:
            prepared = prepare(track, wanted, domains, work, teacher)
            if not prepare_only:
                run_missing(prepared, wanted, seed_range)
    if prepare_only:
        return
    found = report.build([(track, wanted, seeds, track_directory(track, work)) for track, wanted, seeds in plans])
    measure.show(found.result)
    if results is not None:
        report.write(found, results)


def chosen(track: Track, parts: tuple[str, ...]) -> list[Arm]:
    """Arms whose name contains one of `parts`, and the labels and full arms that they are compared with.

    Raises: click.ClickException if no arm's name contains a part.
    """
    for part in parts:
        if not any(part in arm.name for arm in track.arms):
            names = ", ".join(arm.name for arm in track.arms)
            raise click.ClickException(f"--arms {part}: no arm of track {track.number} has it in its name: {names}.")
    named = [arm for arm in track.arms if not parts or any(part in arm.name for part in parts)]
    regimes = {LABELS.regime, *(arm.regime for arm in named)}
    return [arm for arm in track.arms if arm in named or (arm.is_reference and arm.regime in regimes)]


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.quality")
