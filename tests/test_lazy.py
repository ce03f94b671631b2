"""Names that are imported when first used, and names that moved: old imports work and say where to."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastclstm

MOVED = {
    "fastclstm.adapters.keras.from_keras": "fastclstm.convert.keras",
    "fastclstm.adapters.keras.load_weights": "fastclstm.convert.keras",
    "fastclstm.adapters.torch.from_torch": "fastclstm.convert.torch",
    "fastclstm.adapters.torch.to_torch": "fastclstm.convert.torch",
    "fastclstm.cli.app": "fastclstm.commands",
    "fastclstm.cli.main": "fastclstm.commands",
    "fastclstm.layers.EarlyStopping": "fastclstm.training",
    "fastclstm.layers.EncoderForecaster": "fastclstm.models",
    "fastclstm.layers.History": "fastclstm.training",
    "fastclstm.layers.Sequential": "fastclstm.models",
}


@pytest.mark.parametrize("old", MOVED)
def test_what_moved_is_found_and_says_where_it_is(old):
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"^{old} is {MOVED[old]}.{name} now$") as warned:
        exec(f"from {module} import {name}", scope := {})
    assert scope[name] is getattr(importlib.import_module(MOVED[old]), name)
    assert {warning.filename for warning in warned} == {"<string>"}  # the importing line, not ours
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        _ = importlib.import_module(module).nothing


def test_a_room_is_imported_when_first_used():
    rooms = "adapters", "convert", "datasets", "functional", "io", "layers", "models", "nn", "training"
    code = f"""
import fastclstm, sys
for room in {rooms!r}:
    assert room in dir(fastclstm)
    assert getattr(fastclstm, room) is sys.modules["fastclstm." + room]
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(fastclstm.__file__).parents[1], check=True)


@pytest.mark.parametrize("room", ["convert", "io", "nn"])
def test_so_is_all_that_stands_in_it(room):
    """In a process of its own: what another test has imported stands there in any case."""
    code = f"""
import inspect, pathlib, fastclstm
package = fastclstm.{room}
files = {{path.stem for path in pathlib.Path(package.__file__).parent.glob("*.py")}} - {{"__init__"}}
missing = files - set(dir(package))
inner = {{"keras_graphs", "keras_layers", "onnx_builder", "onnx_export", "onnx_forecasting", "onnx_layers",
         "onnx_operators", "onnx_recurrent", "torch_calls", "torch_cells", "torch_dialects", "torch_grus",
         "torch_probing", "torch_recognition"}}
assert missing <= inner, missing
assert all(inspect.ismodule(getattr(package, name)) for name in files - missing)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(fastclstm.__file__).parents[1], check=True)


def test_type_checkers_know_every_public_name():
    """They are shown no __getattr__, so that they find a name that is not there."""
    tree = ast.parse(Path(fastclstm.__file__).read_text())
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {(alias.asname, node.module) for node in branch.body for alias in node.names}
    assert told == {(name, home.removesuffix(f".{name}")) for name, home in fastclstm._HOME.items()}


@pytest.mark.slow
def test_mypy_finds_a_name_that_is_not_there(tmp_path):
    pytest.importorskip("mypy")
    user = tmp_path / "user.py"
    user.write_text(
        "import fastclstm\n"
        "from fastclstm import ConvLSTM2D, NotThere\n"
        "from fastclstm.layers import NotThereEither\n"
        "fastclstm.nn.losses.WeightedSum, fastclstm.convert.keras.load_weights, fastclstm.io.weights.load\n"
        "fastclstm.nn.no_such\n"
    )
    root = Path(fastclstm.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "mypy", user], cwd=root, capture_output=True, text=True)
    found = [line.partition("error: ")[2] for line in done.stdout.splitlines() if "error: " in line]
    assert [line.partition(" has no attribute ")[2] for line in found] == [
        '"NotThere"  [attr-defined]', '"NotThereEither"  [attr-defined]', '"no_such"  [attr-defined]'
    ]  # fmt: skip
