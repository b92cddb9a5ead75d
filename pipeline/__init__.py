"""What happens between a teacher and a student, one visible place per stage.

    text ─▶ pipeline.teacher ─▶ cache directory ─▶ pipeline.student ─▶ checkpoint ─▶ pipeline.evaluation.held_out

`pipeline.teacher` (stage one) and `pipeline.student` (stage two) never import each other: they meet only in the
cache directory. Both use `models` (loading, heads, tokenizers) and `options`. `importing` turns other tools' files
into caches.

Only `commands` and `terminal` print. Nothing is imported eagerly, so `import pipeline` is free.
"""
