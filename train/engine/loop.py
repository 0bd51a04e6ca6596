"""The training loop: epochs of steps, metrics and checkpoints."""

import contextlib
import json
import math
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from train.data.inputs import Inputs
from train.engine import devices, interrupt, logger, workdir
from train.engine.checkpoint import Checkpoints
from train.engine.config import Config, Resolved
from train.engine.model import (
    check_block,
    count_parameters,
    leaf_names,
    make_apply,
    make_model,
    make_optimizer,
    make_schedule,
    make_state,
    variables_of,
)
from train.engine.progress import Progress, Run, headline
from train.engine.saved import saved_tree
from train.engine.setup import Images, check_batch, make_inputs, validate
from train.engine.steps import (
    Metrics,
    make_evaluate,
    make_train_steps,
    searching,
    steps_per_call,
)

# Without the bar itself, so that a line fits in 80 columns.
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LOSS_ADVICE = "A lower --learning-rate or a longer --warmup-epochs may help."
STATE_ADVICE = (
    "A gradient or a batch statistic is not finite; to stop where it is computed, set "
    "the environment variable JAX_DEBUG_NANS=True, or JAX_DEBUG_INFS=True for an "
    "infinity."
)


def train(config: Config, images: Images, folder: Path | None = None) -> Run:
    """Trains ``config``, or resumes its run, and returns the result.

    Args:
      config: what to train; its ``workdir`` is ignored.
      images: to train and evaluate on.
      folder: of metrics.jsonl, timing.jsonl, run.json and checkpoints; a run of the
        same configuration in it is resumed. None writes nothing.

    Raises:
      ValueError: the configuration cannot be trained, or ``folder`` holds another run.
      CheckpointError: all checkpoints in the folder are damaged.
      FloatingPointError: the loss, a parameter or a batch statistic is not finite.
      Interrupted: a signal stopped the run; ``saved`` says whether it can be resumed.
    """
    config = validate(config)
    check_batch(config, images)
    check_block(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(searching())
        if folder is not None:  # Before anything is compiled.
            lock = workdir.locked(folder, config)
            devices.on_main(lambda: stack.enter_context(lock))
        inputs = make_inputs(config, images, devices.make_mesh(config.devices))
        stack.callback(inputs.close)
        training = Training(config, inputs)
        if folder is not None:
            training.open(folder, stack)
        return training.run()


class Training:
    """One run: its compiled steps, its progress and its folder."""

    def __init__(self, config: Resolved, inputs: Inputs) -> None:
        """Makes the model, its initial state and the jitted steps."""
        self.config, self.inputs = config, inputs
        self.total = config.epochs * inputs.steps_per_epoch
        self.schedule = make_schedule(config, inputs.steps_per_epoch, self.total)
        self.key = jax.random.key(config.seed)
        self.model = make_model(config, inputs.num_classes)
        if devices.is_main():
            devices.log(headline(config, self.model, inputs))
        # The second key is that of the order of images: see `DeviceInputs`.
        init_key, _, augment_key = jax.random.split(self.key, 3)
        self.augment_key = devices.replicate(
            jax.random.key_data(augment_key), inputs.mesh
        )
        state = make_state(
            self.model,
            make_optimizer(config, self.schedule),
            init_key,
            inputs.image_size,
            make_apply(config, inputs.num_classes),
        )
        self.progress = Progress(devices.replicate(state, inputs.mesh))
        self.train_steps = make_train_steps(config, inputs)
        self.evaluate = make_evaluate(inputs)
        self.folder: Path | None = None
        self.checkpoints: Checkpoints | None = None
        self.log_epoch: logger.LogEpoch = lambda line, timing: None
        self.compiled = False
        self.started = 0.0

    @property
    def step(self) -> int:
        """The number of completed steps."""
        epochs, steps = len(self.progress.history), len(self.progress.losses)
        return epochs * self.inputs.steps_per_epoch + steps

    def run(self) -> Run:
        """Trains until the last epoch is complete."""
        progress = self.progress
        while len(progress.history) < self.config.epochs:
            self._run_epoch()
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return Run(
            self.config, self.model, progress.state, progress.history, progress.timing
        )

    def _run_epoch(self) -> None:
        progress, steps_per_epoch = self.progress, self.inputs.steps_per_epoch
        epoch, done = len(progress.history) + 1, len(progress.losses)
        start = time.perf_counter()
        self.started = start - progress.seconds
        with tqdm(
            total=steps_per_epoch,
            initial=done,
            desc=f"epoch {epoch}/{self.config.epochs}",
            unit="step",
            bar_format=BAR_FORMAT,
            mininterval=1,
            disable=not devices.is_main(),
        ) as bar:
            self._train_epoch(epoch, bar)
            trained = time.perf_counter()
            test_loss, test_accuracy = self.evaluate(progress.state, self._check_stop)
            if not math.isfinite(test_loss):
                raise self._not_finite(
                    f"The test loss is {test_loss} at epoch {epoch}, step {self.step}",
                    LOSS_ADVICE,
                )
            loss = statistics.fmean(progress.losses)
            bar.set_postfix(loss=f"{loss:.4f}", test=f"{test_accuracy:.2%}")
        line = {
            "epoch": epoch,
            "step": self.step,
            "train_loss": loss,
            "train_accuracy": statistics.fmean(progress.accuracies),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": float(self.schedule(self.step - 1)),
        }
        progress.timing.append(
            self._time(epoch, steps_per_epoch - done, trained - start)
        )
        progress.losses, progress.accuracies, progress.seconds = [], [], 0.0
        progress.history.append(line)
        self._write_metrics()
        self.log_epoch(line, progress.timing[-1])
        if epoch % self.config.checkpoint_every == 0 or epoch == self.config.epochs:
            self._save()

    def _time(self, epoch: int, steps: int, seconds: float) -> dict[str, Any]:
        """A line of timing.jsonl, separate from the reproducible metrics."""
        first, self.compiled = not self.compiled, True
        images = steps * self.config.batch_size
        return {
            "epoch": epoch,
            "steps": steps,
            "compiled": first,
            "step_seconds": seconds / steps if steps else None,
            "images_per_second": images / seconds if steps else None,
            "seconds": time.perf_counter() - self.started,
        }

    def _train_epoch(self, epoch: int, bar: tqdm) -> None:
        """Runs the remaining steps of the epoch.

        The metrics of a call are fetched after the next call is dispatched, so that the
        device never waits for the host.
        """
        progress, inputs = self.progress, self.inputs
        size = steps_per_call(self.config, inputs.steps_per_epoch)

        def fetch(metrics: Metrics) -> None:
            loss = np.asarray(metrics.loss, np.float64)
            accuracy = np.asarray(metrics.accuracy, np.float64)
            self._check_finite(epoch, loss, np.asarray(metrics.finite))
            progress.losses += loss.tolist()
            progress.accuracies += accuracy.tolist()
            bar.set_postfix(loss=f"{loss[-1]:.4f}", refresh=False)
            bar.update(len(loss))

        pending = None
        for item in inputs.train_batches(epoch, len(progress.losses), size):
            progress.state, metrics = self.train_steps(
                progress.state, inputs.data, self.augment_key, item
            )
            if pending is not None:
                fetch(pending)
            pending = metrics
            if self._stop_requested():
                fetch(metrics)
                raise self._stopped()
        if pending is not None:
            fetch(pending)

    def _check_finite(self, epoch: int, loss: np.ndarray, finite: np.ndarray) -> None:
        """Raises ``FloatingPointError`` for the first step that is not finite."""
        bad = np.flatnonzero(~(np.isfinite(loss) & finite.all(axis=1)))
        if not bad.size:
            return
        i = bad[0]
        where = f"epoch {epoch}, step {self.step + int(i) + 1}"
        if not np.isfinite(loss[i]):
            raise self._not_finite(f"The loss is {loss[i]} at {where}", LOSS_ADVICE)
        names = leaf_names(variables_of(self.progress.state))
        name = names[np.argmin(finite[i])]
        raise self._not_finite(
            f"{name} is not finite after {where}, whose loss is finite ({loss[i]:.4g})",
            STATE_ADVICE,
        )

    def _not_finite(self, problem: str, advice: str) -> FloatingPointError:
        newest = self._newest()
        last_good = f"The {newest}." if newest else "There is no checkpoint."
        return FloatingPointError(f"{problem}; training stopped. {last_good} {advice}")

    def _stop_requested(self) -> int:
        """The number of the signal that a process of the run received, or 0."""
        return devices.max_over_processes(interrupt.requested() or 0)

    def _check_stop(self) -> None:
        if self._stop_requested():
            raise self._stopped()

    def open(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Resumes the run in ``folder``; writes to it until ``stack`` is closed."""
        template = devices.to_host(saved_tree(self.progress.state, self.key))

        def begin() -> tuple[Any, dict[str, Any]] | None:
            self.folder = folder
            self.checkpoints = Checkpoints(
                folder / workdir.CHECKPOINTS, self.config.keep, devices.log
            )
            stack.callback(self.checkpoints.close)
            found = self.checkpoints.restore(template)
            total, attention = count_parameters(self.progress.state.params)
            text = workdir.describe(self.config, total, attention, devices.describe())
            workdir.write(folder / workdir.RUN, text)
            self.log_epoch = stack.enter_context(logger.opened(self.config, folder))
            return found

        found = devices.broadcast_from_main(devices.on_main(begin), template)
        if devices.is_main():
            devices.log(f"Writing to {folder}.")
        if found is not None:
            self._resume(*found)
        self._write_metrics()
        for line, timing in zip(
            self.progress.history, self.progress.timing, strict=True
        ):
            self.log_epoch(line, timing)

    def _resume(self, tree: dict[str, Any], record: dict[str, Any]) -> None:
        del tree["key"]
        self.inputs.set_position(record.pop("position"))
        state = self.progress.state.replace(**devices.replicate(tree, self.inputs.mesh))
        self.progress = Progress(state, **record)
        if devices.is_main():
            devices.log(f"Resuming from step {self.step} of {self.total}.")

    def _save(self) -> None:
        """Starts to save the progress; raises if it is not finite."""
        if self.folder is None and jax.process_count() == 1:
            return
        tree = devices.to_host(saved_tree(self.progress.state, self.key))
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            if not np.isfinite(leaf).all():
                raise self._not_finite(
                    f"{name} is not finite after step {self.step}", STATE_ADVICE
                )
        if self.checkpoints is not None:
            record = {**vars(self.progress), "position": self.inputs.position()}
            del record["state"]
            # A copy, since the lists grow while Orbax writes.
            self.checkpoints.save(self.step, tree, json.loads(json.dumps(record)))

    def _write_metrics(self) -> None:
        if self.folder is None:
            return
        try:
            workdir.write_lines(self.folder / workdir.METRICS, self.progress.history)
            workdir.write_lines(self.folder / workdir.TIMING, self.progress.timing)
        except OSError as error:
            devices.log(
                f"{workdir.METRICS} in {self.folder} could not be written "
                f"({error.strerror}); the next epoch will write it again."
            )

    def _stopped(self) -> interrupt.Interrupted:
        """Saves; returns the exception that says where."""
        which = signal.Signals(self._stop_requested())
        self.progress.seconds = time.perf_counter() - self.started
        self._save()
        newest = self._newest()
        where = f"the {newest}" if newest else "nothing is saved"
        stopped = f"Stopped by {which.name} at step {self.step} of {self.total}"
        return interrupt.Interrupted(
            which, f"{stopped}; {where}.", saved=newest is not None
        )

    def _newest(self) -> str | None:
        """Where the newest checkpoint is; waits for the current save."""
        if self.checkpoints is None:
            return None
        self.checkpoints.wait()
        newest = self.checkpoints.newest()
        if newest is None:
            return None
        return f"checkpoint of step {newest} is in {self.checkpoints.directory}"
