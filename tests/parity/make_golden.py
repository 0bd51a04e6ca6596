"""``python -m tests.parity.make_golden`` writes golden.npz; needs the group ``parity``.

Holds the outputs and gradients of the PyTorch blocks for ``cases.GOLDEN``; inputs and
parameters are drawn again from the case's seed.
"""

from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("golden.npz")


# The article's, for ours.
NAMES = {
    "channel": "channel_attention_block",
    "spatial": "spatial_attention_block",
    "reduce": "fc_layers.0",
    "expand": "fc_layers.2",
}


def to_torch(kernel):
    """A Flax kernel in PyTorch's layout."""
    import torch

    if kernel.ndim == 2:
        return torch.tensor(kernel.T)
    return torch.tensor(np.moveaxis(kernel, (-1, -2), (0, 1)))


def to_flax(weight):
    """A PyTorch weight in Flax's layout."""
    weight = weight.numpy()
    return weight.T if weight.ndim == 2 else np.moveaxis(weight, (0, 1), (-1, -2))


def output_and_gradient(block, x, cotangent):
    """A PyTorch block's output and its input's gradient; its parameters keep theirs."""
    import torch

    x = torch.tensor(np.moveaxis(x, -1, 1)).requires_grad_()
    y = block(x)
    y.backward(torch.tensor(np.moveaxis(cotangent, -1, 1)))
    return {
        "y": np.moveaxis(y.detach().numpy(), 1, -1),
        "x": np.moveaxis(x.grad.numpy(), 1, -1),
    }


def run(case):
    """The PyTorch block's output and gradients for ``case``, in Flax's layouts."""
    import jax
    import torch

    from tests.parity import torch_article

    variables, x, cotangent = case.arrays()
    block = torch_article.build(case.block, x.shape[-1], ratio=case.ratio, k=case.k)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    paths = [[part.key for part in path] for path, _ in leaves]
    weights = dict(block.named_parameters())
    names = [
        ".".join([*(NAMES.get(p, p) for p in path[:-1]), "weight"]) for path in paths
    ]
    assert sorted(names) == sorted(weights)
    with torch.no_grad():
        for name, (_, leaf) in zip(names, leaves, strict=True):
            weights[name].copy_(to_torch(leaf))
    arrays = output_and_gradient(block, x, cotangent)
    for name, path in zip(names, paths, strict=True):
        arrays["/".join(path)] = to_flax(weights[name].grad)
    return arrays


def main():
    from tests import cases

    arrays = {
        f"{case.name}:{name}": array
        for case in cases.GOLDEN
        for name, array in run(case).items()
    }
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {len(cases.GOLDEN)} cases, {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
