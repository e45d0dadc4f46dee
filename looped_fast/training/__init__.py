"""Training: settings and presets, curriculum, the loop over steps, checkpoints, processes, log."""
