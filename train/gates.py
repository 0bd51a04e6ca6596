"""``python -m train.gates RUN --out gates.png``: where a trained network attends.

RUN is a workdir of ``train.cifar`` whose block has a spatial gate. The picture shows
test images and, beside them, the spatial gates of each stage's last block and Grad-CAM
of the true class, from the last checkpoint: alone, and over the image.

``python -m train.gates RUN [RUN ...] --steps 60`` trains each run again, up to this
step, and plots how far its gates are open over the steps.

Exit codes: 0 drawn, 2 invalid command line, data or workdir.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from train.engine.command import exit_codes
from train.engine.config import Config, Resolved, check_count, resolve
from train.engine.options import parse
from train.engine.workdir import RUN
from train.study import gates as study
from train.study.logs import labels_of
from train.study.plots import check_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROG = "train.gates"
TRUE_CLASS = "Grad-CAM, true class"


@dataclasses.dataclass(frozen=True)
class Options:
    """Plot spatial gates over test images, or, with --steps, how far gates are open."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
    ] = ()
    """Workdir of train.cifar; with --steps, one or more."""
    out: Annotated[Path, tyro.conf.arg(metavar="PICTURE")] = Path("gates.png")
    """Output image; its suffix selects the format."""
    data_dir: Path = Config.data_dir
    """Folder of the training data, as for train.cifar."""
    images: Annotated[int, tyro.conf.arg(metavar="COUNT")] = 6
    """Number of images to show, from 1 to the batch size."""
    limits: Annotated[
        tuple[float, float] | None, tyro.conf.arg(metavar="LOWEST HIGHEST")
    ] = None
    """Gate values of the darkest and the lightest color; default: the minimum and the
    maximum of each block."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="COUNT")] = None
    """Instead of images, plot how far the gates of each stage's last block are open
    over this number of first training steps, for which each run is trained again."""


def draw(options: Options) -> None:
    """Writes the picture; raises ``ValueError`` where there is nothing to draw."""
    check_count("images", options.images)
    limits = options.limits
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(
            f"`limits` must be two numbers, the lower one first, got {limits[0]} "
            f"{limits[1]}; for a sigmoid, pass 0 1."
        )
    if options.steps is not None:
        check_count("steps", options.steps)
        if limits is not None:
            raise ValueError("`limits` are those of images; leave out `steps`.")
    if not options.runs or (options.steps is None and len(options.runs) > 1):
        raise ValueError(
            "`runs` must be one workdir of train.cifar, or several with --steps, got "
            f"{len(options.runs)}."
        )
    check_picture("out", options.out)
    configs = {run: read_config(run, options.data_dir) for run in options.runs}
    # Only now, so that a mistyped path answers at once.
    from train.engine import setup

    for config in configs.values():
        setup.validate(config)
    if options.steps is None:
        ((run, config),) = configs.items()
        figure = images_of(run, config, options)
    else:
        figure = steps_of(configs, options.steps)
    figure.savefig(options.out, dpi=130)
    print(f"Wrote {options.out}.")


def images_of(run: Path, config: Resolved, options: Options) -> "Figure":
    """Test images beside the spatial gates and Grad-CAM of a run."""
    from flax_attn import inspect
    from flax_attn.blocks import BLOCKS
    from train.engine import devices, saved, setup

    if options.images > config.batch_size:
        raise ValueError(
            f"`images` must be at most {config.batch_size}, the batch size of the run, "
            f"got {options.images}."
        )
    inputs = setup.make_inputs(config, setup.load(config), devices.make_mesh(1))
    with contextlib.closing(inputs):
        model, variables = saved.last_saved(config, inputs, run)
        trained = model, variables, inputs
        shown, gates = study.spatial_gates(*trained, count=options.images)
        if not gates:
            names = ", ".join(filter(study.has_spatial_gate, BLOCKS))
            other = ", or pass --steps" if study.gates_of(config.block) else ""
            raise ValueError(
                f"`runs` must have a spatial gate, got attention {config.block}; train "
                f"with --attention one of {names}{other}."
            )
        cam = study.grad_cam(*trained, count=options.images)
    return inspect.plot(shown, gates, cams={TRUE_CLASS: cam}, limits=options.limits)


def steps_of(configs: Mapping[Path, Resolved], steps: int) -> "Figure":
    """How far the gates of each run are open over its first ``steps`` steps."""
    from train.engine import setup
    from train.study.plots import plot_steps

    for run, config in configs.items():
        if not study.gates_of(config.block):
            raise ValueError(
                f"`runs` must have gates, got {run} with attention {config.block}, "
                "which has none; leave it out."
            )
    gates = []
    for config in configs.values():
        images = setup.load(config)
        setup.check_batch(config, images)
        gates.append(study.gates_over_steps(config, images, steps))
    return plot_steps(dict(zip(labels_of(list(configs)), gates, strict=True)))


def read_config(run: Path, data_dir: Path) -> Resolved:
    """The configuration in a run's run.json, with its images in ``data_dir``.

    Raises:
      ValueError: there is none.
    """
    try:
        recipe = json.loads((run / RUN).read_text())["config"]
        return resolve(Config(**recipe, data_dir=data_dir))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`runs` must be workdirs of train.cifar, got {run} ({error})."
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    options = parse(Options, prog=PROG, args=args)
    with exit_codes(PROG):
        draw(options)


if __name__ == "__main__":
    main()
