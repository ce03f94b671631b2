"""convlstm2d in TensorFlow's graphs: a numpy_function with a gradient of its own, which no XLA can compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastclstm.adapters.host import HostCall

try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(f"this backend of Keras needs TensorFlow: pip install tensorflow ({error})") from error


def run(arrays: Mapping[str, Any], options: Mapping[str, Any], save: bool) -> list[Any]:
    """Compute the output, the last h and the last c of tensors that are named as those of a `HostCall`.

    With `save` what the way back needs is kept; without it the way back takes the steps forward again. The graph may
    not know the sizes of the batch and of time.
    """
    call = HostCall.of("convlstm2d", arrays, options)
    dtype = arrays["x"].dtype
    shapes = _output_shapes(arrays, options)

    def backward(token: Any, dy: Any, dh: Any, dc: Any, *values: Any) -> Any:
        return call.backward(token, (dy, dh, dc), *values)

    @tf.custom_gradient
    def computed(*tensors: Any) -> tuple[list[Any], Any]:
        if save:
            *outputs, token = tf.numpy_function(call.forward_saving, tensors, [dtype] * 3 + [tf.int32])
        else:
            outputs = tf.numpy_function(call.forward, tensors, [dtype] * 3)
            token = tf.zeros(2, tf.int32)  # under which nothing is kept

        def pulled(*cotangents: Any) -> list[Any]:
            wanted = call.differentiable
            given = [token, *cotangents, *tensors]
            back = iter(tf.numpy_function(backward, given, [dtype] * len(wanted)))
            return [_shaped(next(back), tensor.shape) if name in wanted else None
                    for name, tensor in zip(call.names, tensors, strict=True)]  # fmt: skip

        return [_shaped(output, shape) for output, shape in zip(outputs, shapes, strict=True)], pulled

    return computed(*map(tf.convert_to_tensor, arrays.values()))  # variables as their values


def _output_shapes(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int | None]]:
    B, T = arrays["x"].shape[:2]
    main = {name: arrays[name] for name in ("x", "kernel", "recurrent_kernel")}
    known = [[1 if size is None else size for size in array.shape] for array in main.values()]
    shapes = [[B, *shape[1:]] for shape in HostCall.of("convlstm2d", main, options).shapes(*map(tuple, known))]
    if len(shapes[0]) == 5:
        shapes[0][1] = T
    return shapes


def _shaped(tensor: Any, shape: Any) -> Any:
    tensor.set_shape(shape)
    return tensor
