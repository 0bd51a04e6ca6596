"""The configuration of a run: one dataclass for the command line and the loop."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

# Default (epochs, batch size); small data sets need small batches.
DEFAULTS = {
    "cifar10": (100, 128),
    "cifar100": (100, 128),
    "digits": (10, 64),
    "folder": (90, 256),
}
IMAGE_SIZES = {"cifar": 32, "imagenet": 224}
LOGGERS = ("tensorboard", "wandb")
# The suffix of a block's name if it is initialized as the identity.
IDENTITY = "+identity"
# The fields that this name stands for.
OF_BLOCK = ("attention", "preset", "init", "attention_lr_scale")


def one_of(names: Callable[[], Iterable[str]]) -> Any:
    """An option with the choices ``names()``, evaluated only by the command line."""
    return tyro.conf.arg(
        constructor_factory=lambda: tyro.extras.literal_type_from_choices(names()),
        help_behavior_hint=_default_hint,
    )


def _default_hint(default: str) -> str:
    name = default.strip("[]'")
    return "" if name == "None" else f"(default: {name})"


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a residual network with an attention block on images."""

    attention: str = "none"
    """Attention block in every residual branch."""
    init: Literal["default", "identity"] = "default"
    """Initialization of the block: default, or identity, with which every gate is
    initially 1, so that the network starts as if it had no attention."""
    preset: str | None = None
    """Published variant from flax_attn.presets, instead of --attention."""
    attention_lr_scale: float = 1.0
    """Factor for the learning rate of the attention parameters. 0.1 with
    --init identity speeds up early training of spatial attention (cbam, ...)."""
    dataset: Annotated[str | None, one_of(lambda: DEFAULTS)] = None
    """Dataset: cifar10, cifar100, digits (1,797 scans, no download) or folder (one
    folder of images per class); default: cifar10, or folder with --loader grain."""
    loader: Literal["device", "grain"] = "device"
    """How images are loaded: device (all kept in device memory) or grain (read from
    folders during training; needs the extra grain)."""
    family: Literal["cifar", "imagenet"] = "cifar"
    """Family of ResNets: cifar (6n+2 layers, small images) or imagenet."""
    depth: int = 20
    """Number of layers: 8, 20, 32, 44, 56 or 110 (any 6n+2); for --family imagenet 18,
    34, 50, 101 or 152."""
    image_size: int | None = None
    """Height and width of the crops from image folders; default: 32, or 224 with
    --family imagenet."""
    epochs: int | None = None
    """Passes over the training images; default: 100, for digits 10, for folders
    90."""
    batch_size: int | None = None
    """Images per step, over all devices; default: 128, for digits 64, for folders
    256."""
    learning_rate: float = 0.1
    """Peak learning rate: linear warmup, then cosine decay to 0."""
    warmup_epochs: float = 1.0
    """Epochs of warmup, at most a tenth of the run."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay (L2 penalty) on kernels only."""
    label_smoothing: float = 0.0
    """Label smoothing, in [0, 1)."""
    seed: int = 0
    """Random seed for initialization, data order and augmentation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation dtype."""
    steps_per_call: int | None = None
    """Training steps per compiled call; default: up to 100 on accelerators with
    --loader device, otherwise 1 (on CPU, convolutions inside loops are slow)."""
    data_dir: Path = Path("~/.cache/flax_attn")
    """Folder of the CIFAR archive or its unpacked folder (binary or Python version),
    downloaded if missing; for image folders, the folder with train/ and val/."""
    skip_damaged: bool = False
    """For image folders: first read all images, report damaged ones and skip them;
    default: stop at the first damaged image."""
    data_url: tuple[str, ...] = ()
    """URLs of the CIFAR archive, tried in order instead of the built-in ones."""
    workdir: Path | None = None
    """Folder for metrics and checkpoints; default: a new folder in runs/."""
    resume: Literal["auto", "never"] = "auto"
    """If the workdir already contains this run: resume it (auto) or stop with an error
    (never)."""
    logger: Annotated[str | None, one_of(lambda: LOGGERS)] = None
    """Also log metrics to tensorboard or wandb (Weights & Biases); needs the extra of
    the same name."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; one is always saved at the end."""
    keep: int = 3
    """Number of newest checkpoints to keep."""
    devices: int | None = None
    """Number of devices to use; default: all."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0 for multi-process training, the same for all processes.
    With Slurm or Open MPI, or on a TPU pod, this option and the next two are detected
    automatically."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, starting at 0."""
    peer_timeout: int = 100
    """Seconds without a heartbeat after which another process is considered dead,
    which stops the run."""

    @property
    def block(self) -> str:
        """The name of the attention with its options, such as ``se+identity``."""
        return block_name(vars(self))


def block_name(fields: Mapping[str, Any]) -> str:
    """``Config.block`` of the fields of a configuration, such as those in run.json.

    >>> block_name({"attention": "se", "init": "identity", "preset": None})
    'se+identity'
    >>> block_name({"attention": "cbam", "attention_lr_scale": 0.1})
    'cbam+0.1lr'
    """
    name = fields.get("preset") or fields["attention"]
    if fields.get("init") == "identity":
        name += IDENTITY
    factor = fields.get("attention_lr_scale", 1.0)
    return name if factor == 1 else f"{name}+{factor}lr"


# Fields that may differ when a run is resumed: they do not change its result.
NOT_RECIPE = frozenset(
    {
        *("steps_per_call", "data_dir", "data_url", "workdir", "resume"),
        *("logger", "checkpoint_every", "keep", "devices", "coordinator"),
        *("num_processes", "process_id", "peer_timeout"),
    }
)


@dataclasses.dataclass(frozen=True)
class Resolved(Config):
    """A configuration whose result-relevant fields are all set."""

    dataset: str = "cifar10"
    image_size: int = IMAGE_SIZES["cifar"]
    epochs: int = DEFAULTS["cifar10"][0]
    batch_size: int = DEFAULTS["cifar10"][1]


def resolve(config: Config) -> Resolved:
    """Fills in the defaults that depend on the data set or the family.

    An unknown data set, which ``check_fields`` refuses, gets those of CIFAR-10.
    """
    dataset = config.dataset or ("folder" if config.loader == "grain" else "cifar10")
    epochs, batch_size = DEFAULTS.get(dataset, DEFAULTS["cifar10"])
    family = config.family if dataset == "folder" else "cifar"
    defaults = {
        "dataset": dataset,
        "epochs": epochs,
        "batch_size": batch_size,
        "image_size": IMAGE_SIZES.get(family, IMAGE_SIZES["cifar"]),
    }
    given = {name: value for name, value in vars(config).items() if value is not None}
    return Resolved(**(vars(config) | defaults | given))


def recipe(config: Config) -> dict[str, Any]:
    """The fields that determine the result of a run, as JSON types."""
    fields = dataclasses.asdict(resolve(config))
    return {name: value for name, value in fields.items() if name not in NOT_RECIPE}


def completed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe, with the defaults of fields added since."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    return {n: d for n, d in defaults.items() if n not in NOT_RECIPE} | dict(recipe)


def check_fields(config: Resolved) -> None:
    """Raises ``ValueError`` for an invalid field; one line says what to pass."""
    check_choice("dataset", config.dataset, DEFAULTS)
    hints = get_type_hints(Config)
    for field in ("loader", "family", "dtype", "init", "resume"):
        check_choice(field, getattr(config, field), get_args(hints[field]))
    if config.logger is not None:
        check_choice("logger", config.logger, LOGGERS)
    _check_loader(config)
    for field in (
        *("epochs", "batch_size", "steps_per_call", "image_size", "checkpoint_every"),
        *("keep", "devices", "num_processes"),
    ):
        check_count(field, getattr(config, field))
    # A busy process may be silent for a few seconds.
    check_count("peer_timeout", config.peer_timeout, least=5)
    for field in (
        "learning_rate",
        "attention_lr_scale",
        "warmup_epochs",
        "weight_decay",
    ):
        value = getattr(config, field)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"`{field}` must be finite and at least 0, got {value}.")
    for field in ("momentum", "label_smoothing"):
        value = getattr(config, field)
        if not 0 <= value < 1:
            raise ValueError(f"`{field}` must be in [0, 1), got {value}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"`seed` must be in [0, 2**32), got {config.seed}.")
    _check_processes(config)


def _check_loader(config: Config) -> None:
    if (config.loader == "grain") != (config.dataset == "folder"):
        raise ValueError(
            "`dataset` folder and `loader` grain go together, got "
            f"{config.dataset} and {config.loader}; for image folders, pass only "
            "--loader grain."
        )
    if config.dataset != "folder" and config.skip_damaged:
        raise ValueError(
            f"`skip_damaged` is for image folders, got dataset {config.dataset}; "
            "leave out --skip-damaged, or pass --loader grain."
        )
    if config.dataset != "folder" and config.image_size != IMAGE_SIZES["cifar"]:
        raise ValueError(
            f"`image_size` must be 32 for {config.dataset}, got {config.image_size}; "
            "pass --image-size 32, or --loader grain for image folders."
        )


def _check_processes(config: Config) -> None:
    """The three options of a process are given together or not at all."""
    fields = ("coordinator", "num_processes", "process_id")
    missing = [field for field in fields if getattr(config, field) is None]
    if 0 < len(missing) < len(fields):
        raise ValueError(
            f"`{missing[0]}` is missing: pass --coordinator, --num-processes and "
            "--process-id together, or none of them."
        )
    if config.process_id is not None and config.num_processes is not None:
        if not 0 <= config.process_id < config.num_processes:
            raise ValueError(
                f"`process_id` must be in [0, {config.num_processes}), the number of "
                f"processes, got {config.process_id}."
            )
        if config.devices is not None and config.num_processes > 1:
            raise ValueError(
                "`devices` must be unset for several processes, which use all their "
                f"devices, got {config.devices}; leave --devices out."
            )


def check_count(field: str, value: int | None, least: int = 1) -> None:
    """Raises ``ValueError`` for a number below ``least``; None passes."""
    if value is not None and value < least:
        raise ValueError(f"`{field}` must be at least {least}, got {value}.")


def check_choice(field: str, value: str | None, names: Collection[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``names``."""
    if value not in names:
        raise ValueError(f"`{field}` must be one of {', '.join(names)}, got {value!r}.")
