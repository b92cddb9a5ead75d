"""Models and tokenizers of transformers: loading, the vocabulary head, placement on devices, and fingerprints."""
