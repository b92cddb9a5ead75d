"""From questions to a student: a teacher answers prompts, and a student with fewer layers learns its distributions.

    python examples/ten_lines.py --teacher demo-output/teacher --prompts demo-output/train.jsonl

The prompts are JSON lines with `messages` or `prompt`. A final answer in `messages` is ignored, because the teacher
writes its own.
"""

from __future__ import annotations

import argparse

import distill

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", default="demo-output/teacher", help="[default: %(default)s]")
parser.add_argument("--prompts", default="demo-output/train.jsonl", help="[default: %(default)s]")
parser.add_argument("--held-out", default="demo-output/heldout.jsonl", help="[default: %(default)s]")
parser.add_argument("--layers", type=int, default=20, help="layers of the student [default: %(default)s]")
parser.add_argument("--output", default="demo-output/examples/ten-lines", help="[default: %(default)s]")
given = parser.parse_args()

train, test, student = (f"{given.output}/{name}" for name in ("train", "test", "student"))
answers = {"generate": True, "gen_max_new_tokens": 48, "max_documents": 32, "seq_len": 256}

cache = distill.cache_teacher(given.teacher, given.prompts, train, **answers)
distill.cache_teacher(given.teacher, given.held_out, test, **answers)
print(f"cached {cache.tokens:,} tokens in {cache.bytes / 1e3:,.0f} kB")

run = distill.train_student(train, given.teacher, student, student_layers=given.layers, overwrite=True)
result = distill.evaluate(test, student)
print(f"trained for {run.steps} steps: KL to the teacher {result.kl:.3f} nats, agreement {result.agreement:.1%}")
