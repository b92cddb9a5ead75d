"""What the project costs, measured side by side with what it could cost: `python -m benchmarks`.

Every benchmark is a module with a function `run(settings) -> Result`. Its docstring says what is measured and which
bound the number stands beside; `measure` has what they share, `text` and `teacher` the input. Results are ratios and
medians of interleaved repetitions, recorded with the machine in `benchmarks/results/`.
"""
