"""What is made of layers: networks that are called, trained, saved and loaded as one."""

from fastclstm.models.encoder_forecaster import EncoderForecaster
from fastclstm.models.loading import load
from fastclstm.models.model import Model
from fastclstm.models.multiscale_forecaster import MultiscaleForecaster
from fastclstm.models.sequential import Sequential

__all__ = ["EncoderForecaster", "Model", "MultiscaleForecaster", "Sequential", "load"]
