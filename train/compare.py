"""``python -m train.compare``: does attention help on this dataset, and at what cost?

Trains every block with every seed under one recipe and reports the accuracy after the
last epoch. After an interrupt, the same command resumes. The report is made from all
runs in the workdir, so that none can be left out of it.

Exit codes: 0 done, 1 a run diverged, 2 invalid command line, data or log, 130 and 143
stopped by SIGINT and SIGTERM.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro

from train.engine import config as config_lib
from train.engine.command import debugging, exit_codes, stop
from train.engine.config import Config, check_choice
from train.engine.options import block_names, parse
from train.study import gates, logs
from train.study import report as study
from train.study.statistics import BASELINE

PROG = "train.compare"


@dataclasses.dataclass(frozen=True)
class Recipe(Config):
    """Options shared by all runs."""

    # The comparison sets these; see `Options.attentions`.
    attention: tyro.conf.Suppress[str] = BASELINE
    init: tyro.conf.Suppress[Literal["default", "identity"]] = "default"
    preset: tyro.conf.Suppress[str | None] = None
    attention_lr_scale: tyro.conf.Suppress[float] = 1.0
    seed: tyro.conf.Suppress[int] = 0
    workdir: tyro.conf.Suppress[Path | None] = None
    # A comparison always resumes, in one process.
    resume: tyro.conf.Suppress[Literal["auto", "never"]] = "auto"
    coordinator: tyro.conf.Suppress[str | None] = None
    num_processes: tyro.conf.Suppress[int | None] = None
    process_id: tyro.conf.Suppress[int | None] = None
    peer_timeout: tyro.conf.Suppress[int] = Config.peer_timeout


@dataclasses.dataclass(frozen=True)
class Options:
    """Train several blocks with several seeds and report what they gain and cost."""

    attentions: tuple[str, ...] = (BASELINE, "se", "eca", "cbam")
    """Blocks or presets (such as timm_cbam) to compare. The suffix +identity, as in
    se+identity, selects identity initialization, and +0.1lr, as in cbam+0.1lr or
    cbam+identity+0.1lr, scales the learning rate of the block's parameters by 0.1. The
    baseline none is always included."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; every block is trained once per seed. A single seed gives no interval."""
    workdir: Path = Path("runs/compare")
    """Folder for the runs, one subfolder each, and the report."""
    report_only: bool = False
    """Rebuild the report from the logs in workdir; other options are ignored."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = Recipe()


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    notes = {"attentions": block_names(args, BASELINE)}
    options = parse(Options, prog=PROG, args=args, notes=notes)
    with exit_codes(PROG):
        all_finite = options.report_only or _train(options)
        print(study.write_report(options.workdir))
    if not all_finite:
        raise SystemExit(1)


def _train(options: Options) -> bool:
    """Trains what is missing; returns whether the loss of every run stayed finite."""
    # Only now, so that --help and a mistyped option need no jax.
    from tqdm.auto import tqdm

    from train.engine import interrupt, loop, model, setup

    tasks = plan(options)
    for config in tasks:
        setup.validate(config)
    recipe = config_lib.resolve(options.recipe)
    configs = [config_lib.recipe(recipe), *logs.read_configs(options.workdir)]
    logs.check_same_recipe(options.workdir, configs)
    images = setup.load(recipe)
    setup.check_batch(recipe, images)
    for config in {config.block: config for config in tasks}.values():
        model.check_block(config)
    if BASELINE not in options.attentions:
        print(f"The baseline {BASELINE} is trained too.", file=sys.stderr)
    all_finite = True
    with (
        compiled_once(options.workdir / ".compiled"),
        interrupt.listening(),
        tqdm(tasks, unit="run") as bar,
    ):
        for config in bar:
            name = logs.name_of(config.block, config.seed)
            bar.set_description(name)
            folder = options.workdir / name
            try:
                run = loop.train(config, images, folder)
                gates.save_gates(folder, run, images)
            except FloatingPointError as error:
                if debugging():
                    raise
                # A result for this block; the other runs go on.
                bar.write(f"{PROG}: {name}: {error}", file=sys.stderr)
                all_finite = False
            except interrupt.Interrupted as error:
                bar.close()
                stop(PROG, f"{name}: {error}", error.exit_code)
    return all_finite


@contextlib.contextmanager
def compiled_once(cache: Path) -> Iterator[None]:
    """Makes JAX keep compiled programs in ``cache``, since all seeds share them.

    A cache that is already configured stays in use.
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
    # With jax.
    from flax_attn.resnet import ATTENTIONS
    from train.engine.attention import PRESETS, attention_fields

    blocks = [attention_fields(name) for name in options.attentions]
    for fields in blocks:
        name = fields["preset"] or fields["attention"]
        check_choice("attentions", name, [*ATTENTIONS, *PRESETS])
    named = {
        "attentions": [config_lib.block_name(fields) for fields in blocks],
        "seeds": options.seeds,
    }
    for field, values in named.items():
        if not values:
            raise ValueError(f"`{field}` must have at least one value, got none.")
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(
                f"`{field}` must be distinct, got {', '.join(twice)} more than once; "
                "pass each only once."
            )
    if BASELINE not in options.attentions:
        blocks.insert(0, attention_fields(BASELINE))
    common = vars(options.recipe)
    return [
        Config(**common | block | {"seed": seed})
        for seed in options.seeds
        for block in blocks
    ]


if __name__ == "__main__":
    main()
