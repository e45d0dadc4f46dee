"""Importing the package does nothing but define it."""

import subprocess
import sys

SCRIPT = """
import sys, torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum()
import looped_fast
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum())
heavy = {"triton", "matplotlib", "tensorboard", "wandb", "tyro", "sklearn", "looped_fast.train"}
print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())
"""


def test_importing_has_no_side_effects_and_pulls_in_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stderr
