"""The training run: Trainer, loss, schedules, early stopping and checkpoints."""
