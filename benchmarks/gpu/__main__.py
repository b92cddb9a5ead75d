"""The command: runs the parts and records their tables."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

import click
import torch

from benchmarks import measure
from benchmarks.gpu.bench import QUICK, RATE, Bench, Sizes, card
from benchmarks.gpu.fused_head import head
from benchmarks.gpu.stages import capture, loader, training
from benchmarks.gpu.target_selection import selection
from benchmarks.measure import Result, Table
from pipeline.models.devices import kernels

RESULTS = Path(__file__).parents[1] / "results"

PARTS = {
    "card": card,
    "capture": capture,
    "selection": selection,
    "training": training,
    "head": head,
    "loader": loader,
}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option(
    "--quick", is_flag=True, help="Use tiny sizes on any device. The numbers mean nothing and are not recorded."
)
@click.option(
    "--results", type=click.Path(path_type=Path), help="Directory for the results [default: benchmarks/results]"
)
def main(parts: tuple[str, ...], quick: bool, results: Path | None) -> None:
    """Measure both stages on a CUDA device. Example: python -m benchmarks.gpu card capture"""
    if not torch.cuda.is_available() and not quick:
        raise click.ClickException("no CUDA device: this benchmark needs one. `--quick` runs it tiny on a CPU.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    directory = results or (None if quick else RESULTS)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device=device, sizes=QUICK if quick else Sizes(), scratch=Path(scratch))
        for name in dict.fromkeys(("card", *(parts or PARTS))):
            try:
                bench.tables += PARTS[name](bench)
            except Exception as error:  # whatever it is, the other parts are worth their time on the GPU
                traceback.print_exc()
                bench.failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            result = _result(bench)
            if directory is not None:
                measure.write(result, directory, "python -m benchmarks.gpu")
        measure.show(result)
    if bench.failures:
        raise click.ClickException(f"failed: {', '.join(bench.failures)}")


def _result(bench: Bench) -> Result:
    shares = {
        f"{table.title.split(',')[0].lower()}_share": round(
            max(float(row[table.columns.index(RATE)]) for row in table.rows), 3
        )
        for table in bench.tables
        if RATE in table.columns
    }
    failed = [Table("Failed parts", ["part", "error"], list(bench.failures.items()))] if bench.failures else []
    return Result(
        name="gpu",
        question="Both stages on one GPU: tokens per second, and the share of what its products and its memory can do.",
        bound="the rate of a large bf16 product on the same card, over the operations that the models need.",
        settings={
            "row_tokens_in_training": bench.sizes.row_tokens[0],
            "tokens_per_step": bench.sizes.step_tokens,
            "triton_kernels": kernels.kernels_on(bench.device) is not None,
        },
        tables=[*bench.tables, *failed],
        summary={"tflops": round(bench.flops / 1e12, 1), "tb_per_s": round(bench.bandwidth / 1e12, 2), **shares},
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
