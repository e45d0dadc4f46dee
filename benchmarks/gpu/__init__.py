"""Measure on a GPU, from the source tree: ``python -m benchmarks.gpu``. See README.md here."""
