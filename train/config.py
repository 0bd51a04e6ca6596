"""What a run is: one frozen dataclass, read by the command line and by the loop."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

DTYPES = ("float32", "bfloat16")
# (epochs, batch size) where the user names none: small sets want small batches.
DEFAULTS = {"cifar10": (100, 128), "cifar100": (100, 128), "digits": (10, 64)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a residual network with an attention block on small images."""

    attention: str = "none"
    """Block in every residual branch: none, se, se-max, eca, channel, channel-conv,
    spatial, cbam or cbam-conv."""
    dataset: str = "cifar10"
    """cifar10, cifar100 or digits (1,797 scans that need no network)."""
    depth: int = 20
    """Layers of the network, 6n+2: 8, 20, 32, 44, 56, 110."""
    epochs: int | None = None
    """Passes over the training images; by default 100, for digits 10."""
    batch_size: int | None = None
    """Images per step; by default 128, for digits 64."""
    learning_rate: float = 0.1
    """Peak of the schedule: a linear warm-up, then half a cosine down to 0."""
    warmup_epochs: float = 1.0
    """Length of the warm-up; at most a tenth of the run is spent on it."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 penalty on kernels; biases and normalisation have none."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    seed: int = 0
    """Seed of parameters, order and augmentation."""
    dtype: str = "float32"
    """Dtype of the computation: float32 or bfloat16."""
    steps_per_call: int | None = None
    """Steps compiled into one program; by default many on accelerators and 1 on CPU,
    where convolutions inside loops are slow."""
    data_dir: Path = Path("~/.cache/flax_attn")
    """Where the CIFAR archive or its unpacked folder lies, or is downloaded to."""
    workdir: Path | None = None
    """Where metrics.jsonl goes; by default a new folder under runs/."""


def check(config: Config) -> None:
    """Raises ``ValueError``, with one line that says the way out, for a bad field."""
    for field, names in (
        ("dataset", DEFAULTS),
        ("dtype", DTYPES),
    ):
        check_choice(field, getattr(config, field), names)
    for field in ("epochs", "batch_size", "steps_per_call"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ValueError(f"`{field}` must be at least 1, got {value}.")
    for field in ("learning_rate", "warmup_epochs", "weight_decay"):
        value = getattr(config, field)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"`{field}` must be finite and at least 0, got {value}.")
    for field in ("momentum", "label_smoothing"):
        value = getattr(config, field)
        if not 0 <= value < 1:
            raise ValueError(f"`{field}` must be in [0, 1), got {value}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"`seed` must be in [0, 2**32), got {config.seed}.")


def check_choice(field: str, value: str, names: Collection[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``names``."""
    if value not in names:
        raise ValueError(f"`{field}` must be one of {', '.join(names)}, got {value!r}.")


def length(config: Config) -> tuple[int, int]:
    """The epochs and the batch size: what was asked for, or what suits the data set."""
    epochs, batch_size = DEFAULTS[config.dataset]
    return (
        epochs if config.epochs is None else config.epochs,
        batch_size if config.batch_size is None else config.batch_size,
    )
