"""Training on folders of images, from the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
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


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def start(module, environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def test_the_imagenet_family(data_dir, environment, tmp_path):
    out, err = start(
        "train.imagenet",
        environment,
        *("--data-dir", data_dir, "--workdir", tmp_path, "--depth", 18),
        *("--image-size", 32, "--epochs", 1, "--batch-size", 40, "--attention", "se"),
    ).communicate(timeout=400)
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


def test_killed_and_gone_on_with(data_dir, environment, tmp_path):
    """The same images and crops again: the end is that of a run nobody touched."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start("train.cifar", environment, *small(data_dir, whole))
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    for how, epochs in ((signal.SIGKILL, 2), (signal.SIGTERM, 4)):
        process = start("train.cifar", environment, *small(data_dir, killed))
        metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 200
        while not metrics.exists() or metrics.read_text().count("\n") < epochs:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(how)
        _, err = process.communicate(timeout=400)
        assert process.returncode == (143 if how == signal.SIGTERM else -how), err
    process = start("train.cifar", environment, *small(data_dir, killed))
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0 and "Going on from step" in err, err
    assert (killed / "metrics.jsonl").read_bytes() == (
        whole / "metrics.jsonl"
    ).read_bytes()
    losses = [
        json.loads(line)["train_loss"] for line in metrics.read_text().splitlines()
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
def test_bad_arguments(arguments, message, data_dir, environment, tmp_path):
    arguments = [str(a).format(data_dir=data_dir) for a in arguments]
    process = start(
        "train.imagenet", environment, *arguments, "--workdir", tmp_path / "run"
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and message in err, err
    assert len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_images_that_are_gone(data_dir, tmp_path):
    """A position in other images is no position."""
    from train import devices, folders, stream
    from train.config import Config

    config = Config(loader="grain", batch_size=20, image_size=16)
    images = folders.scan(data_dir)
    fed = stream.FolderInputs(images, config, devices.make_mesh(1))
    try:
        with pytest.raises(ValueError, match="holds 200 training images and held 300"):
            fed.go_to({"state": fed.position()["state"], "images": 300})
    finally:
        fed.close()
