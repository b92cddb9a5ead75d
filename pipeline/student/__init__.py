"""Stage two: a cache and a student become a checkpoint. The teacher is nowhere near.

    cache ─▶ data (rows ─▶ batches) ─▶ forward (hidden states ─▶ fused head) ─▶ trainer ─▶ checkpoint
    students: where the student comes from

Never imports `pipeline.teacher`: everything known of the teacher is in the cache.
"""
