"""The command; see the package for what it does."""

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
@click.option("--track", "numbers", multiple=True, type=click.IntRange(1, 2), help="Which track [default: both]")
@click.option(
    "--work",
    default=BENCHMARKS / "work" / "quality",
    type=click.Path(path_type=Path),
    help="Where text, caches and finished runs are [default: benchmarks/work/quality]",
)
@click.option("--results", type=click.Path(path_type=Path), help="Where the report goes [default: benchmarks/results]")
@click.option(
    "--teacher", type=click.Path(path_type=Path), help="Of track 1, transformers directory. Default: SmolLM2, unpacked."
)
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="A directory of .txt files, one per domain.")
@click.option("--seeds", type=click.IntRange(1), help="Runs of each arm [default: 2 in track 1, 5 in track 2]")
@click.option("--arms", multiple=True, help="Only arms whose name has this in it, besides the references.")
@click.option("--quick", "is_quick", is_flag=True, help="Everything tiny; the report is written only to --results.")
@click.option("--prepare-only", is_flag=True, help="Only text, teacher and caches.")
@click.option("--report-only", is_flag=True, help="Only the report of the runs that are there.")
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
    """Train students from every kind of targets and compare them. Resumes where it was stopped.

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
            check_teacher(teacher)  # before the hours of the other track
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
    """Arms by parts of their names, with the labels and full arms that they are compared with.

    Raises: click.ClickException if a part is in no arm's name.
    """
    for part in parts:
        if not any(part in arm.name for arm in track.arms):
            names = ", ".join(arm.name for arm in track.arms)
            raise click.ClickException(f"--arms {part}: in no arm of track {track.number}. There are {names}.")
    named = [arm for arm in track.arms if not parts or any(part in arm.name for part in parts)]
    regimes = {LABELS.regime, *(arm.regime for arm in named)}
    return [arm for arm in track.arms if arm in named or (arm.is_reference and arm.regime in regimes)]


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.quality")
