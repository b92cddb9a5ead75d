"""`python -m benchmarks`: run the benchmarks, print their tables and one line of JSON each, and record them.

python -m benchmarks                        all of them, twenty minutes on two cores
python -m benchmarks fused_loss             one
python -m benchmarks --quick                everything small, as a smoke test; recorded only with --results
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import click
from transformers.utils import logging

from benchmarks import measure

NAMES = (
    "fused_loss",
    "loss_counts",
    "compiled_kernels",
    "training_step",
    "compiled_layers",
    "loader",
    "capture",
    "stage_one_counts",
    "scaling",
    "decode",
    "encoding",
    "sizes",
    "hidden_targets",
    "codebook",
    "temperature",
    "variance",
    "reading",
    "shuffle",
    "engines",
    "servers",
    "server_rounding",
)
NEED_VLLM = {"engines", "servers", "server_rounding"}
RESULTS = Path(__file__).parent / "results"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--quick", is_flag=True, help="Use tiny sizes. The numbers mean nothing and are not recorded by default.")
@click.option("--repetitions", default=5, show_default=True, help="Rounds of every timing.")
@click.option(
    "--teacher",
    default=measure.Settings.teacher,
    type=click.Path(path_type=Path),
    show_default=True,
    help="Teacher, a transformers directory; `make demo` creates the default one.",
)
@click.option(
    "--results", type=click.Path(path_type=Path), help="Directory for the results [default: benchmarks/results]"
)
def main(names: tuple[str, ...], quick: bool, repetitions: int, teacher: Path, results: Path | None) -> None:
    """Run the benchmarks. Example: python -m benchmarks fused_loss --repetitions 7"""
    logging.disable_progress_bar()
    settings = measure.Settings(quick=quick, repetitions=repetitions, teacher=teacher)
    directory = results or (None if quick else RESULTS)
    everything = [name for name in NAMES if name not in NEED_VLLM or importlib.util.find_spec("vllm") is not None]
    for name in names or everything:
        result = importlib.import_module(f"benchmarks.{name}").run(settings)
        measure.show(result)
        if directory is not None:
            measure.write(result, directory, f"python -m benchmarks {name} --repetitions {repetitions}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
