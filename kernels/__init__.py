"""The GPU kernels (Triton). None yet: ``looped_fast.explain_backend`` says so."""
