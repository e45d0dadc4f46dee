"""Fast looped transformers; see README.md. Importing the package has no side effects."""

from pathlib import Path

_HERE = Path(__file__).parent
__path__.append(str(_HERE / "moved"))  # old names of modules that have moved
if not (_HERE / "kernels").is_dir():  # a source tree: kernels/ and csrc/ lie beside this folder
    __path__.append(str(_HERE.parent))

from looped_fast.config import VERSION as __version__  # noqa: E402
from looped_fast.config import ModelConfig  # noqa: E402
from looped_fast.dropin import (  # noqa: E402
    UnsupportedModel,
    accelerate,
    explain_backend,
    restore,
)
from looped_fast.model import LoopedTransformer, TinyRecursiveModel, TRMConfig  # noqa: E402
from looped_fast.ops.cpu_engine import empty_cache  # noqa: E402
from looped_fast.pretrained import from_pretrained  # noqa: E402

__all__ = [
    "LoopedTransformer", "ModelConfig", "TRMConfig", "TinyRecursiveModel", "UnsupportedModel",
    "__version__", "accelerate", "empty_cache", "explain_backend", "from_pretrained", "restore",
]  # fmt: skip
