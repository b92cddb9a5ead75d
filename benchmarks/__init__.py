"""Benchmarks of the project, each next to its theoretical bound: `python -m benchmarks`.

Every benchmark is a module with a function `run(settings) -> Result`. Its docstring says what is measured and against
which bound; `measure` holds the shared code, `text` and `teacher` the input. Results are ratios and medians of
interleaved repetitions, recorded with the machine in `benchmarks/results/`. `tables` writes them into the docs.
"""
