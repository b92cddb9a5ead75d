"""The proof: do students learn from sparse targets what they learn from the teacher's whole distribution?

    text ─▶ teacher, once ─▶ hidden states on disk ─▶ a real cache for every kind of targets ─▶ students ─▶ report
                                        └────────▶ the full distribution, recomputed when needed ──┘

Two tracks. The first has a real teacher, SmolLM2-135M, and a vocabulary of 49,152; its students are small and its runs
few. The second has a teacher trained here on the same text with a vocabulary of 4,096: many arms, many seeds.

    python -m benchmarks.quality                    everything that is missing, then the report; a night on one core
    python -m benchmarks.quality --track 2          one track: two processes, one track each, fill two cores
    python -m benchmarks.quality --report-only      the report of what is there
    python -m benchmarks.quality --quick            everything tiny, to see that it runs

Each run, (track, arm, seed), is one JSON file in the work directory, written when the run is done and never repeated.

    sources    text of several domains from Debian and Python packages       r_data     character vectors of R packages
    corpora    training rows, held-out rows per domain, with their sizes     tracks     sizes, models, arms
    teachers   the teacher of each track                                     states     its hidden states, once
    caches     what `cache-teacher` would have written, from the states      dense      the loss on whole distributions
    objectives an arm's loss on a batch                                      train      one training loop for all
    metrics    students against the teacher's whole distribution             gradients  angles
    runs       what is done and what is missing                              report     tables     plot
"""
