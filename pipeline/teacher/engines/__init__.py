"""What runs a teacher: one interface, and an implementation for each way to run one.

Capture, plan, verification and generation use an engine and nothing else of a teacher.
"""
