"""timm, for the live comparisons."""

import sys

import pytest


@pytest.fixture(scope="session")
def timm():
    """timm, which imports torchvision for names that the tests do not use."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A build for CUDA on a CPU build of PyTorch: its operators do not load, but for
        # the import it is enough that they are declared.
        for name in [x for x in sys.modules if x.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
    import timm

    return timm
