"""Batches, the steps of fit, checkpoints and history; networks are known by what `Trainable` asks of them."""

from fastclstm.training.history import EarlyStopping, History

__all__ = ["EarlyStopping", "History"]
