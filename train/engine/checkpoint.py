"""Checkpoints through Orbax: written asynchronously, verified when read.

A checkpoint is a tree of NumPy arrays and a record of JSON types. The record holds the
SHA-256 of both, since Orbax loads flipped bits without an error.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

# An upper bound of the bytes of a checkpoint beside its arrays.
OVERHEAD_BYTES = 1_000_000
REPLACED = ".replaced"
"""The suffix of a checkpoint until another one of its step is complete."""

_ABSL = logging.getLogger("absl")

Log = Callable[[str], None]


class CheckpointError(Exception):
    """All checkpoints are damaged; the message is one line."""


class Checkpoints:
    """The checkpoints of one run, named by their step.

    Attributes:
      directory: of the checkpoints.
      max_to_keep: how many of the newest are kept.
      log: called with a line about each failure that does not stop the run.
    """

    def __init__(self, directory: Path, max_to_keep: int, log: Log) -> None:
        """Opens ``directory`` and deletes what a killed run left half-written there."""
        self.directory = directory.absolute()
        self.max_to_keep = max_to_keep
        self.log = log
        self._saving: int | None = None
        self._digests: dict[int, str] = {}
        # Until `close`: Orbax logs the traceback of each failure that it also raises,
        # some of them in threads, and that this class reports in one line.
        self._absl_level = _ABSL.level
        _ABSL.setLevel(logging.CRITICAL)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        for unfinished in self.directory.glob("*.orbax-checkpoint-tmp"):
            # A thread of a failed save may still be writing; the next opening deletes
            # the rest.
            shutil.rmtree(unfinished, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._settle()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="main"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.max_to_keep, create=False, multiprocessing_options=alone
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _settle(self) -> None:
        """Deletes a checkpoint that was replaced, or puts it back."""
        for replaced in self.directory.glob(f"*{REPLACED}"):
            path = replaced.with_suffix("")
            if path.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(path)

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, record: dict[str, Any]) -> None:
        """Starts to save ``tree``, whose arrays must not change afterwards.

        A checkpoint that cannot be written is logged, here or at the next call, and
        does not stop the run.
        """
        self.wait()
        digest = _digest(tree, record)
        exists = step in self._manager.all_steps()
        if exists and self._digests.get(step) == digest:
            return
        self._saving = step
        self._digests[step] = digest
        record = record | {"digest": digest}
        try:
            self._check_free_space(tree)
            if exists:  # A checkpoint before the evaluation that ends an epoch.
                path = self.directory / str(step)
                path.rename(path.with_suffix(REPLACED))
                self._manager.reload()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record)
                ),
            )
        # A full disk raises OSError, ValueError in the array store or RuntimeError in
        # a thread, whichever layer meets it first.
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)

    def _check_free_space(self, tree: Any) -> None:
        """Raises ``OSError`` for a full disk; Orbax prints a page for each array."""
        needed = OVERHEAD_BYTES + sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"it needs {needed / 1e6:.1f} MB, but the disk has only "
                f"{free / 1e6:.1f} MB left"
            )

    def wait(self) -> None:
        """Waits until the current save is complete."""
        try:
            self._manager.wait_until_finished()
            self._settle()
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)
        self._saving = None

    def _failed(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        if step is not None:  # What it replaced is put back.
            self._digests.pop(step, None)
        self._manager = self._open()
        last = self.newest()
        kept = "there is no earlier one"
        if last is not None:
            kept = f"that of step {last} is kept"
        self.log(
            f"The checkpoint of step {step} could not be written to {self.directory} "
            f"({_reason(error)}); {kept} and training continues."
        )

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """Returns tree and record of the newest intact checkpoint, or None without any.

        A damaged one is logged and renamed.

        Raises:
          CheckpointError: all of them are damaged.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, template)
            # A damaged file may raise anything in any layer.
            except Exception as error:
                damaged.append(step)
                self.log(
                    f"The checkpoint {self.directory / str(step)} is damaged "
                    f"({_reason(error)}); trying the previous one."
                )
            else:
                for bad in damaged:
                    self._set_aside(bad)
                return found
        if damaged:
            raise CheckpointError(
                f"None of the {len(damaged)} checkpoints in {self.directory} can be "
                "read; restore one from a backup, or start a new run with another "
                "--workdir."
            )
        return None

    def _read(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), record=ocp.args.JsonRestore()
            ),
        )
        tree, record = restored.state, restored.record
        self._digests[step] = record.pop("digest")
        if self._digests[step] != _digest(tree, record):
            raise ValueError("its digest does not match its content")
        return tree, record

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again."""
        name, i = f"damaged-{step}", 1
        while (self.directory.parent / name).exists():
            name, i = f"damaged-{step}-{i}", i + 1
        (self.directory / str(step)).rename(self.directory.parent / name)
        self._manager.reload()

    def close(self) -> None:
        """Waits for the current save and closes the directory."""
        self.wait()
        self._manager.close()
        _ABSL.setLevel(self._absl_level)


def _digest(tree: Any, record: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
        digest.update(name.encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
