from functools import partial

import jax
import pytest

from flax_attn.resnet import BasicBlock, ResNet
from train.study import networks


@pytest.mark.parametrize("backend, per_call", [("cpu", 1), ("gpu", 3)])
def test_networks_take_turns_and_are_compared_to_none(monkeypatch, backend, per_call):
    """With invented times for the networks."""
    steps = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(networks, "STEPS", 3)

    def fastest(calls, rounds):
        assert rounds == 5
        for call in calls.values():
            for _ in range(2):
                call()
                steps.append(int(call.state.step))
        return dict(zip(calls, (0.2, 0.3), strict=True))

    monkeypatch.setattr(networks, "fastest", fastest)
    monkeypatch.setattr(networks, "BATCH", 4)
    make = partial(ResNet, (1,), BasicBlock, width=8, imagenet_stem=False)
    network = ("a network", make, 8, "float32")
    rows = networks.measure_network(network, ["eca"], ["fast"], 5)
    table = {row["block"]: (row["step_ms"], row["overhead_percent"]) for row in rows}
    assert table.keys() == {"none", "eca fast"}
    times = [ms * per_call for ms, _ in table.values()]
    assert times == pytest.approx([200, 300])
    assert [round(percent) for _, percent in table.values()] == [0, 50]
    # Each call starts from the state of the last one; the first one compiled.
    assert steps == 2 * [2 * per_call, 3 * per_call]


def test_variants():
    """No block comes once, each block with each implementation."""
    assert networks.variants(["eca", "se"], ["fast", "plain"]) == [
        ("none", ""),
        *(("eca", "fast"), ("eca", "plain")),
        *(("se", "fast"), ("se", "plain")),
    ]
