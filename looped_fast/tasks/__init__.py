"""Function classes, those of the package and your own, and prompts of (x, f(x)) drawn from them."""

from looped_fast.tasks.base import Baseline, Task, randn
from looped_fast.tasks.functions import (
    OFFICIAL_TASK_NAMES,
    DecisionTree,
    FourierSeries,
    LinearClassification,
    LinearRegression,
    NoisyLinearRegression,
    QuadraticRegression,
    Relu2LayerNetwork,
    SparseLinearRegression,
)
from looped_fast.tasks.mixture import Mixture
from looped_fast.tasks.registry import (
    TASKS,
    TaskNotImportedError,
    allow_task_import,
    find_task,
    make_task,
    task_label,
    task_name,
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
    "EVALUATION", "OFFICIAL_TASK_NAMES", "TASKS", "Baseline", "Batch", "DecisionTree",
    "FixedPrompts", "FourierSeries", "LinearClassification", "LinearRegression", "Mixture",
    "NoisyLinearRegression", "QuadraticRegression", "Relu2LayerNetwork", "SparseLinearRegression",
    "Task", "TaskNotImportedError", "allow_task_import", "batch_generator", "batch_seed",
    "draw_batch", "find_task", "make_task", "randn", "sample_batch", "task_label", "task_name",
    "task_options"
]  # fmt: skip
