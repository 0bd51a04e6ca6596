"""``python -m train.benchmark``: the cost of the blocks, in copies of the feature map.

The blocks are memory-bound, so every time is divided by that of a copy, ``x * 1.0001``
on the same array in the same run. The implementations take turns in random order, and
the fastest of many rounds counts, since other load can only add time.

Exit codes: 0 measured, 2 invalid command line, 130 interrupted after printing what
was measured.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from train.engine.command import exit_codes
from train.engine.config import check_choice, check_count
from train.engine.options import block_names, parse
from train.study.tables import format_table

PROG = "train.benchmark"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Options:
    """Time the attention blocks, relative to a copy of the feature map (x * 1.0001)."""

    blocks: tuple[str, ...] = ()
    """Blocks to measure; default: all."""
    shapes: tuple[tuple[int, int, int, int], ...] = ()
    """Shapes N H W C; default: five, on a GPU seven, with --compile-for three."""
    dtypes: tuple[str, ...] = ()
    """float32, bfloat16 or float16; default: float32, on a GPU also bfloat16, with
    --compile-for only bfloat16."""
    against: tuple[Literal["plain", "torch"], ...] = ()
    """Also measure the plain implementation (plain), or the article's blocks in
    PyTorch, eager and compiled (torch; needs the dependency group parity)."""
    inside: bool = False
    """Also time each block after a 1x1 convolution from C/16 channels, BatchNorm and
    ReLU in one program. The columns added and added_backward are the differences from
    the same program without the block, forward and with all gradients, in copies."""
    network: bool = False
    """Instead, time training steps of whole networks with and without each block:
    ResNet-20 and, on a GPU, ResNet-50, at batch size 128, as they are compiled for
    training (several steps in one program, except on CPU). With --compile-for, compile
    a step of ResNet-50 (bfloat16, 224 x 224) and show the bytes accessed, the temporary
    memory and the compile time."""
    compile_for: str | None = None
    """Only compile, for a TPU topology such as v5e:2x2; needs the dependency group
    tpu-aot, but no TPU."""
    rounds: int = 20
    """Number of measurements per implementation."""
    json: Path | None = None
    """Write the results to this JSON file."""
    plot: Path | None = None
    """Write a bar chart to this file."""

    @property
    def contenders(self) -> list[str]:
        """The implementations to measure."""
        return ["fast", *(["plain"] if "plain" in self.against else [])]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    options = parse(Options, prog=PROG, args=args, notes={"blocks": block_names(args)})
    with exit_codes(PROG):
        _measure_and_print(_resolve(options))


def _resolve(options: Options) -> Options:
    """The options with all blocks named.

    Raises:
      ValueError: they cannot be measured.
    """
    # Only now, so that --help and a mistyped option answer at once.
    from flax_attn.blocks import BLOCKS
    from train.study import plots, torch_blocks

    for block in options.blocks:
        check_choice("blocks", block, BLOCKS)
    for dtype in options.dtypes:
        check_choice("dtypes", dtype, DTYPES)
    for shape in options.shapes:
        if min(shape) < 1:
            raise ValueError(f"`shapes` must have axes of at least 1, got {shape}.")
    check_count("rounds", options.rounds)
    if options.json:
        plots.check_folder("json", options.json)
    if options.plot:
        plots.check_picture("plot", options.plot)
    other = "network" if options.network else "compile_for"
    if options.network or options.compile_for:
        if options.plot:
            raise ValueError(f"`plot` draws single blocks; leave out `{other}`.")
        if options.inside:
            raise ValueError(f"`inside` times single blocks; leave out `{other}`.")
        if "torch" in options.against:
            raise ValueError(
                f"`against` torch is only for single blocks that run on this machine; "
                f"leave out torch or `{other}`."
            )
    if options.network and (options.shapes or options.dtypes):
        raise ValueError(
            "`network` has the shape and dtype of its recipe; leave out `shapes` and "
            "`dtypes`."
        )
    blocks = options.blocks or tuple(BLOCKS)
    if "torch" in options.against:
        torch_blocks.check_installed()
        alone = [name for name in blocks if not torch_blocks.has_counterpart(name)]
        if alone:
            print(f"{PROG}: not in PyTorch: {', '.join(alone)}.", file=sys.stderr)
    return dataclasses.replace(options, blocks=blocks)


def _measure_and_print(options: Options) -> None:
    from train.engine import devices
    from train.study import blocks, plots, timing

    timing.interrupt_between_turns()
    # Appended to as they are measured, so that an interrupt loses none.
    rows: list[dict[str, Any]] = []
    interrupted = False
    try:
        for row in _rows(options):
            rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
    machine = devices.describe()
    print(machine)
    print(format_table(rows) if rows else "Nothing was measured.")
    means = []
    if rows and not (options.network or options.compile_for):
        means = blocks.geometric_means(rows)
        added = "; arithmetic for what is added" if options.inside else ""
        print(f"\nGeometric means over the shapes, in copies of x{added}:")
        print(format_table(means))
    if options.json:
        text = json.dumps({"machine": machine, "rows": rows}, indent=1)
        options.json.write_text(text + "\n")
    if options.plot and means:
        plots.plot_bars(means).savefig(options.plot, dpi=150)
    if interrupted:
        raise SystemExit(130)


def _rows(options: Options) -> Iterator[dict[str, Any]]:
    if options.compile_for:
        yield from _compiled_rows(options, options.compile_for)
        return
    import jax

    from train.study import blocks, networks

    on_gpu = jax.default_backend() == "gpu"
    if options.network:
        for network in (networks.RESNET20, *([networks.RESNET50] if on_gpu else [])):
            yield from networks.measure_network(
                network, options.blocks, options.contenders, options.rounds
            )
        return
    shapes = options.shapes or (blocks.GPU_SHAPES if on_gpu else blocks.SHAPES)
    dtypes = options.dtypes or (("float32", "bfloat16") if on_gpu else ("float32",))
    for case in _cases(options.blocks, shapes, dtypes):
        yield from blocks.measure_block(
            *case, options.against, options.rounds, inside=options.inside
        )


def _compiled_rows(options: Options, topology: str) -> Iterator[dict[str, Any]]:
    from train.study import tpu

    device = tpu.open_topology(topology)
    if options.network:
        yield from tpu.compile_network(options.blocks, options.contenders, device)
        return
    shapes, dtypes = options.shapes or tpu.SHAPES, options.dtypes or ("bfloat16",)
    for case in _cases(options.blocks, shapes, dtypes):
        yield from tpu.compile_block(*case, options.contenders, device)


def _cases(
    blocks: Sequence[str], shapes: Sequence[Any], dtypes: Sequence[str]
) -> Iterator[tuple[str, Any, str]]:
    """Every block, shape and dtype, with a progress bar."""
    from tqdm.auto import tqdm

    from train.study.timing import check_interrupt

    cases = [(b, s, d) for d in dtypes for b in blocks for s in shapes]
    for case in (bar := tqdm(cases, unit="case")):
        check_interrupt()
        block, shape, dtype = case
        bar.set_postfix_str(f"{block} {shape} {dtype}")
        yield case


if __name__ == "__main__":
    main()
