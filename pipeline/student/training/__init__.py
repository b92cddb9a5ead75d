"""The training run: trainer, loss, schedules, early stopping, output directory."""
