"""``python -m train.benchmark``: what the blocks cost, in copies of the feature map.

The blocks do almost no arithmetic; what they cost is passes over memory. So every time
is divided by that of ``copy``, ``x * 1.0001`` on the same array in the same run. The
contenders take turns in ever new order, and of each the fastest of many rounds counts,
since a busy machine can only add time.
"""

import dataclasses
import json
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from tqdm.auto import tqdm

from flax_attn.resnet import ATTENTIONS, cifar_resnet, imagenet_resnet
from train.data.cifar import ImageSet
from train.data.inputs import DeviceInputs
from train.engine import config as config_lib
from train.engine import devices, loop

Shape = tuple[int, int, int, int]
Against = Literal["plain", "torch"]

BLOCKS = tuple(name for name in ATTENTIONS if name not in ("none", "se-max"))
SHAPES: tuple[Shape, ...] = (
    (128, 32, 32, 16),
    (32, 32, 32, 64),
    (16, 28, 28, 512),
    (32, 14, 14, 1024),
    (128, 7, 7, 512),
)
GPU_SHAPES: tuple[Shape, ...] = (*SHAPES, (128, 56, 56, 256), (256, 28, 28, 512))
TPU_SHAPES: tuple[Shape, ...] = (
    (128, 32, 32, 64),
    (128, 56, 56, 256),
    (128, 14, 14, 1024),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure the attention blocks in copies of the feature map."""

    blocks: tuple[str, ...] = BLOCKS
    """Blocks to measure."""
    shapes: tuple[Shape, ...] = ()
    """Shapes N H W C; by default five, on a GPU two more, for a TPU three."""
    dtypes: tuple[str, ...] = ()
    """Dtypes; by default float32, on a GPU also bfloat16, for a TPU only that."""
    against: tuple[Against, ...] = ()
    """What to measure beside: the plain implementation, PyTorch eager and compiled."""
    network: bool = False
    """Time training steps of whole networks with and without each block instead."""
    compile_for: str | None = None
    """Compile for a TPU topology such as v5e:2x2 instead; needs the extra tpu-aot."""
    rounds: int = 20
    """How often each contender has its turn."""
    json: Path | None = None
    """Where to write the rows as JSON."""
    plot: Path | None = None
    """Where to draw a bar chart."""


@dataclasses.dataclass
class Row:
    """One contender on one shape; times and temporaries are in copies of x."""

    block: str
    contender: str
    shape: Shape
    dtype: str
    forward: float
    forward_backward: float
    temporaries: float | None
    """Of forward + backward, in multiples of x."""
    compile_seconds: float
    """Of forward + backward."""
    copy_ms: float


Call = Callable[[], Any]


def fastest(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of each call, the least of ``rounds`` turns, after one for warming up."""
    for call in calls.values():
        _take_turn(call)
    best = dict.fromkeys(calls, math.inf)
    turns = list(calls)
    order = random.Random(0)
    for _ in range(rounds):
        # Whoever follows PyTorch shares the cores with its threads, which wait for
        # more work before they sleep; and whoever follows a large program finds the
        # caches cold. So nobody always follows the same one.
        order.shuffle(turns)
        for name in turns:
            start = time.perf_counter()
            _take_turn(calls[name])
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _take_turn(call: Call) -> None:
    call()
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _note_interrupt(*_: Any) -> None:
    # Raised between two turns, since one inside XLA can bring the process down. A
    # second Ctrl-C is raised at once.
    _interrupted.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)


_interrupted = threading.Event()


def with_backward(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the output of ``apply`` and all gradients for a given cotangent."""

    def run(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pullback = jax.vjp(apply, variables, x)
        return y, pullback(cotangent)

    return run


def make_block(block: str, dtype: str, contender: str) -> Any:
    """The flax module behind a contender, ``"fast"`` or ``"plain"``."""
    attention = ATTENTIONS[block]
    if attention is None:
        raise ValueError("`blocks` must name attention blocks, got 'none'.")
    return attention(dtype=jnp.dtype(dtype), implementation=contender)


def measure_block(
    block: str, shape: Shape, dtype: str, against: tuple[Against, ...], rounds: int
) -> Iterator[Row]:
    """Measures the contenders on one block and shape, in turns."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape, dtype)
    cotangent = jax.random.normal(keys[1], shape, dtype)
    copy = jax.jit(lambda x: x * jnp.asarray(1.0001, dtype))
    calls: dict[str, Call] = {"copy": lambda: jax.block_until_ready(copy(x))}
    seconds: dict[str, float] = {}
    temporaries: dict[str, float] = {}
    contenders = ["fast", *(["plain"] if "plain" in against else [])]
    variables = jax.jit(make_block(block, dtype, "fast").init)(keys[2], x)
    for contender in contenders:
        apply = make_block(block, dtype, contender).apply
        forward = jax.jit(apply).lower(variables, x).compile()
        start = time.perf_counter()
        both = jax.jit(with_backward(apply)).lower(variables, x, cotangent).compile()
        seconds[contender] = time.perf_counter() - start
        temporaries[contender] = temporaries_of(both) / x.nbytes
        calls[f"{contender} forward"] = partial(wait, forward, variables, x)
        calls[f"{contender} both"] = partial(wait, both, variables, x, cotangent)
    if "torch" in against:
        for contender, *pair, compiling in _torch_calls(block, shape, dtype):
            contenders.append(contender)
            seconds[contender] = compiling
            calls[f"{contender} forward"], calls[f"{contender} both"] = pair
    best = fastest(calls, rounds)
    for contender in contenders:
        yield Row(
            block,
            contender,
            shape,
            dtype,
            best[f"{contender} forward"] / best["copy"],
            best[f"{contender} both"] / best["copy"],
            temporaries.get(contender),
            seconds[contender],
            best["copy"] * 1e3,
        )


def wait(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function`` and waits for its result."""
    return jax.block_until_ready(function(*arguments))


def temporaries_of(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def _torch_calls(
    block: str, shape: Shape, dtype: str
) -> Iterator[tuple[str, Call, Call, float]]:
    """The article's block in PyTorch, eager and compiled, in its better layout."""
    import torch

    from tests.parity import torch_article

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    n, h, w, c = shape
    module = torch_article.build(block, c, ratio=16 if c >= 16 else c, k=7)
    module = module.to(device, getattr(torch, dtype))

    def calls(function: Any, layout: torch.memory_format) -> tuple[Call, Call]:
        x, cotangent = (
            torch.randn(n, c, h, w, device=device, dtype=getattr(torch, dtype)).to(
                memory_format=layout
            )
            for _ in range(2)
        )
        x.requires_grad_()
        wanted = [x, *module.parameters()]
        sync = torch.cuda.synchronize if device == "cuda" else lambda: None

        def forward() -> None:
            with torch.no_grad():
                function(x)
            sync()

        def both() -> None:
            torch.autograd.grad(function(x), wanted, cotangent)
            sync()

        return forward, both

    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    eager = {name: calls(module, layout) for name, layout in layouts.items()}
    times = fastest({name: both for name, (_, both) in eager.items()}, rounds=3)
    better = min(times, key=lambda name: times[name])
    yield "torch eager", *eager[better], 0.0
    torch.compiler.reset()
    forward, both = calls(torch.compile(module, dynamic=False), layouts[better])
    start = time.perf_counter()
    forward()
    both()
    yield "torch compiled", forward, both, time.perf_counter() - start


def compile_for_tpu(
    block: str, shape: Shape, dtype: str, against: tuple[Against, ...], topology: str
) -> Iterator[dict[str, Any]]:
    """Compiles forward and gradient for a TPU; bytes are in those of a copy.

    The gradient of the plain CBAM takes minutes at a batch of 128.
    """
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    sharding = jax.sharding.SingleDeviceSharding(description.devices[0])

    def compile_(function: Any, *arguments: Any) -> tuple[Any, float]:
        jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
        start = time.perf_counter()
        compiled = jitted.lower(*arguments).compile()
        return compiled, time.perf_counter() - start

    x = jax.ShapeDtypeStruct(shape, dtype)
    copy, _ = compile_(lambda x: x * jnp.asarray(1.0001, dtype), x)
    copied = copy.cost_analysis()["bytes accessed"]
    for contender in ("fast", *(["plain"] if "plain" in against else [])):
        module = make_block(block, dtype, contender)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        forward, forward_seconds = compile_(module.apply, variables, x)
        both, both_seconds = compile_(with_backward(module.apply), variables, x, x)
        yield {
            "block": block,
            "contender": contender,
            "shape": shape,
            "dtype": dtype,
            "forward_seconds": forward_seconds,
            "seconds": both_seconds,
            "forward_bytes": forward.cost_analysis()["bytes accessed"] / copied,
            "bytes": both.cost_analysis()["bytes accessed"] / copied,
            "temporaries": temporaries_of(both)
            / (math.prod(shape) * jnp.dtype(dtype).itemsize),
        }


def measure_network(
    name: str, blocks: tuple[str, ...], against: tuple[Against, ...], rounds: int
) -> Iterator[dict[str, Any]]:
    """Times a training step of a network with each block, all of them in turns."""
    on_cifar = name == "ResNet-20"
    size = 32 if on_cifar else 224
    dtype = "float32" if on_cifar else "bfloat16"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (128, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 128).astype(np.int32)
    images = ImageSet(pixels, labels, pixels, labels, 10, flip=True)
    inputs = DeviceInputs(
        images,
        config_lib.resolve(config_lib.Config(batch_size=128)),
        devices.make_mesh(1),
    )
    key = jax.random.key_data(jax.random.key(1))
    indices = devices.share(np.arange(128)[None], inputs.mesh, axis=1)
    contenders = ["fast", *(["plain"] if "plain" in against else [])]
    variants = [("none", "")] + [(b, c) for b in blocks for c in contenders]
    calls: dict[str, Call] = {}
    for block, contender in tqdm(variants, desc=f"compiling {name}", unit="network"):
        attention = ATTENTIONS[block]
        if attention is not None:
            attention = partial(attention, implementation=contender)
        config = config_lib.Config(attention=block, dtype=dtype)
        make = partial(cifar_resnet, 20) if on_cifar else partial(imagenet_resnet, 50)
        model = make(num_classes=10, attention=attention, dtype=jnp.dtype(dtype))
        optimizer = loop.make_optimizer(config, loop.make_schedule(config, 1, 100))
        state = loop.make_state(model, optimizer, jax.random.key(0), size)
        state = devices.replicate(state, inputs.mesh)
        train_steps = loop.make_train_steps(config, inputs)

        def call(states: list[Any] = [state], train_steps: Any = train_steps) -> None:  # noqa: B006
            # The step takes the old state's buffers, so the new one replaces it here.
            states[0], _ = train_steps(states[0], inputs.data, key, indices)
            jax.block_until_ready(states[0])

        call()
        calls[f"{block} {contender}".strip()] = call
    best = fastest(calls, rounds)
    for variant, seconds in best.items():
        yield {
            "network": name,
            "dtype": dtype,
            "batch": 128,
            "block": variant,
            "step_ms": seconds * 1e3,
            "overhead_percent": 100 * (seconds / best["none"] - 1),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns under their names."""
    if not rows:
        return "Nothing was measured."

    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, tuple | list):
            return "x".join(map(str, value))
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), *([text(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def geometric_means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each block, contender and dtype, over its shapes."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["block"], row["contender"], row["dtype"])
        groups.setdefault(key, []).append(row)

    def mean(group: list[dict[str, Any]], field: str) -> float:
        return statistics.geometric_mean(row[field] for row in group)

    return [
        {
            "block": block,
            "contender": contender,
            "dtype": dtype,
            "shapes": len(group),
            "forward": mean(group, "forward"),
            "forward_backward": mean(group, "forward_backward"),
        }
        for (block, contender, dtype), group in groups.items()
    ]


def measure(options: Options, rows: list[dict[str, Any]]) -> None:
    """Appends rows to ``rows`` as they are done, so that an interrupt loses none."""
    on_gpu = jax.default_backend() == "gpu"
    if options.network:
        for name in ("ResNet-20", *(["ResNet-50"] if on_gpu else [])):
            rows += measure_network(
                name, options.blocks, options.against, options.rounds
            )
        return
    shapes = options.shapes or (
        TPU_SHAPES if options.compile_for else GPU_SHAPES if on_gpu else SHAPES
    )
    dtypes = options.dtypes or (
        ("bfloat16",)
        if options.compile_for
        else ("float32", "bfloat16")
        if on_gpu
        else ("float32",)
    )
    tasks = [(b, s, d) for d in dtypes for b in options.blocks for s in shapes]
    for block, shape, dtype in (bar := tqdm(tasks, unit="case")):
        bar.set_postfix_str(f"{block} {shape} {dtype}")
        if _interrupted.is_set():
            raise KeyboardInterrupt
        if options.compile_for:
            rows += compile_for_tpu(
                block, shape, dtype, options.against, options.compile_for
            )
        else:
            rows += map(
                dataclasses.asdict,
                measure_block(block, shape, dtype, options.against, options.rounds),
            )


def check(options: Options) -> None:
    """Raises ``ValueError`` for options that cannot be measured."""
    for block in options.blocks:
        config_lib.check_choice("blocks", block, BLOCKS)
    for dtype in options.dtypes:
        config_lib.check_choice("dtypes", dtype, ("float32", "bfloat16", "float16"))
    check_measurement(options.shapes, options.rounds)


def check_measurement(shapes: Sequence[Shape], rounds: int) -> None:
    """Raises ``ValueError`` for shapes or a number of rounds that mean nothing."""
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"`shapes` must have axes of at least 1, got {shape}.")
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")


def write_json(path: Path, tables: dict[str, Any]) -> None:
    """Writes tables and what they were measured on."""
    path.write_text(
        json.dumps({"machine": devices.describe()} | tables, indent=1) + "\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Measures as ``args`` say; an interrupt prints what is done."""
    options = tyro.cli(
        Options, prog="python -m train.benchmark", description=__doc__, args=args
    )
    try:
        check(options)
    except ValueError as error:
        print(f"train.benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.compile_for:
        # The TPU library would look for a TPU here; only its compiler is wanted.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, _note_interrupt)
    rows: list[dict[str, Any]] = []
    interrupted = False
    try:
        measure(options, rows)
    except KeyboardInterrupt:
        interrupted = True
    print(devices.describe())
    print(table(rows))
    timed = bool(rows) and "copy_ms" in rows[0]
    if timed:
        print("\nGeometric means over the shapes, in copies of x:")
        print(table(geometric_means(rows)))
    if options.json:
        write_json(options.json, {"rows": rows})
    if options.plot and timed:
        from train.report import plot_bars

        plot_bars(geometric_means(rows)).savefig(options.plot, dpi=150)
    if interrupted:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
