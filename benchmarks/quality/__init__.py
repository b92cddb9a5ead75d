"""Do students learn as much from sparse targets as from the teacher's full distribution?

    text ─▶ teacher, once ─▶ hidden states on disk ─▶ a real cache for every kind of targets ─▶ students ─▶ report
                                        └────────▶ the full distribution, recomputed when needed ──┘

Two tracks. Track 1 has a real teacher, SmolLM2-135M, with a vocabulary of 49,152, small students and few runs. Track 2
has a teacher that is trained here on the same text, with a vocabulary of 4,096, and has many arms and seeds.

    python -m benchmarks.quality                    run what is missing, then write the report; a night on one core
    python -m benchmarks.quality --track 2          one track; two processes with a track each use two cores
    python -m benchmarks.quality --report-only      the report of the finished runs
    python -m benchmarks.quality --quick            everything tiny, as a smoke test

Each run (track, arm, seed) is one JSON file in the work directory, written when the run is finished and never repeated.

    sources    text of several domains from Debian and Python packages       r_data     character vectors of R packages
    corpora    training rows, held-out rows per domain, with their sizes     tracks     sizes, models, arms
    teachers   the teacher of each track                                     states     its hidden states, once
    caches     the caches of `cache-teacher`, from the states                dense      the loss on full distributions
    objectives an arm's loss on a batch                                      train      one training loop for all arms
    metrics    student compared with the teacher's full distribution         gradients  angles between gradients
    runs       runs, finished and missing                                    report     tables     plot     line
"""
