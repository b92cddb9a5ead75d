"""A cache against its teacher: some rows computed again, and how far the stored targets are from them.

rounding      how much a rounding error of the teacher's dtype changes its predictions
distances     distributions, drawn tokens and states against the teacher's
criterion     how far a right cache may be away, and why
recomputation the run: rows ─▶ teacher, three times ─▶ distances ─▶ result
"""

from pipeline.teacher.verification.criterion import Comparison, TeacherCheck
from pipeline.teacher.verification.recomputation import verify_against_teacher

__all__ = ["Comparison", "TeacherCheck", "verify_against_teacher"]
