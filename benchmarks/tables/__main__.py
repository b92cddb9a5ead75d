"""`python -m benchmarks.tables`: what `make docs` runs."""

from benchmarks.tables import main

main()
