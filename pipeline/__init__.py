"""What happens between a teacher and a student, one visible place per stage.

    text ─▶ pipeline.teacher ─▶ cache directory ─▶ pipeline.student ─▶ checkpoint ─▶ pipeline.evaluation.held_out

`pipeline.teacher` (stage one) and `pipeline.student` (stage two) never import each other: they meet only in the
cache directory. What both need stands beside them: `models` (loading), `heads` (hidden states and the vocabulary
head, a chunk of positions at a time), `tokenizers` (fingerprints), `losses` (sparse divergences and the fused head).

Nothing here prints or parses options; `cli.py` does. Nothing is imported eagerly, so `import pipeline` is free.
"""
