"""Files: read without running what is in them, at a cost that their size bounds, and written whole or not at all."""

from typing import TYPE_CHECKING

from fastclstm.lazy import on_first_use, submodules

if not TYPE_CHECKING:
    __getattr__, __dir__ = on_first_use(
        __name__,
        submodules(
            __name__, "bounds", "files", "keras_files", "kinds", "numpy_files", "pickles", "progress", "torch_files",
            "weights",
        ),
    )  # fmt: skip
