"""The article's blocks in PyTorch, NCHW, for ``train.benchmark --against torch``.

PyTorch is imported when a block is made.
"""

import math
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import jax

from train.study.timing import Call, fastest

if TYPE_CHECKING:
    import torch

# By block: the pools over H, W, how they become logits, and whether a spatial gate
# follows. The article has no other block.
_ARTICLE: dict[str, tuple[tuple[str, ...], str | None, bool]] = {
    "se": (("mean",), "mlp", False),
    "se-max": (("amax",), "mlp", False),
    "eca": (("mean",), "conv", False),
    "channel": (("mean", "amax"), "mlp", False),
    "channel-conv": (("mean", "amax"), "conv", False),
    "spatial": ((), None, True),
    "cbam": (("mean", "amax"), "mlp", True),
    "cbam-conv": (("mean", "amax"), "conv", True),
}


def has_counterpart(block: str) -> bool:
    """Whether there is a PyTorch version of the block."""
    return block in _ARTICLE


def check_installed() -> None:
    """Raises ``ValueError`` without PyTorch."""
    if find_spec("torch") is None:
        raise ValueError(
            "`against` torch needs PyTorch, which is not installed; install the group "
            "parity (pip install --group parity) or leave torch out."
        )


def make_block(
    block: str, channels: int, *, reduction: int = 16, kernel_size: int = 7
) -> tuple[Callable[..., Any], list["torch.Tensor"]]:
    """The function ``(x, *parameters) -> y`` of a block, and its parameters.

    Args:
      block: a name with ``has_counterpart``.
      channels: those of x, ``(N, C, H, W)``.
      reduction: C / hidden width of the MLP (default: 16).
      kernel_size: of the spatial gate's convolution (default: 7).
    """
    import torch
    from torch.nn import functional as F

    pools, excite, spatial = _ARTICLE[block]
    t = int(abs((math.log2(channels) + 1) / 2))
    width, hidden = t + (t + 1) % 2, max(channels // reduction, 1)
    weight_shapes: dict[str | None, list[tuple[int, ...]]] = {
        "mlp": [(hidden, channels), (channels, hidden)],
        "conv": [(1, 1, width)],
        None: [],
    }
    shapes = weight_shapes[excite]
    channel_parameters = len(shapes)
    if spatial:
        shapes = [*shapes, (1, 2, kernel_size, kernel_size)]
    parameters = [
        torch.randn(shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes
    ]

    def logits(pooled: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if excite == "mlp":
            reduce, expand = weights
            return F.linear(F.relu(F.linear(pooled, reduce)), expand)
        return F.conv1d(pooled[:, None], weights[0], padding=width // 2)[:, 0]

    def apply(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        if pools:
            weights = parameters[:channel_parameters]
            pooled = [getattr(torch, pool)(x, dim=(2, 3)) for pool in pools]
            first, *others = (logits(p, weights) for p in pooled)
            x = x * torch.sigmoid(sum(others, first))[:, :, None, None]
        if spatial:
            maps = torch.stack([x.amax(dim=1), x.mean(dim=1)], dim=1)
            x = x * torch.sigmoid(
                F.conv2d(maps, parameters[-1], padding=kernel_size // 2)
            )
        return x

    return apply, parameters


def make_calls(
    block: str, shape: tuple[int, int, int, int], dtype: str
) -> Iterator[tuple[str, Call, Call, float]]:
    """Yields PyTorch eager and compiled, in the better of its two memory formats.

    Each as its name, the forward call, the call with all gradients, and the seconds to
    compile both.
    """
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch_dtype = getattr(torch, dtype)
    n, h, w, c = shape
    apply, parameters = make_block(block, c)
    parameters = [p.to(device, torch_dtype).requires_grad_() for p in parameters]

    def calls(function: Callable[..., Any], layout: Any) -> tuple[Call, Call]:
        x, cotangent = (
            torch.randn(n, c, h, w, device=device, dtype=torch_dtype).to(
                memory_format=layout
            )
            for _ in range(2)
        )
        x.requires_grad_()
        wanted = [x, *parameters]
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

        def forward() -> None:
            with torch.no_grad():
                function(*wanted)
            synchronize()

        def both() -> None:
            torch.autograd.grad(function(*wanted), wanted, cotangent)
            synchronize()

        return forward, both

    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    eager = {name: calls(apply, layout) for name, layout in layouts.items()}
    times = fastest({name: both for name, (_, both) in eager.items()}, rounds=3)
    better = min(times, key=lambda name: times[name])
    yield "torch eager", *eager[better], 0.0
    torch.compiler.reset()
    compiled = torch.compile(apply, dynamic=False)
    forward, both = calls(compiled, layouts[better])
    start = time.perf_counter()
    forward()
    both()
    yield "torch compiled", forward, both, time.perf_counter() - start
