"""Errors of predictors on held-out prompts: models, baselines, prompts from other distributions."""

from looped_fast.evaluation.errors import (
    MIN_PROMPTS,
    Curve,
    bootstrap_curve,
    evaluation_batches,
    loop_errors,
    model_errors,
    model_predictor,
    position_errors,
    prompt_errors,
)

__all__ = [
    "MIN_PROMPTS", "Curve", "bootstrap_curve", "evaluation_batches", "loop_errors",
    "model_errors", "model_predictor", "position_errors", "prompt_errors"
]  # fmt: skip
