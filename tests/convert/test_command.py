"""``python -m flax_attn.convert``, in this process and in one of its own."""

import os
from pathlib import Path

import pytest

from flax_attn import convert
from tests import processes
from tests.convert.states import SE_STATE, assert_same, numbers


def test_the_command_both_ways(command):
    convert.save("torch.safetensors", SE_STATE)
    assert command("torch.safetensors", "flax.safetensors", "--to", "flax") == (
        (0, "", "")
    )
    assert_same(convert.load("flax.safetensors"), convert.to_flax(SE_STATE))
    assert command("flax.safetensors", "back.safetensors", "--to", "torch") == (
        (0, "", "")
    )
    assert_same(convert.load("back.safetensors"), SE_STATE)
    again = ("flax.safetensors", "back.safetensors", "--to", "torch")
    assert command(*again, "--naming", "article")[0] == 1
    assert command(*again, "--naming", "article", "--overwrite") == ((0, "", ""))
    assert set(convert.load("back.safetensors")) == {
        "fc_layers.0.weight",
        "fc_layers.2.weight",
    }


def test_errors_of_the_command(command):
    convert.save("se.safetensors", SE_STATE)
    whole = Path("se.safetensors").read_bytes()
    convert.save("extra.safetensors", SE_STATE | {"more.weight": numbers(3)})
    convert.save("vit.safetensors", {"cls_token": numbers(3)})
    convert.save("big.safetensors", convert.to_flax({"fc.weight": numbers(2, 3)}))
    Path("cut.safetensors").write_bytes(whole[:-5])
    files = sorted(os.listdir())
    expected = {
        ("none.safetensors",): "No such file",
        ("cut.safetensors",): "is not a safetensors file, or is truncated",
        ("extra.safetensors",): "1 unused:\n  more.weight (3,)\n",
        ("vit.safetensors",): "No key fits (naming 'timm'): wrong model",
        ("se.safetensors", "--like", "big.safetensors"): "No key fits",
        (".",): "must be a file",
    }
    messages = set()
    for (name, *options), message in expected.items():
        code, out, err = command(name, "out.safetensors", "--to", "flax", *options)
        assert code == 1 and out == "" and message in err, err
        assert err.startswith("error: ") and "Traceback" not in err
        messages.add(err)
    assert len(messages) == len(expected)
    for name in ("cut.safetensors", "none.safetensors"):
        assert command(name, "out.safetensors", "--to", "flax")[2].count("\n") == 1
    code, _, err = command("se.safetensors", "vit.safetensors", "--to", "flax")
    assert code == 1 and "exists; " in err and err.count("\n") == 1
    same = ("se.safetensors", "./se.safetensors", "--to", "flax", "--overwrite")
    assert "OUT must not be the same file as IN" in command(*same)[2]
    assert sorted(os.listdir()) == files
    assert Path("se.safetensors").read_bytes() == whole
    for wrong in (["--to", "jax"], [], ["--to", "flax", "--naming", "keras"]):
        with pytest.raises(SystemExit, match="2"):
            command("se.safetensors", "out.safetensors", *wrong)


def test_the_lenient_command(command):
    convert.save("extra.safetensors", SE_STATE | {"more.weight": numbers(3)})
    code, out, err = command(
        "extra.safetensors", "out.safetensors", "--to", "flax", "--lenient"
    )
    assert code == 0 and err == "" and "  more.weight (3,)\n" in out
    assert_same(convert.load("out.safetensors"), convert.to_flax(SE_STATE))


def test_the_command_as_a_process(tmp_path):
    convert.save(tmp_path / "in.safetensors", SE_STATE)
    arguments = (tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    done = processes.complete("flax_attn.convert", *arguments, "--to", "flax")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = processes.complete("flax_attn.convert", *arguments, "--to", "flax")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
