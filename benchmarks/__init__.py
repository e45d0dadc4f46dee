"""Speed and memory.

``python -m benchmarks.compare`` compares the engine with plain PyTorch and writes a report;
``pytest benchmarks --benchmark-only`` times the engine's parts, to find regressions.
"""
