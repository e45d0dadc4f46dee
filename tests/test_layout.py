"""The package's layout: public names, folders, versions, and the tour in CONTRIBUTING.md."""

import importlib
import re
from pathlib import Path

import pytest

from looped_fast.errors import EXTRAS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "looped_fast"

# What users import, and from where. Names move within a room only; those of the last three
# modules have moved to evaluation/ and pretrained/, and still import from here (moved/).
PUBLIC = {
    "looped_fast": "LoopedTransformer ModelConfig TRMConfig TinyRecursiveModel UnsupportedModel "
    "__version__ accelerate empty_cache explain_backend from_pretrained restore",
    "looped_fast.config": "ModelConfig",
    "looped_fast.model": "Carry LoopedTransformer Solution TRMConfig TRMOutput TinyRecursiveModel",
    "looped_fast.ops": "Block GPT2 LoopSettings SharedWeights TRM block_names loop loop_mse "
    "read_in",
    "looped_fast.dropin": "UnsupportedModel accelerate explain_backend restore",
    "looped_fast.compat": "FAMILIES LOOP_FUNCS OfficialCheckpoint TransformerModel "
    "TransformerModelLooped TransformerModelTying build_model export_official_checkpoint "
    "load_official_checkpoint model_config_from_state_dict export_trm_checkpoint "
    "load_trm_checkpoint",
    "looped_fast.tasks": "EVALUATION OFFICIAL_TASK_NAMES TASKS Baseline Batch DecisionTree "
    "FixedPrompts FourierSeries LinearClassification LinearRegression Mixture "
    "NoisyLinearRegression QuadraticRegression Relu2LayerNetwork SparseLinearRegression Task "
    "TaskNotImportedError allow_task_import batch_generator batch_seed draw_batch find_task "
    "make_task randn sample_batch task_label task_name task_options",
    "looped_fast.evaluation": "Curve bootstrap_curve evaluation_batches loop_errors model_errors "
    "model_predictor position_errors prompt_errors",
    "looped_fast.pretrained": "Run TRMRun find_checkpoint from_pretrained load_run load_start "
    "load_trm_run names path train_config",
    "looped_fast.__main__": "COMMANDS main",
    "looped_fast.train": "main",
    "looped_fast.evaluate": "main",
    "looped_fast.sweep": "main",
    "looped_fast.openml": "main",
    "looped_fast.state_probes": "main",
    "looped_fast.reproduce": "main",
    "looped_fast.presets": "main preset_config",
    "looped_fast.build": "main",
    "looped_fast.env_report": "main report",
    "looped_fast.kernels": "",
    "looped_fast.baselines": "BASELINES QUICK_BASELINES averaging boosted_trees figure_baselines "
    "greedy_tree lasso least_squares nearest_neighbours on_signs ridge two_layer_network zero",
    "looped_fast.distributions": "SHIFTS sample_shifted shifted_prompts",
    "looped_fast.runs": "Run load_run",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_import_from_where_they_were(module):
    imported = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(imported, name)] == []


def test_there_are_at_most_twenty_one_rooms():
    """Folders, and modules: among these are the commands that users type."""
    rooms = {path.name for path in PACKAGE.iterdir()}
    rooms -= {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    assert len(rooms) <= 21, sorted(rooms)


def test_no_file_is_longer_than_a_sitting():
    files = [
        path
        for folder in ("looped_fast", "kernels", "benchmarks", "csrc", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    ]
    assert len(files) > 100
    assert [path for path in files if len(path.read_text().splitlines()) > 450] == []


def test_the_version_is_that_of_the_package():
    version = importlib.import_module("looped_fast").__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()


def test_messages_name_the_packages_of_an_extra():
    page = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra, packages in EXTRAS.items():
        listed = re.search(rf"^{extra} = \[(.*?)\]", page, re.DOTALL | re.MULTILINE)[1]
        names = re.findall(r'"([a-z][\w-]+)', listed)
        assert set(packages) <= set(names), extra
        assert {name.partition("-cpu")[0] for name in names} == {
            name.partition("-cpu")[0] for name in packages
        }


def test_the_tour_names_what_exists():
    """The tour has ten lines, each with a file and what happens to a prompt there."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    stops = re.findall(r"^\d+\. `([\w/.]+)`, `(\w+)`", page, re.MULTILINE)
    assert len(stops) == 10
    for file, name in stops:
        code = (ROOT / file).read_text()
        assert re.search(rf"class {name}\b|\b{name}\(", code), (file, name)
