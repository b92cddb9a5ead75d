"""The student: loaded, cut down, or built from a configuration; and hidden-state distillation."""
