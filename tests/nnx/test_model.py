"""A block in a network that a user would write."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_attn.nnx
from tests.cases import normal
from tests.nnx.cases import drawn, learned_class

X = normal((4, 8, 8, 3), 1)
LABELS = np.array([0, 1, 2, 0])


class Residual(nnx.Module):
    def __init__(self, features_in, features, attention, *, rngs):
        self.conv = nnx.Conv(features_in, features, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.attention = attention(features, rngs=rngs)
        self.shortcut = nnx.Conv(features_in, features, (1, 1), rngs=rngs)

    def __call__(self, x):
        y = self.attention(nnx.relu(self.norm(self.conv(x))))
        return nnx.relu(y + self.shortcut(x))


class ResNet(nnx.Module):
    def __init__(self, attention, *, rngs):
        self.stage1 = Residual(3, 8, attention, rngs=rngs)
        self.stage2 = Residual(8, 16, attention, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stage2(self.stage1(x))
        self.sow_features(x)
        return self.head(x.mean((1, 2)))

    def sow_features(self, x):
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "features", x)


@learned_class
def test_trains_and_evaluates(name):
    attention = flax_attn.nnx.BLOCKS[name]
    model = drawn(lambda: ResNet(attention, rngs=nnx.Rngs(0)))
    for stage in (model.stage1, model.stage2):
        # Positive, so that no ReLU of few units is dead from the start.
        state = nnx.state(stage.attention)
        nnx.update(stage.attention, jax.tree.map(lambda a: jnp.abs(a) / 3, state))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(X)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, LABELS
            ).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    before = jax.tree.map(np.array, flax_attn.nnx.to_linen(model))
    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    after = flax_attn.nnx.to_linen(model)
    for stage in ("stage1", "stage2"):
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(),
            before["params"][stage]["attention"],
            after["params"][stage]["attention"],
        )
        assert max(jax.tree.leaves(moved)) > 0

    model.eval()
    run = nnx.jit(lambda model, x: model(x))
    logits = run(model, X)
    gates = nnx.jit(flax_attn.nnx.attention_maps)(model, X)
    one = sum(path.startswith("stage1/") for path in gates)
    assert len(gates) == 2 * one > 0
    assert all(path.startswith(("stage1/", "stage2/")) for path in gates)
    copy = drawn(lambda: ResNet(attention, rngs=nnx.Rngs(1)), seed=9)
    flax_attn.nnx.from_linen(copy, after)
    copy.eval()
    np.testing.assert_allclose(run(copy, X), logits, rtol=1e-5, atol=1e-6)
