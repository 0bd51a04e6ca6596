"""Arguments that are not weights, and the wrong direction."""

import jax
import jax.numpy as jnp
import pytest

from flax_attn import convert
from tests.convert.states import SE_LIKE, SE_STATE, numbers, report_of, strange_tensors


def test_nothing_to_convert():
    with pytest.raises(convert.ConversionError, match="no arrays to convert"):
        convert.to_flax({})


def test_the_wrong_direction():
    with pytest.raises(convert.ConversionError, match="already Flax variables; use `t"):
        convert.to_flax(convert.to_flax(SE_STATE))
    with pytest.raises(convert.ConversionError, match="not Flax variables; use `to_f"):
        convert.to_torch(SE_STATE)
    variables = convert.to_flax(SE_STATE)
    with pytest.raises(ValueError, match="`like` must be Flax .* got the key 'fc1.w"):
        convert.to_flax(SE_STATE, like=SE_STATE)
    with pytest.raises(ValueError, match="`like` must be Flax .* the key 'reduce/ker"):
        convert.to_flax(SE_STATE, like=SE_LIKE["params"])
    with pytest.raises(ValueError, match="`like` must be a state dict, .* 'params/red"):
        convert.to_torch(variables, like=variables)


def test_variables_without_collections():
    variables = convert.to_flax(SE_STATE)
    for wrong in (variables["params"], variables["params"]["reduce"]):
        with pytest.raises(convert.ConversionError, match="pass {'params': ...}, plus"):
            convert.to_torch(wrong)
    with pytest.raises(convert.ConversionError, match="already Flax variables"):
        convert.to_flax(variables["params"])


def test_other_wrappers_are_named():
    wrapped = {"epoch": 3, "ema": SE_STATE}
    assert report_of(wrapped).headline.endswith("; pass state['ema'].")
    state = {"encoder." + key: array for key, array in SE_STATE.items()}
    headline = report_of(state).headline
    assert headline.startswith("No key fits (naming 'timm'): all start with 'encoder.'")
    assert report_of(state | {"more.weight": numbers(1)}).headline.endswith("naming.")
    # Not "layer1.", which all keys share: they fit the rules, just not `like`.
    state = {"layer1.0.conv1.weight": numbers(2, 2, 3, 3)}
    assert report_of(state, like=SE_LIKE).headline.endswith("wrong naming.")


def test_bad_arguments():
    with pytest.raises(ValueError, match="`naming` must be \"timm\" or .* got 'jax'"):
        convert.to_flax(SE_STATE, naming="jax")
    with pytest.raises(ValueError, match="`epoch` must be an array, got str"):
        convert.to_flax({"epoch": "3"})
    with pytest.raises(ValueError, match="`like` must hold arrays or shapes, got 3"):
        convert.to_flax(SE_STATE, like={"params": 3})
    for wrong in (None, [numbers(2)], numbers(2)):
        name = type(wrong).__name__
        with pytest.raises(ValueError, match=f"`state` must be a dict, got {name}; p"):
            convert.to_flax(wrong)
        with pytest.raises(ValueError, match=f"`variables` must be a dict, got {name}"):
            convert.to_torch(wrong)
    with pytest.raises(ValueError, match="`like` must be a dict, got list"):
        convert.to_flax(SE_STATE, like=[1])
    with pytest.raises(ValueError, match="`state` must have strings for keys, got 0"):
        convert.to_flax({0: numbers(2)})
    with pytest.raises(ValueError, match="`variables` must have strings .* got 1"):
        convert.to_torch({"params": {1: numbers(2)}})


def test_arrays_that_numpy_cannot_read():
    gone = jnp.ones(3)
    gone.delete()
    values = {"deleted": gone, r"key<fry>": jax.random.key(0), "list": [[1], 2]}
    for message, value in values.items():
        with pytest.raises(ValueError, match=rf"`a/b` must be .* got .*{message}"):
            convert.to_torch({"a": {"b": value}})


def test_tensors_that_numpy_cannot_read():
    torch = pytest.importorskip("torch")
    for message, tensor in strange_tensors(torch).items():
        with pytest.raises(ValueError, match=f"`fc.weight` must be .*{message}"):
            convert.to_flax({"fc.weight": tensor})
