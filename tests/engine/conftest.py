import pytest

from tests import tiny_run
from train.engine import model


@pytest.fixture(scope="module")
def tiny_network():
    """The network of ``tests.tiny_run`` in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "cifar_resnet", tiny_run.network)
        yield
