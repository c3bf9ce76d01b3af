"""The run: recipe, loop, schedules, optimizers, checkpoints, logs, evaluations. Imports loaders and models."""
