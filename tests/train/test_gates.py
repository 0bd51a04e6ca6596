import contextlib

import jax
import numpy as np
import pytest

from tests import tiny_run
from tests.cases import normal
from train import gates
from train.engine import config as config_lib
from train.engine import devices, saved, setup, workdir
from train.engine.checkpoint import Checkpoints
from train.engine.config import Config
from train.study import gates as study


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of CBAM as a checkpoint of noise, and its parameters."""
    folder = tmp_path_factory.mktemp("run")
    config = config_lib.resolve(Config(attention="cbam", depth=8, batch_size=8))
    inputs = setup.make_inputs(config, tiny_run.images(), devices.make_mesh(1))
    leaves, tree = jax.tree.flatten(saved.saved_template(config, inputs))
    noise = [
        np.asarray(normal(leaf.shape, i).astype(leaf.dtype)).reshape(leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    state = jax.tree.unflatten(tree, noise)
    with contextlib.closing(
        Checkpoints(folder / workdir.CHECKPOINTS, 3, print)
    ) as checkpoints:
        checkpoints.save(5, state, {})
    workdir.write(folder / workdir.RUN, workdir.describe(config, 1, 1, "an abacus"))
    return folder, state["params"]


def files_of(folder):
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_the_last_checkpoint_is_drawn_and_nothing_written(run, tmp_path, monkeypatch):
    folder, params = run
    before = files_of(folder)
    seen = {}

    def spatial_gates(model, variables, inputs, count):
        seen.update(model=model, variables=variables, count=count)
        return np.zeros((2, 8, 8, 3), np.uint8), {"stage1_block1": np.ones((2, 4, 4))}

    monkeypatch.setattr(setup, "load", tiny_run.images)

    def grad_cam(model, variables, inputs, count):
        return np.eye(4)[None].repeat(count, 0)

    monkeypatch.setattr(study, "spatial_gates", spatial_gates)
    monkeypatch.setattr(study, "grad_cam", grad_cam)
    out = tmp_path / "out.png"
    gates.main([str(folder), "--out", str(out), "--images", "2"])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert seen["count"] == 2 and seen["model"].stages == (1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, seen["variables"]["params"], params)
    assert files_of(folder) == before


def test_the_steps_of_runs_are_drawn_and_nothing_written(run, tmp_path, monkeypatch):
    folder, _ = run
    before = files_of(folder)

    def gates_over_steps(config, images, steps):
        assert config.attention == "cbam" and len(images.train_images) == 40
        return {"stage1_block1/attention/channel_gate": np.ones((steps + 1, 3))}

    monkeypatch.setattr(setup, "load", tiny_run.images)
    monkeypatch.setattr(study, "gates_over_steps", gates_over_steps)
    out = tmp_path / "out.png"
    gates.main([str(folder), "--steps", "4", "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert files_of(folder) == before


def test_what_the_command_refuses(run, tmp_path, refused, monkeypatch):
    folder, *_ = run
    says = "`runs` must be workdirs of train.cifar, got"
    assert says in refused(gates, tmp_path)
    says = "`runs` must be one workdir of train.cifar, or several with --steps, got"
    assert f"{says} 0." in refused(gates)
    assert f"{says} 2." in refused(gates, folder, folder)
    assert "`steps` must be at least 1" in refused(gates, folder, "--steps", 0)
    without = tmp_path / "without"
    without.mkdir()
    config = config_lib.resolve(Config())
    workdir.write(without / workdir.RUN, workdir.describe(config, 1, 0, "an abacus"))
    says = f"`runs` must have gates, got {without} with attention none, which has none"
    assert says in refused(gates, folder, without, "--steps", 3)
    (without / workdir.RUN).write_text('{"config": {"attention": "nope"}}')
    for options in ((), ("--steps", 3)):
        assert "`attention` must be one of" in refused(gates, without, *options)
    says = "`out` must be a picture"
    assert says in refused(gates, folder, "--steps", 3, "--out", tmp_path / "a.b")
    for images in (0, -3):
        says = f"`images` must be at least 1, got {images}."
        assert says in refused(gates, folder, "--images", images)
    says = "`limits` must be two numbers, the lower one first, got 0.5 0.5"
    assert says in refused(gates, folder, "--limits", 0.5, 0.5)
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    monkeypatch.setattr(setup, "load", tiny_run.images)
    assert "holds no checkpoint; train there first." in refused(gates, tmp_path)
    says = "`images` must be at most 8, the batch size of the run, got 9."
    assert says in refused(gates, folder, "--images", 9)
    says = "`limits` are those of images; leave out `steps`."
    assert says in refused(gates, folder, "--limits", 0, 1, "--steps", 3)
    monkeypatch.setattr(study, "spatial_gates", lambda *_, count: (None, {}))
    error = refused(gates, folder)
    assert "`runs` must have a spatial gate" in error and "or pass --steps" in error
