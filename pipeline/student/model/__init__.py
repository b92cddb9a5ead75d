"""The student model: loading, fewer layers, narrower layers, random initialisation, hidden-state distillation."""
