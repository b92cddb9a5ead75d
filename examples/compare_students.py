"""Several students from one cache, compared on held-out text: the teacher is not run again.

    python examples/compare_students.py --cache demo-output/caches/train --held-out demo-output/caches/heldout

The students differ in `kd_weight`, the weight of the teacher's distributions in the loss. 0 is the
baseline: the text alone.
"""

from __future__ import annotations

import argparse

import distill

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cache", default="demo-output/caches/train", help="[default: %(default)s]")
parser.add_argument("--held-out", default="demo-output/caches/heldout", help="[default: %(default)s]")
parser.add_argument("--student", default="demo-output/teacher", help="model to start from [default: %(default)s]")
parser.add_argument("--layers", type=int, default=6, help="layers to keep of that model [default: %(default)s]")
parser.add_argument("--steps", type=int, default=10, help="[default: %(default)s]")
parser.add_argument("--output", default="demo-output/examples/compared", help="[default: %(default)s]")
given = parser.parse_args()

students = {}
for kd_weight in (0.0, 0.5, 0.9):
    students[kd_weight] = f"{given.output}/kd-{kd_weight}"
    distill.train_student(
        *(given.cache, given.student, students[kd_weight]),
        student_layers=given.layers,
        kd_weight=kd_weight,
        max_steps=given.steps,
        batch_size=2,
        learning_rate=1e-3,
        overwrite=True,
    )

print(f"{'kd_weight':>9}  {'KL to teacher':>17}  {'CE':>7}  {'agreement':>9}")
for kd_weight, student in students.items():
    found = distill.evaluate(given.held_out, student)
    kl = found.metrics["kl"]
    error = "" if kl.error is None else f" ± {kl.error:.4f}"
    print(f"{kd_weight:9}  {f'{kl.value:.4f}{error}':>17}  {found.ce:7.4f}  {found.agreement:9.1%}")

page = distill.report(given.held_out, f"{given.output}/report.html", student=tuple(students.values()))
print(f"a report of where they disagree with the teacher: {page.output}")
