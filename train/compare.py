"""``python -m train.compare``: does attention help on these data, and at what cost?

Trains every block with every seed under one recipe and reports the accuracy after the
last epoch. Interrupted, the same command goes on where it stopped. The report is made
from all runs in the workdir, so that none can be left out of it.

Exit codes: 0 done, 1 a run's loss is not finite, 2 the command line, the data or a log
is bad, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tyro

from train.engine import config as config_lib
from train.engine.config import Config
from train.study import comparison

if TYPE_CHECKING:
    import numpy as np
    from flax import linen as nn

    from train.data.inputs import Inputs
    from train.engine.loop import Images, Run

SHOWN_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Recipe(Config):
    """What all runs have in common."""

    attention: tyro.conf.Suppress[str] = comparison.BASELINE
    seed: tyro.conf.Suppress[int] = 0
    workdir: tyro.conf.Suppress[Path | None] = None
    # A comparison always goes on, in one process.
    resume: tyro.conf.Suppress[str] = "auto"
    coordinator: tyro.conf.Suppress[str | None] = None
    num_processes: tyro.conf.Suppress[int | None] = None
    process_id: tyro.conf.Suppress[int | None] = None
    peer_timeout: tyro.conf.Suppress[int] = Config.peer_timeout


@dataclasses.dataclass(frozen=True)
class Options:
    """Train several blocks with several seeds and report what they gain and cost."""

    attentions: tuple[str, ...] = (comparison.BASELINE, "se", "eca", "cbam")
    """Blocks to compare: none, se, se-max, eca, channel, channel-conv, spatial, cbam,
    cbam-conv. The baseline none is added where it is left out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each trains every block once. One alone gives no interval."""
    workdir: Path = Path("runs/compare")
    """Where the runs lie, a folder for each, and the report."""
    report_only: bool = False
    """Rebuild the report from the logs in workdir; no other option is looked at."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = Recipe()


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    options = tyro.cli(Options, prog="python -m train.compare", args=args)
    try:
        all_finite = options.report_only or _train(options)
        text = comparison.write_report(options.workdir)
    except (ValueError, OSError) as error:
        _stop(error, 2)
    except KeyboardInterrupt:
        _stop("stopped by SIGINT.", 130)
    print(text)
    if not all_finite:
        raise SystemExit(1)


def _train(options: Options) -> bool:
    """Trains what is missing; returns whether the loss of every run stayed finite."""
    # Only now, so that --help, a mistyped option and a report need no jax.
    from tqdm.auto import tqdm

    from train.data import cifar as data
    from train.engine import interrupt, loop
    from train.engine.checkpoint import CheckpointError

    tasks = plan(options)
    for config in tasks:
        loop.check(config)
    configs = [
        config_lib.recipe(options.recipe),
        *comparison.read_configs(options.workdir),
    ]
    comparison.check_same_recipe(options.workdir, configs)
    try:
        images = loop.load(options.recipe)
    except data.DataError as error:
        _stop(error, 2)
    loop.check_batch(options.recipe, images)
    if comparison.BASELINE not in options.attentions:
        print(f"The baseline {comparison.BASELINE} is trained too.", file=sys.stderr)
    all_finite = True
    with (
        compiled_once(options.workdir / ".compiled"),
        interrupt.listening(),
        tqdm(tasks, unit="run") as bar,
    ):
        for config in bar:
            name = comparison.name_of(config.attention, config.seed)
            bar.set_description(name)
            folder = options.workdir / name
            try:
                run = loop.train(config, images, folder)
                save_gates(folder, run, images)
            except FloatingPointError as error:
                # That is a result about this block; the others still have theirs.
                bar.write(f"train.compare: {name}: {error}", file=sys.stderr)
                all_finite = False
            except interrupt.Interrupted as error:
                bar.close()
                _stop(f"{name}: {error}", error.exit_code)
            except (ValueError, OSError, data.DataError, CheckpointError) as error:
                bar.close()
                _stop(error, 2)
    return all_finite


@contextlib.contextmanager
def compiled_once(cache: Path) -> Iterator[None]:
    """Keeps what is compiled in ``cache``: all seeds of a block run one program.

    Where JAX has a cache already, that one serves.
    """
    import jax

    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (mypy)
    if before is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def plan(options: Options) -> list[Config]:
    """The runs in their order: seed by seed, so that an interrupt leaves whole pairs.

    Raises:
      ValueError: there is no block or no seed, or one is named twice.
    """
    for field in ("attentions", "seeds"):
        values = getattr(options, field)
        if not values:
            raise ValueError(f"`{field}` must be at least one, got none.")
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(
                f"`{field}` must differ from each other, got {', '.join(twice)} more "
                "than once; name each once."
            )
    attentions = options.attentions
    if comparison.BASELINE not in attentions:
        attentions = (comparison.BASELINE, *attentions)
    common = {
        field.name: getattr(options.recipe, field.name)
        for field in dataclasses.fields(Config)
    }
    return [
        Config(**common | {"attention": attention, "seed": seed})
        for seed in options.seeds
        for attention in attentions
    ]


def spatial_gates(
    model: "nn.Module", variables: Any, inputs: "Inputs", count: int = SHOWN_IMAGES
) -> tuple["np.ndarray", dict[str, "np.ndarray"]]:
    """The spatial gates of each stage's last block over the first test images.

    Args:
      model: a residual network of ``flax_attn.resnet``.
      variables: its variables.
      inputs: what it was trained on, on one device.
      count: how many images; at most a batch.

    Returns:
      The images, ``(count, H, W, 3)`` uint8, and by the name of the residual block the
      gates ``(count, h, w)`` float32; without spatial attention there are none.
    """
    import jax
    import numpy as np

    from flax_attn import inspect
    from train.engine import devices

    data = inputs.test_data
    item, _ = next(inputs.test_calls())
    normalised = inputs.test_batch(data, item)[0][:count]
    shown = np.asarray((normalised * data.std + data.mean) * 255)
    gates: dict[str, np.ndarray] = {}
    if model.attention is not None:
        read = jax.jit(partial(inspect.attention_maps, model))
        # The variables may lie on several devices; for a few images one will do.
        maps = read(devices.to_host(variables), normalised)
        last = [f"stage{i}_block{blocks}" for i, blocks in enumerate(model.stages, 1)]
        for path, gate in maps.items():
            block, *_, kind = path.split("/")
            if kind == "spatial_gate" and block in last:
                gates[block] = np.asarray(gate[..., 0], np.float32)
    return shown.round().astype(np.uint8), gates


def save_gates(folder: Path, run: "Run", images: "Images") -> None:
    """Leaves ``gates.npz`` in a finished run's folder, if its block has such gates."""
    import numpy as np

    from train.engine import devices, loop

    path = folder / "gates.npz"
    if run.config.attention not in comparison.SPATIAL or path.exists():
        return
    inputs = loop.make_inputs(run.config, images, devices.make_mesh(1))
    with contextlib.closing(inputs):
        shown, gates = spatial_gates(run.model, run.variables, inputs)
    arrays: dict[str, Any] = gates | {"images": shown}
    # Under its name only when it is whole: a file that is there is never made again.
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def _stop(error: Exception | str, code: int) -> NoReturn:
    print(f"train.compare: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
