"""fastclstm: the ConvLSTM from plain NumPy, fast on many cores.

Public names are imported when first used, so ``import fastclstm`` costs NumPy and nothing more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastclstm.lazy import on_first_use, submodules

__version__ = "0.1.0"

_HOME = {
    "Activation": "fastclstm.layers",
    "AdaptiveAveragePooling2D": "fastclstm.layers",
    "Add": "fastclstm.layers",
    "Average": "fastclstm.layers",
    "AveragePooling2D": "fastclstm.layers",
    "AveragePooling3D": "fastclstm.layers",
    "BatchNormalization": "fastclstm.layers",
    "Concatenate": "fastclstm.layers",
    "Conv2D": "fastclstm.layers",
    "Conv2DTranspose": "fastclstm.layers",
    "Conv3D": "fastclstm.layers",
    "Conv3DTranspose": "fastclstm.layers",
    "ConvGRU2D": "fastclstm.layers",
    "ConvGRU2DCell": "fastclstm.layers",
    "ConvLSTM1D": "fastclstm.layers",
    "ConvLSTM2D": "fastclstm.layers",
    "ConvLSTM2DCell": "fastclstm.layers",
    "ConvLSTM3D": "fastclstm.layers",
    "ConvLSTM3DCell": "fastclstm.layers",
    "ConvRNN2D": "fastclstm.layers",
    "ConvRNN2DCell": "fastclstm.layers",
    "Cropping2D": "fastclstm.layers",
    "Cropping3D": "fastclstm.layers",
    "Dense": "fastclstm.layers",
    "DepthToSpace": "fastclstm.layers",
    "DepthwiseConv2D": "fastclstm.layers",
    "Dropout": "fastclstm.layers",
    "EarlyStopping": "fastclstm.training",
    "Embedding": "fastclstm.layers",
    "EncoderForecaster": "fastclstm.models",
    "Flatten": "fastclstm.layers",
    "GRU": "fastclstm.layers",
    "GaussianNoise": "fastclstm.layers",
    "GlobalAveragePooling": "fastclstm.layers",
    "GlobalAveragePooling2D": "fastclstm.layers",
    "GlobalAveragePooling3D": "fastclstm.layers",
    "GlobalMaxPooling": "fastclstm.layers",
    "Input": "fastclstm.layers",
    "GlobalMaxPooling2D": "fastclstm.layers",
    "GlobalMaxPooling3D": "fastclstm.layers",
    "GroupNormalization": "fastclstm.layers",
    "InstanceNormalization": "fastclstm.layers",
    "LSTM": "fastclstm.layers",
    "LayerNormalization": "fastclstm.layers",
    "LeakyReLU": "fastclstm.layers",
    "LearntInput": "fastclstm.layers",
    "Masking": "fastclstm.layers",
    "MaxPooling2D": "fastclstm.layers",
    "MaxPooling3D": "fastclstm.layers",
    "Model": "fastclstm.models",
    "Maximum": "fastclstm.layers",
    "Minimum": "fastclstm.layers",
    "Multiply": "fastclstm.layers",
    "MultiscaleForecaster": "fastclstm.models",
    "PReLU": "fastclstm.layers",
    "Permute": "fastclstm.layers",
    "PixelShuffle": "fastclstm.layers",
    "PixelUnshuffle": "fastclstm.layers",
    "ReLU": "fastclstm.layers",
    "RepeatVector": "fastclstm.layers",
    "Rescaling": "fastclstm.layers",
    "Reshape": "fastclstm.layers",
    "SeparableConv2D": "fastclstm.layers",
    "Sequential": "fastclstm.models",
    "Softmax": "fastclstm.layers",
    "SpaceToDepth": "fastclstm.layers",
    "SpatialDropout2D": "fastclstm.layers",
    "SpatialDropout3D": "fastclstm.layers",
    "Subtract": "fastclstm.layers",
    "TimeDistributed": "fastclstm.layers",
    "TimeDistributionCalculator": "fastclstm.layers",
    "UpSampling": "fastclstm.layers",
    "UpSampling2D": "fastclstm.layers",
    "UpSampling3D": "fastclstm.layers",
    "ZeroPadding2D": "fastclstm.layers",
    "ZeroPadding3D": "fastclstm.layers",
    "conv2d": "fastclstm.functional",
    "conv2d_transpose": "fastclstm.functional",
    "conv3d": "fastclstm.functional",
    "conv3d_transpose": "fastclstm.functional",
    "convgru2d": "fastclstm.functional",
    "convlstm2d": "fastclstm.functional",
    "convlstm3d": "fastclstm.functional",
    "convrnn2d": "fastclstm.functional",
    "from_flax": "fastclstm.convert.flax",
    "from_keras": "fastclstm.convert.keras",
    "from_torch": "fastclstm.convert.torch",
    "get_num_threads": "fastclstm.engines.cpu.threads",
    "load": "fastclstm.models",
    "max_pool3d": "fastclstm.functional",
    "set_num_threads": "fastclstm.engines.cpu.threads",
    "to_flax": "fastclstm.convert.flax",
    "to_onnx": "fastclstm.convert.onnx",
    "to_torch": "fastclstm.convert.torch",
}
_HOME |= submodules(
    __name__, "adapters", "baselines", "convert", "datasets", "functional", "io", "layers", "models", "nn", "training",
    "verification",
)  # fmt: skip
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # what follows is all that type checkers know, so that they find a name that is not there
    from fastclstm import adapters as adapters
    from fastclstm import baselines as baselines
    from fastclstm import convert as convert
    from fastclstm import datasets as datasets
    from fastclstm import functional as functional
    from fastclstm import io as io
    from fastclstm import layers as layers
    from fastclstm import models as models
    from fastclstm import nn as nn
    from fastclstm import training as training
    from fastclstm import verification as verification
    from fastclstm.convert.flax import from_flax as from_flax
    from fastclstm.convert.flax import to_flax as to_flax
    from fastclstm.convert.keras import from_keras as from_keras
    from fastclstm.convert.onnx import to_onnx as to_onnx
    from fastclstm.convert.torch import from_torch as from_torch
    from fastclstm.convert.torch import to_torch as to_torch
    from fastclstm.engines.cpu.threads import get_num_threads as get_num_threads
    from fastclstm.engines.cpu.threads import set_num_threads as set_num_threads
    from fastclstm.functional import conv2d as conv2d
    from fastclstm.functional import conv2d_transpose as conv2d_transpose
    from fastclstm.functional import conv3d as conv3d
    from fastclstm.functional import conv3d_transpose as conv3d_transpose
    from fastclstm.functional import convgru2d as convgru2d
    from fastclstm.functional import convlstm2d as convlstm2d
    from fastclstm.functional import convlstm3d as convlstm3d
    from fastclstm.functional import convrnn2d as convrnn2d
    from fastclstm.functional import max_pool3d as max_pool3d
    from fastclstm.layers import GRU as GRU
    from fastclstm.layers import LSTM as LSTM
    from fastclstm.layers import Activation as Activation
    from fastclstm.layers import AdaptiveAveragePooling2D as AdaptiveAveragePooling2D
    from fastclstm.layers import Add as Add
    from fastclstm.layers import Average as Average
    from fastclstm.layers import AveragePooling2D as AveragePooling2D
    from fastclstm.layers import AveragePooling3D as AveragePooling3D
    from fastclstm.layers import BatchNormalization as BatchNormalization
    from fastclstm.layers import Concatenate as Concatenate
    from fastclstm.layers import Conv2D as Conv2D
    from fastclstm.layers import Conv2DTranspose as Conv2DTranspose
    from fastclstm.layers import Conv3D as Conv3D
    from fastclstm.layers import Conv3DTranspose as Conv3DTranspose
    from fastclstm.layers import ConvGRU2D as ConvGRU2D
    from fastclstm.layers import ConvGRU2DCell as ConvGRU2DCell
    from fastclstm.layers import ConvLSTM1D as ConvLSTM1D
    from fastclstm.layers import ConvLSTM2D as ConvLSTM2D
    from fastclstm.layers import ConvLSTM2DCell as ConvLSTM2DCell
    from fastclstm.layers import ConvLSTM3D as ConvLSTM3D
    from fastclstm.layers import ConvLSTM3DCell as ConvLSTM3DCell
    from fastclstm.layers import ConvRNN2D as ConvRNN2D
    from fastclstm.layers import ConvRNN2DCell as ConvRNN2DCell
    from fastclstm.layers import Cropping2D as Cropping2D
    from fastclstm.layers import Cropping3D as Cropping3D
    from fastclstm.layers import Dense as Dense
    from fastclstm.layers import DepthToSpace as DepthToSpace
    from fastclstm.layers import DepthwiseConv2D as DepthwiseConv2D
    from fastclstm.layers import Dropout as Dropout
    from fastclstm.layers import Embedding as Embedding
    from fastclstm.layers import Flatten as Flatten
    from fastclstm.layers import GaussianNoise as GaussianNoise
    from fastclstm.layers import GlobalAveragePooling as GlobalAveragePooling
    from fastclstm.layers import GlobalAveragePooling2D as GlobalAveragePooling2D
    from fastclstm.layers import GlobalAveragePooling3D as GlobalAveragePooling3D
    from fastclstm.layers import GlobalMaxPooling as GlobalMaxPooling
    from fastclstm.layers import GlobalMaxPooling2D as GlobalMaxPooling2D
    from fastclstm.layers import GlobalMaxPooling3D as GlobalMaxPooling3D
    from fastclstm.layers import GroupNormalization as GroupNormalization
    from fastclstm.layers import Input as Input
    from fastclstm.layers import InstanceNormalization as InstanceNormalization
    from fastclstm.layers import LayerNormalization as LayerNormalization
    from fastclstm.layers import LeakyReLU as LeakyReLU
    from fastclstm.layers import LearntInput as LearntInput
    from fastclstm.layers import Masking as Masking
    from fastclstm.layers import Maximum as Maximum
    from fastclstm.layers import MaxPooling2D as MaxPooling2D
    from fastclstm.layers import MaxPooling3D as MaxPooling3D
    from fastclstm.layers import Minimum as Minimum
    from fastclstm.layers import Multiply as Multiply
    from fastclstm.layers import Permute as Permute
    from fastclstm.layers import PixelShuffle as PixelShuffle
    from fastclstm.layers import PixelUnshuffle as PixelUnshuffle
    from fastclstm.layers import PReLU as PReLU
    from fastclstm.layers import ReLU as ReLU
    from fastclstm.layers import RepeatVector as RepeatVector
    from fastclstm.layers import Rescaling as Rescaling
    from fastclstm.layers import Reshape as Reshape
    from fastclstm.layers import SeparableConv2D as SeparableConv2D
    from fastclstm.layers import Softmax as Softmax
    from fastclstm.layers import SpaceToDepth as SpaceToDepth
    from fastclstm.layers import SpatialDropout2D as SpatialDropout2D
    from fastclstm.layers import SpatialDropout3D as SpatialDropout3D
    from fastclstm.layers import Subtract as Subtract
    from fastclstm.layers import TimeDistributed as TimeDistributed
    from fastclstm.layers import TimeDistributionCalculator as TimeDistributionCalculator
    from fastclstm.layers import UpSampling as UpSampling
    from fastclstm.layers import UpSampling2D as UpSampling2D
    from fastclstm.layers import UpSampling3D as UpSampling3D
    from fastclstm.layers import ZeroPadding2D as ZeroPadding2D
    from fastclstm.layers import ZeroPadding3D as ZeroPadding3D
    from fastclstm.models import EncoderForecaster as EncoderForecaster
    from fastclstm.models import Model as Model
    from fastclstm.models import MultiscaleForecaster as MultiscaleForecaster
    from fastclstm.models import Sequential as Sequential
    from fastclstm.models import load as load
    from fastclstm.training import EarlyStopping as EarlyStopping
else:
    __getattr__, __dir__ = on_first_use(__name__, _HOME)
