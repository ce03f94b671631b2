"""Our operations in JAX: under jit, grad and vmap.

`convlstm2d`, `convgru2d`, `convrnn2d`, `conv2d` and `max_pool3d` take and return JAX's arrays, and otherwise what the
functions of these names in `fastclstm.functional` do. They are computed on the processor, by a `jax.pure_callback` out
of the compiled program; `jax.custom_vjp` knows the way back. There are no forward-mode derivatives (jvp, jacfwd) and
none of second order.

A vmap is one callback. Where it is over samples alone, and weights are the same for all, it is one call with the
samples of all; gradients are computed member by member, as each has weights' gradients of its own. In a shard_map or
pmap every device's share is a callback of its own; an array that is sharded under jit alone is gathered first.

float64, where JAX has it, is computed in float64, everything else in float32; the result is of the widest dtype of the
arrays given. Shapes and options are checked when the call is traced.

Importing this module sets JAX's option jax_cpu_enable_async_dispatch to False: else programs wait on JAX's own threads
while their callbacks wait for arguments that those threads are to copy, and on a machine of one processor nothing ever
ends. JAX reads the option when it first computes: import this module before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from fastclstm.adapters.host import OPERATIONS, HostCall

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(f"fastclstm.adapters.jax needs JAX: pip install 'fastclstm[jax]' ({error})") from error

jax.config.update("jax_cpu_enable_async_dispatch", False)


def convlstm2d(
    x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, initial_state: Any = None, mask: Any = None,
    peephole: Mapping[str, Any] | None = None, normalization_weights: Mapping[str, Any] | None = None,
    dropout_masks: Mapping[str, Any] | None = None, return_state: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Run a ConvLSTM over a batch of sequences: `fastclstm.functional.convlstm2d` of JAX's arrays.

    Parameters
    ----------
    x : array (B, T, H, W, C)
    kernel : array (KH, KW, C, 4F)
    recurrent_kernel : array (RKH, RKW, F, 4F)
    bias : array (4F,), optional
    initial_state, mask, peephole, normalization_weights, dropout_masks
        Arrays too, as of `fastclstm.functional.convlstm2d`. There are no gradients of masks and given statistics.
    return_state : bool
    **options
        The further ones of `fastclstm.functional.convlstm2d` and ``recompute`` of `convlstm2d_vjp`. They are no arrays:
        under jit they stand in the function, or among its static arguments.

    Returns
    -------
    array (B, T, HO, WO, F), or (B, HO, WO, F) with return_sequences=False
        With return_state a tuple of that, h and c, the last states (B, HO, WO, F).

    Raises
    ------
    ValueError, TypeError
        Shapes or options that do not fit together.

    Examples
    --------
    >>> import jax
    >>> x, kernel, recurrent = map(jax.numpy.ones, ((1, 2, 4, 4, 1), (3, 3, 1, 8), (3, 3, 2, 8)))
    >>> gradient = jax.jit(jax.grad(lambda kernel: convlstm2d(x, kernel, recurrent).sum()))(kernel)
    >>> gradient.shape
    (3, 3, 1, 8)
    """
    return _recurrent(
        "convlstm2d", (x, kernel, recurrent_kernel, bias), initial_state, mask, return_state, options,
        peephole=peephole, normalization_weights=normalization_weights, dropout_masks=dropout_masks,
    )  # fmt: skip


def convgru2d(
    x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, initial_state: Any = None, mask: Any = None,
    normalization_weights: Mapping[str, Any] | None = None, dropout_masks: Mapping[str, Any] | None = None,
    return_state: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Run a convolutional GRU over a batch of sequences: `fastclstm.functional.convgru2d` of JAX's arrays.

    x (B, T, H, W, C), kernel (KH, KW, C, 3F), recurrent_kernel (RKH, RKW, F, 3F), bias (2, 3F) or with
    reset_after=False (3F,), and initial_state (B, HO, WO, F) or (h,) give (B, T, HO, WO, F), with return_state a pair
    of that and the last h. Options and errors are as of `convlstm2d` here.

    Examples
    --------
    >>> import jax
    >>> x, kernel, recurrent = map(jax.numpy.ones, ((1, 2, 4, 4, 1), (3, 3, 1, 6), (3, 3, 2, 6)))
    >>> jax.jit(convgru2d)(x, kernel, recurrent).shape
    (1, 2, 4, 4, 2)
    """
    return _recurrent(
        "convgru2d", (x, kernel, recurrent_kernel, bias), initial_state, mask, return_state, options,
        normalization_weights=normalization_weights, dropout_masks=dropout_masks,
    )  # fmt: skip


def convrnn2d(
    x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, initial_state: Any = None, mask: Any = None,
    normalization_weights: Mapping[str, Any] | None = None, dropout_masks: Mapping[str, Any] | None = None,
    return_state: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Run a simple convolutional recurrent network: `fastclstm.functional.convrnn2d` of JAX's arrays.

    As `convgru2d`, with kernels (KH, KW, C, F) and (RKH, RKW, F, F) and a bias (F,).

    Examples
    --------
    >>> import jax
    >>> convrnn2d(*map(jax.numpy.ones, ((1, 2, 4, 4, 1), (3, 3, 1, 2), (3, 3, 2, 2)))).shape
    (1, 2, 4, 4, 2)
    """
    return _recurrent(
        "convrnn2d", (x, kernel, recurrent_kernel, bias), initial_state, mask, return_state, options,
        normalization_weights=normalization_weights, dropout_masks=dropout_masks,
    )  # fmt: skip


def _recurrent(op: str, main: tuple[Any, ...], initial_state: Any, mask: Any, return_state: bool,
               options: Mapping[str, Any], **mappings: Mapping[str, Any] | None) -> Any:  # fmt: skip
    names = OPERATIONS[op].states
    arrays = dict(zip(("x", "kernel", "recurrent_kernel", "bias"), main, strict=True))
    if initial_state is not None:
        alone = len(names) == 1 and not isinstance(initial_state, tuple | list)
        states = (initial_state,) if alone else initial_state
        if len(states) != len(names):
            raise ValueError(f"{op}: initial_state must be ({', '.join(names)}), got {len(states)} items")
        arrays |= dict(zip(names, states, strict=True))
    arrays |= {"mask": None if mask is None else jnp.asarray(mask) != 0}
    for mapping, named in mappings.items():
        if not isinstance(named, Mapping | None):
            raise TypeError(f"{op}: {mapping} must map names to arrays, got {type(named).__name__}")
        arrays |= {f"{mapping}.{name}": array for name, array in (named or {}).items()}
    outputs = run(op, arrays, options)
    return outputs if return_state else outputs[0]


def conv2d(x: Any, kernel: Any, bias: Any = None, **options: Any) -> Any:
    """Convolve frames with a kernel: `fastclstm.functional.conv2d` of JAX's arrays, with its options.

    x (B, H, W, C), kernel (KH, KW, C, F) and bias (F,) give (B, HO, WO, F). Raises ValueError or TypeError where shapes
    or options do not fit together.

    Examples
    --------
    >>> import jax
    >>> conv2d(jax.numpy.ones((1, 4, 4, 1)), jax.numpy.ones((3, 3, 1, 2)), padding="valid").shape
    (1, 2, 2, 2)
    """
    return run("conv2d", {"x": x, "kernel": kernel, "bias": bias}, options)[0]


def max_pool3d(x: Any, pool_size: Any = (2, 2, 2), strides: Any = None, **options: Any) -> Any:
    """Take the maximum over windows of time, height and width: `fastclstm.functional.max_pool3d` of JAX's arrays.

    x (B, T, H, W, C) gives (B, TO, HO, WO, C); options are those of the function, but there is no return_indices.
    Raises ValueError or TypeError where they do not fit together.

    Examples
    --------
    >>> import jax
    >>> max_pool3d(jax.numpy.arange(8.0).reshape(1, 2, 2, 2, 1)).item()
    7.0
    """
    return run("max_pool3d", {"x": x}, options | {"pool_size": pool_size, "strides": strides})[0]


def run(op: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[jax.Array, ...]:
    """Compute an operation's outputs of arrays that are named as those of a `HostCall`; None is left out."""
    for name in ("x", "kernel", "recurrent_kernel"):
        if given.get(name, ()) is None:
            raise TypeError(f"{op}: {name} must be an array, got None")
    arrays = {name: jnp.asarray(array) for name, array in given.items() if array is not None}
    floats = {name: array for name, array in arrays.items() if name != "mask"}
    for name, array in floats.items():
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{op}: {name} is {array.dtype}; complex arrays are not supported, pass real ones")
    result = jnp.result_type(*floats.values())
    result = result if jnp.issubdtype(result, jnp.floating) else jnp.float32
    inside = jnp.float64 if result == jnp.float64 else jnp.float32
    ready = {name: array.astype(inside) if name in floats else array for name, array in arrays.items()}
    call = HostCall.of(op, ready, options)
    outputs = _call(call, *ready.values())
    return tuple(output.astype(result) for output in outputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(call: HostCall, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return _callback(call.forward, _results(call, arrays), *arrays)


def _forward(call: HostCall, *primals: Any) -> tuple[tuple[jax.Array, ...], Any]:
    arrays = tuple(primal.value for primal in primals)
    token = jax.ShapeDtypeStruct((2,), np.int32)
    *outputs, token = _callback(call.forward_saving, (*_results(call, arrays), token), *arrays)
    perturbed = () if primals[0].perturbed else None  # a structure, as residuals hold arrays alone
    return tuple(outputs), (token, arrays, perturbed)


def _backward(call: HostCall, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    token, arrays, perturbed = residuals
    input_gradient = perturbed is not None or call.op == "max_pool3d"
    wanted = [name for name in call.differentiable if name != "x" or input_gradient]
    results = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype)
                    for name, array in zip(call.names, arrays, strict=True) if name in wanted)  # fmt: skip
    full = tuple(jnp.zeros(dy.shape, dy.dtype) if isinstance(dy, jax.custom_derivatives.SymbolicZero) else dy
                 for dy in cotangents)  # fmt: skip
    backward = partial(call.backward, input_gradient=input_gradient)
    pulled = dict(zip(wanted, _callback(backward, results, token, full, *arrays), strict=True))
    return tuple(pulled.get(name) for name in call.names)


_call.defvjp(_forward, _backward, symbolic_zeros=True)


def _results(call: HostCall, arrays: tuple[jax.Array, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in call.shapes(*(a.shape for a in arrays)))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _callback(function: Any, results: Any, *arguments: Any) -> Any:
    return jax.pure_callback(function, results, *arguments, vmap_method="expand_dims")


@_callback.defjvp
def _second(function: Any, results: Any, primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "fastclstm.adapters.jax: there are first derivatives in reverse mode alone (jax.grad, jax.vjp, jax.jacrev), "
        "and these were to be differentiated again; for a product with the Hessian take a difference of two jax.grad"
    )
