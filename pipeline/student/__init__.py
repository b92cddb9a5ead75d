"""Stage two: train a student on a cache. Never imports `pipeline.teacher`: the cache has all it needs.

cache ─▶ data/ (rows ─▶ batches) ─▶ training/forward (hidden states ─▶ fused head) ─▶ training/trainer ─▶ checkpoint

validation/   checks before any weights are loaded
model/        creating the student, hidden-state distillation
"""
