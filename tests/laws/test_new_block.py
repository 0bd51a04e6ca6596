"""A block that only this file knows: one entry in BLOCKS, and all the rest follows.

``insertion/test_own_block.py`` inserts, labels and inspects a block without an entry.
"""

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn import blocks, functional
from flax_attn.functional import checks
from tests import cases, references, tiny_run
from tests.cases import normal, variables_for
from tests.laws import test_axes, test_dtypes, test_masks, test_start, test_values
from tests.library.inspect.test_gates import Again
from train import benchmark, cifar


class ScaledMean(blocks.Attention, kw_only=True):
    """``x * gate(scale * mean(x) + shift)``: one weight and one bias per channel."""

    gates = {"channel_gate": "channel_gate"}

    @nn.compact
    def channel_gate(self, x, mask=None):
        mean = functional.squeeze_spatial(
            x,
            mask=checks.check_mask(mask, x),
            spatial_dims=self.spatial_dims,
            implementation=self.implementation,
        )
        mean = mean.astype(self.dtype or x.dtype)
        logits = Affine(self.dtype, self.param_dtype, self.last_layer(), name="expand")
        gate = self.gate_from(logits(mean))
        self.sow("intermediates", "channel_gate", gate)
        return gate


class Affine(nn.Module):
    dtype: jnp.dtype | None
    param_dtype: jnp.dtype
    init: dict

    @nn.compact
    def __call__(self, x):
        shape = (1, x.shape[-1])
        kernel = self.param("kernel", self.init["kernel_init"], shape, self.param_dtype)
        bias = self.param("bias", self.init["bias_init"], shape[1:], self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x * kernel.reshape(shape_of(x)) + bias.reshape(shape_of(x))


def shape_of(x):
    return (1,) * (x.ndim - 1) + (-1,)


def reference(params, x, dims=2):
    kernel, bias = params["expand"]["kernel"][0], params["expand"]["bias"]
    return x * references.sigmoid(references.average(x, dims) * kernel + bias)


NEW = "scaled-mean"
X = normal((2, 6, 5, 16), 1)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(blocks._blocks, NEW, ScaledMean)
    monkeypatch.setitem(cases.REFERENCES, NEW, reference)


def test_created_by_its_name():
    assert isinstance(flax_attn.create(NEW, use_bias=True), ScaledMean)
    with pytest.raises(ValueError, match=f"{NEW}, got 'other'"):
        flax_attn.create("other")


@pytest.mark.parametrize(
    "law",
    [
        partial(test_values.test_both_implementations_against_float64, kind="maps"),
        partial(test_masks.test_padding_counts_for_nothing, dims=3),
        test_axes.test_each_sample_is_on_its_own,
        partial(test_dtypes.test_result_dtype_is_linens, implementation="fast"),
        test_start.test_identity_that_can_learn,
        test_start.test_sown_gates_multiply_back_to_the_output,
        test_values.test_the_multiplier_multiplies_back,
    ],
    ids=["values", "masks", "axes", "dtypes", "identity", "gates", "multiplier"],
)
def test_the_laws_take_it(law):
    law(block=NEW)


def test_trains_on_digits(tmp_path, capsys, monkeypatch):
    """In a network of one residual block."""
    monkeypatch.setattr("train.engine.model.cifar_resnet", tiny_run.network)
    arguments = f"--attention {NEW} --dataset digits --depth 8 --epochs 1 --batch-size"
    cifar.main([*arguments.split(), "480", "--workdir", str(tmp_path / "run")])
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["train_loss"])
    assert f"attention {NEW}" in capsys.readouterr().out


def test_measured_by_the_benchmark(tmp_path):
    out = tmp_path / "rows.json"
    shape = ["--shapes", "1", "4", "4", "16", "--rounds", "1"]
    benchmark.main(["--blocks", NEW, *shape, "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["block"] == NEW and row["forward"] > 0


def test_a_lost_gate_is_named():
    """In ``nn.scan`` without room for gates, the declaration tells that one is lost."""
    model = Again(ScaledMean)
    with pytest.raises(ValueError, match="no gate at shared/channel_gate"):
        flax_attn.inspect.attention_maps(model, variables_for(model, X), X)


def test_costed():
    """The definition is counted, whichever implementation the block has."""
    counted = flax_attn.cost(flax_attn.create(NEW), X.shape)
    assert counted == flax_attn.cost(ScaledMean(implementation="plain"), X.shape)
    assert counted.parameters == counted.transcendentals == 2 * 16
