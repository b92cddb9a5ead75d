"""Caches that other tools made: `distill import` reads them, `distill export` writes two of their formats.

    files ──readers──▶ ForeignRow ──row_mapping──▶ cf.CacheRow

A reader knows how one tool writes tokens and lists of entries. Everything else exists once, in `row_mapping`: shift,
normalisation, loss mask, documents, checks. `survey` reads the source once before anything is written.
"""
