"""The loop against a real server with a tiny model, as it would run against a large one."""

from pirate_trainer import PAIRS, ask, train


def test_it_learns(selfloop_server):
    sampler, losses = train(selfloop_server.model)
    assert losses[-1] < 0.1 * losses[0]
    assert [ask(sampler, question) for question, _ in PAIRS] == [answer for _, answer in PAIRS]


def test_a_crash_in_the_midst_changes_nothing(selfloop_server):
    _, expected = train(selfloop_server.model, steps=6)
    selfloop_server.kill_worker(at_step=3)
    _, losses = train(selfloop_server.model, steps=6)
    assert losses == expected
