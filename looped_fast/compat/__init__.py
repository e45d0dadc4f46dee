"""The official code (Leiay/looped_transformer): its models, checkpoints and configurations."""

from looped_fast.compat.checkpoints import (
    OfficialCheckpoint,
    export_official_checkpoint,
    load_official_checkpoint,
    model_config_from_state_dict,
)
from looped_fast.compat.models import (
    FAMILIES,
    LOOP_FUNCS,
    TransformerModel,
    TransformerModelLooped,
    TransformerModelTying,
    build_model,
)

__all__ = [
    "FAMILIES", "LOOP_FUNCS", "OfficialCheckpoint", "TransformerModel", "TransformerModelLooped",
    "TransformerModelTying", "build_model", "export_official_checkpoint",
    "load_official_checkpoint", "model_config_from_state_dict"
]  # fmt: skip
