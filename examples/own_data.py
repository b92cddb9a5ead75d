"""Cache text from your own program: `data` may be any iterable of dicts, such as a generator over a database.

    python examples/own_data.py --teacher demo-output/teacher

The keys are the columns that a file would have: `text`, `messages`, `prompt` with `completion`, or `input_ids`
(docs/data.md). With `prompt` and `completion`, only the completion is in the loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from transformers import AutoTokenizer

import distill

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", default="demo-output/teacher", help="[default: %(default)s]")
parser.add_argument("--output", default="demo-output/examples/own-data", help="[default: %(default)s]")
parser.add_argument("--count", type=int, default=100, help="number of examples [default: %(default)s]")
given = parser.parse_args()


def lessons(count: int) -> Iterator[dict[str, str]]:
    for i in range(count):
        a, b = i % 13 + 2, i % 7 + 3
        yield {
            "prompt": f"How many apples are in {a} baskets of {b}?",
            "completion": f" Each of the {a} baskets has {b} apples, so there are {a} × {b} = {a * b}.",
        }


summary = distill.cache_teacher(given.teacher, lessons(given.count), given.output, seq_len=128, overwrite=True)
print(f"cached {summary.rows} rows, {summary.loss_tokens:,} of {summary.tokens:,} tokens are loss tokens")

tokenizer = AutoTokenizer.from_pretrained(given.teacher)
row = distill.open_cache(given.output)[0]
print("the teacher's most likely tokens in the first completion:")
for t in row.loss_mask.nonzero()[0][:8]:
    ids, logprobs = row.targets.at(t)
    choice, label = tokenizer.decode([ids[logprobs.argmax()]]), tokenizer.decode([row.label_ids[t]])
    print(f"  {label!r:12} teacher: {choice!r:12} entropy {row.targets.entropy[t]:.2f} nats")
