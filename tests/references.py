"""The article's blocks in float64 NumPy, written from the equations.

Nothing of the library is imported. Arrays are (..., H, W, C); ``params`` are trees of
arrays in the layout that flax gives them.
"""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def mlp(params, s):
    """expand(relu(reduce(s))) for descriptors (..., C)."""

    def layer(p, s):
        return s @ p["kernel"] + p.get("bias", 0.0)

    return layer(params["expand"], np.maximum(layer(params["reduce"], s), 0))


def conv_along_channels(params, s, padding="zeros"):
    """Slides one kernel along the channels of descriptors (..., C)."""
    kernel = params["conv"]["kernel"][:, 0, 0]
    k, channels = len(kernel), s.shape[-1]
    out = np.zeros_like(s)
    for c in range(channels):
        for j in range(k):
            source = c + j - k // 2
            if padding == "circular":
                out[..., c] += kernel[j] * s[..., source % channels]
            elif 0 <= source < channels:
                out[..., c] += kernel[j] * s[..., source]
    return out + params["conv"].get("bias", 0.0)


def conv_over_positions(params, maps):
    """Slides a kernel over all axes of maps (..., H, W, 2) but the last."""
    kernel = params["conv"]["kernel"]
    out = convolve(maps, kernel)[..., 0]
    return out + params["conv"].get("bias", 0.0)


def convolve(x, kernel, dilation=1):
    """Slides a kernel (k, ..., M, O) over maps (..., H, W, M), with zeros outside."""
    sizes = x.shape[1 - kernel.ndim : -1]
    out = np.zeros((*x.shape[:-1], kernel.shape[-1]))
    for position in np.ndindex(*sizes):
        for tap in np.ndindex(*kernel.shape[:-2]):
            source = [
                p + (t - k // 2) * dilation
                for p, t, k in zip(position, tap, kernel.shape, strict=False)
            ]
            if all(0 <= s < n for s, n in zip(source, sizes, strict=True)):
                here, there = (..., *position, slice(None)), (..., *source, slice(None))
                out[here] += x[there] @ kernel[tap]
    return out


def average(x):
    return x.mean(axis=(-3, -2))


def peak(x):
    return x.max(axis=(-3, -2))


def gate_channels(x, logits):
    return x * sigmoid(logits)[..., None, None, :]


def se(params, x, pool="avg"):
    return gate_channels(x, mlp(params, average(x) if pool == "avg" else peak(x)))


def eca(params, x, pool="avg", padding="zeros"):
    s = average(x) if pool == "avg" else peak(x)
    return gate_channels(x, conv_along_channels(params, s, padding))


def channel(params, x):
    return gate_channels(x, mlp(params, average(x)) + mlp(params, peak(x)))


def channel_conv(params, x):
    logits = [conv_along_channels(params, s) for s in (average(x), peak(x))]
    return gate_channels(x, sum(logits))


def spatial(params, x):
    maps = np.stack([x.max(axis=-1), x.mean(axis=-1)], axis=-1)
    return x * sigmoid(conv_over_positions(params, maps))[..., None]


def cbam(params, x):
    return spatial(params["spatial"], channel(params["channel"], x))


def cbam_conv(params, x):
    return spatial(params["spatial"], channel_conv(params["channel"], x))


def bam(params, x, dilation=4):
    """x * (1 + sigmoid(channel + spatial)), for maps (..., H, W, C) and biases."""

    def layer(name, x, dilation=1):
        return convolve(x, params[name]["kernel"], dilation) + params[name]["bias"]

    channel = mlp(params, average(x))[..., None, None, :]
    y = layer("spatial_reduce", x)
    y = layer("spatial_conv2", layer("spatial_conv1", y, dilation), dilation)
    return x * (1 + sigmoid(channel + layer("spatial_expand", y)))


def scse(params, x, combine=np.add):
    by_position = x * sigmoid(x @ params["spatial"]["kernel"])
    return combine(se(params["channel"], x), by_position)
