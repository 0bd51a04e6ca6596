"""Checkpoints: the dict inside the dict, and the prefixes of wrappers."""

import numpy as np
import pytest

from flax_attn import convert
from tests.convert.states import SE_STATE, assert_same, numbers, report_of

EXPECTED = convert.to_flax(SE_STATE)


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_the_dict_of_weights_is_found(name, capsys):
    checkpoint = {"epoch": 3, "best": np.float32(0.5), name: SE_STATE, "optimizer": {}}
    assert_same(convert.to_flax(checkpoint), EXPECTED)
    said = f"Unwrapped {name!r} from `state`, without 'epoch', 'best', 'optimizer'.\n"
    assert capsys.readouterr().out == said
    assert_same(convert.to_flax({"model": {"state_dict": SE_STATE}}), EXPECTED)
    assert capsys.readouterr().out.count("Unwrapped") == 2


def test_weights_beside_a_dict_are_not_left_out():
    report = report_of({"model": SE_STATE, "fc.bias": numbers(3)} | SE_STATE)
    assert len(report.unused) == 2 and report.unused[0].startswith("model/fc1.weight")


def test_two_dicts_of_weights_are_two_readings(tmp_path):
    both = {"state_dict": SE_STATE, "model": SE_STATE}
    with pytest.raises(ValueError, match="`state` must .* `state_dict` and `model`; p"):
        convert.to_flax(both)
    torch = pytest.importorskip("torch")
    torch.save({name: {"bn": torch.ones(1)} for name in both}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt must .* `state_dict` and `model`; p"):
        convert.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("prefixes", [["module."], ["module.", "_orig_mod."]])
def test_prefixes_are_stripped(prefixes, capsys):
    state = {"".join(prefixes) + key: array for key, array in SE_STATE.items()}
    assert_same(convert.to_flax(state), EXPECTED)
    said = [f"Removed the prefix {prefix!r} from all keys." for prefix in prefixes]
    assert capsys.readouterr().out.splitlines() == said
    # Not if only some keys have the prefix.
    report = report_of(state | SE_STATE)
    assert report.unused[0].startswith("".join(prefixes))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin", ".ckpt"])
def test_checkpoints_in_files_of_torch(suffix, command):
    torch = pytest.importorskip("torch")
    state = {"module." + key: torch.tensor(array) for key, array in SE_STATE.items()}
    path = f"a{suffix}"
    torch.save({"epoch": 3, "state_dict": state, "best": torch.tensor(0.5)}, path)
    code, out, err = command(path, "out.safetensors", "--to", "flax")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"Unwrapped 'state_dict' from {path}, without 'epoch', 'best'.",
        "Removed the prefix 'module.' from all keys.",
    ]
    assert_same(convert.load("out.safetensors"), EXPECTED)
    with pytest.raises(ValueError, match="`path` must not have .*safetensors"):
        convert.save(path, SE_STATE, overwrite=True)
