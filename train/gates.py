"""``python -m train.gates RUN --out gates.png``: where a trained network attends.

RUN is a workdir of ``train.cifar`` whose block has a spatial gate. The picture shows
test images and, beside them, the spatial gates of each stage's last block and Grad-CAM
of the true class, from the last checkpoint: alone, and over the image.

Exit codes: 0 drawn, 2 invalid command line, data or workdir.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from train.engine.command import exit_codes
from train.engine.config import Config, Resolved, check_count, resolve
from train.engine.workdir import RUN
from train.study import gates as study

TRUE_CLASS = "Grad-CAM, true class"


def draw(
    run: Annotated[Path, tyro.conf.Positional],
    out: Path = Path("gates.png"),
    data_dir: Path = Config.data_dir,
    images: int = 6,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw the spatial gates of a trained network beside test images.

    Args:
        run: workdir of train.cifar.
        out: the picture to write; its suffix selects the format.
        data_dir: folder of the images it was trained on.
        images: how many images to show, at least 1; at most a batch.
        limits: gates with the darkest and the lightest color; by default the lowest
            and the highest of each block.
    """
    check_count("images", images)
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(
            f"`limits` must be two numbers, the lower one first, got {limits[0]} "
            f"{limits[1]}; a sigmoid has 0 1."
        )
    config = read_config(run, data_dir)
    # Only now, so that a mistyped path answers at once.
    from flax_attn import inspect
    from flax_attn.blocks import BLOCKS
    from train.engine import devices, loop

    inputs = loop.make_inputs(config, loop.load(config), devices.make_mesh(1))
    with contextlib.closing(inputs):
        model, variables = loop.last_saved(config, inputs, run)
        shown, gates = study.spatial_gates(model, variables, inputs, count=images)
        if not gates:
            names = ", ".join(filter(study.has_spatial_gate, BLOCKS))
            raise ValueError(
                f"`run` must have a spatial gate, got attention {config.block}; train "
                f"with --attention one of {names}."
            )
        cam = study.grad_cam(model, variables, inputs, count=images)
    figure = inspect.plot(shown, gates, cams={TRUE_CLASS: cam}, limits=limits)
    figure.savefig(out, dpi=130)
    print(f"Wrote {out}.")


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
    with exit_codes("train.gates"):
        tyro.cli(draw, prog="python -m train.gates", args=args)


if __name__ == "__main__":
    main()
