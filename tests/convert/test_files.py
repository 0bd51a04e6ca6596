"""Files: what is read, what is refused, and how they are written."""

import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from flax_attn import convert
from tests.convert.states import SE_STATE, assert_same, numbers, strange_tensors


def test_truncated_files(tmp_path):
    path = tmp_path / "se.safetensors"
    convert.save(path, SE_STATE)
    whole = path.read_bytes()
    for part in (whole[:-1], whole[:40], whole[:4], b"", whole + b"1", b"PK\3\4" * 9):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="is not a safetensors file, or is trunc"):
            convert.load(path)
    path.write_bytes(whole)
    assert_same(convert.load(path), SE_STATE)


def test_what_is_no_file_of_arrays(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="`path` must be a file"):
        convert.load(tmp_path)
    path = tmp_path / "clash.safetensors"
    safetensors.numpy.save_file({"a/b": numbers(1), "a": numbers(1)}, path)
    with pytest.raises(ValueError, match="'a' both as an array and as a tree"):
        convert.load(path)


@pytest.mark.parametrize(
    "state, message",
    [
        ({"a/b": numbers(1), "a": {"b": numbers(1)}}, "one leaf at 'a/b', got two"),
        ({"stats": {"Conv_0/kernel/sigma": numbers(1)}}, "got 'Conv_0/kernel/sigma'"),
        ({"a/b": numbers(1), "a": numbers(1)}, "'a' both as an array and as a tree"),
        ({"w": [numbers(1), numbers(1)]}, "`w` must be an array, got list"),
    ],
)
def test_a_tree_that_would_be_read_as_another_is_not_written(state, message, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=message):
        convert.save(path, state)
    assert not path.exists()


def test_where_no_file_can_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*none for a"):
        convert.save(tmp_path / "none" / "a.safetensors", SE_STATE)
    with pytest.raises(IsADirectoryError, match="`path` must be a file, got the"):
        convert.save(tmp_path, SE_STATE, overwrite=True)
    with pytest.raises(ValueError, match="must not have a PyTorch suffix"):
        convert.save(tmp_path / "A.PTH", SE_STATE)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_file_of_dtypes_that_numpy_lacks(dtype, command):
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}
    header = json.dumps({"fc.bias": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + b"00"
    Path("a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"fc.bias` must be .* got {dtype}; .*float"):
        convert.load("a.safetensors")
    code, _, err = command("a.safetensors", "out.safetensors", "--to", "flax")
    assert code == 1 and err.startswith("error: `a.safetensors: fc.bias` must be")


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_dtypes_that_could_not_be_read_are_not_written(dtype, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="`fc.bias` must be .* got float8.*astype"):
        convert.save(path, {"fc.bias": np.ones(2, dtype)})
    with pytest.raises(ValueError, match="`rng` must be .* got key<fry>"):
        convert.save(path, {"rng": jax.random.key(0)})
    assert not path.exists()


def test_files_of_torch_that_numpy_cannot_read(command):
    torch = pytest.importorskip("torch")
    for message, tensor in strange_tensors(torch).items():
        torch.save({"fc.weight": tensor}, "a.pth")
        code, _, err = command("a.pth", "out.safetensors", "--to", "flax")
        assert code == 1 and re.match(
            f"error: `a.pth: fc.weight` must .*{message}", err
        )


def test_a_file_of_torch_names_what_is_no_tensor(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    held = {"fc.weight": torch.ones(2, 2), "epoch": 3, "best": {"bias": torch.ones(2)}}
    torch.save(held, path)
    with pytest.raises(ValueError, match=r"got epoch \(int\), best \(dict\); save"):
        convert.load(path)
    for other in ([torch.ones(2)], torch.ones(2)):
        torch.save(other, path)
        with pytest.raises(ValueError, match=f"got {type(other).__name__}; save"):
            convert.load(path)


def test_without_libraries(tmp_path, monkeypatch):
    path = tmp_path / "se.pth"
    path.touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        convert.load(path)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        convert.save(tmp_path / "se.safetensors", SE_STATE)
    with pytest.raises(ImportError, match="pip install safetensors"):
        convert.load(path.rename(tmp_path / "se.safetensors"))


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "se.safetensors"
    convert.save(path, SE_STATE)
    mode = path.stat().st_mode
    (tmp_path / "usual").touch()
    assert mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(FileExistsError, match="exists; `overwrite=True`"):
        convert.save(path, {"a": numbers(1)})
    with pytest.raises(ValueError, match="`path` must not have .* got .*se.pth"):
        convert.save(tmp_path / "se.pth", SE_STATE)
    with pytest.raises(ValueError, match="cannot be written"):
        convert.save(path, {"a": np.ones(3, np.complex128)}, overwrite=True)

    def half(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="no space left"):
            convert.save(path, {"a": numbers(1)}, overwrite=True)
    assert_same(convert.load(path), SE_STATE)
    assert sorted(os.listdir(tmp_path)) == ["se.safetensors", "usual"]
    convert.save(path, {"a": numbers(1)}, overwrite=True)
    assert_same(convert.load(path), {"a": numbers(1)})


def test_arrays_that_lie_in_memory_otherwise(tmp_path):
    state = {
        "fortran": np.asfortranarray(numbers(2, 3)),
        "transposed": numbers(2, 3).T,
        "reversed": numbers(5)[::-1],
        "scalar": np.array(3.0),
        "bytes": numbers(3).astype(">f4"),
    }
    convert.save(tmp_path / "a.safetensors", state)
    loaded = convert.load(tmp_path / "a.safetensors")
    assert loaded.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(loaded[key], array)
        assert loaded[key].shape == array.shape
