"""Layers: what a user holds. Parameters, options and state; all numbers come from `fastclstm.functional`."""

from typing import TYPE_CHECKING

from fastclstm.layers.activation import Activation, LeakyReLU, Softmax
from fastclstm.layers.base import Layer
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.convlstm2d_cell import ConvLSTM2DCell
from fastclstm.layers.convolution import Conv2D, Conv3D
from fastclstm.layers.dense import Dense, Flatten
from fastclstm.layers.dropout import Dropout
from fastclstm.layers.max_pooling3d import MaxPooling3D
from fastclstm.layers.normalization import BatchNormalization, LayerNormalization
from fastclstm.layers.pooling import AveragePooling2D, GlobalAveragePooling, GlobalMaxPooling, MaxPooling2D
from fastclstm.layers.resampling import UpSampling, ZeroPadding2D
from fastclstm.layers.symbolic import Input
from fastclstm.layers.time_distributed import TimeDistributed
from fastclstm.layers.time_distribution import TimeDistributionCalculator
from fastclstm.lazy import moved

__all__ = [
    "Activation", "AveragePooling2D", "BatchNormalization", "Conv2D", "Conv3D", "ConvLSTM2D", "ConvLSTM2DCell",
    "Dense", "Dropout", "Flatten", "GlobalAveragePooling", "GlobalMaxPooling", "Input",
    "Layer", "LayerNormalization", "LeakyReLU", "MaxPooling2D", "MaxPooling3D", "Softmax",
    "TimeDistributed", "TimeDistributionCalculator", "UpSampling", "ZeroPadding2D",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__ = moved(__name__, {
        "EarlyStopping": "fastclstm.training", "EncoderForecaster": "fastclstm.models", "History": "fastclstm.training",
        "Sequential": "fastclstm.models",
    })  # fmt: skip
