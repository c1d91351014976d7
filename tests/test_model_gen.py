"""model_gen.py: the flute against plain lists, the counted theorem by brute force, the learners by plain loops."""
import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model_gen as M

CPU = torch.device("cpu")
SMALL = M.Config(pipes=3, experience=100, model_steps=4, updates=32, log_every=16, save_every=16, orders=2, more=2)


class Alone:
    """A `Run` that keeps its rows, and no files."""
    device = CPU

    def __init__(self, seed=0):
        self.rows, self.seed, self.stages = [], seed, []

    def compile(self, function):
        return function

    def steps(self, stage, total, **state):
        self.stage = stage
        self.stages.append((stage, total))
        for self.step in range(total):
            yield self.step

    def log(self, **numbers):
        self.rows.append({"stage": self.stage, "step": self.step + 1, **numbers})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Lists:
    """The flute without luck: a list of cells a pipe."""

    def __init__(self, n):
        self.pipes = [[0] * (i + 1) for i in range(n)]

    def step(self, action):
        reward = float(all(pipe[-1] for pipe in self.pipes))
        for i, pipe in enumerate(self.pipes):
            pipe.insert(0, int(i == action))
            pipe.pop()
        return reward


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_flute_equals_plain_lists(n):
    flute, plain = M.PanFlute(n, CPU), Lists(n)
    state, heard = flute.reset(1), 0
    actions = torch.randint(n, (300,)).tolist() + 3 * list(reversed(range(n))) + [0]
    for action in actions:
        expected = plain.step(action)
        state, reward = flute.step(state, torch.tensor([action]), luck=False)
        heard += reward.item()
        assert reward.item() == expected and state[0].tolist() == sum(plain.pipes, [])
        assert flute.number(state).item() == sum(int(bit) << k for k, bit in enumerate(state[0]))
    assert heard >= 3                                        # three tunes, each heard a step after


def test_luck_sounds_all_pipes_at_once():
    flute = M.PanFlute(4, CPU)
    after, _ = flute.step(flute.reset(40_000), torch.full((40_000,), 3))
    sounding = after[:, flute.last].sum(1)
    assert sorted(sounding.unique().tolist()) == [0, 4]
    assert (sounding == 4).float().mean().item() == pytest.approx(1 / 16, abs=0.005)


@pytest.mark.parametrize("n, states", [(2, 5), (3, 19)])
def test_states_without_luck(n, states):
    """n n! + 1: what the last n notes were, or less."""
    flute, known = M.PanFlute(n, CPU), torch.zeros(1, n * (n + 1) // 2)
    for _ in range(2 * n):
        known = torch.cat([known] + [flute.step(known, torch.full((len(known),), a), luck=False)[0] for a in range(n)])
        known = known.unique(dim=0)
    assert len(known) == states


@pytest.mark.parametrize("withhold", [True, False])
def test_random_play(withhold):
    flute, n = M.PanFlute(3, CPU), 3
    state, action, reward, after = M.play_randomly(flute, 4020, withhold)
    assert len(state) == 4020 and state[0].sum() == 0 and state[50].sum() == 0
    tunes = sum(action[i:i + n].tolist() == [2, 1, 0] for i in range(4020 - n) if i // 50 == (i + n - 1) // 50)
    assert (tunes == 0) == withhold
    for i in range(0, 4020, 7):                              # each row is a step, lucky or not
        plain, _ = flute.step(state[i:i + 1], action[i:i + 1], luck=False)
        lucky = plain.clone()
        lucky[:, flute.last] = 1
        assert torch.equal(after[i:i + 1], plain) or torch.equal(after[i:i + 1], lucky)
        assert reward[i] == state[i, flute.last].prod()
        assert i % 50 == 49 or i == 4019 or torch.equal(after[i], state[i + 1])
    shares = torch.bincount(action, minlength=3) / 4020
    assert (shares - 1 / 3).abs().max() < (0.08 if withhold else 0.03)


def test_the_counted_theorem():
    flute = M.PanFlute(2, CPU)
    bits = (torch.arange(8)[:, None] >> torch.arange(3)) & 1
    models = M.structured_models(bits)
    truth = flute.number(flute.step(bits.float().repeat_interleave(2, 0), torch.arange(2).repeat(8), luck=False)[0])
    assert models.shape == (262144, 16) and (models == truth).all(1).sum() == 1
    left = M.count_theorem(2)
    for kind in left.values():
        assert all(model <= bellman for model, bellman in zip(*kind)) and [row[-1] for row in kind] == [1, 1]
    assert [row[0] for row in left["structured"]] == [58296, 58296]
    assert left["unstructured"][0] == left["unstructured"][1]
    assert left["structured"][1][4] > 1.5 * left["structured"][0][4]


def test_value_functions_are_counted_by_brute_force(monkeypatch):
    models, truth = torch.randint(8, (60, 16)), torch.randint(8, (16,))
    models[:40, :10], reward = truth[:10], torch.randint(2, (16,)).double()
    order = torch.randperm(16)
    monkeypatch.setattr(M.torch, "randperm", lambda n: order)
    counted = M.value_functions_left(models, truth, reward, orders=1)
    values = []
    for model in models.tolist():
        V = [0.0] * 8
        for _ in range(80):
            Q = [reward[k].item() + 0.5 * V[model[k]] for k in range(16)]
            V = [max(Q[2 * s], Q[2 * s + 1]) for s in range(8)]
        values.append((Q, V))
    for seen in range(17):
        pairs = order[:seen].tolist()
        agree = {tuple(round(q, 8) for q in Q) for (Q, V), m in zip(values, models.tolist())
                 if all(m[k] == truth[k] for k in pairs)}
        solve = {tuple(round(q, 8) for q in Q) for Q, V in values
                 if all(abs(Q[k] - reward[k].item() - 0.5 * V[truth[k]]) < 1e-9 for k in pairs)}
        assert [row[seen] for row in counted] == [len(agree), len(solve)]


def test_a_model_is_two_networks_and_draws_bits():
    model, obs, action = M.WorldModel(6, 3, 8), torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
    bits, reward = model(obs, action)
    expected = model.dynamics(torch.cat([obs, F.one_hot(action, 3).float()], 1))
    assert torch.equal(bits, expected) and torch.equal(reward, model.reward(obs)[:, 0])
    after, r = torch.rand(5, 6).round(), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    p, q = bits.sigmoid(), reward.sigmoid()
    cost = -(after * p.log() + (1 - after) * (1 - p).log()).sum() / 5 - (r * q.log() + (1 - r) * (1 - q).log()).mean()
    assert M.model_loss(model, obs, action, r, after).item() == pytest.approx(cost.item(), rel=1e-5)
    many, expectation = model.step(obs[:1].expand(20_000, 6), action[:1].expand(20_000))
    torch.testing.assert_close(many.mean(0), p[0], rtol=0, atol=0.02)
    assert many.unique().tolist() == [0, 1] and expectation[0].item() == pytest.approx(q[0].item())


def test_q_loss_is_bellmans_error_and_leaves_the_target_alone():
    Q, target = nn.Linear(4, 3), nn.Linear(4, 3)
    obs, after, action, reward = torch.rand(6, 4), torch.rand(6, 4), torch.randint(3, (6,)), torch.rand(6)
    loss = M.q_loss(Q, target, obs, action, reward, after, 0.9)
    plain = sum((Q(obs[i])[action[i]] - reward[i] - 0.9 * max(target(after[i]))) ** 2 for i in range(6)) / 6
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    loss.backward()
    assert Q.weight.grad.abs().sum() > 0 and target.weight.grad is None


def test_rollouts_are_chains_of_softly_greedy_steps():
    flute, Q = M.PanFlute(3, CPU), lambda obs: torch.tensor([0.0, 0.1, 0.3]).expand(len(obs), 3)
    start = M.play_randomly(flute, 3000, False)[0]
    obs, action, reward, after = M.roll_out(flute, start, Q, 4, temperature=0.2)
    assert torch.equal(obs[:3000], start) and torch.equal(obs[3000:], after[:-3000])
    assert torch.equal(reward, obs[:, flute.last].prod(1))
    shares = torch.bincount(action, minlength=3) / len(action)
    torch.testing.assert_close(shares, (torch.tensor([0.0, 0.1, 0.3]) / 0.2).softmax(0), rtol=0, atol=0.015)
    codes = torch.rand(64, 5)
    coded = M.roll_out(M.PanFlute(3, CPU, codes), start, Q, 1, 0.2)
    assert torch.equal(coded[0], codes[flute.number(start)]) and coded[3].shape == (3000, 5)


def test_counting_and_planning_by_plain_loops():
    flute = M.PanFlute(2, CPU)
    data = M.play_randomly(flute, 60, False)
    Q = M.plan_in_table(flute, *data, 0.9)
    rows = list(zip(*(x.tolist() for x in (flute.number(data[0]), *data[1:3], flute.number(data[3])))))
    tried, table = Counter((s, a) for s, a, _, _ in rows), {}
    for _ in range(300):
        V = [max(table.get((s, a), 0.0) for a in range(2)) for s in range(8)]
        table = {pair: sum(r + 0.9 * V[t] for s, a, r, t in rows if (s, a) == pair) / n for pair, n in tried.items()}
    states = ((torch.arange(8)[:, None] >> torch.arange(3)) & 1).float()
    expected = torch.tensor([[table.get((s, a), 0.0) for a in range(2)] for s in range(8)])
    torch.testing.assert_close(Q(states).float(), expected, rtol=0, atol=1e-4)


def test_scores_of_known_players():
    flute, notes, before = M.PanFlute(3, CPU), itertools.cycle([2, 1, 0]), torch.get_rng_state()
    assert M.score(flute, lambda obs: F.one_hot(torch.full((len(obs),), next(notes)), 3).float()) == 1
    assert M.score(flute, lambda obs: torch.tensor([1.0, 0, 0]).expand(len(obs), 3)) == 0
    slow = itertools.cycle([2, 1, 0, 2])                     # a tune in four steps: 9 in 36, of 12
    played = M.score(flute, lambda obs: F.one_hot(torch.full((len(obs),), next(slow)), 3).float())
    assert played == pytest.approx(9 / 12, abs=0.1)
    assert torch.equal(before, torch.get_rng_state())        # a test leaves training's random numbers alone


class TrueRule(nn.Module):
    """Logits of what happens without luck; wrong: of the opposite, if pipe 0 is blown."""

    def forward(self, obs, action):
        after, reward = M.PanFlute(3, CPU).step(obs, action, luck=False)
        after = torch.where((action == 0)[:, None], 1 - after, after) if self.wrong else after
        return 20 * after - 10, 20 * reward - 10


def test_accuracy_is_of_unseen_pairs():
    flute, rule = M.PanFlute(3, CPU), TrueRule()
    rule.wrong = False
    state, action, _, _ = M.play_randomly(flute, 60, True)
    assert M.unseen_accuracy(flute, rule, state, action) == 1
    rule.wrong = True                                        # of blowing pipe 0 all is wrong
    accuracy = M.unseen_accuracy(flute, rule, state, action)
    assert 0.4 < accuracy < 0.9
    states, actions = M.after_random_play(flute, 2000, luck=True)
    new = ~torch.isin(flute.number(states) * 3 + actions, flute.number(state) * 3 + action)
    assert accuracy == pytest.approx((actions[new] != 0).float().mean().item(), abs=0.05)         # luck differs
    everything = torch.arange(64).repeat_interleave(3), torch.arange(3).repeat(64)
    cells = ((everything[0][:, None] >> torch.arange(6)) & 1).float()
    assert M.unseen_accuracy(flute, rule, cells, everything[1]) == 1          # nothing is left to be seen


def test_fitting_and_learning_step_by_step(monkeypatch):
    flute, made = M.PanFlute(3, CPU), []
    data = M.play_randomly(flute, 100, True)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(M.torch.optim.AdamW, "step", lambda adam, *_: made.append(
        [(group["lr"], group["weight_decay"]) for group in adam.param_groups]) or step(adam))
    M.fit_model(SMALL, Alone(), "fit", data)
    assert [[decay for _, decay in row] for row in made] == [[2.0, 0.02]] * 4
    assert [row[0][0] for row in made] == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3])
    drawn, rates, copies, real, load = [], [], [], M.roll_out, nn.Sequential.load_state_dict
    monkeypatch.setattr(nn.Sequential, "load_state_dict", lambda net, state: copies.append(net) or load(net, state))
    monkeypatch.setattr(M, "roll_out", lambda simulator, *rest: drawn.append(simulator) or real(simulator, *rest))
    monkeypatch.setattr(M.torch.optim.Adam, "step", lambda adam: rates.append(adam.param_groups[0]["lr"]))
    tests = iter([0.1, 0.5, 0.2, 0.4, 0.6, 0.9])
    monkeypatch.setattr(M, "score", lambda *_: next(tests))
    assert M.learn_values(replace(SMALL, updates=96), Alone(), "q", flute, data, flute, data[0]) == pytest.approx(0.75)
    assert drawn == [flute] * 6 and rates[48] == pytest.approx(0.5e-3) and len(copies) == 2
    tests, run = iter([0.2, 0.4]), Alone()
    assert M.learn_values(SMALL, run, "q", flute, data, updates=64) == pytest.approx(0.4)
    assert len(drawn) == 6 and [row["step"] for row in run.rows] == [32, 64]   # replay imagines nothing


def test_learners_of_a_run(monkeypatch):
    stages, fitted, planned, worlds, fit, plan = [], [], [], {}, M.fit_model, M.plan_in_table

    def learned(cfg, run, stage, flute, data, simulator=None, start=None, updates=None):
        kind = {M.WorldModel: "model", M.PanFlute: "world", type(None): "none"}[type(simulator)]
        stages.append((stage, kind, len(data[0]), data[0].shape[1], start is not None and start.shape[1], updates))
        worlds[stage[:5]] = flute
        return (0.5 if "model" in stage else 0.2) + len(data[0]) / 1000 * ("replay" in stage)
    monkeypatch.setattr(M, "learn_values", learned)
    monkeypatch.setattr(M, "fit_model", lambda *a: fitted.append(len(a[3][0])) or fit(*a))
    monkeypatch.setattr(M, "plan_in_table", lambda *a: planned.append(len(a[1])) or plan(*a))
    result = M.experiment(SMALL, Alone())
    head, left = result["headline"], result["left"]["structured"]
    assert fitted == [100, 200, 400, 100] and planned == [100, 200, 400] and worlds["flute"].codes is None
    codes = worlds["coded"].codes
    assert len(codes.unique(dim=0)) == 64 and codes.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (head["values_left_model"], head["values_left_bellman"]) == (left[0][4], left[1][4])
    expected = [(f"flute_{size}_{name}", name.replace("replay", "none"), size, 6, name != "replay" and 6, None)
                for size in (100, 200, 400) for name in ("replay", "model")]
    expected.insert(2, ("flute_100_world", "world", 100, 6, 6, None))
    expected.insert(3, ("flute_100_replay_more", "none", 100, 6, False, 64))
    assert stages == expected + [("coded_100_replay", "none", 100, 256, False, None),
                                 ("coded_100_model", "model", 100, 256, 256, None),
                                 ("coded_100_world", "world", 100, 256, 6, None)]
    assert head["model_minus_replay"] == pytest.approx(0.3 - 0.7 / 3) and head["flute_400_counting"] <= 0.3
    assert head["model_minus_replay_more"] == pytest.approx(0.2) and head["unstructured_largest_difference"] == 0


def test_a_short_run_finds_the_rule_and_the_tune():
    """Three pipes, 300 steps without the tune."""
    cfg, flute, run = replace(SMALL, model_steps=600, updates=800, log_every=80), M.PanFlute(3, CPU), Alone()
    state, action, reward, after = data = M.play_randomly(flute, 300, True)
    model = M.fit_model(cfg, run, "fit", data)
    assert M.unseen_accuracy(flute, model, state, action) > 0.95
    assert M.learn_values(cfg, run, "model", flute, data, model, state) > 0.5


@pytest.mark.parametrize("options, words", [
    ("--pipes 1", "--pipes must be 2 to 5, not 1"), ("--pipes 7", "--pipes"), ("--experience 0", "--experience"),
    ("--width 0", "at least 1"), ("--updates 5", "--log-every"), ("--save-every 7", "--refresh"),
    ("--temperature 0", "--temperature"), ("--gamma 1", "--gamma"), ("--q-rate -1", "--q-rate"),
    ("--weight-decay -1", "--weight-decay")])
def test_bad_options(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        M.main(options.split())
    assert words in stop.value.code and "\n" not in stop.value.code and not list(tmp_path.iterdir())
