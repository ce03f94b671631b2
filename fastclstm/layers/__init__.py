"""Layers: what a user holds. Parameters, options and state; all numbers come from `fastclstm.functional`."""

from fastclstm.layers.base import Layer
from fastclstm.layers.convlstm2d import ConvLSTM2D, ConvLSTM2DCell
from fastclstm.layers.max_pooling3d import MaxPooling3D
from fastclstm.layers.time_distribution import TimeDistributionCalculator

__all__ = ["ConvLSTM2D", "ConvLSTM2DCell", "Layer", "MaxPooling3D", "TimeDistributionCalculator"]
