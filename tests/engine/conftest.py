import pytest

from tests import tiny_run
from tests.cases import compiling_quickly
from train.engine import model


@pytest.fixture(scope="module")
def tiny_network():
    """The network of ``tests.tiny_run`` in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "cifar_resnet", tiny_run.network)
        yield


@pytest.fixture(scope="module")
def quick():
    """Programs of a few steps take less time to run than to optimize."""
    with compiling_quickly():
        yield
