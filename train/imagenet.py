"""``python -m train.imagenet --data-dir FOLDER``: trains on folders of images.

``FOLDER/train/CLASS/IMAGE`` and ``FOLDER/val/CLASS/IMAGE``; exit codes and the other
options are those of ``train.cifar``. Epochs, learning rate, warmup, momentum and weight
decay are those of Goyal et al., Accurate, Large Minibatch SGD, 2017,
https://arxiv.org/abs/1706.02677, for batches of 256; the learning rate decays by a
cosine instead of in steps.
"""

from collections.abc import Sequence

from train import cifar
from train.engine.config import Config

DEFAULT = Config(
    loader="grain",
    family="imagenet",
    depth=50,
    learning_rate=0.1,
    warmup_epochs=5,
    weight_decay=1e-4,
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    cifar.main(args, prog="train.imagenet", default=DEFAULT)


if __name__ == "__main__":
    main()
