"""The article's blocks in float64 NumPy, written from the equations.

Nothing of the library is imported. Arrays are (..., H, W, C), with ``dims`` spatial
axes; ``params`` are trees of arrays in the layout that flax gives them.
"""

from functools import partial

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def mlp(params, s):
    """expand(relu(reduce(s))) for descriptors (..., C)."""

    def layer(p, s):
        return s @ p["kernel"] + p.get("bias", 0.0)

    return layer(params["expand"], np.maximum(layer(params["reduce"], s), 0))


def conv_along_channels(params, s):
    """Slides one kernel along the channels of descriptors (..., C)."""
    logits = convolve(s[..., None], params["conv"]["kernel"])[..., 0]
    return logits + params["conv"].get("bias", 0.0)


def convolve(x, kernel, dilation=1):
    """Slides a kernel (k, ..., M, O) over maps (..., H, W, M), with zeros outside."""
    taps = kernel.shape[:-2]
    sizes = x.shape[-1 - len(taps) : -1]
    margins = [(k // 2 * dilation,) * 2 for k in taps]
    padded = np.pad(x, [*[(0, 0)] * (x.ndim - 1 - len(taps)), *margins, (0, 0)])
    out = 0
    for tap in np.ndindex(*taps):
        starts = [t * dilation for t in tap]
        window = [slice(t, t + n) for t, n in zip(starts, sizes, strict=True)]
        out = out + padded[..., *window, :] @ kernel[tap]
    return out


def average(x, dims):
    return x.mean(axis=tuple(range(-1 - dims, -1)), keepdims=True)


def peak(x, dims):
    return x.max(axis=tuple(range(-1 - dims, -1)), keepdims=True)


def se(params, x, dims=2, squeeze=average):
    return x * sigmoid(mlp(params, squeeze(x, dims)))


def eca(params, x, dims=2):
    return x * sigmoid(conv_along_channels(params, average(x, dims)))


def ese(params, x, dims=2):
    layer = params["excite"]
    return x * sigmoid(average(x, dims) @ layer["kernel"] + layer.get("bias", 0.0))


def channel(params, x, dims=2, excite=mlp):
    logits = excite(params, average(x, dims)) + excite(params, peak(x, dims))
    return x * sigmoid(logits)


def spatial(params, x, dims=2):
    maps = np.stack([x.max(axis=-1), x.mean(axis=-1)], axis=-1)
    logits = convolve(maps, params["conv"]["kernel"])
    return x * sigmoid(logits + params["conv"].get("bias", 0.0))


def cbam(params, x, dims=2, excite=mlp):
    y = channel(params["channel"], x, dims, excite)
    return spatial(params["spatial"], y)


def lcbam(params, x, dims=2):
    """Half the sum of mean and maximum, in the place of both."""
    s = (average(x, dims) + peak(x, dims)) / 2
    y = x * sigmoid(mlp(params["channel"], s))
    t = (y.mean(axis=-1, keepdims=True) + y.max(axis=-1, keepdims=True)) / 2
    layer = params["spatial"]["conv"]
    return y * sigmoid(convolve(t, layer["kernel"]) + layer.get("bias", 0.0))


def bam(params, x, dims=2, dilation=4):
    """x * (1 + sigmoid(channel + spatial))."""

    def layer(name, x, dilation=1):
        y = convolve(x, params[name]["kernel"], dilation)
        return y + params[name].get("bias", 0.0)

    y = layer("spatial_reduce", x)
    y = layer("spatial_conv2", layer("spatial_conv1", y, dilation), dilation)
    logits = mlp(params, average(x, dims)) + layer("spatial_expand", y)
    return x * (1 + sigmoid(logits))


def scse(params, x, dims=2, combine=np.add):
    logits = x @ params["spatial"]["kernel"] + params["spatial"].get("bias", 0.0)
    return combine(se(params["channel"], x, dims), x * sigmoid(logits))


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
    "scse": scse,
    "scse-max": partial(scse, combine=np.maximum),
}
