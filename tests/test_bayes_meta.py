"""bayes_meta.py: exact solutions against closed forms and slow oracles, losses by plain loops, short runs."""
import functools
import itertools
import math
from dataclasses import replace

import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.distributions as D

import bayes_meta as M

CPU = torch.device("cpu")
COIN = M.FAMILIES["coin"]
SMALL = M.Config(length=10, pulls=10, width=16, predict_batch=64, play_batch=64, sequences=1000, log_every=10**6)


class Alone:
    """A `Run` that keeps its rows, and no files."""
    device, compile = CPU, staticmethod(lambda function: function)

    def __init__(self):
        self.seed, self.rows = 0, []

    def steps(self, stage, total, **state):
        for self.step in range(total):
            self.stage = stage
            yield self.step

    def log(self, **numbers):
        self.rows.append({"stage": self.stage, "step": self.step + 1, **numbers})


def at_random(inputs, outputs):
    """A network that knows nothing: all its outputs are 0."""
    model = M.Recurrent(inputs, outputs, 4)
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def test_predictions_are_those_of_the_conjugate_posteriors():
    torch.manual_seed(0)
    prior = 0.5                                              # 1, the default, in the next test
    for name, faces in (("coin", 2), ("die", 3), ("gaussian", None)):
        family = M.FAMILIES[name]
        x = family.sample(5, 9, CPU)
        exact = family.bayes(x, prior)
        for b, t in itertools.product(range(5), range(9)):
            if name == "gaussian":
                ours = exact.mean[b, t].item(), exact.variance[b, t].item()
                expected = x[b, :t].double().sum().item() / (t + prior), 1 + 1 / (t + prior)
            else:
                ours = exact.probs[b, t].tolist()
                expected = scipy.stats.dirichlet.mean(torch.bincount(x[b, :t], minlength=faces).numpy() + prior)
            assert ours == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name, nats", [("coin", 11.147209), ("die", 18.578549), ("gaussian", 29.901032)])
def test_log_loss_of_bayes_over_twenty_symbols(name, nats):
    """Closed forms, as ln 21 + mean_k ln C(20, k) for the coin."""
    torch.manual_seed(0)
    x = M.FAMILIES[name].sample(20_000, 20, CPU)
    loss = -M.FAMILIES[name].bayes(x).log_prob(x).sum(1)
    assert loss.mean() == pytest.approx(nats, abs=4 * loss.std().item() / math.sqrt(20_000))


def test_wrong_predictors_of_the_coin():
    """Exact, 20 symbols: always the prior costs 0.13579 nats a symbol, the prior Beta(1/2, 1/2) 5.20e-3."""
    torch.manual_seed(0)
    x = COIN.sample(20_000, 20, CPU)
    for q, nats in ((COIN.bayes(x[:, :1]), 0.13579), (COIN.bayes(x, 0.5), 5.20e-3)):
        assert D.kl_divergence(COIN.bayes(x), q).mean() == pytest.approx(nats, rel=0.03)
    assert M.kl_by_step(at_random(2, 2), COIN, x).mean() == pytest.approx(0.13579, rel=0.03)
    assert M.prediction_loss(at_random(2, 2), COIN, x).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", M.FAMILIES)
def test_nobody_sees_what_is_to_be_predicted(name):
    torch.manual_seed(0)
    family = M.FAMILIES[name]
    model, x, t = M.Recurrent(family.inputs, family.outputs, 8), family.sample(6, 9, CPU), 4
    other = x.clone()
    other[:, t] = x[:, t] + 1 if name == "gaussian" else (x[:, t] + 1) % family.K
    for predict in (family.bayes, lambda x: M.predict(model, family, x)):
        divergence = D.kl_divergence(predict(x), predict(other))               # (6, 9)
        assert divergence[:, :t + 1].abs().max() < 1e-6
        assert divergence[:, t + 1].max() > 1e-6
    assert family.encode(0 * x).abs().sum(-1).min() > 0      # no symbol looks like the start


def test_bayes_is_a_fixed_point_of_meta_training():
    """All strings of 6 bits: the expected loss has no gradient by the logits of a history at Bayes, and one nearby."""
    x = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    evidence = torch.tensor([1 / 7 / math.comb(6, ones) for ones in x.sum(1).tolist()], dtype=torch.float64)
    history = 2**torch.arange(6) + torch.stack([x[:, :t] @ 2**torch.arange(t) for t in range(6)], 1)   # a number each
    bayes = torch.zeros(64, 2).double().index_put((history,), COIN.bayes(x).logits)
    for logits, low, high in ((bayes, 0, 1e-12), (bayes + 0.1 * torch.randn_like(bayes), 1e-3, 1)):
        logits.requires_grad_()
        (-(evidence[:, None] * D.Categorical(logits=logits[history]).log_prob(x)).sum()).backward()
        assert low <= logits.grad.abs().max() < high


def plain_value(T, known, rule):
    """Expected return by recursion over beliefs in plain Python; rule(belief, means, values) -> P(arm 0)."""
    @functools.cache
    def value(s0, f0, s1, f1):
        if s0 + f0 + s1 + f1 == T:
            return 0.0
        m0, m1 = (s0 + 1) / (s0 + f0 + 2) if known is None else known, (s1 + 1) / (s1 + f1 + 2)
        q0 = m0 * (1 + value(s0 + 1, f0, s1, f1)) + (1 - m0) * value(s0, f0 + 1, s1, f1)
        q1 = m1 * (1 + value(s0, f0, s1 + 1, f1)) + (1 - m1) * value(s0, f0, s1, f1 + 1)
        p = rule((s0, f0, s1, f1), (m0, m1), (q0, q1))
        return p * q0 + (1 - p) * q1
    return value(0, 0, 0, 0)


def higher(a, b):
    return 0.5 if a == b else float(a > b)


def thompson(belief, *_):
    """P(theta_0 > theta_1) of two Beta laws, by a quadrature that is not ours."""
    first, second = (scipy.stats.beta(belief[i] + 1, belief[i + 1] + 1) for i in (0, 2))
    return scipy.integrate.quad(lambda theta: first.pdf(theta) * second.cdf(theta), 0, 1)[0]


RULES = {"best": lambda belief, means, values: higher(*values), "greedy": lambda belief, means, _: higher(*means),
         "random": lambda *_: 0.5, "Thompson": thompson,
         "one try, then greedy": lambda belief, means, _: 0.0 if sum(belief[2:]) == 0 else higher(*means),
         "greedy, ties: arm tried less": lambda belief, means, _:
             higher(sum(belief[2:]), sum(belief[:2])) if means[0] == means[1] else higher(*means)}


@pytest.mark.parametrize("known", [None, 0.55])
@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_values_equal_a_plain_recursion(T, known):
    for name, ours in M.exact_returns(T, known, CPU).items():
        if name != "Thompson" or T == 5:                     # quadrature is slow, and ours a midpoint rule
            accuracy = 1e-5 if name == "Thompson" else 1e-10
            assert ours == pytest.approx(plain_value(T, known, RULES[name]), abs=accuracy), name


def test_golden_returns():
    assert M.thompson_policy([torch.zeros(1).double()] * 4).item() == pytest.approx(0.5, abs=1e-12)
    assert M.exact_returns(20, None, CPU) == pytest.approx({
        "best": 12.4312649, "greedy": 12.3653519, "random": 10, "Thompson": 11.9318,
        "greedy, ties: arm tried less": 12.3954964}, abs=5e-5)
    assert M.exact_returns(20, 0.55, CPU) == pytest.approx({
        "best": 12.3840147, "greedy": 11, "random": 10.5, "one try, then greedy": 12.2515706}, abs=1e-7)


@pytest.mark.parametrize("known, mean", [(None, 4), (0.55, 8 * (0.55 + 0.5) / 2)])
def test_return_lost_is_what_the_return_lacks(known, mean):
    torch.manual_seed(0)
    Q, V = M.bandit_values(8, known)
    theta, actions, rewards = M.play(at_random(4, 3), 20_000, 8, known, CPU)
    assert M.return_lost(actions, rewards, Q) == pytest.approx(V - mean, abs=0.02)
    for arm in (0, 1):                                       # an arm pays with its theta
        assert rewards[actions == arm].double().mean() == pytest.approx(theta[:, arm].mean().item(), abs=0.01)


@pytest.mark.parametrize("actions, rewards, lost", [((1, 1), (1, 0), 0), ((1, 1), (0, 1), 0.55 - 1 / 3), (
    (1, 0), (1, 1), 2 / 3 - 0.55), ((0, 0), (1, 0), 1 / 120), ((0, 1), (0, 0), 1 / 120 + 0.05)])
def test_return_lost_of_two_pulls_by_hand(actions, rewards, lost):
    """Arm 0 pays .55, known: arm 1 first is best (1/2 + 1/2 2/3 + 1/2 .55 = 1.1 + 1/120), then after a success only."""
    Q, _ = M.bandit_values(2, 0.55)
    assert M.return_lost(torch.tensor([actions]), torch.tensor([rewards]), Q) == pytest.approx(lost, abs=1e-12)


def test_losses_by_plain_loops():
    torch.manual_seed(0)
    model, B, T = M.Recurrent(4, 3, 8), 4, 6
    theta, actions, rewards = M.play(model, B, T, None, CPU)
    read, state, outputs = torch.zeros(B, 1, 4), None, []
    for t in range(T):                                       # what was before t, as it was played
        output, state = model(read, state)
        outputs.append(output[:, 0])
        read = torch.eye(4)[2 * actions[:, t] + rewards[:, t]][:, None]
    output = torch.stack(outputs, 1)
    log_pi, v = output[..., :2].log_softmax(-1), 5 * output[..., 2]
    imitation, advantage = 0.0, torch.zeros(B, T)
    for b in range(B):
        later = 0.0
        for t in reversed(range(T)):
            imitation -= log_pi[b, t, theta[b].argmax()] / (B * T)
            following = v[b, t + 1].item() if t + 1 < T else 0.0
            later = rewards[b, t].item() + following - v[b, t].item() + 0.9 * later
            advantage[b, t] = later
    z, target = (advantage - advantage.mean()) / advantage.std(correction=0), advantage + v.detach()
    expected = 0.0
    for b, t in itertools.product(range(B), range(T)):
        entropy, error = -(log_pi[b, t].exp() * log_pi[b, t]).sum(), (v[b, t] - target[b, t]) / 5
        expected += (-log_pi[b, t, actions[b, t]] * z[b, t] + error**2 / 2 - 0.03 * entropy) / (B * T)
    torch.testing.assert_close(M.imitation_loss(model, actions, rewards, theta.argmax(1)), imitation)
    loss = M.actor_critic_loss(model, actions, rewards, torch.tensor(0.03))
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, model.core.weight_hh_l0)[0]         # the critic's targets give no gradient
    torch.testing.assert_close(torch.autograd.grad(loss, model.core.weight_hh_l0)[0], wanted)


def test_unexplained_share_of_known_maps():
    torch.manual_seed(0)
    z = torch.randn(400, 10, 5).double()
    half = torch.cat([z @ torch.randn(5, 1).double(), torch.randn(400, 10, 1).double()], -1)   # one of two numbers
    assert M.unexplained(z, half) == pytest.approx(0.5, abs=0.02)
    assert M.unexplained(z, torch.cat([z[:200], -z[200:]])) > 3                # tested on what was not fitted


def test_simulation_from_the_belief_is_the_mean_in_each():
    torch.manual_seed(0)
    model, x = M.Recurrent(2, 2, 4), COIN.sample(200, 5, CPU)
    found, counts = M.simulation(model, COIN, x), M.before(torch.nn.functional.one_hot(x, 2))
    with torch.no_grad():                                    # h and c after x_{<t}
        states = [torch.cat(model(M.shifted(COIN.encode(x))[:, :t])[1], -1)[0] for t in range(1, 6)]
    states, clock = torch.stack(states, 1).double(), torch.arange(5).expand(200, 5)[..., None]
    for cells, target, name in ((counts, states, "bayes_to_network"), (clock, counts, "clock_to_bayes")):
        guess = torch.zeros_like(target)
        for cell in cells.flatten(0, 1).unique(dim=0):
            member = (cells == cell).all(-1)
            guess[member] = target[:100][member[:100]].mean(0)
        error = (target - guess)[100:].square().mean((0, 1)) / target[100:].var((0, 1), correction=0)
        assert found[name] == pytest.approx(error.mean().item(), rel=1e-6), name


def test_a_random_lstm_tells_the_counts_too():
    """Share of Bayes' state that an untrained LSTM of width 48 leaves, seeds 0-9: as in the script 0.009 to 0.020; with
    a forget bias of 1 and PyTorch's own input weights 0.000004 to 0.000016."""
    torch.manual_seed(0)
    model, x = M.Recurrent(2, 2, 48), COIN.sample(1000, 20, CPU)
    assert 0.005 < M.simulation(model, COIN, x)["network_to_bayes"] < 0.04
    with torch.no_grad():
        model.core.weight_ih_l0 /= math.sqrt(48 / 2)
        model.core.bias_ih_l0[48:96] += 1
    assert M.simulation(model, COIN, x)["network_to_bayes"] < 5e-5


def test_a_network_comes_near_bayes():
    """10 symbols, 400 steps, seeds 0-9: 0.0004 to 0.0007 nats a symbol. Control, 10 steps: 0.067 to 0.095."""
    x = COIN.sample(1000, 10, CPU)
    for steps, low, high in ((400, 0, 1.2e-3), (10, 0.04, 0.2)):
        torch.manual_seed(0)
        _, history = M.train_predictor(replace(SMALL, predict_steps=steps), Alone(), "coin", x)
        assert low < history[-1]["kl"] < high


def player(seed, stage, steps, known=None):
    """A player after so many updates with 10 pulls -> model, its return below the best."""
    torch.manual_seed(seed)
    model, history = M.train_player(SMALL, Alone(), stage, steps, known, M.bandit_values(10, known)[0])
    return model, history[-1]["lost"]


def test_players_learn():
    """Seeds 0-9: actor-critic, 300 updates, 0.10 to 0.15 (greedy 0.016, Thompson 0.317; after 20 updates 0.92 to 1.05);
    one arm known, 500 updates, 0.06 to 0.14 (greedy 0.591)."""
    assert player(0, "bandit", 300)[1] < 0.25
    assert player(0, "bandit", 20)[1] > 0.6
    assert player(0, "known_arm", 500, 0.55)[1] < 0.25


def test_imitation_is_thompson_sampling():
    """300 updates, seeds 0-9: probabilities within 0.035 to 0.049 of Thompson's; an actor-critic's, 0.12 to 0.16."""
    for stage, low, high in (("imitation", 0, 0.08), ("bandit", 0.1, 1)):
        model, _ = player(0, stage, 300)
        _, actions, rewards = M.play(model, 1000, 10, None, CPU)
        p = model(M.shifted(M.encode_pulls(actions, rewards)))[0][..., :2].softmax(-1)[..., 0]
        belief = [M.before((actions == arm) & (rewards == reward)) for arm in (0, 1) for reward in (1, 0)]
        assert low < (p - M.thompson_policy(belief)).abs().mean() < high


def test_headline_says_what_the_histories_say():
    cfg = M.Config(**{**M.PRESETS["smoke"], "families": "coin"})
    found = M.experiment(cfg, Alone())
    head, coin = found["headline"], found["families"]["coin"]
    lost = {stage: player["history"][-1]["lost"] for stage, player in found["players"].items()}
    assert head["coin_kl"] == coin["history"][-1]["kl"] != coin["history"][0]["kl"]
    assert head["imitation_return"] == M.bandit_values(5, None)[1] - lost["imitation"]
    assert head["bandit_return_lost"] == lost["bandit"]
    assert head["known_arm_return"] == M.bandit_values(5, 0.55)[1] - lost["known_arm"]


def test_bad_options_are_refused():
    for options, words in (({"families": "coin,dice"}, "'dice'"), ({"families": ""}, "''"),
                           ({"pulls": 51}, "--pulls 51"), ({"play_batch": -1}, "--play-batch must")):
        with pytest.raises(ValueError, match=words):
            M.Config(**options)
    run = Alone()
    run.device = torch.device("mps")                         # has no float64
    with pytest.raises(ValueError, match="--device cpu"):
        M.experiment(SMALL, run)


def test_parts_alone_and_smallest_sizes(tmp_path):
    for number, options in enumerate(("--families gaussian", "--length 1 --pulls 1 --play-batch 1 --predict-batch 1 "
                                      "--sequences 1 --width 1 --predict-steps 1 --bandit-steps 1")):
        M.main(["--preset", "smoke", "--device", "cpu", *options.split(), "--out", str(tmp_path / str(number))])
        assert (tmp_path / str(number) / "figure.png").exists()
