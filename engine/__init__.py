"""The run: recipe, loop, schedules, optimizers, checkpoints, logs, evaluations. Imports loaders, models and runtime."""
