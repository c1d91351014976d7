"""metagenrl.py: environments against gymnasium, the learned loss, all gradients, the replay, scores, short runs."""
import itertools
import math
import types
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from torch.func import stack_module_state

import metagenrl as M

CPU, TINY = torch.device("cpu"), M.Config(**M.PRESETS["smoke"])


class Alone:                                                 # a `Run` that keeps the state of its last stage
    device, seed, rows, state, log = CPU, 0, [{"stage": "L"}, {"stage": "untrained"}], None, lambda *_, **numbers: None

    def steps(self, stage, total, **state):
        self.state = state
        return range(total)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch_of(*shape, S=3, A=2, ends=0.3, kind=torch.double):
    *front, T = shape
    obs, action = torch.randn(*front, T + 1, S), torch.rand(*shape, A) * 2 - 1
    batch = M.Batch(obs, action, torch.randn(shape), torch.rand(shape) < ends)
    return M.Batch(*(x.to(kind) for x in batch))


def an_agent(cfg=TINY, S=3, A=2):
    L = M.Objective(cfg).double()
    agent = M.Agent(types.SimpleNamespace(S=S, A=A), L, cfg)
    phi = {k: w.detach().double().requires_grad_() for k, w in agent.policy.named_parameters()}
    theta, _ = stack_module_state([M.mlp(S + A, cfg.hidden, 1).double() for _ in range(2)])
    return agent, L, phi, {k: w.detach() for k, w in theta.items()}


def test_pendulum_equals_gymnasium_with_a_stronger_motor():
    real, ours = gymnasium.make("Pendulum-v1").unwrapped, M.Pendulum()
    real.max_torque = 8.0
    real.reset(seed=0)
    state = ours.reset(device=CPU)
    real.state = state.double().numpy()
    for a in 2 * torch.rand(60, 1) - 1:
        obs, reward, *_ = real.step(8 * a.numpy())
        state, r = ours.step(state, a)
        np.testing.assert_allclose(ours.see(state).numpy() * [1, 1, 4], obs, atol=1e-3)
        assert r.item() == pytest.approx(0.2 * reward, abs=1e-3)


def test_the_other_tasks_by_hand():
    point, servo, reacher = M.Point(), M.Servo(), M.Reacher()
    place, r = point.step(torch.tensor([1.45, -0.3]), torch.tensor([1.0, 1.0]))
    assert [*place.tolist(), r.item()] == pytest.approx([1.5, -0.15, -math.hypot(1.5, 0.15)])
    state, r = servo.step(torch.tensor([0.5, 1.0]), torch.tensor([-1.0]))
    assert [*state.tolist(), r.item()] == pytest.approx([0.42, -0.4, -0.42])
    assert servo.step(torch.tensor([1.4, 2.0]), torch.tensor([1.0]))[0].tolist() == [1.5, 0.0]       # the rail's end
    up = torch.tensor([*[math.pi / 2] * 3, 0.3, 0.4])                          # the tip is at (0, 1)
    assert reacher.see(up)[6:].tolist() == pytest.approx([0.3, -0.6], abs=1e-6)
    turned = math.sin(0.3) / 3, (2 + math.cos(0.3)) / 3                        # the middle link, to the left
    r = reacher.step(up, torch.tensor([0.0, 1.0, 0.0]))[1].item()
    assert r == pytest.approx(-math.hypot(0.3 + turned[0], 0.4 - turned[1]), abs=1e-6)
    assert 0.3 <= reacher.reset(1000, device=CPU)[:, 3:].norm(dim=1).min() < 0.32


@pytest.mark.parametrize("task", M.TASKS)
def test_stored_transitions_equal_single_steps(task):
    population = M.Population(TINY, task, M.Objective(TINY), CPU)
    states, env = [], population.env
    step = env.step
    env.step = lambda state, action: states.append(state) or step(state, action)
    batch = population.play(3, noise=0.5)
    for i, e, t in itertools.product(range(TINY.agents), range(3), range(TINY.horizon)):
        state, r = step(states[t][i, e], batch.action[i, e, t])
        torch.testing.assert_close((env.see(state), r), (batch.obs[i, e, t + 1], batch.reward[i, e, t]))
    assert 0.9 < batch.action.abs().max() <= 1


def test_sequences_are_windows_of_one_episode_anywhere_in_it():
    population = M.Population(replace(TINY, agents=2), "point", M.Objective(TINY), CPU)
    n, episodes, H, T = 2, 5, TINY.horizon, TINY.length
    code = torch.arange(n * episodes * (H + 1)).view(n, episodes, H + 1)
    population.replay = M.Batch(code[..., None], code[..., :-1, None], code[..., :-1], code[..., :-1])
    batch = population.sample(20_000)
    first = batch.obs[..., 0, 0]
    assert torch.equal(batch.obs[..., 0], first[..., None] + torch.arange(T + 1))
    assert torch.equal(batch.reward, batch.obs[..., :-1, 0]) and torch.equal(batch.action[..., 0], batch.reward)
    assert (first[0] < code[1].min()).all() and (first[1] >= code[1].min()).all()      # each agent its own
    counts = torch.bincount(first[0] % (H + 1), minlength=H + 1) / 20_000
    assert counts[H - T + 1:].sum() == 0 and counts[:H - T + 1].min() > 0.8 / (H - T + 1)


def test_parameter_counts_of_the_paper():
    cfg = M.Config(**M.PRESETS["paper"])
    nets = M.Objective(cfg), M.mlp(17, cfg.hidden, 6), M.mlp(23, cfg.hidden, 1)        # the last two: HalfCheetah's
    assert [sum(w.numel() for w in net.parameters()) for net in nets] == [15_497, 132_656, 133_001]


def test_what_the_learned_loss_cannot_see():
    L, (s, a, r, d) = M.Objective(TINY).double(), batch_of(4, 6, ends=0.0)
    pi, V = torch.randn_like(a), torch.randn(4, 7).double()
    l, same = L(pi, a, r, d, V), dict(rtol=1e-5, atol=1e-6)
    assert l.std() > 1e-3
    flip, V_too = torch.tensor([1.0, -1.0]), 5 * V - 2
    for other in (L(pi.flip(2), a.flip(2), r, d, V), L(flip * pi, flip * a, r, d, V), L(pi, a, 7 * r + 3, d, V_too)):
        torch.testing.assert_close(other, l, **same)
    changed = a.clone()
    changed[:, 3] = 0
    moved = (L(pi, changed, r, d, V) - l).abs().amax(0) > 0
    assert moved[:4].all() and not moved[4:].any()


def test_the_lstm_is_pytorchs_backwards():
    L, (s, a, r, d), seen, w = M.Objective(TINY), batch_of(4, 6, kind=torch.float), {}, TINY.width
    L.gates.register_forward_hook(lambda _, x, y: seen.update(x=x[0]))
    L.out.register_forward_hook(lambda _, x, y: seen.update(h=x[0]))
    L(torch.randn_like(a), a, r, d, torch.randn(4, 7))
    lstm, order = torch.nn.LSTM(w + 8, w, batch_first=True), [0, 1, 3, 2]      # PyTorch: i, f, g, o
    for mine, theirs in ((L.gates.weight, lstm.weight_ih_l0), (L.recurrent.weight, lstm.weight_hh_l0)):
        theirs.data = torch.cat([mine.chunk(4)[i] for i in order]).detach()
    lstm.bias_ih_l0.data = torch.cat([torch.zeros(w), torch.ones(w), torch.zeros(2 * w)])
    lstm.bias_hh_l0.data.zero_()
    torch.testing.assert_close(lstm(seen["x"].flip(1))[0].flip(1), seen["h"])


def test_an_end_has_value_zero_before_values_are_standardised():
    L, (s, a, r, d), seen = M.Objective(TINY), batch_of(4, 6, kind=torch.float), []
    V = 10 + torch.randn(4, 7)
    L.other.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    l = L(torch.randn_like(a), a, r, d, V)
    V = torch.cat([V[:, :1], V[:, 1:] * (1 - d)], 1)
    z = (V - V.mean()) / V.std(correction=0)
    r = (r - r.mean()) / r.std(correction=0)
    expected = torch.stack([r, (torch.arange(6) / 6).expand(4, 6), z[:, 1:], z[:, :-1]], -1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    L.out[-1].bias.data.fill_(1e6)
    assert torch.allclose(L(a, a, r, d, V), torch.tensor(1000.0)) and l.abs().max() < 1000


def test_critics_learn_td3s_target_by_a_plain_loop():
    agent, _, phi, theta = an_agent()
    _, _, phi_target, theta_target = an_agent()
    batch, noise = batch_of(3, 4), 3 * torch.randn(3, 4, 2).double()
    total, critic = 0.0, lambda theta, k, s, a: agent.Q({name: w[k] for name, w in theta.items()}, s, a)
    for b, t in itertools.product(range(3), range(4)):
        after = agent.pi(phi_target, batch.obs[b, t + 1]) + (0.2 * noise[b, t]).clamp(-0.5, 0.5)
        best = min(critic(theta_target, k, batch.obs[b, t + 1], after.clamp(-1, 1)) for k in (0, 1))
        y = batch.reward[b, t] + 0.9 * (1 - batch.end[b, t]) * best
        total += sum((critic(theta, k, batch.obs[b, t], batch.action[b, t]) - y) ** 2 for k in (0, 1)) / 12
    torch.testing.assert_close(agent.critic_loss(theta, theta_target, phi_target, noise, batch), total)


def test_rules_that_people_have_written():
    r, V, d = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 1.0, 1.5, 2.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    expected = [1 + 0.9 * 1 - 0.5 + 0.9 * 0.8 * (2 - 1), 2 - 1, 4 + 0.9 * 2 - 1.5]     # nothing from beyond the end
    assert M.advantages(r, d, V, 0.9, 0.8)[0].tolist() == pytest.approx(expected)
    agent, _, phi, theta = an_agent()
    batch = batch_of(3, 4)
    (s, a, r, d), pi = batch, agent.pi(phi, batch.obs)
    V = agent.Q({name: w[0] for name, w in theta.items()}, s, pi)
    torch.testing.assert_close(agent.policy_loss(phi, theta, None, batch, "ddpg"), -V[:, :4].mean())
    weight = 2 * (pi[:, :-1] - a) / 2 * M.znorm(M.advantages(r, d, V, 0.9)).detach()[..., None] / 12
    expected = torch.autograd.grad(pi[:, :-1], list(phi.values()), weight.detach())
    found = torch.autograd.grad(agent.policy_loss(phi, theta, None, batch, "reinforce"), list(phi.values()))
    torch.testing.assert_close(found, expected)


def test_the_learned_loss_reaches_phi_through_pi_alone():
    agent, L, phi, theta = an_agent()
    batch, alpha = batch_of(3, 4), dict(L.named_parameters())
    theta = {name: w.requires_grad_() for name, w in theta.items()}
    (s, a, r, d), pi = batch, agent.pi(phi, batch.obs)
    V = agent.Q({name: w[0] for name, w in theta.items()}, s, pi).detach()
    for rule, values in (("L", V), ("no_value", torch.zeros_like(V))):
        expected = torch.autograd.grad(L(pi[:, :-1], a, r, d, values).mean(), list(phi.values()), retain_graph=True)
        loss = agent.policy_loss(phi, theta, alpha, batch, rule)
        found = torch.autograd.grad(loss, list(phi.values()), retain_graph=True)
        assert all(torch.allclose(x, y) for x, y in zip(found, expected))
        assert torch.autograd.grad(loss, list(theta.values()), allow_unused=True)[0] is None


@pytest.mark.parametrize("aids", [True, False], ids=["clipped inner step", "plain inner step"])
def test_the_meta_gradient_by_finite_differences(aids):
    cfg = replace(TINY, aids=aids, inner_rate=0.5, batch=3)
    agents = [an_agent(cfg) for _ in range(2)]
    agent, L = agents[0][:2]
    phi, theta = ({k: torch.stack([x[i][k].detach() for x in agents]).requires_grad_() for k in agents[0][i]}
                  for i in (2, 3))
    L.out[-1].weight.data *= 100 if aids else 1              # inner gradients of norm over 1: clipped
    alpha, batch = {k: w.detach() for k, w in L.named_parameters()}, batch_of(2, 6, 4)
    found = M.meta_gradient(agent, alpha, phi, theta, batch, cfg)
    way = {k: torch.randn_like(w) for k, w in alpha.items()}

    def minus_J(step, i):
        moved = {k: w + step * way[k] for k, w in alpha.items()}
        p, q = ({k: w[i] for k, w in weights.items()} for weights in (phi, theta))
        loss = agent.policy_loss(p, q, moved, M.Batch(*(x[i, :3] for x in batch)), "L")
        g = dict(zip(p, torch.autograd.grad(loss, list(p.values()))))
        norm = math.sqrt(sum(x.square().sum().item() for x in g.values()))
        assert norm > 1 or not aids
        after = {k: w - 0.5 * g[k] / (max(1, norm) if aids else 1) for k, w in p.items()}
        s = batch.obs[i, :, :-1]
        return -agent.Q({k: w[0] for k, w in q.items()}, s, agent.pi(after, s)).mean().item()
    for i in range(2):
        slope = sum((found[k][i] * way[k]).sum() for k in way).item()
        assert slope == pytest.approx((minus_J(1e-6, i) - minus_J(-1e-6, i)) / 2e-6, rel=1e-5, abs=1e-10)


def test_an_iteration_by_plain_steps():
    cfg = replace(TINY, warmup=2, copies=50)
    L = M.Objective(cfg)
    population, alpha = M.Population(cfg, "servo", L, CPU), {k: w.detach() for k, w in L.named_parameters()}
    copy = lambda weights: torch.cat([w.detach().flatten() for w in weights.values()])
    for age in range(6):
        phi, theta, target = copy(population.phi), copy(population.theta), copy(population.theta_target)
        population.learn(alpha, "L")
        assert not torch.equal(copy(population.theta), theta)
        assert torch.equal(copy(population.phi), phi) == (age % 2 == 1 or age < 2)
        moved = target if age % 2 else target + cfg.polyak * (copy(population.theta) - target)
        torch.testing.assert_close(copy(population.theta_target), moved)
    assert population.replay.action.abs().mean().item() == pytest.approx(0.5, abs=0.03)       # uniform at first
    small, large = M.clip({"w": torch.tensor([0.3, 0.4])}), M.clip({"w": torch.tensor([3.0, 4.0])})
    assert small["w"].tolist() == pytest.approx([0.3, 0.4]) and large["w"].tolist() == pytest.approx([0.6, 0.8])


def test_scores_by_hand(monkeypatch):
    returns = {"L": -2.0, "ddpg": -1.0, "reinforce": -3.0, "untrained": -5.0, "negated": -9.0, "no_value": -4.0}

    def test(cfg, run, rule, objective, tasks=M.TASKS):
        l = objective(*[torch.ones(1, 2, 1)] * 2, *[torch.ones(1, 2)] * 2, torch.ones(1, 3))
        assert (rule == "negated") == (l < 0).all()
        return {task: {"agents": [returns[rule] - 1, returns[rule] + 1], "curve": [], "cosine_reinforce": [i / 10, 0.6],
                       "cosine_ddpg": [0.2, 0.4]} for i, task in enumerate(tasks)}
    L = M.Objective(TINY)
    L.out[-1].weight.data.zero_()
    L.out[-1].bias.data.fill_(3.0)
    for name, function in (("meta_test", test), ("train", lambda cfg, run: L)):
        monkeypatch.setattr(M, name, function)
    head = M.experiment(TINY, Alone())["headline"]
    expected = {"score_seen": 0.75, "score_unseen": 0.75, "negated_score": -1, "reinforce_score": 0.5,
                "no_value_score_pendulum": 0.25, "L_score": 0.75, "wins_over_untrained": 1,
                "cosine_reinforce": 0.3}
    assert {key: head[key] for key in expected} == pytest.approx(expected)


def test_alpha_follows_the_mean_of_clipped_gradients_and_is_averaged(monkeypatch):
    for pull, moves in ((-1.0, False), (1.0, True)):
        monkeypatch.setattr(M, "meta_gradient", lambda agent, alpha, phi, theta, batch, cfg: {
            k: torch.stack([1000 * torch.ones_like(w), pull * torch.ones_like(w)]) for k, w in alpha.items()})
        run = Alone()
        averaged = M.train(TINY, run).out[-1].bias.item()    # biases start at 0
        last = run.state["objective"].out[-1].bias.item()
        assert (last < averaged < 0) == moves and (last < -0.02) == moves


def test_meta_tests_are_of_fresh_agents_with_the_right_losses(monkeypatch):
    seen, L = {}, M.Objective(TINY)
    monkeypatch.setattr(M.Population, "learn", lambda self, alpha, rule, axis: seen.update({rule: (self, alpha, axis)}))
    monkeypatch.setattr(M, "cosines", lambda population, alpha: {})
    for rule in ("L", "untrained"):
        M.meta_test(TINY, Alone(), rule, L, ["point"])
    (one, alpha, _), (two, own, axis) = seen["L"], seen["untrained"]
    assert torch.equal(one.phi["0.weight"], two.phi["0.weight"]) and axis == 0
    assert torch.equal(alpha["out.0.weight"], L.out[0].weight) and not torch.equal(*own["out.0.weight"][:2])
    torch.manual_seed(12345)
    assert torch.equal(one.evaluate(), one.play(32).reward.sum(-1).mean(1))


def test_short_run_finds_a_policy_gradient():
    """One life of 500 iterations; cosine of L's gradient with DDPG's, for DDPG's agents of ages 100 to 150, two tasks.
    Seeds 0-9: 0.15 to 0.89; more than an untrained L's, -0.63 to 0.67, by 0.07 to 1.50."""
    cfg, found = M.Config(lives=1, life=500, log_every=1000, test_life=1000), {}
    losses = {"trained": M.train(cfg, Alone()), "untrained": M.Objective(cfg)}
    for task, (name, L) in itertools.product(("point", "servo"), losses.items()):
        torch.manual_seed(0)
        population = M.Population(cfg, task, L, CPU)
        for age in range(151):
            population.learn(None, "ddpg")
            if age >= 100 and age % 10 == 0:
                cosines = M.cosines(population, {k: w.detach() for k, w in L.named_parameters()})
                found.setdefault(name, []).append(cosines["cosine_ddpg"])
    assert 0.12 < np.mean(found["trained"]) < 1 and np.mean(found["trained"]) > np.mean(found["untrained"]) + 0.05


@pytest.mark.parametrize("options, message", [
    ("--train pole", "pole"), ("--train pendulum,point,servo,reacher", "some of"), ("--length 41", "--length"), (
        "--warmup 440", "--warmup"), ("--agents 0", "sizes >= 1"), ("--test-life 330", "--test-life")])
def test_bad_options(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        M.main(options.split())
    assert message in stop.value.code and "\n" not in stop.value.code and not list(tmp_path.iterdir())
