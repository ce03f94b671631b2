import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import fastclstm

MODULES = ["fastclstm", *(
    module.name
    for module in pkgutil.walk_packages(fastclstm.__path__, "fastclstm.")
    if not module.name.endswith("__main__")
)]  # fmt: skip
WITH_EXAMPLES = {f"fastclstm.functional.{name}" for name in ("convlstm", "convolution", "pooling", "volumes")}

NEEDED = {"fastclstm.adapters.torch_": "torch", "fastclstm.adapters.xarray": "xarray",
          "fastclstm.adapters.xarray_blocks": "dask"}  # fmt: skip
"""Packages without which modules are not there."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    for prefix, package in NEEDED.items():
        if name.startswith(prefix):
            pytest.importorskip(package)
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in WITH_EXAMPLES


def test_examples_of_the_readme():
    outcome = doctest.testfile(str(Path(__file__).parents[1] / "README.md"), module_relative=False)
    assert outcome.failed == 0
    assert outcome.attempted > 5
