import doctest
import importlib
import os
import pkgutil

import pytest

import fastclstm

MODULES = ["fastclstm", *(
    module.name
    for module in pkgutil.walk_packages(fastclstm.__path__, "fastclstm.")
    if not module.name.endswith("__main__")
)]  # fmt: skip
WITH_EXAMPLES = {f"fastclstm.functional.{name}" for name in ("convlstm", "convolution", "pooling", "volumes")}

NEEDED = {"torch_": "torch", "keras_": "keras", "jax": "jax", "tensorflow_ops": "tensorflow",
          "xarray": "xarray", "xarray_blocks": "dask"}  # fmt: skip
"""Packages without which modules of adapters, by what their names begin with, are not there; Keras is on PyTorch."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    if "keras_" in name:
        os.environ.setdefault("KERAS_BACKEND", "torch")
        pytest.importorskip("torch")
    for prefix, package in NEEDED.items():
        if name.startswith(f"fastclstm.adapters.{prefix}"):
            pytest.importorskip(package)
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in WITH_EXAMPLES
