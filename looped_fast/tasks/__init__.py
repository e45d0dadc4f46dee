"""The function classes of the paper, and prompts of (x, f(x)) drawn from them."""

from looped_fast.tasks.functions import (
    OFFICIAL_TASK_NAMES,
    TASKS,
    DecisionTree,
    LinearRegression,
    NoisyLinearRegression,
    Relu2LayerNetwork,
    SparseLinearRegression,
    Task,
    make_task,
    task_options,
)
from looped_fast.tasks.sampling import (
    EVALUATION,
    Batch,
    FixedPrompts,
    batch_generator,
    batch_seed,
    draw_batch,
    sample_batch,
)

__all__ = [
    "EVALUATION", "OFFICIAL_TASK_NAMES", "TASKS", "Batch", "DecisionTree", "FixedPrompts",
    "LinearRegression", "NoisyLinearRegression", "Relu2LayerNetwork", "SparseLinearRegression",
    "Task", "batch_generator", "batch_seed", "draw_batch", "make_task", "sample_batch",
    "task_options"
]  # fmt: skip
