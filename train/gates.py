"""``python -m train.gates RUN --out gates.png``: where a trained network attends.

RUN is a workdir of ``train.cifar`` whose block has a spatial gate. The picture shows
test images and, beside them, the spatial gates of each stage's last block and Grad-CAM
of the true class, from the last checkpoint: alone, and over the image.

Exit codes: 0 drawn, 2 invalid command line, data or workdir.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from train.engine.command import exit_codes
from train.engine.config import Config, Resolved, check_count, resolve
from train.engine.options import parse
from train.engine.workdir import RUN
from train.study import gates as study

PROG = "train.gates"
TRUE_CLASS = "Grad-CAM, true class"


@dataclasses.dataclass(frozen=True)
class Options:
    """Plot the spatial gates of a trained network next to test images."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Workdir of train.cifar."""
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


def draw(options: Options) -> None:
    """Writes the picture; raises ``ValueError`` where there is nothing to draw."""
    check_count("images", options.images)
    limits = options.limits
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(
            f"`limits` must be two numbers, the lower one first, got {limits[0]} "
            f"{limits[1]}; a sigmoid has 0 1."
        )
    config = read_config(options.run, options.data_dir)
    # Only now, so that a mistyped path answers at once.
    from flax_attn import inspect
    from flax_attn.blocks import BLOCKS
    from train.engine import devices, saved, setup

    inputs = setup.make_inputs(config, setup.load(config), devices.make_mesh(1))
    with contextlib.closing(inputs):
        model, variables = saved.last_saved(config, inputs, options.run)
        trained = model, variables, inputs
        shown, gates = study.spatial_gates(*trained, count=options.images)
        if not gates:
            names = ", ".join(filter(study.has_spatial_gate, BLOCKS))
            raise ValueError(
                f"`run` must have a spatial gate, got attention {config.block}; train "
                f"with --attention one of {names}."
            )
        cam = study.grad_cam(*trained, count=options.images)
    figure = inspect.plot(shown, gates, cams={TRUE_CLASS: cam}, limits=limits)
    figure.savefig(options.out, dpi=130)
    print(f"Wrote {options.out}.")


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
            f"`run` must be a workdir of train.cifar, got {run} ({error})."
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    options = parse(Options, prog=PROG, args=args)
    with exit_codes(PROG):
        draw(options)


if __name__ == "__main__":
    main()
