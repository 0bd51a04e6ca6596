"""``assert_active``: gates that do not move the output are found."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import variables_for
from tests.insertion.models import KEY, SE, Chain, Gated, X


@pytest.mark.parametrize("broken", ["", "result", "zero"])
def test_inactive_gates_are_found(broken):
    model = Gated(broken)
    variables = jax.jit(model.init)(KEY, X)
    run = partial(flax_attn.assert_active, model, variables, X)
    if not broken:
        assert run() == ("used/channel", "used/spatial", "second")
    else:
        dead = "second" if broken == "result" else "used/channel, used/spatial, second"
        with pytest.raises(AssertionError, match=f"on the gates of {dead}\\. "):
            # Sown values depend on the gate but are not part of the output.
            run(mutable=["intermediates"])


def test_a_closed_gate_is_active():
    model = flax_attn.SE(reduction=1, gate=lambda logits: 0 * logits)
    variables = variables_for(model, X)
    assert flax_attn.assert_active(model, variables, X) == ("",)


def test_a_scale_that_starts_at_zero_is_reported():
    model = flax_attn.insert(
        nn.Sequential([nn.LayerNorm(scale_init=nn.initializers.zeros)]),
        SE,
        nn.LayerNorm,
    )
    variables = jax.jit(model.init)(KEY, X)
    with pytest.raises(
        AssertionError, match="gates of layers_0/attention.*zero-initialized"
    ):
        flax_attn.assert_active(model, variables, X)


class Foreign(nn.Module):
    """An attention block that is no ``Attention``."""

    @nn.compact
    def __call__(self, x):
        return x * nn.sigmoid(self.param("scale", nn.initializers.zeros, (1,) * x.ndim))


def test_an_attention_of_another_kind():
    model = flax_attn.insert(Chain(), Foreign, nn.Conv)
    variables = variables_for(model, X)
    paths = ("first/attention", "second/attention")
    assert flax_attn.assert_active(model, variables, X) == paths
    labels = flax_attn.parameter_labels(model, X)
    assert labels["first"]["attention"] == {"scale": "attention_no_decay"}


def test_a_model_without_attention_raises():
    chain = Chain()
    variables = variables_for(chain, X)
    for run in (
        lambda: flax_attn.sites(chain, X),
        lambda: flax_attn.assert_active(chain, variables, X),
        lambda: flax_attn.parameter_labels(chain, X),
    ):
        with pytest.raises(ValueError, match="`model` must .*Chain"):
            run()
    model = flax_attn.insert(chain, SE(), nn.Conv)
    with pytest.raises(ValueError, match="must give a finite output"):
        flax_attn.assert_active(model, variables_for(model, X), X * np.nan)
