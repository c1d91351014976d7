"""symla.py: the grid against loops over cells, its symmetries, evolution, environments, rivals, short runs."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import symla as S

CPU = torch.device("cpu")
SMALL = S.Config(iterations=2, pairs=2, test_environments=3, test_lifetime=8, log_every=1, tests="cues_2x3,arms_4")


class Alone:
    """A `Run` that keeps its rows, and no files."""
    device = CPU

    def __init__(self, seed=0):
        self.rows, self.seed = [], seed

    def steps(self, stage, total, **state):
        self.stage = stage
        for self.step in range(total):
            yield self.step

    def log(self, **numbers):
        self.rows.append({"stage": self.stage, "step": self.step + 1, **numbers})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def life_of_inputs(T=40, E=3, O=5, A=4):
    return [(3 * F.one_hot(torch.randint(O, (E,)), O).double(), F.one_hot(torch.randint(A, (E,)), A).double(),
             torch.randn(E).double()) for _ in range(T)]


def logits_of(model, inputs):
    memory, logits = None, []
    for step in inputs:
        out, memory = model(*step, memory)
        logits.append(out)
    return torch.stack(logits)                               # (T, E, A)


def torchs_cell(gates, inputs, units):
    """nn.LSTMCell with the weights of `gates`, whose gates come in another order."""
    cell, order = nn.LSTMCell(inputs, units).double(), (0, 1, 3, 2)
    weight, bias = (torch.cat([part.chunk(4)[k] for k in order]) for part in (gates.weight, gates.bias))
    cell.weight_ih.data, cell.weight_hh.data = weight.split([inputs, units], 1)
    cell.bias_ih.data, cell.bias_hh.data = bias, torch.zeros_like(bias)
    return cell


@pytest.mark.parametrize("previous_obs, product, mute", [(1, 1, False), (0, 0, False), (1, 1, True)])
def test_grid_equals_a_loop_over_cells(previous_obs, product, mute):
    O, A, N, M = 3, 2, 4, 3
    model = S.SymLA(N, M, previous_obs, product, mute).double()
    inputs, cell = life_of_inputs(6, 1, O, A), torchs_cell(model.gates, 5 + 2 * M, N)
    state = {(a, b): (torch.zeros(1, N).double(),) * 2 for a in range(O) for b in range(A)}
    ahead, back, before = torch.zeros(A, M).double(), torch.zeros(O, M).double(), torch.zeros(O).double()
    for (obs, was, reward), out in zip(inputs, logits_of(model, inputs)):
        for a, b in state:
            hears = [obs[0, a], previous_obs * before[a], *back[a],
                     was[0, b], reward[0], product * was[0, b] * reward[0], *ahead[b]]
            state[a, b] = cell(torch.stack(hears)[None], state[a, b])
        up = torch.stack([sum(model.ahead.weight @ state[a, b][0][0] for a in range(O)) for b in range(A)])
        down = torch.stack([sum(model.back.weight @ state[a, b][0][0] for b in range(A)) / A for a in range(O)])
        ahead, back, before = (not mute) * up[:, 1:].tanh(), (not mute) * down.tanh(), obs[0]
        torch.testing.assert_close(out[0], up[:, 0], rtol=0, atol=1e-12)


def test_meta_rnn_hears_all_that_cells_hear_and_remembers():
    model = S.MetaRNN(4, 3, 6).double()                      # one entry more than there are
    inputs, cell, before = life_of_inputs(6, 2, 3, 3), torchs_cell(model.gates, 15, 6), torch.zeros(2, 4).double()
    state = (torch.zeros(2, 6).double(),) * 2
    for (obs, was, reward), out in zip(inputs, logits_of(model, inputs)):
        obs, last = F.pad(obs, (0, 1)), before
        state, before = cell(torch.cat([obs, last, was, reward[:, None], was * reward[:, None]], 1), state), obs
        torch.testing.assert_close(out, state[0] @ model.out.weight.T, rtol=0, atol=1e-12)


def test_order_of_entries_and_actions_means_nothing():
    model, inputs, entries, actions = S.SymLA(8, 4).double(), life_of_inputs(), torch.randperm(5), torch.randperm(4)
    logits = logits_of(model, inputs)
    moved = logits_of(model, [(obs[:, entries], was[:, actions], reward) for obs, was, reward in inputs])
    torch.testing.assert_close(moved, logits[..., actions], rtol=0, atol=1e-12)
    assert logits.std(2).mean() > 0.1                        # not because all are equal


def test_sizes_and_first_weights():
    for O, A in ((1, 2), (7, 3)):
        assert S.SymLA(8, 4)(torch.ones(2, O), torch.ones(2, A), torch.ones(2))[0].shape == (2, A)
    with pytest.raises(ValueError, match="sees 4 entries, not 5"):
        S.MetaRNN(4, 3)(torch.ones(2, 5), torch.ones(2, 3), torch.ones(2))
    model, rnn, biases = S.SymLA(32, 4), S.MetaRNN(4, 3), torch.tensor([-1.0, 3.0, 0.0, 0.0]).repeat_interleave(32)
    for layer in (model.gates, model.ahead, model.back, rnn.gates, rnn.out):
        assert layer.weight.std().item() * layer.in_features**0.5 == pytest.approx(2, rel=0.25)
    assert torch.equal(model.gates.bias, biases) and torch.equal(rnn.gates.bias, biases)


class Spy(nn.Module):
    """Always has the same logits, and notes what it is told."""
    def __init__(self, logits=torch.tensor([0.0, 9.0, 0.0])):
        super().__init__()
        self.logits, self.heard = logits, []

    def forward(self, obs, was, reward, memory):
        self.heard.append((obs, was, reward, memory))
        return self.logits.expand(len(obs), 3), len(self.heard)


def test_a_learner_hears_observation_last_action_and_its_reward():
    right = torch.tensor([[0, 1], [1, 2]])
    envs, spy = S.Environments(F.one_hot(right, 3).float()), Spy()
    pay = S.live(spy, envs, 200)
    cues = torch.stack([(obs == 3).nonzero()[:, 1] for obs, *_ in spy.heard])  # (T, E), one entry each is on
    torch.testing.assert_close(pay, spy.logits.softmax(0)[right.gather(1, cues.T).T])
    for t, (_, was, reward, memory) in enumerate(spy.heard):
        assert memory == (t or None)
        last = right[[0, 1], cues[t - 1]] == was.argmax(1) if t else torch.zeros(2, dtype=bool)
        assert torch.equal(reward, last.float()) and was.sum() == (2 if t else 0)
    S.live(spy := Spy(torch.tensor([0.0, 1.0, -1.0])), S.Environments(torch.rand(20_000, 1, 3)), 2)
    torch.testing.assert_close(spy.heard[1][1].mean(0), spy.logits.softmax(0), rtol=0, atol=0.015)


def test_members_share_dice_and_do_not_interact():
    model, envs = S.SymLA(4, 2), S.Environments(torch.rand(5, 2, 3))
    members = {name: w + 0.3 * torch.randn(3, *w.shape) for name, w in model.named_parameters()}
    torch.manual_seed(1)
    together = torch.vmap(lambda theta: S.live(model, envs, 10, theta=theta), randomness="same")(members)
    for i in range(3):
        torch.manual_seed(1)                                 # one alone, with the same dice
        alone = S.live(model, envs, 10, theta={name: w[i] for name, w in members.items()})
        torch.testing.assert_close(alone, together[i])
    assert (together[0] - together[1]).abs().max() > 0.01


def test_es_gradient_is_the_estimate_of_the_docstring(monkeypatch):
    model, direction, eps = nn.Linear(3, 2, bias=False), torch.randn(2, 3), torch.randn(8, 2, 3)
    monkeypatch.setattr(S.torch, "randn", lambda *shape, **more: eps)

    def fitness(theta):                                      # linear in the weights, two kinds, noise that all share
        value = (direction * theta["weight"]).sum() + 100 * torch.rand(())
        return torch.stack([value, 3 * value])
    torch.manual_seed(1)
    mean = S.es_gradient(fitness, model, 8, 0.1)
    expected = -sum((2 * direction * e).sum() * e for e in eps) / 8            # F = 2 value
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-3, atol=2e-3)
    torch.manual_seed(1)
    value = (direction * model.weight).sum().item() + 100 * torch.rand(()).item()
    assert mean.tolist() == pytest.approx([value, 3 * value], rel=1e-5)


def test_what_learners_have_seen_and_what_not():
    kinds = S.seen(500, CPU)
    assert [tuple(kind.pay.shape) for kind in kinds.values()] == [(500, 4, 3), (500, 2, 3), (500, 1, 3)]
    assert (kinds["cues"].pay.argmax(2) == torch.tensor([0, 1, 0, 2])).all() and (kinds["cues"].pay.sum(2) == 1).all()
    assert (kinds["two_cues"].pay.argmax(2) == torch.tensor([0, 1])).all()
    assert (kinds["arms"].pay.diff(dim=2) <= 0).all()
    assert kinds["arms"].pay.mean((0, 1)).tolist() == pytest.approx([0.75, 0.5, 0.25], abs=0.03)
    cues, noisy = S.unseen("cues_6x4", 3000, CPU), S.unseen("noisy_cues_3x5", 3000, CPU)
    assert cues.pay.shape == (3000, 6, 4) and noisy.pay.shape == (3000, 3, 5)
    torch.testing.assert_close(cues.pay.mean(0), torch.full((6, 4), 0.25), rtol=0, atol=0.04)
    assert cues.pay.unique().tolist() == [0, 1] and noisy.pay.unique().tolist() == pytest.approx([0.2, 0.8])
    arms, normal, zero = S.unseen("arms_15", 3000, CPU), S.unseen("normal_arms_5", 3000, CPU), torch.zeros(3000).long()
    assert arms.pay.shape == (3000, 1, 15) and arms.pay.mean().item() == pytest.approx(0.5, abs=0.01)
    assert normal.pay.shape == (3000, 1, 5) and normal.pay.std().item() == pytest.approx(1, abs=0.03)
    assert (normal.step(zero, zero)[1] - normal.pay[:, 0, 0]).std().item() == pytest.approx(1, abs=0.05)
    hits = torch.stack([arms.step(zero, zero + 3)[1] for _ in range(50)])
    assert hits.unique().tolist() == [0, 1] and (hits.mean(0) - arms.pay[:, 0, 3]).abs().mean() < 0.06


def test_rooms_by_hand_and_shuffled():
    room = S.rooms(400, 3, CPU)
    for env in range(40):
        goal = next(s for s in range(9) if (room.goes[env, s] == -1).all())
        for s in set(range(9)) - {goal}:
            y, x = divmod(s, 3)
            after = [3 * max(y - 1, 0) + x, 3 * min(y + 1, 2) + x, 3 * y + max(x - 1, 0), 3 * y + min(x + 1, 2)]
            assert room.goes[env, s].tolist() == after
            assert room.pay[env, s].tolist() == [float(place == goal) for place in after]
    after, reward = room.step(torch.full((400,), 4), torch.zeros(400).long())
    inside = room.goes[:, 4, 0] >= 0
    assert (after[inside] == 1).all() and torch.equal(reward[inside], (room.goes[inside, 1, 0] < 0).float())
    other = room.shuffled()                                  # the same under other names
    for env in range(50):
        order = [next(b for b in range(4) if torch.equal(room.goes[env, :, b], other.goes[env, :, a])
                      and torch.equal(room.pay[env, :, b], other.pay[env, :, a])) for a in range(4)]
        assert sorted(order) == [0, 1, 2, 3] and sorted(other.code[env].tolist()) == list(range(9))
    assert (other.code != room.code).float().mean() > 0.8 and len(other.code.unique(dim=0)) > 390
    assert torch.equal(other.see(other.reset() * 0).argmax(1), other.code[:, 0])


def test_best_players_by_hand():
    rooms = S.rooms(4000, 3, CPU)
    places = [(rooms.goes == -1).all(2).float().argmax(1) == s for s in range(9)]
    for s, best in ((0, 8 / 27), (1, 1 / 3), (4, 8 / 21)):   # corner, edge, centre: steps from anywhere, then the goal
        part = S.Environments(rooms.pay[places[s]], rooms.goes[places[s]])
        assert S.planned(part, 3000, torch.amax) == pytest.approx(best, abs=1e-3)
    assert S.best_possible(4, 3, 5000)[-1] == pytest.approx(1)                 # and no overflow
    for cues, A, T, mean in ((4, 3, 40, 0.900005), (4, 3, 100, 0.96), (6, 4, 100, 0.91), (2, 8, 100, 0.93)):
        assert sum(S.best_possible(cues, A, T)) / T == pytest.approx(mean, abs=1e-6)
    assert S.best_possible(4, 3, 3) == pytest.approx([1 / 3, 5 / 12, 1 / 2])


def test_q_learning_by_a_plain_loop(monkeypatch):
    envs = S.rooms(1, 3, CPU)
    step, taken, Q, n = envs.step, [], {}, {}
    monkeypatch.setattr(envs, "step", lambda s, a: taken.append((s, a, *step(s, a))) or taken[-1][2:])
    pay = S.tabular(envs, 300, 0.7, 0.9)
    for t, row in enumerate(taken):
        s, a, after, reward = (x.item() for x in row)
        value = {b: Q.get((s, b), 0) + 0.7 / math.sqrt(1 + n.get((s, b), 0)) for b in range(4)}
        assert value[a] >= max(value.values()) - 1e-5 and pay[t, 0] == envs.pay[0, s, a]
        n[s, a] = n.get((s, a), 0) + 1
        target = reward + 0.9 * max(Q.get((after, b), 0) for b in range(4))
        Q[s, a] = Q.get((s, a), 0) + (target - Q.get((s, a), 0)) / n[s, a]


@pytest.mark.parametrize("augment, upheaval", [(False, False), (True, False), (False, True)])
def test_environments_and_rates_of_meta_training(augment, upheaval, monkeypatch):
    lived, rates, cfg = [], [], replace(SMALL, iterations=3, learning_rate=0.1, environments=50, upheaval=upheaval)
    monkeypatch.setattr(S, "live", lambda _, envs, T, then, theta: lived.append((envs, then)) or torch.ones(T, 50))
    monkeypatch.setattr(S, "es_gradient", lambda fitness, *_: fitness({}))
    monkeypatch.setattr(S.torch.optim.Adam, "step", lambda adam: rates.append(adam.param_groups[0]["lr"]))
    S.meta_train(cfg, Alone(), "rnn", S.MetaRNN(4, 3), augment)
    (envs, then), fixed = lived[0], S.seen(50, CPU)["cues"]
    assert torch.equal(envs.pay, fixed.pay) != augment and torch.equal(envs.code, fixed.code) != augment
    assert (then is not None) == upheaval and (not upheaval or not torch.equal(then.pay, fixed.pay))
    assert len(lived) == 9 and not torch.equal(lived[2][0].pay, lived[5][0].pay)              # new bandits each time
    assert rates == pytest.approx([0.1, 0.07, 0.04])


class Recall(nn.Module):
    """Knows the four cues of meta-training by heart; elsewhere does anything."""
    def forward(self, obs, was, reward, memory):
        right = F.one_hot(torch.tensor([0, 1, 0, 2]), 3).float()
        return (99 * obs @ right if obs.shape[1] == 4 else torch.zeros_like(was)), 0


def test_evaluation_of_known_players():
    cfg = replace(SMALL, test_environments=2000, test_lifetime=20, tests="cues_2x3,noisy_cues_3x3,arms_4")
    grid = S.SymLA(4, 2)
    curves, scores = S.evaluate(cfg, {"symla": Recall(), "rnn": grid, "mute": grid, "untrained": grid}, CPU)
    assert min(curves["seen"]["symla"][:10]) == 1 and max(curves["seen"]["symla"][10:]) < 0.45
    assert curves["shuffled"]["symla"] == pytest.approx([1 / 3] * 20, abs=0.04)
    assert curves["seen"]["rnn"] == curves["seen"]["mute"]   # the same dice for all
    for row in scores.values():                              # any action: 0
        assert row["symla"] == pytest.approx(0, abs=0.03) and row["mute"] == row["untrained"]
    best = sum(S.best_possible(2, 3, 20)) / 20
    assert scores["cues_2x3"]["tabular"] == pytest.approx((best - 1 / 3) / (2 / 3), abs=0.04)


def test_learners_of_a_run(monkeypatch):
    meta_train, evaluate, made, starts, last = S.meta_train, S.evaluate, [], {}, {}

    def trained(cfg, run, stage, model, augment):
        made.append((stage, type(model).__name__, getattr(model, "talk", None), augment, torch.rand(()).item()))
        starts[stage] = torch.cat([w.detach().flatten() for w in model.parameters()])
        meta_train(cfg, run, stage, model, augment)
    monkeypatch.setattr(S, "meta_train", trained)
    monkeypatch.setattr(S, "evaluate", lambda cfg, models, device: last.update(models) or evaluate(cfg, models, device))
    result = S.experiment(replace(SMALL, lifetime=3), Alone(7))
    dice = torch.rand((), generator=torch.Generator().manual_seed(7)).item()
    assert made == [("symla", "SymLA", 1.0, False, dice), ("mute", "SymLA", 0.0, False, dice),
                    ("rnn", "MetaRNN", None, False, dice), ("rnn_augmented", "MetaRNN", None, True, dice)]
    ends = {name: torch.cat([w.flatten() for w in model.parameters()]) for name, model in last.items()}
    assert torch.equal(ends["untrained"], starts["symla"]) and not torch.equal(ends["symla"], starts["symla"])
    head, curves = result["headline"], result["curves"]      # a half has four steps, a life of training three
    assert head["seen_rnn"] == pytest.approx(sum(curves["seen"]["rnn"][:3]) / 3)
    assert head["shuffled_again_symla"] == pytest.approx(sum(curves["shuffled"]["symla"][4:7]) / 3)


def test_short_runs():
    cfg = replace(SMALL, iterations=30, pairs=32, environments=4, log_every=10)
    for model in (rnn := S.MetaRNN(4, 3), grid := S.SymLA(8, 4)):
        S.meta_train(cfg, Alone(), "stage", model)
    cues, arms = S.seen(500, CPU)["cues"], S.seen(500, CPU)["arms"]
    with torch.no_grad():
        rewards = [S.live(model, kind, 40).mean().item() for model, kind in (
            (rnn, cues), (rnn, cues.shuffled()), (grid, arms), (grid, arms.shuffled()))]
    assert rewards[0] > 0.5 and rewards[1] < 0.42            # recalled
    assert rewards[2] == pytest.approx(rewards[3], abs=0.05) and rewards[2] > 0.55            # learned


@pytest.mark.parametrize("options, words", [
    ("--hidden 0", "at least 1"), ("--pairs 0", "at least 1"), ("--test-lifetime 1", "at least 2"),
    ("--upheaval --lifetime 1", "at least 2"), ("--sigma nan", "--sigma"), ("--learning-rate -1", "--learning-rate"),
    ("--tests maze_3", "'maze_3'"), ("--tests cues_1x4", "from 2 to 99"), ("--tests cues_4x1", "'cues_4x1'"),
    ("--tests arms_15,", "''"), ("--tests room_1", "'room_1'"), ("--tests arms_100", "'arms_100'")])
def test_bad_options(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        S.main(options.split())
    assert words in stop.value.code and "\n" not in stop.value.code and not list(tmp_path.iterdir())
