import time
from functools import partial

from train.study import timing


def test_the_fastest_turn_counts(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    turns = {"a": iter([9, 4, 1]), "b": iter([9, 2, 3])}  # The first warms up.
    order = []

    def call(name):
        nonlocal clock
        order.append(name)
        clock += next(turns[name])

    calls = {name: partial(call, name) for name in turns}
    assert timing.fastest(calls, rounds=2) == {"a": 1, "b": 2}
    assert order == ["a", "b"] * 3


def test_turns_change_their_order():
    rounds, taken = 20, []
    calls = {name: partial(taken.append, name) for name in "abcd"}
    assert timing.fastest(calls, rounds).keys() == set("abcd")
    # After one turn each to warm up.
    turns = [tuple(taken[i : i + 4]) for i in range(4, 4 * rounds + 1, 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len({turn[0] for turn in turns}) == 4
