"""The time of single blocks, in copies of the feature map, and what they add to one.

A copy is ``x * 1.0001`` on the same array in the same run.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_attn.blocks import create
from train.study import torch_blocks
from train.study.timing import Call, fastest, temporary_bytes, wait, with_gradients

Shape = tuple[int, int, int, int]

SHAPES: tuple[Shape, ...] = (
    (128, 32, 32, 16),
    (32, 32, 32, 64),
    (16, 28, 28, 512),
    (32, 14, 14, 1024),
    (128, 7, 7, 512),
)
GPU_SHAPES: tuple[Shape, ...] = (*SHAPES, (128, 56, 56, 256), (256, 28, 28, 512))
TIMES = ("forward", "forward_backward", "added", "added_backward")


class Stem(nn.Module):
    """1x1 convolution, BatchNorm in training and ReLU, as before most blocks.

    Attributes:
      features: number of channels of the result.
      dtype: dtype of the computation.
      attention: the block applied to the result, or None.
    """

    features: int
    dtype: Any
    attention: nn.Module | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the feature map; its normalization keeps no running average."""
        y = nn.Conv(self.features, (1, 1), use_bias=False, dtype=self.dtype)(x)
        y = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(y)
        y = nn.relu(y)
        return y if self.attention is None else self.attention(y)


def measure_block(
    block: str,
    shape: Shape,
    dtype: str,
    against: Sequence[str],
    rounds: int,
    *,
    inside: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times the contenders on one block and shape, in turns.

    Args:
      block: a name in ``flax_attn.blocks.BLOCKS``.
      shape: of the feature map, (N, H, W, C).
      dtype: of the map and the computation.
      against: contenders to the fast implementation: ``"plain"``, ``"torch"``.
      rounds: turns of each contender.
      inside: whether to time the JAX contenders after a ``Stem`` too.

    Yields:
      A row for each contender. The times and the temporaries of forward + backward are
      in copies, ``compile_seconds`` is that of forward + backward; with ``inside``,
      ``added`` and ``added_backward`` are what the block adds to the ``Stem``.
    """
    x, cotangent = _maps(shape, dtype)
    copy = jax.jit(lambda x: x * jnp.asarray(1.0001, dtype))
    calls: dict[str, Call] = {"copy": partial(wait, copy, x)}
    compile_seconds: dict[str, float] = {}
    temporaries: dict[str, float] = {}
    names = ["fast", *(["plain"] if "plain" in against else [])]
    modules = {
        name: create(block, dtype=jnp.dtype(dtype), implementation=name)
        for name in names
    }
    variables = jax.jit(modules["fast"].init)(jax.random.key(0), x)
    for name, module in modules.items():
        programs = _compile(module.apply, variables, x, cotangent)
        forward, both, compile_seconds[name] = programs
        temporaries[name] = temporary_bytes(both) / x.nbytes
        calls[f"{name} forward"] = partial(wait, forward, variables, x)
        calls[f"{name} both"] = partial(wait, both, variables, x, cotangent)
    if inside:
        stems = {"none": None, **modules}
        for name, attention in stems.items():
            calls |= _stem_calls(f"{name} inside", attention, shape, dtype)
    if "torch" in against and torch_blocks.has_counterpart(block):
        torch = torch_blocks.make_calls(block, shape, dtype)
        for name, forward, both, compile_seconds[name] in torch:
            calls |= {f"{name} forward": forward, f"{name} both": both}
    best = fastest(calls, rounds)
    copies = {name: seconds / best["copy"] for name, seconds in best.items()}
    for name, seconds in compile_seconds.items():
        row = {
            "block": block,
            "contender": name,
            "shape": shape,
            "dtype": dtype,
            "forward": copies[f"{name} forward"],
            "forward_backward": copies[f"{name} both"],
        }
        if inside:
            for column, what in (("added", "forward"), ("added_backward", "both")):
                with_block = copies.get(f"{name} inside {what}")
                base = copies[f"none inside {what}"]
                row[column] = None if with_block is None else with_block - base
        yield row | {
            "temporaries": temporaries.get(name),
            "compile_seconds": seconds,
            "copy_ms": best["copy"] * 1e3,
        }


def _maps(shape: Shape, dtype: str) -> tuple[jax.Array, jax.Array]:
    """A random feature map and a random cotangent."""
    keys = jax.random.split(jax.random.key(1))
    x, cotangent = (jax.random.normal(key, shape, dtype) for key in keys)
    return x, cotangent


def _compile(
    apply: Any, variables: Any, x: jax.Array, cotangent: jax.Array
) -> tuple[Any, Any, float]:
    """The forward program, the one with all gradients, and the latter's seconds."""
    forward = jax.jit(apply).lower(variables, x).compile()
    start = time.perf_counter()
    lowered = jax.jit(with_gradients(apply)).lower(variables, x, cotangent)
    return forward, lowered.compile(), time.perf_counter() - start


def _stem_calls(
    name: str, attention: nn.Module | None, shape: Shape, dtype: str
) -> dict[str, Call]:
    """Both programs of a ``Stem``, from C / 16 channels to the feature map.

    With more, the noise of the convolution would hide the block.
    """
    n, h, w, features = shape
    x, _ = _maps((n, h, w, max(features // 16, 1)), dtype)
    _, cotangent = _maps(shape, dtype)
    stem = Stem(features, jnp.dtype(dtype), attention)
    variables = jax.jit(stem.init)(jax.random.key(2), x)
    params, statistics_ = variables["params"], variables["batch_stats"]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": statistics_}
        y, _ = stem.apply(variables, x, mutable=["batch_stats"])
        return y

    forward, both, _ = _compile(apply, params, x, cotangent)
    return {
        f"{name} forward": partial(wait, forward, params, x),
        f"{name} both": partial(wait, both, params, x, cotangent),
    }


def geometric_means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each block, contender and dtype, over its shapes.

    What a block adds to a program is a difference, which noise can make negative: its
    mean is the arithmetic one.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["block"], row["contender"], row["dtype"])
        groups.setdefault(key, []).append(row)

    def mean(group: Sequence[Mapping[str, Any]], field: str) -> float | None:
        values = [row[field] for row in group]
        if None in values:
            return None
        if field.startswith("added"):
            return statistics.fmean(values)
        return statistics.geometric_mean(values)

    return [
        {"block": block, "contender": contender, "dtype": dtype, "shapes": len(group)}
        | {field: mean(group, field) for field in TIMES if field in group[0]}
        for (block, contender, dtype), group in groups.items()
    ]
