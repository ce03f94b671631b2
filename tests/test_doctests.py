import doctest
import importlib
import os
import pkgutil
from pathlib import Path

import pytest

import fastclstm

MODULES = ["fastclstm", *(
    module.name
    for module in pkgutil.walk_packages(fastclstm.__path__, "fastclstm.")
    if not module.name.endswith("__main__")
)]  # fmt: skip
NEEDS = {
    **dict.fromkeys(("torch_accelerate", "torch_cells", "torch_layers", "torch_ops"), ("torch",)),
    **dict.fromkeys(("keras_accelerate", "keras_layers"), ("torch", "keras")),
    "jax": ("jax",),
    "tensorflow_ops": ("tensorflow",),
}
"""Packages that the modules of adapters ask for; Keras is on PyTorch here."""
WITH_EXAMPLES = {f"fastclstm.functional.{name}" for name in ("convlstm", "convolution", "pooling", "volumes")}


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    for package in NEEDS.get(name.partition("adapters.")[2], ()):
        os.environ.setdefault("KERAS_BACKEND", "torch")
        pytest.importorskip(package)
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in WITH_EXAMPLES


def test_examples_of_the_readme():
    outcome = doctest.testfile(str(Path(__file__).parents[1] / "README.md"), module_relative=False)
    assert outcome.failed == 0
    assert outcome.attempted > 5
