"""What a file holds, whichever layer or network that is."""

from __future__ import annotations

import os
from typing import Any

from fastclstm.io import weights
from fastclstm.layers import Layer
from fastclstm.training.checkpoints import CHECKPOINT


def load(path: str | os.PathLike[str], **options: Any) -> Layer:
    """Return the layer or network that its `save` wrote, of the class that the file names.

    Parameters
    ----------
    path : path
        A safetensors file.
    **options
        Replace those in the file, as functions must, which files do not hold.

    Returns
    -------
    Layer
        A ConvLSTM2D, a Sequential, or whatever was saved. A class of your own must have been imported before.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        A damaged or foreign file, the checkpoint of a training, a class that is not known, parameters that do not fit
        the options.

    Examples
    --------
    >>> import tempfile
    >>> from fastclstm.layers import Dense
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Dense(3, 2, seed=0).save(f"{folder}/weights.safetensors")
    ...     load(f"{folder}/weights.safetensors")
    Dense(in_features=3, out_features=2, seed=0)
    """
    arrays, metadata = weights.load(path)
    name = os.fspath(path)
    if metadata.get("class") == CHECKPOINT:
        raise ValueError(f"{name} is the checkpoint of a training, which fit(checkpoint=…, resume=True) goes on from; "
                         f"load what the model's save wrote")  # fmt: skip
    return Layer._restored(name, arrays, metadata, options)
