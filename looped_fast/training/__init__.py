"""Training: settings, presets, curriculum, the training loop, checkpoints, processes, log."""
