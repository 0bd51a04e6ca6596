"""``python -m train.passes``: where CBAM's time goes, and which convolution wins.

The first table times each pass that CBAM makes over the feature map alone, in copies of
the map, beside the least that memory traffic allows (a map read or written is half a
copy) and beside the whole block in the same turns. The second times the 7x7 convolution
of the spatial gate on ever larger maps: the banded product of the fast implementation
and the convolution of the plain one.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm.auto import tqdm

from flax_attn import _kernels, functional
from train import benchmark, devices
from train.benchmark import Call, Shape

SIZES = (7, 14, 28, 56, 112, 224, 512)
# Pixels of a measured convolution, about: small maps come in batches.
PIXELS = 2**18


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure the passes of CBAM and the two forms of its convolution."""

    shapes: tuple[Shape, ...] = benchmark.SHAPES
    """Shapes N H W C of the passes."""
    sizes: tuple[int, ...] = SIZES
    """Heights and widths of the maps that are convolved."""
    rounds: int = 20
    """How often each contender has its turn."""
    json: Path | None = None
    """Where to write both tables as JSON."""


Arrays = dict[str, jax.Array]
INNER = ("x", "channel", "cotangent", "spatial", "max_c", "mean_c")
# Name, maps read and written, and the pass: what its one compiled program computes.
PASSES: tuple[tuple[str, float, Callable[[Arrays], Any]], ...] = (
    ("mean over HW", 1, lambda a: _kernels.mean(a["x"], _kernels.SPATIAL)),
    ("maximum over HW", 1, lambda a: _kernels.maximum(a["x"], _kernels.SPATIAL)),
    ("mean over C, gated", 1, lambda a: _kernels._mean_of_gated(a["x"], a["channel"])),
    ("maximum over C, gated", 1, lambda a: (a["x"] * a["channel"]).max(-1)),
    ("x * both gates", 2, lambda a: a["x"] * a["channel"] * a["spatial"]),
    (
        "spatial gate's gradient",
        2,
        lambda a: _kernels._sum_of(
            lambda x, gate, ct: x * gate * ct,
            _kernels.CHANNEL,
            *(a[name] for name in ("x", "channel", "cotangent")),
        ),
    ),
    (
        "ties over C",
        1,
        lambda a: _kernels._sum_of(
            _kernels._ties_of_gated,
            _kernels.CHANNEL,
            *(a[name] for name in ("x", "channel", "max_c")),
        ),
    ),
    (
        "channel gate's gradient",
        2,
        lambda a: _kernels._sum_of(
            lambda *maps: maps[0] * _inner(*maps),
            _kernels.SPATIAL,
            *(a[name] for name in INNER),
        ),
    ),
    (
        "ties over HW",
        1,
        lambda a: _kernels._sum_of(
            _kernels._ties, _kernels.SPATIAL, a["x"], a["max_hw"]
        ),
    ),
    (
        "gradient of x",
        3,
        lambda a: (
            _inner(*(a[name] for name in INNER)) * a["channel"]
            + a["mean_hw"]
            + _kernels._ties(a["x"], a["max_hw"]) * a["mean_hw"]
        ),
    ),
)


def _inner(x: jax.Array, gate: jax.Array, *rest: jax.Array) -> jax.Array:
    """The cotangent of ``x * gate`` for a channel gate."""
    cotangent, spatial, maximum, mean = rest
    ties = _kernels._ties_of_gated(x, gate, maximum)
    return cotangent * spatial + mean + ties * mean


def make_arrays(shape: Shape) -> Arrays:
    """The maps and small arrays that the passes read."""
    n, h, w, c = shape
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], shape)
    channel = jax.random.uniform(keys[1], (n, 1, 1, c))
    return {
        "x": x,
        "cotangent": jax.random.normal(keys[2], shape),
        "channel": channel,
        "spatial": jax.random.uniform(keys[3], (n, h, w, 1)),
        "max_c": (x * channel).max(-1, keepdims=True),
        "mean_c": (x * channel).mean(-1, keepdims=True),
        "max_hw": x.max((-3, -2), keepdims=True),
        "mean_hw": x.mean((-3, -2), keepdims=True),
    }


def measure_passes(shape: Shape, rounds: int) -> dict[str, float]:
    """Copies of x that each pass takes, and CBAM forward and with its gradient."""
    arrays = make_arrays(shape)
    x, cotangent = arrays["x"], arrays["cotangent"]
    module = benchmark.make_block("cbam", "float32", "fast")
    variables = module.init(jax.random.key(1), x)
    both = jax.jit(benchmark.with_backward(module.apply))
    calls: dict[str, Call] = {
        "copy": partial(benchmark.wait, jax.jit(lambda x: x * 1.0001), x),
        "CBAM forward": partial(benchmark.wait, jax.jit(module.apply), variables, x),
        "CBAM forward + backward": partial(
            benchmark.wait, both, variables, x, cotangent
        ),
    }
    for name, _, compute in PASSES:
        calls[name] = partial(benchmark.wait, jax.jit(compute), arrays)
    best = benchmark.fastest(calls, rounds)
    return {name: seconds / best["copy"] for name, seconds in best.items()}


def pass_table(shapes: tuple[Shape, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each pass, for their sums and for the block itself."""
    columns: dict[str, dict[str, float]] = {}
    for shape in tqdm(shapes, desc="passes", unit="shape"):
        columns["x".join(map(str, shape))] = measure_passes(shape, rounds)

    def row(name: str, least: float, of: Callable[[dict[str, float]], float]) -> Any:
        values = {shape: of(column) for shape, column in columns.items()}
        mean = math.exp(sum(map(math.log, values.values())) / len(values))
        return {"pass": name, "least": least, "mean": mean} | values

    def total(names: list[str]) -> Callable[[dict[str, float]], float]:
        return lambda column: sum(column[name] for name in names)

    names = [name for name, *_ in PASSES]
    least = {name: maps / 2 for name, maps, _ in PASSES}
    rows = [row(name, least[name], total([name])) for name in names]
    # One program may make the two squeezes of the same operand in one read.
    for name, group, shared in (
        ("CBAM forward", names[:5], 2),
        ("CBAM forward + backward", names, 2),
    ):
        rows.append(row(f"sum: {name}", sum(least[n] for n in group), total(group)))
        rows.append(row(name, rows[-1]["least"] - shared / 2, total([name])))
    return rows


def convolution_table(sizes: tuple[int, ...], rounds: int) -> Iterator[dict[str, Any]]:
    """Forward + backward of the 7x7, 2 to 1 convolution in both forms, by map size."""
    for size in tqdm(sizes, desc="convolutions", unit="size"):
        batch = max(1, PIXELS // size**2)
        keys = jax.random.split(jax.random.key(0), 3)
        maps = jax.random.normal(keys[0], (batch, size, size, 2))
        cotangent = jax.random.normal(keys[1], (batch, size, size, 1))
        kernel = jax.random.normal(keys[2], (7, 7, 2, 1))
        calls: dict[str, Call] = {}
        temporaries: dict[str, int] = {}
        for form in ("fast", "plain"):
            convolve = partial(functional.conv_spatial, implementation=form)
            both = jax.jit(benchmark.with_backward(convolve))
            compiled = both.lower(maps, kernel, cotangent).compile()
            calls[form] = partial(benchmark.wait, compiled, maps, kernel, cotangent)
            temporaries[form] = benchmark.temporaries_of(compiled)
        best = benchmark.fastest(calls, rounds)
        yield {
            "maps": (batch, size, size, 2),
            "product_ms": best["fast"] * 1e3,
            "convolution_ms": best["plain"] * 1e3,
            "convolution / product": best["plain"] / best["fast"],
            "product_temporaries": temporaries["fast"] / maps.nbytes,
            "convolution_temporaries": temporaries["plain"] / maps.nbytes,
        }


def main() -> None:
    """Measures as the command line says."""
    options = tyro.cli(Options, prog="python -m train.passes", description=__doc__)
    try:
        benchmark.check_measurement(options.shapes, options.rounds)
        if min(options.sizes, default=0) < 1:
            raise ValueError(f"`sizes` must be at least 1 each, got {options.sizes}.")
    except ValueError as error:
        print(f"train.passes: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    passes = pass_table(options.shapes, options.rounds)
    convolutions = list(convolution_table(options.sizes, options.rounds))
    print(devices.describe())
    print("\nPasses over the map, in copies of it, each compiled alone:")
    print(benchmark.table(passes))
    print("\nThe 7x7 convolution 2 -> 1 forward + backward:")
    print(benchmark.table(convolutions))
    if options.json:
        benchmark.write_json(
            options.json, {"passes": passes, "convolutions": convolutions}
        )


if __name__ == "__main__":
    main()
