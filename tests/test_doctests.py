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


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    if name.startswith("fastclstm.adapters.torch_"):
        pytest.importorskip("torch")
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in WITH_EXAMPLES


def test_examples_of_the_readme():
    outcome = doctest.testfile(str(Path(__file__).parents[1] / "README.md"), module_relative=False)
    assert outcome.failed == 0
    assert outcome.attempted > 5
