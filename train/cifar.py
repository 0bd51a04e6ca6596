"""``python -m train.cifar``: trains a residual network with an attention block.

Exit codes: 0 trained, 1 the training diverged, others as in ``train.engine.command``.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from typing import Annotated

from train.engine.command import exit_codes
from train.engine.config import Config, one_of
from train.engine.options import parse


def _attentions() -> Iterable[str]:
    from flax_attn.resnet import ATTENTIONS  # With jax, which takes a moment.

    return ATTENTIONS


def _presets() -> Iterable[str]:
    from train.engine.attention import PRESETS

    return PRESETS


@dataclasses.dataclass(frozen=True)
class Options(Config):
    """Train a residual network with an attention block on images."""

    attention: Annotated[str, one_of(_attentions)] = "none"
    """Attention block in every residual branch."""
    preset: Annotated[str | None, one_of(_presets)] = None
    """Published variant from flax_attn.presets, instead of --attention."""


def main(
    args: Sequence[str] | None = None,
    *,
    prog: str = "train.cifar",
    default: Config | None = None,
) -> None:
    """Runs the command line ``args``, by default that of the process."""
    options = Options(**vars(default or Config()))
    config = parse(Options, prog=prog, args=args, default=options)
    with exit_codes(prog):
        _run(config)


def _run(config: Config) -> None:
    # Only now, so that --help and a mistyped option answer at once.
    from train.engine import devices, interrupt, loop, setup, workdir
    from train.study.gates import has_spatial_gate

    config = setup.validate(config)
    devices.join(config)
    folder = workdir.choose(config)
    devices.on_main(lambda: workdir.check_resumable(folder, config))
    images = setup.load(config)
    setup.check_batch(config, images)
    quoted = shlex.quote(folder.as_posix())  # Also understood on Windows.
    try:
        with interrupt.listening():
            run = loop.train(config, images, folder)
    except interrupt.Interrupted as error:
        if not error.saved:
            raise
        resume = f"{error} To resume, run the same command with --workdir {quoted}."
        raise interrupt.Interrupted(error.signal, resume, saved=True) from None
    if devices.is_main():
        print(run.summary())
        print(f"The run is in {quoted}. Next:\n  python -m train.report {quoted}")
        if has_spatial_gate(config.block):
            data = ""
            if (
                config.dataset != "digits"
                and config.data_dir != Config.data_dir.expanduser()
            ):
                data = f" --data-dir {shlex.quote(config.data_dir.as_posix())}"
            print(f"  python -m train.gates {quoted}{data}")


if __name__ == "__main__":
    main()
