"""Models, checkpoints and configurations of public code.

That is the official code (Leiay/looped_transformer), and that of the Tiny Recursive Model
(SamsungSAILMontreal/TinyRecursiveModels).
"""

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
from looped_fast.compat.trm import export_trm_checkpoint, load_trm_checkpoint

__all__ = [
    "FAMILIES", "LOOP_FUNCS", "OfficialCheckpoint", "TransformerModel", "TransformerModelLooped",
    "TransformerModelTying", "build_model", "export_official_checkpoint", "export_trm_checkpoint",
    "load_official_checkpoint", "load_trm_checkpoint", "model_config_from_state_dict",
]  # fmt: skip
