from functools import partial

from flax_attn.resnet import cifar_resnet
from train.study import networks


def test_networks_take_turns_and_are_compared_to_none(monkeypatch):
    """By a clock that gives each network a time of its own."""

    def fastest(calls, rounds):
        for call in calls.values():
            call()
        assert rounds == 5
        return dict(zip(calls, (0.2, 0.3, 0.1), strict=True))

    monkeypatch.setattr(networks, "fastest", fastest)
    monkeypatch.setattr(networks, "BATCH", 4)
    make = partial(cifar_resnet, 8, width=4)
    network = ("ResNet-8", make, 8, "float32")
    rows = networks.measure_network(network, ["eca"], ["fast", "plain"], 5)
    table = {row["block"]: (row["step_ms"], row["overhead_percent"]) for row in rows}
    assert table.keys() == {"none", "eca fast", "eca plain"}
    assert [round(ms) for ms, _ in table.values()] == [200, 300, 100]
    assert [round(percent) for _, percent in table.values()] == [0, 50, -50]


def test_a_step_takes_the_state_of_the_last_one(monkeypatch):
    monkeypatch.setattr(networks, "BATCH", 4)
    steps = []

    def fastest(calls, rounds):
        (call,) = calls.values()
        for _ in range(3):
            call()
            steps.append(int(call.state.step))
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(networks, "fastest", fastest)
    make = partial(cifar_resnet, 8, width=4)
    list(networks.measure_network(("ResNet-8", make, 8, "float32"), [], ["fast"], 1))
    assert steps == [2, 3, 4]  # The first one compiled.
