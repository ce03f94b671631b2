"""Arrows point down only: commands → convert → models → training → layers → functional → dispatch → engines → spec.

And no module is imported by what it imports, however far round: also not within a function or for types alone.
"""

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastclstm

ROOT = Path(fastclstm.__file__).parent
FLOORS = {"lazy": 0, "spec": 0, "nn": 1, "engines": 2, "dispatch": 3, "functional": 4, "io": 5, "layers": 6,
          "training": 7, "models": 8, "datasets": 8, "baselines": 8, "verification": 8, "viz": 8,
          "convert": 9, "adapters": 9}  # fmt: skip
"""Every other room is on top: the command line."""
TOP = 10
SHARED = {"cell_updates", "cells", "disk_cache", "forks", "lending", "notices", "recurrence", "remembered"}
"""Modules of engines/ that every engine may use."""

LONGEST = 750
"""Lines of a file."""

HEAVY = {"numba", "llvmlite", "torch", "keras", "tensorflow", "jax", "onnx", "dask", "xarray", "safetensors", "h5py",
         "sklearn", "scipy", "matplotlib", "PIL", "tqdm", "typer", "click", "rich"}  # fmt: skip


def is_module(name):
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(source, package):
    """Full names of the modules that a source imports, wherever in it; `package` resolves relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if base == "fastclstm":  # a module, or a public name that lives in one
                    yield name if is_module(name) else fastclstm._HOME.get(alias.name, base)
                else:
                    yield name if base.startswith("fastclstm.") and is_module(name) else base


def floor(module):
    room = module.split(".")[1] if "." in module else None
    return -1 if room is None else FLOORS.get(room, TOP)  # the package itself: its version, and public names


def engine(module):
    """Name of the engine a module is part of; what the engines share is no engine."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["fastclstm", "engines"] and len(parts) > 2 and parts[2] not in SHARED else None


def violation(importer, imported):
    """What is wrong with an import, or None."""
    if not imported.startswith("fastclstm"):
        if importer.split(".")[1:2] == ["spec"] and imported.partition(".")[0] not in {
            "numpy",
            *sys.stdlib_module_names,
        }:
            return f"{importer} imports {imported}, but spec imports numpy alone"
        return None
    if floor(imported) > floor(importer):
        return f"{importer} imports {imported}, which stands above it"
    if floor(imported) == floor(importer) == FLOORS["engines"] and engine(imported) not in (None, engine(importer)):
        return f"{importer} imports {imported}, another engine"
    return None


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        package = ".".join(parts[:-1])
        yield package if parts[-1] == "__init__" else ".".join(parts), package, path.read_text(encoding="utf-8")


SOURCES = {name: (package, source) for name, package, source in modules() if name != "fastclstm"}


def circle(sources):
    """A circle of imports among modules, each after one that imports it, or nothing."""
    graph = {name: set(imports(source, package)) & set(sources) for name, (package, source) in sources.items()}
    for name, imported in graph.items():
        imported.discard(name)  # a package names what is in it
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.mark.parametrize("name", SOURCES)
def test_arrows_point_down(name):
    package, source = SOURCES[name]
    assert [wrong for imported in imports(source, package) if (wrong := violation(name, imported))] == []


def test_no_file_is_more_than_one_room():
    """So long a file has a seam somewhere; split it by what its parts are about."""
    lengths = {name: source.count("\n") for name, (_, source) in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_the_rooms_are_there():
    assert {"fastclstm.spec", "fastclstm.dispatch", "fastclstm.functional", "fastclstm.engines.reference"} <= set(
        SOURCES
    )
    assert {room for name in SOURCES if (room := name.split(".")[1]) in FLOORS} == set(FLOORS)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("fastclstm.spec.windows", "import numba"),
        ("fastclstm.spec.windows", "from ..nn import activations"),
        ("fastclstm.spec", "from fastclstm.nn import activations"),
        ("fastclstm.engines.cpu.kernels.direct", "from fastclstm import dispatch"),
        ("fastclstm.engines.cpu.kernels.direct", "from fastclstm.engines import reference"),
        ("fastclstm.engines.cpu.kernels.direct", "from fastclstm.engines.reference import conv2d"),
        ("fastclstm.engines.recurrence", "from fastclstm.engines.reference import conv2d"),
        ("fastclstm.engines.cpu.kernels.direct", "from ... import reference"),
        ("fastclstm.dispatch", "def later():\n    from fastclstm.functional import conv2d"),
        ("fastclstm.functional", "from fastclstm import ConvLSTM2D"),
        ("fastclstm.layers.pooling", "import fastclstm.commands"),
    ],
)
def test_the_rule_sees_a_wrong_import(importer, source):
    assert any(violation(importer, imported) for imported in imports(source, importer.rpartition(".")[0]))


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        (
            "fastclstm.engines.cpu.kernels.direct",
            "import numba\nfrom fastclstm.nn import activations\nfrom fastclstm import spec",
        ),
        ("fastclstm.engines.cpu.kernels.direct", "from fastclstm.engines.cpu import packing\nfrom . import simd"),
        ("fastclstm.engines.reference", "from fastclstm.engines import recurrence"),
        ("fastclstm.layers.pooling", "from fastclstm import __version__, functional"),
        ("fastclstm.commands", "from fastclstm import ConvLSTM2D\nfrom fastclstm.commands.demo import run"),
    ],
)
def test_the_rule_lets_a_right_import_pass(importer, source):
    assert not any(violation(importer, imported) for imported in imports(source, importer.rpartition(".")[0]))


def test_no_circle_of_imports():
    assert circle(SOURCES) == []


def package(**sources):
    """Modules of a room `layers`, by name; each imports what it is given."""
    return {f"fastclstm.layers.{name}": ("fastclstm.layers", source) for name, source in sources.items()}


# These tests plant their imports in names of modules that there are, as only those are told from public names.
@pytest.mark.parametrize(
    ("back", "names"),
    [
        ("from fastclstm.layers.pooling import MaxPooling2D", ["base", "dropout", "pooling"]),
        ("from fastclstm.layers import pooling", ["base", "dropout", "pooling"]),
        ("from . import pooling", ["base", "dropout", "pooling"]),
        ("import fastclstm.layers.pooling", ["base", "dropout", "pooling"]),
        ("def later():\n    from fastclstm.layers.pooling import MaxPooling2D", ["base", "dropout", "pooling"]),
        ("if TYPE_CHECKING:\n    from fastclstm.layers.pooling import MaxPooling2D", ["base", "dropout", "pooling"]),
        ("from fastclstm.layers.dropout import Dropout", ["base", "dropout"]),
    ],
)
def test_the_rule_sees_a_circle(back, names):
    planted = package(pooling="from fastclstm.layers.dropout import Dropout",
                      dropout="from fastclstm.layers import base", base=back)  # fmt: skip
    found = circle(planted)
    assert {name.rpartition(".")[2] for name in found} == set(names)
    assert found[0] == found[-1]


def test_the_rule_sees_a_circle_through_the_package():
    sources = package(base="from fastclstm.layers import Dropout", dropout="from fastclstm.layers.base import Layer")
    sources["fastclstm.layers"] = "fastclstm.layers", "from fastclstm.layers.dropout import Dropout"
    assert len(circle(sources)) == 4


def test_the_rule_lets_a_diamond_pass():
    top = "from fastclstm.layers import dropout, pooling\nimport numpy"
    assert circle(package(dense=top, dropout="from fastclstm.layers.base import Layer",
                          pooling="from fastclstm.layers.base import Layer", base="")) == []  # fmt: skip


def loaded_by(statements):
    """Names of the heavy packages that a fresh interpreter has loaded after `statements`."""
    code = f"import sys\n{statements}\nprint(*sorted({HEAVY!r} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import fastclstm, fastclstm.functional, fastclstm.nn.activations\ndir(fastclstm)") == []


def test_the_reference_engine_needs_numpy_alone():
    call = "convlstm2d(np.ones((1, 2, 3, 3, 1)), np.ones((3, 3, 1, 4)), np.ones((3, 3, 1, 4)), engine='reference')"
    assert loaded_by(f"import numpy as np\nfrom fastclstm import convlstm2d\n{call}") == []


def test_a_heavy_package_would_be_noticed():
    assert "numba" in loaded_by("import numba")


def test_public_names_exist_where_they_are_said_to_live():
    for name in fastclstm.__all__:
        assert getattr(fastclstm, name) is not None
    assert dir(fastclstm) == sorted(fastclstm.__all__)
    with pytest.raises(AttributeError, match="module 'fastclstm' has no attribute 'nothing'"):
        _ = fastclstm.nothing
