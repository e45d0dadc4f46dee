"""The GPU kernels (Triton), and the host code that launches them."""
