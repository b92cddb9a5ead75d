"""A cache against its teacher: some rows computed again, and how far the stored targets are from them.

rounding      how much a rounding error of the teacher's dtype changes its predictions
distances     distributions, drawn tokens and states against the teacher's
criterion     how far a correct cache may differ, and why
row_check     one row: three runs of the teacher ─▶ distances
loaded_teacher, served_teacher: in this process, on a server
recomputation the whole: rows ─▶ teacher ─▶ result
"""

from pipeline.teacher.verification.criterion import Comparison, TeacherCheck
from pipeline.teacher.verification.recomputation import verify_against_teacher

__all__ = ["Comparison", "TeacherCheck", "verify_against_teacher"]
