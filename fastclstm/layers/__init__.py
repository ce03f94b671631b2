"""Layers: what a user holds. Parameters, options and state; all numbers come from `fastclstm.functional`."""

from typing import TYPE_CHECKING

from fastclstm.layers.activation import Activation, LeakyReLU, Softmax
from fastclstm.layers.adaptive_pooling import AdaptiveAveragePooling2D
from fastclstm.layers.base import Layer
from fastclstm.layers.borders import Cropping2D, Cropping3D, ZeroPadding2D, ZeroPadding3D
from fastclstm.layers.convgru2d import ConvGRU2D, ConvGRU2DCell
from fastclstm.layers.convlstm1d import ConvLSTM1D
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.convlstm2d_cell import ConvLSTM2DCell
from fastclstm.layers.convlstm3d import ConvLSTM3D, ConvLSTM3DCell
from fastclstm.layers.convolution import Conv2D, Conv3D
from fastclstm.layers.convrnn2d import ConvRNN2D, ConvRNN2DCell
from fastclstm.layers.dense import Dense, Flatten
from fastclstm.layers.depthwise import DepthwiseConv2D, SeparableConv2D
from fastclstm.layers.dropout import Dropout, SpatialDropout2D, SpatialDropout3D
from fastclstm.layers.embedding import Embedding
from fastclstm.layers.global_pooling import (
    GlobalAveragePooling,
    GlobalAveragePooling2D,
    GlobalAveragePooling3D,
    GlobalMaxPooling,
    GlobalMaxPooling2D,
    GlobalMaxPooling3D,
)
from fastclstm.layers.group_normalization import GroupNormalization, InstanceNormalization
from fastclstm.layers.gru import GRU
from fastclstm.layers.learnt_input import LearntInput
from fastclstm.layers.lstm import LSTM
from fastclstm.layers.masking import Masking
from fastclstm.layers.max_pooling3d import MaxPooling3D
from fastclstm.layers.merging import Add, Average, Concatenate, Maximum, Minimum, Multiply, Subtract
from fastclstm.layers.noise import GaussianNoise
from fastclstm.layers.normalization import BatchNormalization, LayerNormalization
from fastclstm.layers.pooling import AveragePooling2D, AveragePooling3D, MaxPooling2D
from fastclstm.layers.rearranging import DepthToSpace, PixelShuffle, PixelUnshuffle, SpaceToDepth
from fastclstm.layers.rectifiers import PReLU, ReLU
from fastclstm.layers.resampling import UpSampling, UpSampling2D, UpSampling3D
from fastclstm.layers.rescaling import Rescaling
from fastclstm.layers.reshaping import Permute, RepeatVector, Reshape
from fastclstm.layers.symbolic import Input
from fastclstm.layers.time_distributed import TimeDistributed
from fastclstm.layers.time_distribution import TimeDistributionCalculator
from fastclstm.layers.transposed import Conv2DTranspose, Conv3DTranspose
from fastclstm.lazy import moved

__all__ = [
    "GRU",
    "LSTM",
    "Activation",
    "AdaptiveAveragePooling2D",
    "Add",
    "Average",
    "AveragePooling2D",
    "AveragePooling3D",
    "BatchNormalization",
    "Concatenate",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "ConvGRU2D",
    "ConvGRU2DCell",
    "ConvLSTM1D",
    "ConvLSTM2D",
    "ConvLSTM2DCell",
    "ConvLSTM3D",
    "ConvLSTM3DCell",
    "ConvRNN2D",
    "ConvRNN2DCell",
    "Cropping2D",
    "Cropping3D",
    "Dense",
    "DepthToSpace",
    "DepthwiseConv2D",
    "Dropout",
    "Embedding",
    "Flatten",
    "GaussianNoise",
    "GlobalAveragePooling",
    "GlobalAveragePooling2D",
    "GlobalAveragePooling3D",
    "GlobalMaxPooling",
    "GlobalMaxPooling2D",
    "GlobalMaxPooling3D",
    "GroupNormalization",
    "Input",
    "InstanceNormalization",
    "Layer",
    "LayerNormalization",
    "LeakyReLU",
    "LearntInput",
    "Masking",
    "MaxPooling2D",
    "MaxPooling3D",
    "Maximum",
    "Minimum",
    "Multiply",
    "PReLU",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "ReLU",
    "RepeatVector",
    "Rescaling",
    "Reshape",
    "SeparableConv2D",
    "Softmax",
    "SpaceToDepth",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "Subtract",
    "TimeDistributed",
    "TimeDistributionCalculator",
    "UpSampling",
    "UpSampling2D",
    "UpSampling3D",
    "ZeroPadding2D",
    "ZeroPadding3D",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__ = moved(__name__, {
        "EarlyStopping": "fastclstm.training", "EncoderForecaster": "fastclstm.models", "History": "fastclstm.training",
        "Sequential": "fastclstm.models",
    })  # fmt: skip
