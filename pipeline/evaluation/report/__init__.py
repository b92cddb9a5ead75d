"""One HTML file that shows where students and their teacher disagree.

report_sources.py      what was named: a cache, students, the logs of training runs
teacher_positions.py   text and teacher's distribution at every loss token, from the cache
student_positions.py   KL, CE, agreement and distribution of a student at the same positions, in one pass
bins.py                means over bins: teacher entropy, token frequency, confidence
passages.py            pieces of text to show, and the data behind each token
charts.py              SVG
provenance.py          how cache and students were made
page.py, template/     the HTML file
report.py              all of it in order
"""
