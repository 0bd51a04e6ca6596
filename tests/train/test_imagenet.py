"""Training on folders of images, from the command line."""

import json
import shutil
import signal
import sys

import numpy as np
import pytest
from PIL import Image

import train.data
from tests.processes import finish, metrics_of, process_options, run, start, wait_until
from train import imagenet
from train.data import folders, stream
from train.data.cifar import DataError
from train.engine import devices, setup
from train.engine.config import Config, resolve

IMAGES = {"train": 200, "val": 30}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two classes of small images of two shades, with noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.RandomState(0)
    for part, count in IMAGES.items():
        for i in range(count):
            label = i % 2
            size = rng.randint(20, 40, 2)
            pixels = rng.randint(0, 100, (*size, 3)) + 120 * label
            path = folder / part / f"class{label}" / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.mark.long
def test_the_imagenet_family(data_dir, environment, tmp_path):
    _, out, err = run(
        *(environment, "train.imagenet"),
        *("--data-dir", data_dir, "--workdir", tmp_path, "--depth", 18),
        *("--image-size", 32, "--epochs", 1, "--batch-size", 40, "--attention", "se"),
    )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 5, err
    # Table 1's 18 layers for two classes; SE at r = 16 adds 2 * C * C / 16 eight times.
    attention = 2 * sum(2 * c * c // 16 for c in (64, 128, 256, 512))
    assert f"ResNet-18, attention se, on folder: {11_177_538 + attention:,} par" in out
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    assert (config["loader"], config["family"]) == ("grain", "imagenet")
    assert (config["epochs"], config["image_size"]) == (1, 32)


def small(data_dir, workdir):
    return (
        *("--loader", "grain", "--data-dir", data_dir, "--workdir", workdir),
        *("--depth", 8, "--image-size", 16, "--epochs", 8, "--batch-size", 20),
    )


@pytest.mark.long
def test_killed_and_resumed(data_dir, environment, tmp_path):
    """The same images and crops again, and so the same end as without an interrupt.

    The first epoch of two processes, each of which reads its own rows, is the same too.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = run(environment, "train.cifar", *small(data_dir, whole))
    assert code == 0, err
    for how, epochs in ((signal.SIGKILL, 2), (signal.SIGTERM, 4)):
        process = start(environment, "train.cifar", *small(data_dir, killed))
        wait_until(process, lambda: metrics_of(killed).count("\n") >= epochs)  # noqa: B023
        process.send_signal(how)
        code, _, err = finish(process)
        assert code == (143 if how == signal.SIGTERM else -how), err
    code, _, err = run(environment, "train.cifar", *small(data_dir, killed))
    assert code == 0 and "Resuming from step" in err, err
    assert metrics_of(killed) == metrics_of(whole)
    two = tmp_path / "two"
    both = [
        start(environment, "train.cifar", *small(data_dir, two), *place)
        for place in process_options(2)
    ]
    for code, _, err in map(finish, both):
        assert code == 0, err
    first, expected = (
        json.loads(metrics_of(folder).splitlines()[0]) for folder in (two, whole)
    )
    # Rounding has grown for ten steps; other rows would differ by far more.
    np.testing.assert_allclose(first["train_loss"], expected["train_loss"], rtol=1e-3)
    losses = [
        json.loads(line)["train_loss"] for line in metrics_of(killed).splitlines()
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--data-dir", "nowhere"), "The folder nowhere cannot be read"),
        (("--data-dir", "{data_dir}", "--depth", 20), "`depth` must be one of 18, 34"),
        (("--data-dir", "{data_dir}"), "`batch_size` must be at most the 200 training"),
        (("--dataset", "digits"), "`dataset` folder and `loader` grain go together"),
    ],
)
def test_bad_arguments(arguments, message, data_dir, tmp_path, refused):
    arguments = (str(a).format(data_dir=data_dir) for a in arguments)
    line = refused(imagenet, *arguments, "--workdir", tmp_path / "run")
    assert message in line and not (tmp_path / "run").exists()


def test_damaged_images_are_left_out(data_dir, tmp_path, capsys):
    """Named and counted before the rest of the command line is refused."""
    copy = shutil.copytree(data_dir, tmp_path / "images")
    damaged = ("train/class0/0004.png", "val/class1/0001.png")
    for name in damaged:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
    arguments = ["--data-dir", str(copy), "--workdir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="^2$"):
        imagenet.main([*arguments, "--skip-damaged", "--batch-size", "200"])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    first, second, count, last = (
        line for line in lines if "checking" not in line and line.strip()
    )
    for line, name in zip((first, second), damaged, strict=True):
        said = f"Skipped: '{copy / name}' cannot be read as an image ("
        assert line.startswith(said) and "truncated" in line
    assert count == "2 of 230 images are damaged and left out."
    assert "`batch_size` must be at most the 199 training images" in last


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.delitem(sys.modules, "train.data.folders")
    monkeypatch.delattr(train.data, "folders")
    with pytest.raises(DataError, match=r'pip install -e "\.\[grain\]"'):
        setup.load(resolve(Config(loader="grain")))


def test_a_position_in_other_images_is_refused(data_dir):
    config = resolve(Config(loader="grain", batch_size=20, image_size=16))
    images = folders.scan(data_dir)
    fed = stream.FolderInputs(images, config, devices.make_mesh(1))
    try:
        with pytest.raises(ValueError, match="contains 200 .* but 300 when the run"):
            fed.set_position({"state": fed.position()["state"], "images": 300})
    finally:
        fed.close()
