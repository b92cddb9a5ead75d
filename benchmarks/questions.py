"""Everyday questions for the teacher of the demo. Those for training and those held out are about different topics."""

from __future__ import annotations

from pathlib import Path

from benchmarks.files import write_json_lines

FORMS = (
    "What is {}? Answer in two sentences.",
    "Why is {} important? Answer in two sentences.",
    "Describe {} to a child in two sentences.",
)
TOPICS = (
    *("the moon", "the sun", "rain", "snow", "a rainbow", "a volcano", "an earthquake", "the ocean", "a river"),
    *("a desert", "a forest", "a mountain", "an island", "a glacier", "wind", "lightning", "gravity", "light"),
    *("sound", "heat", "water", "ice", "salt", "sugar", "gold", "iron", "glass", "paper", "wood", "bread", "cheese"),
    *("honey", "rice", "chocolate", "coffee", "tea", "an apple", "a bicycle", "a car", "a train", "a ship"),
    *("an airplane", "a bridge", "a library", "a museum", "a school", "a hospital", "a garden", "a farm", "a dog"),
    *("a cat", "a horse", "an elephant", "a whale", "a bee", "a butterfly", "a spider", "an owl", "a penguin"),
    *("a shark", "a tree", "a flower", "a seed", "a mushroom", "the heart", "the brain", "the skin", "blood", "sleep"),
    *("exercise", "a vaccine", "music", "a piano", "a guitar", "a painting", "a novel", "a poem", "a map", "a clock"),
    *("money", "a bank", "a computer", "the internet", "a telephone", "a camera", "a robot", "a battery"),
    *("electricity", "a magnet", "a telescope", "a microscope", "a satellite", "football", "chess", "swimming"),
)
HELD_OUT_EVERY = 8  # topics, the first one included


def questions(*, held_out: bool) -> list[str]:
    topics = [topic for i, topic in enumerate(TOPICS) if (i % HELD_OUT_EVERY == 0) == held_out]
    return [form.format(topic) for topic in topics for form in FORMS]


def chat(question: str) -> dict[str, list[dict[str, str]]]:
    """A row of data: the question as a chat without an answer."""
    return {"messages": [{"role": "user", "content": question}]}


def write_questions(file: Path, *, held_out: bool) -> None:
    """Writes the questions as chats without an answer."""
    write_json_lines(file, map(chat, questions(held_out=held_out)))
