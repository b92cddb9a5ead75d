"""Conversations as text: messages of a data set ─▶ the teacher's chat template ─▶ what the assistant says in it."""
