"""Training of Tiny Recursive Models on puzzles: settings, presets, loss, trainer, command."""
