"""The article's blocks in float64 NumPy, written from the equations.

Nothing of the library is imported. Arrays are (..., H, W, C), with ``dims`` spatial
axes; ``params`` are trees of arrays in the layout that flax gives them.
"""

from functools import partial

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def dense(layer, s):
    return s @ layer["kernel"] + layer.get("bias", 0.0)


def mlp(params, s):
    """expand(relu(reduce(s))) for descriptors (..., C)."""
    return dense(params["expand"], np.maximum(dense(params["reduce"], s), 0))


def conv_along_channels(params, s):
    """Slides one kernel along the channels of descriptors (..., C)."""
    return conv(params["conv"], s[..., None])[..., 0]


def conv(layer, x, dilation=1):
    """Slides a kernel (k, ..., M, O) over maps (..., H, W, M), with zeros outside."""
    kernel = layer["kernel"]
    taps = kernel.shape[:-2]
    sizes = x.shape[-1 - len(taps) : -1]
    margins = [(k // 2 * dilation,) * 2 for k in taps]
    padded = np.pad(x, [*[(0, 0)] * (x.ndim - 1 - len(taps)), *margins, (0, 0)])
    out = 0
    for tap in np.ndindex(*taps):
        starts = [t * dilation for t in tap]
        window = [slice(t, t + n) for t, n in zip(starts, sizes, strict=True)]
        out = out + padded[..., *window, :] @ kernel[tap]
    return out + layer.get("bias", 0.0)


def average(x, dims):
    return x.mean(axis=tuple(range(-1 - dims, -1)), keepdims=True)


def peak(x, dims):
    return x.max(axis=tuple(range(-1 - dims, -1)), keepdims=True)


def se(params, x, dims=2, squeeze=average):
    return x * sigmoid(mlp(params, squeeze(x, dims)))


def eca(params, x, dims=2):
    return x * sigmoid(conv_along_channels(params, average(x, dims)))


def ese(params, x, dims=2):
    return x * sigmoid(dense(params["excite"], average(x, dims)))


def channel(params, x, dims=2, excite=mlp):
    logits = excite(params, average(x, dims)) + excite(params, peak(x, dims))
    return x * sigmoid(logits)


def spatial(params, x, dims=2):
    maps = np.stack([x.max(axis=-1), x.mean(axis=-1)], axis=-1)
    return x * sigmoid(conv(params["conv"], maps))


def cbam(params, x, dims=2, excite=mlp):
    y = channel(params["channel"], x, dims, excite)
    return spatial(params["spatial"], y)


def lcbam(params, x, dims=2):
    """Half the sum of mean and maximum, in the place of both."""
    s = (average(x, dims) + peak(x, dims)) / 2
    y = x * sigmoid(mlp(params["channel"], s))
    t = (y.mean(axis=-1, keepdims=True) + y.max(axis=-1, keepdims=True)) / 2
    return y * sigmoid(conv(params["spatial"]["conv"], t))


def bam(params, x, dims=2, dilation=4):
    """x * (1 + sigmoid(channel + spatial))."""
    y = conv(params["spatial_reduce"], x)
    y = conv(params["spatial_conv1"], y, dilation)
    y = conv(params["spatial_conv2"], y, dilation)
    logits = mlp(params, average(x, dims)) + conv(params["spatial_expand"], y)
    return x * (1 + sigmoid(logits))


def sse(params, x, dims=2):
    return x * sigmoid(dense(params["spatial"], x))


def scse(params, x, dims=2, combine=np.add):
    return combine(se(params["channel"], x, dims), sse(params, x))


def simam(params, x, dims=2, lam=1e-4):
    """x * sigmoid(1 / e), eq. 5: e = 4 (v + lam) / ((x - m)^2 + 2 v + 2 lam)."""
    squares = (x - average(x, dims)) ** 2
    v = average(squares, dims)
    return x * sigmoid((squares + 2 * v + 2 * lam) / (4 * (v + lam)))


def gather_excite(params, x, dims=2):
    return x * sigmoid(average(x, dims))


def gather_excite_plus(params, x, dims=2):
    """Depthwise convolutions of stride 2, an MLP, and the nearest of the results."""

    def halved(p, y):
        margins = [*[(0, 0)] * (y.ndim - 1 - dims), *[(1, 1)] * dims, (0, 0)]
        padded, sizes, out = np.pad(y, margins), y.shape[-1 - dims : -1], 0
        for tap in np.ndindex(*p["kernel"].shape[:dims]):
            starts = zip(tap, sizes, strict=True)
            window = [slice(t, t + n, 2) for t, n in starts]
            out = out + padded[..., *window, :] * p["kernel"][tap][0]
        return out + p.get("bias", 0.0)

    y = halved(params["gather2"], np.maximum(halved(params["gather1"], x), 0))
    y = mlp(params, y)
    for axis in range(-1 - dims, -1):
        n, m = x.shape[axis], y.shape[axis]
        y = np.take(y, np.arange(n) * m // n, axis)
    return x * sigmoid(y)


def global_context(params, x, dims=2, fuse=np.add):
    """x + expand(relu(norm(reduce(sum_j softmax(x @ pool)_j x_j))))."""
    axes = tuple(range(-1 - dims, -1))
    weights = np.exp(dense(params["pool"], x))
    weights = weights / weights.sum(axes, keepdims=True)
    s = dense(params["reduce"], (x * weights).sum(axes, keepdims=True))
    s = (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-5)
    s = s * params["norm"]["scale"] + params["norm"]["bias"]
    return fuse(x, dense(params["expand"], np.maximum(s, 0)))


def coordinate(params, x, dims=2):
    """Gates along each axis, of the mean over the others."""
    y, axes = x, range(-1 - dims, -1)
    for axis, name in zip(axes, ["l", "hw", "dhw"][dims - 1], strict=True):
        others = tuple(a for a in axes if a != axis)
        s = dense(params["reduce"], x.mean(others, keepdims=True))
        hard_swish = s * np.clip(s + 3, 0, 6) / 6
        y = y * sigmoid(dense(params[f"expand_{name}"], hard_swish))
    return y


REFERENCES = {
    "se": se,
    "se-max": partial(se, squeeze=peak),
    "eca": eca,
    "ese": ese,
    "channel": channel,
    "channel-conv": partial(channel, excite=conv_along_channels),
    "spatial": spatial,
    "cbam": cbam,
    "cbam-conv": partial(cbam, excite=conv_along_channels),
    "lcbam": lcbam,
    "bam": bam,
    "sse": sse,
    "scse": scse,
    "scse-max": partial(scse, combine=np.maximum),
    "simam": simam,
    "coordinate": coordinate,
    "gc": global_context,
    "ge": gather_excite,
    "ge-plus": gather_excite_plus,
}
