"""metagenrl.py: environments against Gymnasium, the learned loss, its meta-gradient, the loop, the command line."""
import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch

import metagenrl as M

CPU = torch.device("cpu")


def config(**more):
    return M.Config(**{**M.PRESETS["smoke"], **more})


class Alone:
    """A `Run` that trains in this process and keeps nothing."""
    device, world, rank, compiled = CPU, 1, 0, False
    compile = staticmethod(lambda function: function)
    average = staticmethod(lambda tensors: None)
    share = staticmethod(lambda batch, dim=1: batch)
    watch = staticmethod(lambda losses: None)

    def __init__(self, *seeds):
        self.seeds, self.rows, self.rates = list(seeds), [], {}

    def steps(self, stage, total, state):
        self.stage, self.state = stage, state
        for self.step in range(total):
            yield self.step

    def clock(self, name):
        return M.contextlib.nullcontext()

    def log(self, rows):
        self.rows += [{"stage": self.stage, "step": self.step + 1, **row} for row in rows]


def random_batch(n=3, B=4, T=5, O=3, A=2, seed=0, ends=True):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    d = (torch.rand(n, B, T, generator=g) < 0.2).float() * ends
    return M.Batch(r(n, B, T + 1, O), r(n, B, T, A).clamp(-1, 1), r(n, B, T), d, torch.ones(n, B, T))


def weights(shapes, n, seed=0, spread=0.5):
    """Random flat weights (n, P), biases and gains included."""
    size = sum(map(math.prod, shapes.values()))
    return spread * torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def small_net(n=3, O=3, A=2, cfg=None, hidden=8):
    """Net, phi, theta of n agents."""
    net = M.Net(M.network_shapes(O, hidden, A), M.network_shapes(O + A, hidden, 1),
                M.objective_shapes(cfg or config()), torch.ones(n, A))
    size = sum(map(math.prod, net.critic.values()))
    return net, weights(net.policy, n, 1), weights(net.critic, n * 2, 2).view(n, 2, size)


def some_inputs(cfg, n=2, B=3, T=5, A=2, seed=0, ends=False):
    """Arguments of `objective`."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    d = (torch.rand(n, B, T, generator=g) < 0.3).float() * ends
    alpha = M.split(weights(M.objective_shapes(cfg), n, seed + 1), M.objective_shapes(cfg))
    return dict(alpha=alpha, pi=r(n, B, T, A).tanh(), a=r(n, B, T, A).tanh(), r=r(n, B, T), d=d,
                V=r(n, B, T + 1), act_mask=torch.ones(n, A), mask=torch.ones(n, B, T))


# ---- environments ----

gymnasium = pytest.importorskip("gymnasium")


def follow_gymnasium(name, ours, action_of, state_of, steps=200, precision=torch.float32):
    """Largest difference a step of states, rewards and ends, our state set to Gymnasium's before each step."""
    env, draw, worst = gymnasium.make(name).unwrapped, np.random.default_rng(0), 0.0
    env.reset(seed=0)
    for t in range(steps):
        if t % 50 == 0:
            env.reset(seed=t)
        state = torch.tensor(np.array(state_of(env)), dtype=precision)[None]
        action, given = action_of(draw)
        seen, reward, over, *_ = env.step(given)
        state, own, done = ours.step(state, torch.tensor(action, dtype=precision)[None])
        wanted = torch.tensor(np.array(state_of(env)), dtype=precision)
        worst = max(worst, (state[0] - wanted).abs().max().item())
        yield worst, own.item() - reward, done.item(), over, np.abs(ours.obs(state)[0].numpy() - seen).max()
        if over:
            env.reset(seed=t + 1000)


def test_pendulum_equals_gymnasium():
    def action(draw):
        a = draw.uniform(-1.3, 1.3, 1)
        return a, 2 * a
    for worst, reward, done, over, seen in follow_gymnasium("Pendulum-v1", M.Pendulum(), action, lambda env: env.state):
        assert worst < 1e-5 and abs(reward) < 1e-5 and not done and seen < 1e-5


def test_pendulum_by_hand():
    """From theta = 1, omega = 0.5 with torque 0.6 (action 0.3)."""
    state, reward, _ = M.Pendulum().step(torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([[0.3]]).double())
    omega = 0.5 + (15 * math.sin(1) + 3 * 0.6) * 0.05
    assert torch.allclose(state, torch.tensor([[1 + 0.05 * omega, omega]]).double(), atol=1e-7, rtol=0)
    assert reward.item() == pytest.approx(-(1 + 0.1 * 0.25 + 0.001 * 0.36), abs=1e-7)


@pytest.mark.parametrize("push", [0.5, 1.0, 1.5])
def test_mountain_car_equals_gymnasium(push):
    """A whole episode with the engine along the velocity: reaches the goal."""
    env, ours, total = gymnasium.make("MountainCarContinuous-v0").unwrapped, M.MountainCar(), 0.0
    env.reset(seed=0)
    for _ in range(999):
        state = torch.tensor(np.array(env.state), dtype=torch.float32)[None]
        action = push if state[0, 1] >= 0 else -push
        seen, reward, over, *_ = env.step(np.array([action]))
        state, own, done = ours.step(state, torch.tensor([[action]]))
        assert np.abs(state[0].numpy() - seen).max() < 1e-5 and abs(own.item() - reward) < 1e-5
        assert done.item() == over
        total += own.item()
        if over:
            break
    assert over and total > 50


def test_cartpole_equals_gymnasium_at_full_force():
    def action(draw):
        a = int(draw.integers(2))
        return [2.0 * a - 1], a
    ours = M.CartPole()
    order = lambda env: np.array(env.state)[[0, 2, 1, 3]]                     # ours: x, angle, rates
    ends = 0
    for worst, reward, done, over, seen in follow_gymnasium("CartPole-v1", ours, action, order):
        assert worst < 1e-5 and reward == 0 and done == over and seen < 1e-5
        ends += over
    assert ends > 3


def test_acrobot_equals_gymnasium():
    def action(draw):
        a = int(draw.integers(3))
        return [a - 1.0], a
    ours = M.Acrobot()
    env, draw = gymnasium.make("Acrobot-v1").unwrapped, np.random.default_rng(0)
    env.reset(seed=0)
    for t in range(300):
        if t % 20 == 0:                                                       # fast and far states, too
            env.state = draw.uniform(-1, 1, 4) * [math.pi, math.pi, 4, 8]
        state = torch.tensor(env.state, dtype=torch.float32)[None]
        own, given = action(draw)
        env.step(given)
        state, reward, done = ours.step(state, torch.tensor([own]))
        gap = (state[0].double() - torch.tensor(env.state)).abs()
        gap[:2] = torch.minimum(gap[:2], 2 * math.pi - gap[:2])               # -pi is pi
        scale = 1 + torch.tensor(env.state).abs().max()
        assert gap.max() / scale < 1e-5 and not done
        height = -math.cos(env.state[0]) - math.cos(env.state[0] + env.state[1])
        assert reward.item() == pytest.approx(height / 2, abs=1e-4)
        seen = env._get_ob()
        assert np.abs(ours.obs(torch.tensor(env.state)[None])[0].numpy() - seen).max() < 1e-6


def test_our_own_environments_by_hand():
    one = lambda *x: torch.tensor([x], dtype=torch.float64)
    exact = dict(atol=1e-12, rtol=0)
    state, reward, _ = M.Servo().step(one(0.5, 1.0), one(-2.0))               # the action counts as -1
    v = 1 + 0.2 * (-4 - 3)
    assert torch.allclose(state, one(0.5 + 0.2 * v, v), **exact) and reward.item() == pytest.approx(-abs(0.5 + 0.2 * v))
    state, _, _ = M.Servo().step(one(1.45, 2.0), one(1.0))                    # into the wall
    assert state.tolist() == [[1.5, 0.0]]
    state, reward, _ = M.KinematicPoint().step(one(0.3, -1.45), one(0.5, -1.0))
    assert torch.allclose(state, one(0.375, -1.5), **exact) and reward.item() == pytest.approx(-math.hypot(0.375, 1.5))
    env = M.KinematicReacher()
    state, reward, _ = env.step(one(0.2, -0.4, 0, 0, 0.6, 0.1), one(1.0, -0.5))
    q1, q2 = 0.5, -0.55
    tip = [(math.cos(q1) + math.cos(q1 + q2)) / 2, (math.sin(q1) + math.sin(q1 + q2)) / 2]
    assert reward.item() == pytest.approx(-math.hypot(0.6 - tip[0], 0.1 - tip[1]), abs=1e-12)
    assert torch.allclose(env.obs(state), one(math.cos(q1), math.cos(q2), math.sin(q1), math.sin(q2),
                                              0.6 - tip[0], 0.1 - tip[1]), **exact)
    env = M.Reacher()
    state, reward, _ = env.step(one(0.2, -0.4, 1.0, 10.6, 0.6, 0.1), one(0.5, 1.0))
    v1, v2 = 1 + 0.05 * (10 - 2), 10.0                                        # the second at its limit
    assert torch.allclose(state, one(0.2 + 0.05 * v1, -0.4 + 0.05 * v2, v1, v2, 0.6, 0.1), **exact)
    q1, q2 = 0.2 + 0.05 * v1, -0.4 + 0.05 * v2
    tip = [(math.cos(q1) + math.cos(q1 + q2)) / 2, (math.sin(q1) + math.sin(q1 + q2)) / 2]
    assert reward.item() == pytest.approx(-math.hypot(0.6 - tip[0], 0.1 - tip[1]) - 0.01 * 1.25, abs=1e-12)
    state, reward, _ = M.PointMass().step(one(0.1, 1.49, 0.4, 2.0), one(0.5, 1.0))
    vx = 0.4 + 0.05 * (2 - 0.4)
    assert torch.allclose(state, one(0.1 + 0.05 * vx, 1.5, vx, 0.0), **exact)
    assert reward.item() == pytest.approx(-math.hypot(0.1 + 0.05 * vx, 1.5) - 0.01 * 1.25)
    hanging = M.SwingUp().reset(torch.full((1, 4), 0.5))
    assert torch.allclose(hanging, torch.tensor([[0, math.pi, 0, 0]]), atol=1e-6)
    state, reward, done = M.SwingUp().step(one(2.39, math.pi, 3.0, 0.0), one(1.0))
    assert state[0, 0] == 2.4 and state[0, 2] == 0 and not done
    assert reward.item() == pytest.approx(-0.1 - 0.001, abs=1e-3)
    for env, near, far in ((M.Reacher(), 0.2, 0.95), (M.KinematicReacher(), 0.3, 0.9)):
        goals = env.reset(torch.tensor([[0, 0, 0.3, 0], [0, 0, 0.3, 1.0]]))[:, 4:].norm(dim=1)
        assert goals.tolist() == pytest.approx([near, far])
    strong, weak = M.StrongPendulum(), M.Pendulum()
    assert torch.allclose(strong.step(one(1.0, 0.5), one(0.25))[0], weak.step(one(1.0, 0.5), one(1.0))[0])
    assert strong.obs(one(0.0, 4.0)).tolist() == [[1.0, 0.0, 1.0]]


def test_lander_by_hand():
    env, one = M.Lander(), lambda *x: torch.tensor([x], dtype=torch.float64)
    state = one(0, 5, 1, -2, 0.1, 0.2)
    assert torch.allclose(env.obs(state), one(0, 0.75, 0.2, -4 / 15, 0.1, 0.08, 0, 0), atol=1e-9)
    after, _, done = env.step(state, one(-1, 0.4))                            # engines off: it falls
    assert torch.allclose(after, one(0.02, 5 - 0.02 * 2.2, 1, -2.2, 0.104, 0.2), atol=1e-9) and not done
    after, _, _ = env.step(state, one(1, 0))                                  # full thrust beats gravity
    assert after[0, 3] > -2 and after[0, 2] < 1
    off, _, _ = env.step(state, one(0.0, 0.5))
    assert torch.allclose(off, env.step(state, one(-0.5, -0.5))[0])           # both below their thresholds
    thrust, reward, _ = env.step(state, one(1, 0.75))                         # both engines, tilted by 0.1
    up, along = 1.733 / 4.959, 0.24 * 0.75 / 4.959
    assert thrust[0, 2].item() == pytest.approx(1 - math.sin(0.1) * up + math.cos(0.1) * along, abs=1e-9)
    assert thrust[0, 3].item() == pytest.approx(-2 + math.cos(0.1) * up + math.sin(0.1) * along - 0.2, abs=1e-9)
    assert thrust[0, 5].item() == pytest.approx(0.2 - 0.088 * 0.75 / 0.9, abs=1e-9)
    shaping = (env.potential(env.obs(thrust)) - env.potential(env.obs(state))).item()
    assert reward.item() == pytest.approx(shaping - 0.3 - 0.03 * 0.75, abs=1e-9)
    assert env.reset(torch.tensor([[0.0, 1]]))[0, 2:4].tolist() == pytest.approx([-4.033, 4.033], abs=1e-3)
    right, reward, _ = env.step(state, one(0, 1))
    assert right[0, 2] > off[0, 2] and right[0, 5] < off[0, 5]
    for x, vy, angle, ends, bonus in ((0.0, -0.5, 0.0, True, 120), (0.0, -5.0, 0.0, True, -100), (3.0, -0.5, 0.0, True, -100),
                                      (0.0, -0.5, 0.5, True, -100), (10.5, 0.0, 0.0, True, -100)):
        state = one(x, 0.005 if abs(x) < 10 else 5.0, 0, vy, angle, 0)
        after, reward, done = env.step(state, one(-1, 0))
        shaping = (env.potential(env.obs(after)) - env.potential(env.obs(state))).item()
        assert done.item() == ends and reward.item() == pytest.approx(shaping + bonus, abs=1e-4)


@pytest.mark.parametrize("name,policy,low,high", [("pendulum", "random", -1300, -1100), ("mountaincar", "random", -37, -30)])
def test_returns_of_random_policies(name, policy, low, high):
    env = M.ENVIRONMENTS[name]()
    torch.manual_seed(0)
    state, total = env.reset(200), 0
    for _ in range(env.horizon):
        state, reward, _ = env.step(state, 2 * torch.rand(200, env.actions) - 1)
        total = total + reward
    assert low < total.mean() < high


@pytest.mark.parametrize("name", M.ENVIRONMENTS)
def test_first_states_and_sizes(name):
    env = M.ENVIRONMENTS[name]()
    low, high = env.reset(torch.zeros(1, env.draws)), env.reset(torch.ones(1, env.draws))
    state = env.reset(50)
    assert env.obs(state).shape == (50, env.observations)
    if name not in ("lander", "reacher", "kreach"):
        assert ((state >= torch.minimum(low, high) - 1e-6) & (state <= torch.maximum(low, high) + 1e-6)).all()
    after, reward, done = env.step(state, torch.zeros(50, env.actions))
    assert after.shape == state.shape and reward.shape == done.shape == (50,) and done.dtype == torch.bool
    alone = env.step(state[7:8], torch.zeros(1, env.actions))
    assert torch.allclose(alone[0], after[7:8]) and torch.allclose(alone[1], reward[7:8])


def test_worlds_equal_their_environments():
    """Padded rows of four kinds in mixed order; gravity for none but its own."""
    names = ["servo", "strongpend", "kreach", "servo", "kpoint"]
    worlds, E = M.Worlds(names, CPU), 3
    assert (worlds.O, worlds.A, worlds.H, worlds.Z) == (6, 2, 40, 6)
    assert worlds.act_mask.tolist() == [[1, 0], [1, 0], [1, 1], [1, 0], [1, 1]]
    u = torch.rand(5, E, worlds.draws, generator=torch.Generator().manual_seed(0))
    state, action = worlds.reset(u), 2 * torch.rand(5, E, 2) - 1
    after, reward, done = worlds.step(state, action)
    for i, name in enumerate(names):
        env = M.ENVIRONMENTS[name]()
        own = env.reset(u[i, :, :env.draws])
        assert torch.equal(state[i, :, :own.shape[1]], own) and not state[i, :, own.shape[1]:].any()
        assert torch.equal(worlds.obs(state)[i, :, :env.observations], env.obs(own))
        own, r, _ = env.step(own, action[i, :, :env.actions])
        assert torch.equal(after[i, :, :own.shape[1]], own) and torch.equal(reward[i], r)
    wide = M.Worlds(["servo"], CPU, names)                                    # padded for others that are elsewhere
    assert (wide.O, wide.A, wide.H, wide.Z) == (6, 2, 40, 6) and len(wide.groups) == 1
    end = torch.zeros(5, E, dtype=torch.bool)
    end[0, 1] = end[2, 2] = True
    again = worlds.restart(after, end, u)
    assert torch.equal(again[end], state[end]) and torch.equal(again[~end], after[~end])


# ---- the objective ----


@pytest.mark.parametrize("preset,size", [("quick", 3241), ("paper", 15497)])
def test_number_of_weights(preset, size):
    shapes = M.objective_shapes(M.Config(**M.PRESETS[preset]))
    assert sum(map(math.prod, shapes.values())) == size


@pytest.mark.parametrize("O,A,policy,critic", [(17, 6, 132_656, 133_001), (8, 2, 128_102, 128_451), (11, 3, 129_503, 129_851)])
def test_number_of_weights_of_the_papers_agents(O, A, policy, critic):
    size = lambda *sizes: sum(map(math.prod, M.network_shapes(*sizes).values()))
    assert size(O, 350, A) == policy and size(O + A, 350, 1) == critic


@pytest.mark.parametrize("symmetric", [False, True])
def test_invariances(symmetric):
    cfg = config()
    x = some_inputs(cfg, A=3)
    l = M.objective(**x, symmetric=symmetric)
    same = dict(atol=2e-5, rtol=1e-5)
    order = [2, 0, 1]
    assert torch.allclose(M.objective(**{**x, "a": x["a"][..., order], "pi": x["pi"][..., order]}, symmetric=symmetric), l, **same)
    assert torch.allclose(M.objective(**{**x, "r": 7 * x["r"] - 3}, symmetric=symmetric), l, **same)
    assert torch.allclose(M.objective(**{**x, "V": 5 * x["V"] + 2}, symmetric=symmetric), l, **same)
    flipped = M.objective(**{**x, "a": -x["a"], "pi": -x["pi"]}, symmetric=symmetric)
    assert torch.allclose(flipped, l, **same) == symmetric
    assert not torch.allclose(M.objective(**{**x, "a": -x["a"]}, symmetric=symmetric), l, atol=1e-3)
    assert not torch.allclose(M.objective(**{**x, "r": -x["r"]}, symmetric=symmetric), l, atol=1e-3)
    assert not torch.allclose(M.objective(**{**x, "V": -x["V"]}, symmetric=symmetric), l, atol=1e-3)


def test_padding_changes_nothing():
    """More action directions, more agents, more steps and sequences, all masked."""
    cfg = config()
    x = some_inputs(cfg, ends=True)
    l = M.objective(**x)
    wide = dict(x, **{k: torch.cat([x[k], torch.full_like(x[k], 0.7)], -1) for k in ("a", "pi")})
    wide["act_mask"] = torch.tensor([[1.0, 1, 0, 0]]).expand(2, -1)
    assert torch.allclose(M.objective(**wide), l, atol=1e-5)
    more = {k: torch.cat([v, v.flip(0)]) for k, v in x.items() if k != "alpha"}
    more["alpha"] = {k: torch.cat([v, v.flip(0)]) for k, v in x["alpha"].items()}
    assert torch.allclose(M.objective(**more)[:2], l, atol=1e-6)
    rows = {k: torch.cat([v, v[:, :1] * 0 + 9], 1) for k, v in x.items() if k not in ("alpha", "act_mask")}
    rows["mask"][:, -1] = 0
    assert torch.allclose(M.objective(**{**x, **rows})[:, :-1], l, atol=1e-5)


def test_steps_beyond_an_episodes_end_change_nothing():
    """An episode of 3 steps in windows of 5: the two padded steps may hold anything."""
    cfg = config()
    x = some_inputs(cfg)
    x["mask"][:, 1, 3:] = 0
    l = M.objective(**x)
    for key in ("a", "pi", "r", "d"):
        x[key] = x[key].clone()
        x[key][:, 1, 3:] = 0.9
    x["V"] = x["V"].clone()
    x["V"][:, 1, 4:] = 8
    other = M.objective(**x)
    assert torch.allclose(other[:, 1, :3], l[:, 1, :3], atol=1e-5) and torch.allclose(other[:, 0], l[:, 0], atol=1e-5)


def test_an_action_changes_its_own_and_earlier_losses_only():
    x = some_inputs(config())
    l = M.objective(**x)
    a = x["a"].clone()
    a[:, :, 2] = -a[:, :, 2]
    changed = (M.objective(**{**x, "a": a}) - l).abs() > 1e-6
    assert not changed[:, :, 3:].any() and changed[:, :, :3].all()


def test_bound_and_constant():
    cfg = config()
    x, shapes = some_inputs(cfg), M.objective_shapes(cfg)
    zero = {name: torch.zeros_like(part) for name, part in x["alpha"].items()}
    zero["out.last.bias"] += 300.0
    assert torch.allclose(M.objective(**{**x, "alpha": zero}), torch.tensor(1000 * math.tanh(0.3)))
    huge = M.split(1e3 * weights(shapes, 2), shapes)
    l = M.objective(**{**x, "alpha": huge})
    assert l.abs().max() <= 1000 and l.abs().max() > 900


def test_l_of_a_step_by_plain_loops():
    """The whole network again, one agent, sequence and step at a time, in float64 numpy."""
    cfg = config(action_layers=2, layers=2, width=4, features=3)
    x = {k: v if k == "alpha" else v.double() for k, v in some_inputs(cfg, ends=True).items()}
    x["alpha"] = {k: v.double() for k, v in x["alpha"].items()}
    x["act_mask"][1, 1] = 0
    l = M.objective(**x)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))

    def layer(w, name, z, norm):
        z = z @ w[f"{name}.weight"] + w[f"{name}.bias"][0]
        half = len(z) // 2
        z = np.concatenate([np.maximum(z[:half], 0), z[half:]**2])
        if norm:
            z = (z - z.mean()) / np.sqrt(z.var() + 1e-5) * w[f"{name}.gain"][0] + w[f"{name}.shift"][0]
        return z
    for i in range(2):
        w = {k: v[i].numpy() for k, v in x["alpha"].items()}
        a, pi, r, d, V = (x[k][i].numpy() for k in ("a", "pi", "r", "d", "V"))
        zn = lambda z: (z - z.mean()) / np.sqrt(z.var() + 1e-8)
        rn, Vn, (B, T, _) = zn(r), zn(V), a.shape
        for b in range(B):
            h, c = np.zeros(4), np.zeros(4)
            for t in reversed(range(T)):
                feats = []
                for j in range(int(x["act_mask"][i].sum())):
                    z = np.array([a[b, t, j], pi[b, t, j]])
                    for k in range(2):
                        z = layer(w, f"action.{k}", z, True)
                    feats.append(z)
                z = np.array([rn[b, t], t / T, Vn[b, t + 1] * (1 - d[b, t]), Vn[b, t]])
                for k in range(2):
                    z = layer(w, f"other.{k}", z, False)
                z = z @ w["other.last.weight"] + w["other.last.bias"][0]
                z = np.concatenate([np.mean(feats, 0), z])
                gates = z @ w["lstm.weight"] + w["lstm.bias"][0] + h @ w["lstm.recurrent"]
                gi, gf, go, gg = np.split(gates, 4)
                c = sigmoid(gf + 1) * c + sigmoid(gi) * np.tanh(gg)
                h = sigmoid(go) * np.tanh(c)
                z = h
                for k in range(2):
                    z = layer(w, f"out.{k}", z, True)
                z = (z @ w["out.last.weight"] + w["out.last.bias"][0])[0]
                assert l[i, b, t].item() == pytest.approx(1000 * np.tanh(z / 1000), abs=1e-9)


@pytest.mark.parametrize("name", ["reward", "time", "value"])
def test_dropped_inputs_do_not_count(name):
    x = some_inputs(config())
    l = M.objective(**x, drop=[name])
    assert not torch.allclose(l, M.objective(**x))
    change = {"reward": dict(r=x["r"].flip(2)), "value": dict(V=x["V"].flip(2))}.get(name)
    if change:
        assert torch.allclose(M.objective(**{**x, **change}, drop=[name]), l, atol=1e-6)


def test_l_gives_no_gradient_but_through_pi():
    cfg = config()
    net, phi, theta = small_net(cfg=cfg)
    batch = random_batch()
    phi, theta = phi.requires_grad_(), theta[:, :1].clone().requires_grad_()
    alpha = weights(net.objective, 3)
    loss = M.policy_loss(phi, theta, alpha, None, batch, net, cfg, "objective").sum()
    by_phi, by_theta = torch.autograd.grad(loss, (phi, theta), allow_unused=True)
    assert by_theta is None and by_phi.abs().max() > 0
    x = some_inputs(cfg)
    V, pi = x["V"].requires_grad_(), x["pi"].requires_grad_()
    by_V, by_pi = torch.autograd.grad(M.objective(**x).sum(), (V, pi), allow_unused=True)
    assert by_V is None and by_pi.abs().max() > 0
    assert M.objective(**{**x, "pi": pi.detach()}).requires_grad is False
    other = M.policy_loss(phi, theta, alpha, None, batch, net, cfg, "ddpg").sum()
    assert torch.autograd.grad(other, theta)[0].abs().max() > 0               # DDPG's does depend on it


def test_negated_objective():
    cfg = config()
    alpha, x = weights(M.objective_shapes(cfg), 2, 5), some_inputs(cfg)
    l, other = (M.objective(**{**x, "alpha": M.split(w, M.objective_shapes(cfg))})
                for w in (alpha, M.negated(alpha, cfg)))
    assert torch.allclose(l, -other) and l.abs().max() > 0


# ---- the learning rule ----


def double(thing):
    return M.Batch(*(part.double() for part in thing)) if isinstance(thing, tuple) else thing.double()


@pytest.mark.parametrize("bound,K", [(False, 1), (True, 1), (True, 2)])
def test_meta_gradient_against_finite_differences(bound, K):
    """In float64, tiny networks, along random directions: relative error below 1e-4; with an inner gradient
    longer than the clip when bounded. V is constant by definition, also in a second step, where it would depend
    on alpha: there it is left out."""
    cfg = config(width=4, features=2, inner_rate=0.1, inner_bound=bound, inner_steps=K, clip=0.003 if bound else 1.0,
                 symmetric=True, drop="value" if K > 1 else "")
    net, phi, theta = small_net(n=2, cfg=cfg, hidden=4)
    net = net._replace(act_mask=net.act_mask.double())
    phi, theta, alpha = double(phi), double(theta[:, :1]), double(weights(net.objective, 2, 3))
    batch = double(random_batch(n=2, B=2 * (K + 1)))
    gradient, J, _, norm = M.meta_gradient(alpha, phi, theta, batch, net, cfg)
    assert not bound or (norm > cfg.clip).all()
    for seed in range(3):
        step = torch.randn(alpha.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        high, low = (M.meta_gradient(alpha + e * step, phi, theta, batch, net, cfg)[1] for e in (1e-6, -1e-6))
        wanted = -(high - low) / 2e-6
        got = (gradient * step).sum(1)
        assert ((got - wanted).abs() <= 1e-4 * wanted.abs() + 1e-12).all() and wanted.abs().min() > 0


def test_small_inner_steps_give_the_first_order_term():
    """lambda_3 -> 0: dJ/dalpha -> -lambda_3 d/dalpha <grad_phi L, grad_phi J>."""
    cfg = config(width=4, features=2, inner_rate=1e-6, inner_bound=False)
    net, phi, theta = small_net(n=2, cfg=cfg, hidden=4)
    net = net._replace(act_mask=net.act_mask.double())
    phi, theta, alpha = double(phi), double(theta[:, :1]), double(weights(net.objective, 2, 3))
    batch = double(random_batch(n=2, B=4))
    got = M.meta_gradient(alpha, phi, theta, batch, net, cfg)[0]
    alpha, phi = alpha.requires_grad_(), phi.requires_grad_()
    half = M.Batch(*(part[:, :2] for part in batch))
    g, = torch.autograd.grad(M.policy_loss(phi, theta, alpha, None, half, net, cfg, "objective").sum(), phi, create_graph=True)
    pi = M.policy(phi, batch.obs[:, :, :-1], net.policy, net.act_mask)
    J = M.mean(M.critics(theta, batch.obs[:, :, :-1], pi, net.critic)[:, 0], batch.mask)
    j, = torch.autograd.grad(J.sum(), phi)
    wanted, = torch.autograd.grad(1e-6 * (g * j).sum(), alpha)                # of -J
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-12) and wanted.abs().max() > 0


def test_no_inner_step_no_gradient():
    cfg = config(inner_rate=0.0)
    net, phi, theta = small_net(cfg=cfg)
    batch = random_batch()
    gradient, J, *_ = M.meta_gradient(weights(net.objective, 3), phi, theta[:, :1], batch, net, cfg)
    pi = M.policy(phi, batch.obs[:, :, :-1], net.policy, net.act_mask)
    assert not gradient.any()
    assert torch.allclose(J, M.critics(theta[:, :1], batch.obs[:, :, :-1], pi, net.critic)[:, 0].mean((1, 2)))


def test_two_inner_steps_are_two_steps():
    cfg = config(inner_steps=2, inner_rate=0.3)
    net, phi, theta = small_net(cfg=cfg)
    theta, batch, alpha = theta[:, :1], random_batch(B=6), weights(net.objective, 3)
    J = M.meta_gradient(alpha, phi, theta, batch, net, cfg)[1]
    for part in range(2):
        own = M.Batch(*(x[:, 2 * part:2 * part + 2] for x in batch))
        phi = phi.detach().requires_grad_()
        g, = torch.autograd.grad(M.policy_loss(phi, theta, alpha, None, own, net, cfg, "objective").sum(), phi)
        phi = M.inner_step(phi, g, cfg)
    pi = M.policy(phi, batch.obs[:, :, :-1], net.policy, net.act_mask)
    assert torch.allclose(J, M.critics(theta, batch.obs[:, :, :-1], pi, net.critic)[:, 0].mean((1, 2)), atol=1e-6)


def test_scalar_closed_form(monkeypatch):
    """pi = phi s, L = alpha mean (phi s - a)^2, Q = -(a - k s)^2, one step of everything by hand."""
    k, lr = 0.7, 0.05
    monkeypatch.setattr(M, "policy", lambda phi, obs, shapes, mask: phi[:, :, None, None] * obs)
    monkeypatch.setattr(M, "critics", lambda theta, obs, a, shapes: -(a - k * obs).square()[..., 0][:, None])
    monkeypatch.setattr(M, "split", lambda alpha, shapes: alpha)
    monkeypatch.setattr(M, "objective", lambda alpha, pi, a, *rest: alpha[:, :, None] * (pi - a).square()[..., 0])
    cfg = config(inner_rate=lr, inner_bound=False)
    net = M.Net({}, {}, {}, torch.ones(1, 1))
    batch = random_batch(n=1, B=4, O=1, A=1)
    phi, alpha = torch.tensor([[0.2]]), torch.tensor([[1.5]])
    gradient, J, *_ = M.meta_gradient(alpha, phi, torch.zeros(1, 1, 1), batch, net, cfg)
    s, a = batch.obs[0, :2, :-1, 0], batch.action[0, :2, :, 0]
    both = batch.obs[0, :, :-1, 0]
    slope = ((0.2 * s - a) * s).mean()
    after = 0.2 - 2 * lr * 1.5 * slope
    by_phi = -2 * ((after * both - k * both) * both).mean()
    assert J.item() == pytest.approx(-((after - k) * both).square().mean().item(), rel=1e-5)
    assert gradient.item() == pytest.approx(-(by_phi * -2 * lr * slope).item(), rel=1e-4)


def test_td_targets_by_hand():
    cfg = config(target_noise=0.4, gamma=0.9)
    net, phi, theta = small_net(n=2, cfg=cfg)
    batch = random_batch(n=2)
    batch.terminated[:] = 0
    batch.terminated[0, 1, 2] = 1
    noise = 3 * torch.randn(2, 4, 5, 2)                                       # some of it beyond the clip
    y = M.td_target(phi, theta, batch, noise, net, cfg)
    assert y[0, 1, 2] == batch.reward[0, 1, 2]
    after = batch.obs[:, :, 1:]
    action = M.policy(phi, after, net.policy, net.act_mask) + (0.4 * noise).clamp(-0.5, 0.5)
    Q = [M.critics(theta[:, i:i + 1], after, action.clamp(-1, 1), net.critic)[:, 0] for i in range(2)]
    wanted = batch.reward + 0.9 * torch.minimum(*Q)
    wanted[0, 1, 2] = batch.reward[0, 1, 2]
    assert torch.allclose(y, wanted, atol=1e-6)
    masked = net._replace(act_mask=torch.tensor([[1.0, 0], [1, 1]]))          # noise in no direction that is not there
    quiet = noise.clone()
    quiet[0, ..., 1] = 0
    assert torch.equal(M.td_target(phi, theta, batch, noise, masked, cfg)[0], M.td_target(phi, theta, batch, quiet, masked, cfg)[0])


def test_gae_by_hand():
    r, V, d = torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 1, -1, 2]), torch.tensor([0.0, 1, 0])
    d2 = 3 + 0.9 * 2 + 1
    d1 = 2 - 1                                                                # an end: no value, no trace
    d0 = 1 + 0.9 * 1 - 0.5
    assert torch.allclose(M.gae(r, d, V, 0.9, 0.8, torch.ones(3)), torch.tensor([d0 + 0.72 * d1, d1, d2]))


def test_gae_in_padding():
    """A time limit after two steps: what lies in the padding does not count, the value there does."""
    r, d, mask = torch.tensor([1.0, 2, 99]), torch.zeros(3), torch.tensor([1.0, 1, 0])
    got = M.gae(r, d, torch.tensor([0.5, 1, -1, 77]), 0.9, 0.8, mask)
    d1 = 2 + 0.9 * -1 - 1
    assert torch.allclose(got, torch.tensor([1 + 0.9 - 0.5 + 0.72 * d1, d1, 0]))


def test_reinforce_gradient():
    """By pi: 2 (pi - a) / A times the advantage over the number of steps."""
    g = torch.Generator().manual_seed(0)
    pi, a = (torch.randn(2, 3, 4, 2, generator=g) for _ in range(2))
    advantage, mask = torch.randn(2, 3, 4, generator=g), torch.tensor([[1.0, 1], [1, 0]])
    pi.requires_grad_()
    loss = M.mean(M.reinforce(pi, a, advantage, mask), torch.ones(2, 3, 4)).sum()
    got, = torch.autograd.grad(loss, pi)
    share = (mask / mask.sum(1, keepdim=True))[:, None, None]
    assert torch.allclose(got, 2 * (pi - a) * share * advantage[..., None] / 12, atol=1e-6)


def test_no_rule_but_ddpg_differentiates_the_critic():
    """REINFORCE's and L's gradients are those with V held constant."""
    cfg = config()
    net, phi, theta = small_net(cfg=cfg)
    batch, alpha, real = random_batch(), weights(net.objective, 3), M.critics
    for rule in ("reinforce", "objective"):
        got = M.policy_gradient(phi, theta[:, :1], alpha, None, batch, net, cfg, rule)
        M.critics = lambda theta, obs, action, shapes: real(theta, obs, action.detach(), shapes).detach()
        try:
            assert torch.equal(got, M.policy_gradient(phi, theta[:, :1], alpha, None, batch, net, cfg, rule))
        finally:
            M.critics = real


def test_policy_gradient_is_clipped():
    cfg = config(clip=0.01)
    net, phi, theta = small_net(cfg=cfg)
    g = M.policy_gradient(phi, theta[:, :1], weights(net.objective, 3), None, random_batch(), net, cfg, "ddpg")
    assert torch.allclose(g.norm(dim=1), torch.tensor(0.01))


def test_critics_follow_their_own_rate_targets_and_noise(monkeypatch):
    cfg, seen, real = config(critic_rate=0.5, policy_rate=0.1), [], M.critic_gradient
    agents = filled_agents(cfg, ["kpoint", "servo"], steps=25)
    agents.phi_target.add_(1)
    agents.theta_target.add_(1)
    def note(theta, theta_target, phi_target, noise, batch, net, cfg):
        assert torch.equal(theta_target, agents.theta_target) and torch.equal(phi_target, agents.phi_target)
        seen.append(noise)
        return real(theta, theta_target, phi_target, noise, batch, net, cfg)
    monkeypatch.setattr(M, "critic_gradient", note)
    before = agents.theta.clone()
    M.critic_update(agents, torch.ones(2, 1))
    assert (agents.theta - before).abs().max().item() == pytest.approx(0.5, rel=1e-3)     # Adam's first step
    assert abs(seen[0].mean()) < 0.4 and 0.7 < seen[0].std() < 1.3 and seen[0].min() < -1


def test_policy_loss_rules():
    cfg = config()
    net, phi, theta = small_net(cfg=cfg)
    batch, alpha = random_batch(), weights(net.objective, 3)
    batch.mask[1, 2, 3:] = 0
    loss = lambda rule, own=None: M.policy_loss(phi, theta[:, :1], alpha, own, batch, net, cfg, rule)
    pi = M.policy(phi, batch.obs, net.policy, net.act_mask)
    Q = M.critics(theta[:, :1], batch.obs, pi, net.critic)[:, 0]
    assert torch.allclose(loss("ddpg"), -(Q[..., :-1] * batch.mask).sum((1, 2)) / batch.mask.sum((1, 2)))
    own = torch.tensor([0.0, 0.3, 1.0])
    assert torch.allclose(loss("annealed", own), own * loss("objective") + (1 - own) * loss("ddpg"))
    advantage = M.znorm(M.gae(batch.reward, batch.terminated, Q, cfg.gamma, cfg.lam, batch.mask), batch.mask)
    wanted = M.mean(M.reinforce(pi[:, :, :-1], batch.action, advantage, net.act_mask), batch.mask)
    assert torch.allclose(loss("reinforce"), wanted)
    l = M.objective(M.split(alpha, net.objective), pi[:, :, :-1], batch.action, batch.reward, batch.terminated, Q,
                    net.act_mask, batch.mask, symmetric=True)
    assert torch.allclose(loss("objective"), M.mean(l, batch.mask))


def test_adam_equals_torch():
    """Two rows of which one starts three steps later."""
    g = torch.Generator().manual_seed(0)
    w, first, second, count = torch.randn(2, 5, generator=g), torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 1)
    twins = [w[i].clone().requires_grad_() for i in range(2)]
    optimisers = [torch.optim.Adam([twin], lr=0.01) for twin in twins]
    for step in range(10):
        active = torch.tensor([[1.0], [float(step >= 3)]])
        gradient = torch.randn(2, 5, generator=g) * active
        count += active
        M.adam(w, first, second, count, gradient, 0.01)
        for i in range(2):
            if active[i]:
                twins[i].grad = gradient[i].clone()
                optimisers[i].step()
    assert all(torch.allclose(w[i], twins[i], atol=1e-6) for i in range(2))


def test_clip():
    g = torch.tensor([[3.0, 4], [0.3, 0.4], [0, 0]])
    assert torch.allclose(M.clip(g, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0, 0]]))


def test_forward_equals_torch_layers():
    net, phi, theta = small_net()
    obs = torch.randn(3, 4, 5, 3)
    for i in range(3):
        w = {name: part[i] for name, part in M.split(phi, net.policy).items()}
        x = obs[i]
        for name in ("0", "1"):
            x = torch.nn.functional.linear(x, w[f"{name}.weight"].T, w[f"{name}.bias"][0]).relu()
            x = torch.nn.functional.layer_norm(x, (8,), w[f"{name}.gain"][0], w[f"{name}.shift"][0])
        x = torch.nn.functional.linear(x, w["last.weight"].T, w["last.bias"][0]).tanh()
        assert torch.allclose(M.policy(phi, obs, net.policy, net.act_mask)[i], x, atol=1e-5)
    action = torch.randn(3, 4, 5, 2)
    both = M.critics(theta, obs, action, net.critic)
    assert torch.equal(both[:, 1:], M.critics(theta[:, 1:], obs, action, net.critic)) and both.shape == (3, 2, 4, 5)


def test_first_weights():
    shapes = M.network_shapes(3, 50, 2)
    draws = lambda k: torch.rand(4, k, generator=torch.Generator().manual_seed(k))
    O = torch.tensor([[1.0], [2], [3], [3]])
    w = M.split(M.first_weights(shapes, draws, {"0.weight": (O, 50)}, {"last.weight": 0.1}), shapes)
    for i in range(4):
        limit = math.sqrt(6 / (O[i].item() + 50))
        assert 0.9 * limit < w["0.weight"][i].abs().max() <= limit
    assert 0.09 * math.sqrt(6 / 52) < w["last.weight"].abs().max() <= 0.1 * math.sqrt(6 / 52)
    assert (w["0.gain"] == 1).all() and not w["0.shift"].any() and not w["1.bias"].any()
    cfg = M.Config()
    alpha = M.split(M.first_objective(cfg, [3], CPU), M.objective_shapes(cfg))
    for name in ("lstm.weight", "lstm.recurrent"):                            # TensorFlow draws both as one matrix
        limit = math.sqrt(6 / (2 * 16 + 8 + 64))
        assert 0.95 * limit < alpha[name].abs().max() <= limit
    for name, limit in (("out.last.weight", 0.1 * math.sqrt(6 / 17)), ("other.last.weight", math.sqrt(6 / 24))):
        assert 0.7 * limit < alpha[name].abs().max() <= limit                 # only L's very last layer starts small
    assert torch.equal(M.first_objective(cfg, [3], CPU), M.first_objective(cfg, [2, 3], CPU)[1:])


# ---- one agent at a time, in the usual style: torch.func.functional_call and autograd.grad ----


class Layers(torch.nn.Module):
    """Hidden layers with an activation and layer norm, then a linear layer, as modules."""

    def __init__(self, sizes, n_out, activation, norm=True):
        super().__init__()
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(size) if norm else torch.nn.Identity() for size in sizes[1:])
        self.last = torch.nn.Linear(sizes[-1], n_out) if n_out else torch.nn.Identity()
        self.activation = activation

    def forward(self, x):
        for layer, norm in zip(self.hidden, self.norms):
            x = norm(self.activation(layer(x)))
        return self.last(x)


class Loss(torch.nn.Module):
    """L for one agent."""

    def __init__(self, w=16, features=8):
        super().__init__()
        mixed = lambda x: torch.cat([x[..., :w // 2].relu(), x[..., w // 2:]**2], -1)
        self.action, self.other = Layers([2, w], 0, mixed), Layers([4, w], features, mixed, norm=False)
        self.out, self.cell = Layers([w, w], 1, mixed), torch.nn.Linear(w + features + w, 4 * w)

    def forward(self, pi, a, r, d, V):
        pairs = torch.stack([a, pi], -1)
        acts = (0.5 * (self.action(pairs) + self.action(-pairs))).mean(-2)
        zn = lambda x: (x - x.mean()) / (x.var(unbiased=False) + 1e-8).sqrt()
        B, T = r.shape
        V = zn(V.detach())
        time = (torch.arange(T) / T).expand(B, T)
        other = self.other(torch.stack([zn(r), time, V[:, 1:] * (1 - d), V[:, :-1]], -1))
        x, h = torch.cat([acts, other], -1), torch.zeros(B, acts.shape[-1])
        c, out = h, [None] * T
        for t in reversed(range(T)):
            i, f, o, g = self.cell(torch.cat([x[:, t], h], -1)).chunk(4, -1)
            c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out[t] = self.out(h)[:, 0]
        return 1000 * torch.tanh(torch.stack(out, 1) / 1000)


def as_modules(agents, alpha, i):
    """Weights of agent i -> ({parameter: tensor} of policy, critic 1 and L), their modules."""
    O, A = int(agents.worlds.observations[i]), int(agents.worlds.actions[i])
    modules = Layers([O, 32, 32], A, torch.relu), Layers([O + A, 32, 32], 1, torch.relu), Loss()
    worlds = agents.worlds
    rows = {"policy": list(range(O)), "critic": [*range(O), *range(worlds.O, worlds.O + A)]}

    def take(flat, shapes, first, last):
        w = {k: v[0] for k, v in M.split(flat[None], shapes).items()}
        out = {}
        for k, name in enumerate(("0", "1")):
            matrix = w[f"{name}.weight"][first] if k == 0 else w[f"{name}.weight"]
            out |= {f"hidden.{k}.weight": matrix.T, f"hidden.{k}.bias": w[f"{name}.bias"][0],
                    f"norms.{k}.weight": w[f"{name}.gain"][0], f"norms.{k}.bias": w[f"{name}.shift"][0]}
        return out | {"last.weight": w["last.weight"][:, :last].T, "last.bias": w["last.bias"][0, :last]}
    phi = take(agents.phi[i], agents.net.policy, rows["policy"], A)
    theta = take(agents.theta[i, 0], agents.net.critic, rows["critic"], 1)
    w, loss = {k: v[0] for k, v in M.split(alpha[i:i + 1], agents.net.objective).items()}, {}
    for name in ("action", "other", "out"):
        loss |= {f"{name}.hidden.0.weight": w[f"{name}.0.weight"].T, f"{name}.hidden.0.bias": w[f"{name}.0.bias"][0]}
        if name != "other":
            loss |= {f"{name}.norms.0.weight": w[f"{name}.0.gain"][0], f"{name}.norms.0.bias": w[f"{name}.0.shift"][0]}
        if name != "action":
            loss |= {f"{name}.last.weight": w[f"{name}.last.weight"].T, f"{name}.last.bias": w[f"{name}.last.bias"][0]}
    loss |= {"cell.weight": torch.cat([w["lstm.weight"], w["lstm.recurrent"]]).T, "cell.bias": w["lstm.bias"][0]}
    detach = lambda weights: {k: v.detach().clone().requires_grad_() for k, v in weights.items()}
    return tuple(map(detach, (phi, theta, loss))), modules


def one_meta_step(weights, modules, obs, a, r, d):
    """Eqs. 3 and 4 for one agent, the gradient of -J by L's parameters, clipped to norm 1."""
    (phi, theta, alpha), (pi_net, q_net, loss) = weights, modules
    call, B = torch.func.functional_call, len(obs) // 2
    policy = lambda phi, s: torch.tanh(call(pi_net, phi, (s,)))
    Q = lambda s, a: call(q_net, theta, (torch.cat([s, a], -1),))[..., 0]
    pi = policy(phi, obs[:B, :-1])
    with torch.no_grad():
        V = Q(obs[:B], policy(phi, obs[:B]))
    L = call(loss, alpha, (pi, a[:B], r[:B], d[:B], V)).mean()
    g = torch.autograd.grad(L, list(phi.values()), create_graph=True)
    norm = sum(x.square().sum() for x in g).sqrt()
    after = {k: p - 0.1 * x / norm.clamp(min=1) for (k, p), x in zip(phi.items(), g)}
    J = Q(obs[:, :-1], policy(after, obs[:, :-1])).mean()
    grads = torch.autograd.grad(-J, list(alpha.values()))
    norm = sum(x.square().sum() for x in grads).sqrt()
    return {k: x / norm.clamp(min=1) for k, x in zip(alpha, grads)}, J.detach()


def filled_agents(cfg, names, seeds=(0,), steps=60):
    agents = M.Agents(names, cfg, list(seeds), CPU, 0)
    for _ in range(steps):
        agents.act(torch.ones(len(agents.phi), 1, dtype=torch.bool))
    return agents


def test_population_equals_a_loop_and_is_three_times_as_fast():
    """N = 8 at quick's sizes against eight one-agent meta steps: same to 1e-5, at least 3 times faster on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cfg = M.Config()
    agents = filled_agents(cfg, ["strongpend", "kpoint"] * 4)
    alpha = M.first_objective(cfg, [0], CPU).repeat(8, 1)
    torch.manual_seed(0)
    agents.phi.add_(0.1 * torch.randn_like(agents.phi))                       # as after some learning: |g| above 1, too
    alpha[:, -400:] *= 1.5
    batch = agents.sample(32)
    loop = []
    for i in range(8):
        O, A = int(agents.worlds.observations[i]), int(agents.worlds.actions[i])
        weights, modules = as_modules(agents, alpha, i)
        loop.append((weights, modules, batch.obs[i, ..., :O], batch.action[i, ..., :A], batch.reward[i], batch.terminated[i]))
    gradient, J, _, norm = M.meta_gradient(alpha, agents.phi, agents.theta[:, :1], batch, agents.net, cfg)
    clipped = M.clip(gradient, 1.0)
    assert norm.min() < 1 < norm.max()
    for i in range(8):
        grads, own = one_meta_step(*loop[i])
        mine = {k: v[i] for k, v in M.split(clipped, agents.net.objective).items()}
        assert own.item() == pytest.approx(J[i].item(), abs=1e-5)
        pairs = [(mine["lstm.weight"], grads["cell.weight"].T[:24]), (mine["action.0.weight"], grads["action.hidden.0.weight"].T),
                 (mine["out.last.weight"], grads["out.last.weight"].T), (mine["other.0.bias"][0], grads["other.hidden.0.bias"]),
                 (mine["out.0.gain"][0], grads["out.norms.0.weight"])]
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in pairs)
    batched = lambda: M.clip(M.meta_gradient(alpha, agents.phi, agents.theta[:, :1], batch, agents.net, cfg)[0], 1.0)
    one_by_one = lambda: [one_meta_step(*each) for each in loop]
    fast, slow = M.median_seconds(CPU, [batched, one_by_one])
    torch.set_num_threads(threads)
    print(f"meta step, N = 8: {1e3 * fast:.1f} ms; one by one: {1e3 * slow:.1f} ms; {slow / fast:.1f} times")
    assert slow / fast > 3


def test_updates_of_a_population_equal_updates_alone():
    """Critic, policy and meta-gradient of agent i do not depend on the other agents."""
    cfg = config(inner_rate=0.1)
    net, phi, theta = small_net(cfg=cfg)
    batch, noise, alpha = random_batch(), torch.randn(3, 4, 5, 2), weights(net.objective, 3)
    every = [M.critic_gradient(theta, theta.flip(1), phi, noise, batch, net, cfg)[1],
             M.policy_gradient(phi, theta[:, :1], alpha, torch.ones(3), batch, net, cfg, "objective"),
             M.meta_gradient(alpha, phi, theta[:, :1], batch, net, cfg)[0]]
    for i in range(3):
        one = slice(i, i + 1)
        alone, b = net._replace(act_mask=net.act_mask[one]), M.Batch(*(x[one] for x in batch))
        own = [M.critic_gradient(theta[one], theta[one].flip(1), phi[one], noise[one], b, alone, cfg)[1],
               M.policy_gradient(phi[one], theta[one, :1], alpha[one], torch.ones(1), b, alone, cfg, "objective"),
               M.meta_gradient(alpha[one], phi[one], theta[one, :1], b, alone, cfg)[0]]
        for whole, part in zip(every, own):
            assert torch.allclose(whole[one], part, atol=1e-5) and part.abs().max() > 0
    assert (every[1].norm(dim=1) < 1 + 1e-5).all()


def test_a_critic_and_a_policy_learn_what_they_should():
    """One update lowers the TD loss and raises the critic's opinion, on the same batch."""
    cfg = config(critic_rate=1e-3, policy_rate=1e-3)
    agents = filled_agents(cfg, ["kpoint", "servo"], steps=45)
    one, same = torch.ones(2, 1), agents.sample(16)
    agents.sample = lambda count: same
    noise = torch.zeros(2, *same.action.shape[1:])
    agents.random = lambda sampler, *shape: noise
    for _ in range(20):
        first = M.critic_update(agents, one)
    assert (M.critic_update(agents, one) < first).all()
    loss = lambda: M.policy_loss(agents.phi, agents.theta[:, :1], agents.phi, one[:, 0], same, agents.net, cfg, "ddpg")
    before, target = loss(), agents.phi_target.clone()
    M.policy_update(agents, one, agents.phi, one[:, 0], "ddpg")
    assert (loss() < before).all()
    assert torch.allclose(agents.phi_target, target + cfg.polyak * (agents.phi - target))


def test_agents_that_are_too_young_do_not_move():
    agents = filled_agents(config(), ["kpoint", "servo"], steps=45)
    phi, theta, first = agents.phi.clone(), agents.theta.clone(), torch.tensor([[1.0], [0]])
    for _ in range(3):
        M.critic_update(agents, first)
        M.policy_update(agents, first, agents.phi, first[:, 0], "ddpg")
    assert not torch.equal(agents.phi[0], phi[0]) and not torch.equal(agents.theta[0], theta[0])
    assert torch.equal(agents.phi[1], phi[1]) and torch.equal(agents.theta[1], theta[1])
    assert agents.policy_updates.tolist() == agents.critic_updates.tolist() == [[3], [0]]


# ---- replay, lives ----


def test_windows_do_not_cross_episodes():
    """Every stored transition carries its episode and step: windows are consecutive, offsets uniform."""
    cfg = config(copies=2, slots=4, length=6)
    agents = M.Agents(["servo"], cfg, [0], CPU, 0)
    worlds = agents.worlds
    def step(state, action):
        state = state.clone()
        state[..., 1] += 1
        return state, state[..., 1] - 1 + 100 * state[..., 0], torch.zeros(1, 2, dtype=torch.bool)
    def restart(state, end, u):
        state = state.clone()
        state[..., 0] += end
        state[..., 1] *= ~end
        return state
    worlds.step, worlds.restart, worlds.obs = step, restart, lambda state: state
    agents.state.zero_()
    agents.obs[:, :, 0, 0] = 0
    yes = torch.ones(1, 1, dtype=torch.bool)
    for t in range(19):
        agents.act(yes)
    assert not agents.sample(50).mask.any()                                   # no episode is over
    for t in range(120):
        agents.act(yes)
    batch = agents.sample(4000)                                               # the 7th episode is running, 4 slots
    assert batch.mask.all()
    episode, t = batch.obs[0, ..., 0], batch.obs[0, ..., 1]
    assert (episode == episode[:, :1]).all() and (t == t[:, :1] + torch.arange(7)).all()
    assert torch.equal(batch.reward[0], t[:, :-1] + 100 * episode[:, :-1])
    assert episode.unique().tolist() == [3, 4, 5] and t[:, 0].unique().tolist() == list(range(15))
    share = torch.bincount(t[:, 0].long()) / 4000
    assert (share - 1 / 15).abs().max() < 0.02
    assert (torch.bincount(episode[:, 0].long())[3:] / 4000 - 1 / 3).abs().max() < 0.03


def test_short_episodes_are_padded_and_ends_are_stored():
    cfg = config(copies=3, slots=6, length=8)
    agents = M.Agents(["cartpole", "servo"], cfg, [0], CPU, 0)
    full = agents.worlds.step
    clock = torch.zeros(2, 3)
    def step(state, action):
        state, reward, done = full(state, action)
        clock.add_(1)
        done[0] = clock[0] % 5 == 0                                           # cartpole "falls" every 5 steps
        return state, reward, done
    agents.worlds.step = step
    for _ in range(45):
        agents.act(torch.ones(2, 1, dtype=torch.bool))
    batch = agents.sample(64)
    assert (batch.mask[0].sum(1) == 5).all() and (batch.mask[1].sum(1) == 8).all()
    assert (batch.terminated[0, :, 4] == 1).all() and not (batch.terminated[0] * batch.mask[0])[:, :4].any()
    assert not batch.terminated[1].any()                                      # 20 steps of servo are a time limit
    assert agents.episodes.tolist() == [[9] * 3, [2] * 3]


def test_rewards_are_stored_scaled_and_returns_reported_unscaled():
    cfg = config(train="strongpend", test="strongpend", agents=1, slots=3)
    agents = M.Agents(["strongpend"], cfg, [0], CPU, 0)
    before = agents.state.clone()
    agents.act(torch.zeros(1, 1, dtype=torch.bool))
    _, reward, _ = M.StrongPendulum().step(before[0], agents.action[0, :, 0, 0])
    assert torch.allclose(agents.reward[0, :, 0, 0], 0.2 * reward)
    total = M.evaluate(agents, agents.new_worlds(CPU))
    assert -700 < total.item() < -60                                          # 40 steps of up to -16


def test_noise_is_for_collecting_only():
    cfg = config(noise=0.5)
    agents = M.Agents(["kpoint", "servo"], cfg, [0], CPU, 0)
    assert torch.equal(M.evaluate(agents, agents.new_worlds(CPU)), M.evaluate(agents, agents.new_worlds(CPU)))
    obs = agents.obs[*agents.place, agents.slot, agents.time]
    quiet = M.policy(agents.phi, obs, agents.net.policy, agents.net.act_mask)
    agents.act(torch.zeros(2, 1, dtype=torch.bool))
    noise = agents.action[:, :, 0, 0] - quiet
    assert noise.abs().max() > 0.1 and not agents.action[1, ..., 1].any()     # servo has one direction only


def test_stored_actions_are_within_bounds():
    agents = M.Agents(["kpoint"], config(noise=5.0), [0], CPU, 0)
    for _ in range(5):
        agents.act(torch.zeros(1, 1, dtype=torch.bool))
    stored = agents.action[0, :, 0, :5]
    assert stored.abs().max() == 1 and (stored.abs() == 1).float().mean() > 0.5


def test_evaluation_by_a_plain_loop():
    agents = M.Agents(["cartpole", "kreach"], config(), [4], CPU, 0)
    got = M.evaluate(agents, agents.new_worlds(CPU))
    u = torch.rand(2, 2, 4, generator=M.stream(4, 10, CPU))
    for i, env in enumerate((M.CartPole(), M.KinematicReacher())):
        totals = []
        for k in range(2):
            state, total = env.reset(u[i, k:k + 1, :env.draws]), 0.0
            for _ in range(env.horizon):
                obs = torch.zeros(2, 1, 6)
                obs[i, :, :env.observations] = env.obs(state)
                action = M.policy(agents.phi, obs, agents.net.policy, agents.net.act_mask)[i, :, :env.actions]
                state, reward, done = env.step(state, action)
                total += reward.item()
                if done:
                    break
            totals.append(total)
        assert got[i].item() == pytest.approx(np.mean(totals), rel=1e-5)


def test_lives():
    """First lives end one after another, later ones every `life`; a birth leaves the others alone."""
    first = torch.tensor([[10], [14], [20]])
    assert M.ages(first, 20, 9).tolist() == [[9], [9], [9]] and M.ages(first, 20, 10).tolist() == [[0], [10], [10]]
    assert M.ages(first, 20, 33).tolist() == [[3], [19], [13]] and M.ages(first, 20, 40).tolist() == [[10], [6], [0]]
    assert M.ages(first, 0, 33).tolist() == [[33], [33], [33]]
    agents = filled_agents(config(), ["kpoint", "servo"], steps=25)
    M.critic_update(agents, torch.ones(2, 1))
    M.policy_update(agents, torch.ones(2, 1), agents.phi, torch.ones(2), "ddpg")
    before = {name: part.clone() for name, part in vars(agents).items() if isinstance(part, torch.Tensor)}
    agents.birth(torch.tensor([[True], [False]]))
    for name, part in before.items():
        assert torch.equal(getattr(agents, name)[1], part[1]), name
    for name in ("phi", "theta", "state"):
        assert not torch.equal(getattr(agents, name)[0], before[name][0])
    assert torch.equal(agents.phi[0], agents.phi_target[0]) and torch.equal(agents.theta[0], agents.theta_target[0])
    for name in ("phi_first", "phi_second", "theta_first", "theta_second"):
        assert not getattr(agents, name)[0].any() and getattr(agents, name)[1].any()
    assert not agents.episodes[0].any() and agents.critic_updates.tolist() == agents.policy_updates.tolist() == [[0], [1]]
    assert not agents.sample(8).mask[0].any() and agents.sample(8).mask[1].all()


def test_every_agent_learns_what_its_age_allows(monkeypatch):
    """Births, random actions, critics and policies by age, for ends of first lives spread over a life."""
    cfg, seen = config(iterations=75, agents=3, random_steps=20, critic_start=22, policy_start=27, life=50), []
    birth, act, critic, update = M.Agents.birth, M.Agents.act, M.critic_update, M.policy_update
    born = []
    monkeypatch.setattr(M.Agents, "birth", lambda self, which: (born.append(which[:, 0].tolist()), birth(self, which)))
    monkeypatch.setattr(M.Agents, "act", lambda self, which: (seen.append([which[:, 0].tolist()]), act(self, which)))
    monkeypatch.setattr(M, "critic_update", lambda agents, active: (seen[-1].append(active[:, 0].tolist()), critic(agents, active))[1])
    monkeypatch.setattr(M, "policy_update", lambda agents, active, *rest: (seen[-1].append(active[:, 0].tolist()), update(agents, active, *rest)))
    M.train(cfg, Alone(0))
    firsts = [27 + 23 * (i + 1) // 3 for i in range(3)]
    assert born == [[True] * 3] + [[j == i for j in range(3)] for i in range(3)]
    for t, (at_random, critics, *policies) in enumerate(seen):
        age = [t if t < f else t - f for f in firsts]
        assert at_random == [a < 20 for a in age] and critics == [float(a >= 22) for a in age]
        assert policies == ([[float(a >= 27) for a in age]] if t % 2 else [])


def test_nothing_learns_before_an_episode_is_over(monkeypatch):
    """The paper's preset learns from the first step on: what is not there does not count."""
    cfg, seen, update = config(iterations=30, critic_start=0, policy_start=0, life=0), [], M.policy_update
    monkeypatch.setattr(M, "policy_update", lambda agents, active, *rest: (seen.append(active[0, 0].item()), update(agents, active, *rest)))
    M.train(cfg, Alone(0))
    assert seen == [0.0] * 9 + [1.0] * 6                                      # at 1, 3, ..., 29; episodes have 20 steps


def test_a_meta_test_updates_as_meta_training_does(monkeypatch):
    """The same calls, rules and ages; targets follow from the start on."""
    cfg, calls = config(test_iterations=40, random_steps=20, critic_start=22, policy_start=27), []
    critic, update, act = M.critic_update, M.policy_update, M.Agents.act
    monkeypatch.setattr(M.Agents, "act", lambda self, which: (calls.append([which.all().item()]), act(self, which)))
    monkeypatch.setattr(M, "critic_update", lambda agents, active: (calls[-1].append(active.mean().item()), critic(agents, active))[1])
    monkeypatch.setattr(M, "policy_update", lambda agents, active, alpha, share, rule: (
        calls[-1].extend([active.mean().item(), rule]), update(agents, active, alpha, share, rule)))
    M.meta_test(weights(M.objective_shapes(cfg), 1), "servo,kpoint", 0, cfg, rule="reinforce")
    for t, call in enumerate(calls):
        assert call == [t < 20, float(t >= 22)] + ([float(t >= 27), "reinforce"] if t % 2 else [])


def test_meta_updates_get_the_living_critics_and_new_sequences(monkeypatch):
    """Eq. 4 is judged by critic 1 itself, not by its twin or target, on sequences half of which eq. 3 does not see."""
    seen, real, holder = [], M.meta_gradient, []
    birth = M.Agents.birth
    monkeypatch.setattr(M.Agents, "birth", lambda self, which: (holder.append(self), birth(self, which)))
    def note(alpha, phi, theta, batch, net, cfg):
        agents = holder[0]
        seen.append(torch.equal(theta[:, 0], agents.theta[:, 0]) and torch.equal(phi, agents.phi) and
                    not torch.equal(theta[:, 0], agents.theta_target[:, 0]))
        assert batch.mask.shape[1] == 8
        assert not batch.mask.any() or not torch.equal(batch.action[:, :4], batch.action[:, 4:])
        return real(alpha, phi, theta, batch, net, cfg)
    monkeypatch.setattr(M, "meta_gradient", note)
    M.train(config(iterations=40), Alone(0))
    assert seen[-5:] == [True] * 5


def test_alpha_moves_by_the_mean_over_agents_that_learn(monkeypatch):
    """Two of three agents are old enough: their mean, not a third of their sum."""
    cfg = config(iterations=2, agents=3, critic_start=0, policy_start=0, objective_decay=1.0, average=0.0, life=0)
    g = torch.arange(3.0)[:, None] * torch.full((3, 3241), 0.002)
    monkeypatch.setattr(M, "meta_gradient", lambda *rest: (g, *[torch.zeros(3)] * 3))
    monkeypatch.setattr(M, "learn", lambda agents, *rest: (torch.zeros(3), torch.tensor([[0.0], [1], [1]])))
    got = []
    monkeypatch.setattr(M, "adam", lambda w, m, v, count, gradient, rate: got.append((gradient.clone(), count.clone())))
    M.train(cfg, Alone(0))
    assert torch.allclose(got[0][0], torch.full((1, 3241), 0.003)) and got[0][1].tolist() == [[1.0]]


def test_lines_of_the_log_by_hand(monkeypatch):
    """Agents past half of their lives that are no teachers, each environment's own."""
    run = Alone(0, 1)
    run.stage = run.step = 0
    agents = M.Agents(["kpoint", "servo", "kpoint"], config(), [0, 1], CPU, 0)
    monkeypatch.setattr(M, "evaluate", lambda agents, judge: torch.arange(6.0))
    column = lambda *x: torch.tensor(x, dtype=torch.float32)
    age, teacher = torch.tensor([[30], [30], [30], [30], [10], [26]]), torch.tensor([[True], [False], [False]] * 2)
    M.log_training(config(), run, agents, None, age, [column(0, 0, 0, 0, 0, 0), column(1, 2, 3, 4, 5, 6), column(7, 8, 9, 10, 11, 12)],
                   column(1, 2, 6, 0, 0, 3), teacher)
    assert [{k: v for k, v in row.items() if k not in ("stage", "step")} for row in run.rows] == [
        {"seed": 0, "critic_loss": 3.0, "return_kpoint": 2.0, "cosine_kpoint": 3.0, "norm_kpoint": 9.0,
         "return_servo": 1.0, "cosine_servo": 2.0, "norm_servo": 8.0},
        {"seed": 1, "critic_loss": 1.0, "return_kpoint": 5.0, "cosine_kpoint": 6.0, "norm_kpoint": 12.0}]


def test_only_agents_old_enough_count_in_the_meta_gradient(monkeypatch):
    """alpha does not move before the first policy learns, and then only by its agents' clipped gradients."""
    cfg, calls = config(iterations=30), []
    real = M.meta_gradient
    def note(alpha, phi, theta, batch, net, cfg):
        out = real(alpha, phi, theta, batch, net, cfg)
        calls.append((alpha.clone(), out[0]))
        return out
    monkeypatch.setattr(M, "meta_gradient", note)
    kept = M.train(cfg, Alone(0))
    start = M.first_objective(cfg, [0], CPU)
    moved = [not torch.equal(alpha[:1], start) for alpha, _ in calls]
    assert moved == [False] * 13 + [True] * 2                                 # updates at 1, 3, ..., 29; policies from 24 on
    twin, used, wanted = start.clone().requires_grad_(), start.clone(), []
    adam = torch.optim.Adam([twin])
    for j, (_, g) in enumerate(calls):
        if j >= 12:                                                           # torch's Adam has seen nothing before
            adam.param_groups[0]["lr"] = cfg.objective_rate * (1 - 0.9 * (2 * j + 1) / 30)
            twin.grad = M.clip(g, 1.0).mean(0, keepdim=True)
            adam.step()
        used = cfg.average * used + (1 - cfg.average) * twin.detach()
        wanted.append(used)
    assert torch.allclose(kept[-1], used, atol=1e-6)
    for part, snapshot in zip((0.12, 0.25, 0.5, 1), kept):                    # after iterations 4, 8, 15 and 30
        assert torch.allclose(snapshot, wanted[math.ceil(30 * part) // 2 - 1], atol=1e-6)


def test_seeds_side_by_side_equal_seeds_alone():
    cfg = config(iterations=40)
    both = M.train(cfg, Alone(3, 5))
    for s, seed in enumerate((3, 5)):
        assert torch.allclose(M.train(cfg, Alone(seed))[:, 0], both[:, s], atol=1e-5)
    curves = M.meta_test(both[-1], "servo,kreach", [3, 5], cfg)
    alone = M.meta_test(both[-1, 1:], "servo,kreach", 5, cfg)
    assert curves.shape == (2, 3, 2, 2) and torch.allclose(alone[0], curves[1], rtol=1e-3)


def test_teachers_and_annealing(monkeypatch):
    """The share of L in each agent's loss: it rises from 0 to 1, but for teachers."""
    seen, real = [], M.policy_update
    def note(agents, active, alpha, own, rule="objective"):
        seen.append((rule, own.tolist()))
        real(agents, active, alpha, own, rule)
    monkeypatch.setattr(M, "policy_update", note)
    M.train(config(iterations=12, anneal=8, teachers=1, agents=3), Alone(0))
    wanted = [min(1, t / 8) for t in (1, 3, 5, 7, 9, 11)]
    assert all(isinstance(w, float) for _, own in seen for w in own)
    assert [rule for rule, _ in seen] == ["annealed"] * 6
    assert [own for _, own in seen] == [[0.0, w, w] for w in wanted]
    seen.clear()
    M.train(config(iterations=12, anneal=8), Alone(0))
    assert [rule for rule, _ in seen] == ["annealed"] * 4 + ["objective"] * 2


# ---- meta-tests ----


def test_frozen_objective_stays_and_a_constant_one_moves_nothing(monkeypatch):
    cfg = config(test_iterations=60)
    alpha = weights(M.objective_shapes(cfg), 1, 3)
    before, policies = alpha.clone(), []
    real = M.evaluate
    def note(agents, worlds):
        policies.append((agents.phi.clone(), agents.theta.clone()))
        return real(agents, worlds)
    monkeypatch.setattr(M, "evaluate", note)
    M.meta_test(alpha, "servo,kpoint", 0, cfg)
    assert torch.equal(alpha, before)
    assert (policies[0][0] != policies[-1][0]).any(1).all() and (policies[0][1] != policies[-1][1]).any(2).all()
    policies.clear()
    named = M.split(alpha, M.objective_shapes(cfg))
    named["out.last.weight"].zero_()                                          # L says the same whatever it sees
    curves = M.meta_test(alpha, "servo,kpoint", 0, cfg)
    assert torch.equal(policies[0][0], policies[-1][0]) and not torch.equal(policies[0][1], policies[-1][1])
    assert torch.equal(curves[:, 0], curves[:, -1])


def test_meta_tests_start_alike():
    """All rules have the same first agents, noise and first states."""
    cfg = config(test_iterations=20)
    alpha = weights(M.objective_shapes(cfg), 1)
    curves = [M.meta_test(alpha, "servo", 0, cfg, rule=rule) for rule in ("objective", "ddpg", "reinforce")]
    assert torch.equal(curves[0], curves[1]) and torch.equal(curves[0], curves[2])        # random steps only
    cfg = config(test_iterations=40)
    curves = [M.meta_test(alpha, "servo", 0, cfg, rule=rule) for rule in ("objective", "ddpg", "reinforce")]
    first = M.Agents(["servo"], cfg, [0], CPU, 0).phi[0]
    assert not torch.equal(first, M.Agents(["servo"], cfg, [0], CPU, 1).phi[0])           # not those of meta-training
    assert torch.equal(curves[0][:, 0], curves[1][:, 0]) and len({float(c[0, -1, 0, 0]) for c in curves}) == 3


# Seeds 100 to 109, 2026-11-25, 2 x AMD EPYC, torch 2.13: kpoint -2.5 (deviation 0.4), servo -1.17 (0.10);
# policies that do not move: -15.9 (1.6), -10.9 (1.8). Thresholds: mean minus 4 deviations. Shortest ways to the middle
# at full speed cost about 1.3 and 0.8.
KPOINT, SERVO = (-4.1, -1.2), (-1.6, -0.7)


@pytest.mark.parametrize("seed", [110, 111])
def test_reinforce_learns_and_policies_that_do_not_move_do_not(seed):
    """Quick's sizes, 320 iterations: the critic, its advantages, the replay and the policy's update work together."""
    cfg = M.Config(test_iterations=320, test_every=320, test_agents=3)
    alpha = torch.zeros(1, 3241)
    kpoint, servo = M.meta_test(alpha, "kpoint,servo", seed, cfg, rule="reinforce")[0, -1].mean(1).tolist()
    assert KPOINT[0] < kpoint < KPOINT[1] and SERVO[0] < servo < SERVO[1]
    still = dataclasses.replace(cfg, policy_rate=1e-9)
    kpoint, servo = M.meta_test(alpha, "kpoint,servo", seed, still, rule="reinforce")[0, -1].mean(1).tolist()
    assert kpoint < KPOINT[0] - 4 and servo < SERVO[0] - 2


def taught(cfg, names, seeds):
    """Agents that have learned by DDPG for 80 iterations."""
    agents = M.Agents(names, cfg, seeds, CPU, 0)
    one = torch.ones(len(agents.phi), 1)
    for t in range(160):
        agents.act(one * t < cfg.random_steps)
        if t >= 40:
            M.critic_update(agents, one)
        if t >= 80 and t % 2:
            M.policy_update(agents, one, agents.phi, one[:, 0], "ddpg")
    return agents


def alignment(agents, alpha, times=10):
    """Mean cosine between -grad_phi L and the critic's gradient."""
    copies, cfg = alpha.repeat_interleave(len(agents.phi) // len(alpha), 0), agents.cfg
    return np.mean([M.meta_gradient(copies, agents.phi, agents.theta[:, :1], agents.sample(2 * cfg.sequences), agents.net,
                                    cfg)[2].mean().item() for _ in range(times)])


def test_the_meta_gradient_aligns_the_loss_with_the_critic_also_elsewhere():
    """300 meta-updates, four seeds side by side, agents at rest. Calibrated over seeds 100 to 109, one at a time
    (2026-11-25, 2 x AMD EPYC, torch 2.13): cosine 0.45 (deviation 0.07) on kpoint and strongpend, 0.39 (0.07) on servo and
    kreach, which alpha never saw; before, -0.03 (0.26) on both. Of four seeds' means: thresholds 4 deviations below.
    Control: the meta-gradient's sign flipped."""
    cfg, seeds = M.Config(), [110, 111, 112, 113]
    seen, unseen = taught(cfg, ["kpoint", "strongpend"] * 2, seeds), taught(cfg, ["servo", "kreach"], seeds)
    for sign, passes in ((1, True), (-1, False)):
        alpha = M.first_objective(cfg, seeds, CPU)
        moments, count = torch.zeros(2, *alpha.shape), torch.zeros(1, 1)
        for _ in range(300):
            batch = seen.sample(2 * cfg.sequences)
            g = M.meta_gradient(alpha.repeat_interleave(4, 0), seen.phi, seen.theta[:, :1], batch, seen.net, cfg)[0]
            count += 1
            M.adam(alpha, *moments, count, sign * M.clip(g, 1.0).view(4, 4, -1).mean(1), 1e-2)
        got = alignment(seen, alpha), alignment(unseen, alpha)
        assert (got[0] > 0.31 and got[1] > 0.25) == passes and (passes or max(got) < 0)


# ---- the command line ----

SMOKE = ["--preset", "smoke"]


def comparable(folder):
    """All numbers of a summary that do not depend on the clock."""
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("headline", "per_seed", "beside")}


def run_here(capsys, *options):
    """main() in this process -> (exit status, standard output, standard error)."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        M.main([str(option) for option in options])
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_smoke_run_then_its_objective_elsewhere(tmp_path, capsys):
    status, out, error = run_here(capsys, *SMOKE, "--num-seeds", 2, "--test", "kpoint,kreach", "--out", tmp_path / "a")
    assert status == 0, error
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    for row in summary["per_seed"]:                          # every headline again, from the returns below it
        last = {stage: {name: np.mean(x[-1]) for name, x in own.items()} for stage, own in row["returns"].items()}
        score = lambda stage, name: (last[stage][name] - last["untrained L"][name]) / (
            last["DDPG"][name] - last["untrained L"][name])
        for name in ("kpoint", "kreach"):
            assert row["headline"][f"score_{name}"] == pytest.approx(score("L", name), rel=1e-3, abs=1e-3)
            assert row["headline"][f"reinforce_score_{name}"] == pytest.approx(score("REINFORCE", name), rel=1e-3, abs=1e-3)
        assert row["headline"]["negated_minus_untrained"] == pytest.approx(
            (score("-L", "kpoint") + score("-L", "kreach")) / 2, rel=1e-3, abs=1e-3)
        for part in (12, 25, 50):
            assert row["headline"][f"checkpoint_trend_seen_{part}"] == pytest.approx(score(f"L at {part} %", "kpoint"), rel=1e-3, abs=1e-3)
            assert row["headline"][f"checkpoint_trend_unseen_{part}"] == pytest.approx(score(f"L at {part} %", "kreach"), rel=1e-3, abs=1e-3)
        assert row["headline"]["checkpoint_trend_unseen_100"] == row["headline"]["score_kreach"]
        assert {"return_kpoint", "cosine_servo", "norm_kpoint"} <= set().union(*row["meta_training"])
        assert {tuple(np.shape(x)) for own in row["returns"].values() for x in own.values()} == {(3, 2)}
    assert (tmp_path / "a" / "figure.png").stat().st_size > 30_000
    path = tmp_path / "a" / "objective.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["alpha"]["lstm.weight"].shape == (2, 24, 64) and saved["seeds"] == [0, 1]
    again = [*SMOKE, "--objective", path, "--test", "kpoint,kreach", "--num-seeds", 2]
    status, out, error = run_here(capsys, *again, "--out", tmp_path / "b")
    assert status == 0, error
    other = json.loads((tmp_path / "b" / "summary.json").read_text())
    for row, own in zip(summary["per_seed"], other["per_seed"]):               # the same objective, the same fresh agents
        for stage in ("L", "-L", "DDPG", "REINFORCE", "untrained L"):
            assert row["returns"][stage] == own["returns"][stage]
    assert (tmp_path / "b" / "figure.png").stat().st_size > 20_000
    assert not (tmp_path / "b" / "objective.pt").exists() and other["trained_on"] == ["kpoint", "servo"]
    assert summary["beside"]["score_kpoint"].startswith("seen") and summary["beside"]["score_kreach"].startswith("UNSEEN")
    status, out, error = run_here(capsys, *SMOKE, "--objective", path, "--seed", 1, "--train", "kreach", "--test",
                                  "kpoint,kreach", "--out", tmp_path / "d")   # labels are the file's, the second seed its own
    one = json.loads((tmp_path / "d" / "summary.json").read_text())
    assert status == 0 and one["per_seed"][0]["returns"]["L"] == other["per_seed"][1]["returns"]["L"], error
    assert one["beside"] .keys() == other["beside"].keys() and one["beside"]["score_kreach"].startswith("UNSEEN")
    for options, message in ((["--width", 32], "has --width 16, not 32"), (["--layers", 2], "has --layers 1, not 2"),
                             (["--no-symmetric"], "has --symmetric True, not False"), (["--drop", "time"], "has --drop")):
        status, _, error = run_here(capsys, *again, *options, "--out", tmp_path / "c")
        assert status == 2 and message in error and not (tmp_path / "c").exists()
    torch.save({**saved, "alpha": {"lstm.weight": torch.zeros(1, 2)}}, tmp_path / "short.pt")
    (tmp_path / "noise.pt").write_text("no")
    nan = {name: part * math.nan for name, part in saved["alpha"].items()}
    torch.save({**saved, "alpha": nan}, tmp_path / "nan.pt")
    for options, message in ((["--seed", 1], "has seeds [0, 1], not 2"), (["--seed", 7, "--num-seeds", 1], "not 7")):
        status, _, error = run_here(capsys, *again, *options, "--out", tmp_path / "c")
        assert status == 2 and message in error and not (tmp_path / "c").exists()
    for name, message in (("short.pt", "has not the weights"), ("nan.pt", "all finite"), ("noise.pt", "is not a valid objective"), ("gone.pt", "is missing")):
        status, _, error = run_here(capsys, *SMOKE, "--objective", tmp_path / name, "--out", tmp_path / "c")
        assert status == 2 and message in error and len(error.splitlines()) == 1 and not (tmp_path / "c").exists()


@pytest.mark.parametrize("moment", ["meta-training 36/", "DDPG 20/"])
def test_resume_after_kill_equals_uninterrupted(moment, tmp_path, script):
    options = [*SMOKE, "--num-seeds", 2]
    whole = script("metagenrl.py", *options, "--out", tmp_path / "whole", wait=False)    # beside the other
    process = script("metagenrl.py", *options, "--out", tmp_path / "cut", wait=False)
    while moment not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    done = script("metagenrl.py", *options, "--out", tmp_path / "cut", "--resume")
    assert done.returncode == 0 and "(resumed)" in done.stdout
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


@pytest.mark.parametrize("agents, train, iterations", [(4, "kpoint,servo,kreach", 40), (2, "kpoint,servo", 52)])
def test_two_processes_equal_one(agents, train, iterations, tmp_path, capsys, script):
    """The population is shared out, its checkpoint is whole; three kinds over four agents, uneven shares of kinds; two
    agents, of which at times only one learns: fewer than there are processes."""
    options = [*SMOKE, "--device", "cpu", "--no-extras", "--agents", agents, "--train", train, "--num-seeds", 2,
               "--iterations", iterations, "--test-iterations", 30]
    assert run_here(capsys, *options, "--out", tmp_path / "one")[0] == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = script("metagenrl.py", *options, "--out", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    one, two = (torch.load(tmp_path / name / "checkpoint.pt")["stages"] for name in ("one", "two"))
    for key in ("alpha", "used", "kept"):
        torch.testing.assert_close(one["meta-training"]["state"][key], two["meta-training"]["state"][key], atol=1e-5, rtol=1e-4)
    assert "agents" not in one["meta-training"]["state"]                      # done, and large
    torch.testing.assert_close(one["L"]["state"]["returns"], two["L"]["state"]["returns"], atol=1e-3, rtol=1e-3)


def test_a_checkpoint_holds_the_agents_of_all_processes(tmp_path, script):
    """Two processes stopped in the middle of meta-training: one goes on from their checkpoint as if it had been alone."""
    options = [*SMOKE, "--device", "cpu", "--no-extras", "--agents", 4, "--train", "kpoint,servo,kreach", "--iterations", 40,
               "--test-iterations", 30, "--save-every", 20]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = script("metagenrl.py", *options, "--out", tmp_path / "two", launcher=launcher, wait=False)
    while "meta-training 24/" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate()
    saved = torch.load(tmp_path / "two" / "checkpoint.pt")["stages"]["meta-training"]
    assert saved["step"] == 20 and saved["state"]["agents"]["phi"].shape[:2] == (1, 4)
    done = script("metagenrl.py", *options, "--out", tmp_path / "two", "--resume")
    assert done.returncode == 0, done.stderr
    assert script("metagenrl.py", *options, "--out", tmp_path / "one").returncode == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pt")["stages"] for name in ("one", "two"))
    torch.testing.assert_close(one["meta-training"]["state"]["alpha"], two["meta-training"]["state"]["alpha"], atol=1e-5, rtol=1e-4)


def test_three_processes_cannot_share_four_agents(tmp_path, script):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3")
    done = script("metagenrl.py", *SMOKE, "--agents", 4, "--out", tmp_path / "a", launcher=launcher)
    assert done.returncode and "3 processes cannot share a batch of 4 evenly" in done.stderr


@pytest.mark.parametrize("options, message", [
    (["--agent", 3], "--agent"), (["--train", "kpoint,hopper"], "--train: no environment 'hopper': strongpend, kpoint"),
    (["--test", "moon"], "--test: no environment 'moon'"), (["--test", ""], "no environment ''"),
    (["--agents", 1], "--agents 1 is less than the number of --train environments, 2"), (["--gamma", 1.1], "--gamma must be"),
    (["--drop", "states"], "--drop is of reward, time, value"), (["--life", 24], "--life 24 is over"), (["--width", 5], "--width must be even"),
    (["--slots", 1], "--slots must be at least 2"), (["--log-every", 3], "a multiple of --delay 2"),
    (["--test", "servo,kpoint,servo"], "--test names an environment twice"), (["--repeat", 21], "--repeat 21 is longer than an episode of kpoint"), (["--teachers", 3], "--teachers 3"), (["--sequences", 0], "--sequences must be"),
    (["--test", "gym:NoSuch-v0"], "NoSuch"), (["--train", "gym:CartPole-v1"], "continuous"),
    (["--test", "gym:Blackjack-v1"], "flat observations"), (["--objective", "none.pt"], "none.pt is missing")])
def test_bad_options(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = run_here(capsys, *SMOKE, *options)
    assert status == 2 and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_gym_without_gymnasium(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    for option in ("--train", "--test"):
        status, _, error = run_here(capsys, *SMOKE, option, "gym:Pendulum-v1", "--out", tmp_path / "a")
        assert status == 2 and "pip install" in error and not (tmp_path / "a").exists()


def test_gym_bridge_equals_our_own_pendulum():
    """The same first states and actions: the same observations and rewards; actions are scaled to the simulator's."""
    bridge, own = M.GymEnvironment("Pendulum-v1", CPU), M.Pendulum()
    assert (bridge.observations, bridge.actions, bridge.horizon) == (3, 1, 200)
    shown = bridge.reset(torch.tensor([[0.1], [0.6]]))
    state = torch.stack([torch.atan2(shown[:, 1], shown[:, 0]), shown[:, 2]], 1)
    torch.manual_seed(0)
    for _ in range(20):
        action = 2 * torch.rand(2, 1) - 1
        shown, reward, done = bridge.step(shown, action)
        state, wanted, _ = own.step(state, action)
        torch.testing.assert_close(own.obs(state), shown, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(reward, wanted, atol=1e-3, rtol=1e-3)
    again = bridge.restart(shown, [1], torch.tensor([[0.1], [0.1]]))
    assert torch.equal(again[0], shown[0]) and not torch.equal(again[1], shown[1])
    assert torch.equal(again[1], bridge.reset(torch.tensor([[0.1], [0.1]]))[0])


def test_gym_bridge_scales_actions_to_any_box():
    bridge, given = M.GymEnvironment("Pendulum-v1", CPU), []
    bridge.middle, bridge.half = np.array([1.5]), np.array([1.5])             # a box from 0 to 3
    class Stub:
        def step(self, action):
            given.append(action.tolist())
            return np.zeros(3), 0.0, False, False, {}
    bridge.simulators = [Stub()] * 3
    bridge.step(torch.zeros(3, 3), torch.tensor([[-1.0], [0], [2]]))
    assert given == [[0.0], [1.5], [3.0]]


def test_agents_of_gymnasium_begin_new_episodes_when_loaded():
    agents = M.Agents(["gym:Pendulum-v1", "servo"], config(), [0], CPU, 0)
    yes = torch.ones(2, 1, dtype=torch.bool)
    for _ in range(7):
        agents.act(yes)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in agents.state_dict().items()}
    other = M.Agents(["gym:Pendulum-v1", "servo"], config(), [0], CPU, 0)
    other.load_state_dict(saved)
    assert other.time.tolist() == [[0, 0], [7, 7]] and torch.equal(other.state[1], agents.state[1])
    other.act(yes)
    assert torch.equal(other.obs[0, :, 0, 1], other.state[0, :, :3])


def test_gym_bridge_ends():
    """A row that has ended stays so, without reward, until it is restarted: actions may be held longer."""
    bridge = M.GymEnvironment("MountainCarContinuous-v0", CPU)
    state = bridge.reset(torch.zeros(2, 1))
    for simulator in bridge.simulators[:1]:
        simulator.unwrapped.state = np.array([0.449, 0.06], dtype=np.float32)
    state, reward, done = bridge.step(state, torch.ones(2, 1))
    assert done.tolist() == [True, False] and reward[0] > 99
    after, reward, done = bridge.step(state, torch.ones(2, 1))
    assert done.tolist() == [True, False] and reward[0] == 0 and torch.equal(after[0], state[0]) and not torch.equal(after[1], state[1])
    assert not bridge.step(bridge.restart(after, [0], torch.zeros(2, 1)), torch.ones(2, 1))[2].any()


def test_gym_run(tmp_path, capsys):
    status, _, error = run_here(capsys, *SMOKE, "--train", "gym:Pendulum-v1,servo", "--test", "gym:MountainCarContinuous-v0",
                                "--iterations", 30, "--no-extras", "--test-iterations", 3, "--out", tmp_path / "a", "--repeat", 20)
    assert status == 0, error


def test_held_actions():
    """repeat 4: four steps of the environment with one action, rewards added, nothing after an end."""
    worlds, env = M.Worlds(["cartpole", "mountaincar"], CPU, repeat=4), M.CartPole()
    assert worlds.horizon.tolist() == [[125], [249]] and worlds.H == 249
    state = worlds.reset(torch.rand(2, 3, 4))
    state[0, 0] = torch.tensor([0, 0.2, 0, 0.5])                              # falls at once
    action = torch.rand(2, 3, 1)
    after, reward, done = worlds.step(state, action)
    for k in range(3):
        own, total, over, a = state[0, k:k + 1], 0.0, False, action[0, k:k + 1]
        for _ in range(4):
            if not over:
                own, r, over = env.step(own, a)
                total, over = total + r.item(), over.item()
        assert torch.allclose(after[0, k], own[0], atol=1e-6) and reward[0, k] == total and done[0, k] == over
    assert done[0].tolist() == [True, False, False] and reward[0, 0] < 4


def test_compiled_step_equals_eager():
    """What --compile compiles, a trace of the whole step with its second derivatives, is the same function."""
    cfg = config()
    agents = filled_agents(cfg, ["kpoint", "servo"], steps=25)
    agents.run = Alone(0)
    agents.run.compiled = True                                                # Alone.compile keeps the trace as it is
    alpha, batch = weights(agents.net.objective, 2), agents.sample(8)
    for function, inputs, static in (
            (M.meta_gradient, (alpha, agents.phi, agents.theta[:, :1]), {}),
            (M.policy_gradient, (agents.phi, agents.theta[:, :1], alpha, torch.ones(2)), {"rule": "objective"}),
            (M.policy_gradient, (agents.phi, agents.theta[:, :1], alpha, torch.ones(2)), {"rule": "ddpg"}),
            (M.critic_gradient, (agents.theta, agents.theta, agents.phi, torch.randn(2, 8, 6, 2)), {})):
        for other in (batch, agents.sample(8)):                               # traced with the first, used with both
            wanted = function(*inputs, other, agents.net, cfg, **static)
            got = agents.call(function, *inputs, other, **static)
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert len(agents.programs) == 4


def test_learned_gradient_of_a_known_rule(monkeypatch):
    """With REINFORCE's loss in L's place, the push is towards an action after which values rose, else away."""
    def rule(alpha, pi, a, r, d, V, act_mask, mask, *rest):
        return M.reinforce(pi, a, M.gae(r, d, V, 1.0, 1.0, mask), act_mask)
    monkeypatch.setattr(M, "objective", rule)
    x, push = M.learned_gradient(torch.zeros(2, 3241), M.Config())
    torch.testing.assert_close(push, torch.stack([x, -x]).expand(2, 2, -1))


def test_a_test_in_which_nobody_learns_has_scores_of_zero(tmp_path, capsys):
    status, _, error = run_here(capsys, *SMOKE, "--iterations", 2, "--test-iterations", 2, "--out", tmp_path / "a")
    assert status == 0, error
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["headline"]["score_servo"]["mean"] == 0


def test_plan_knows_what_it_does():
    assert "meta-trains on kpoint,servo for 64 iterations, tests on kpoint,servo: 1 seed(s)" in M.plan(config(), 1e10)
    assert "tests x.pt on kpoint,servo" in M.plan(config(objective="x.pt"), 1e10)


def test_help_shows_every_field(capsys):
    status, out, _ = run_here(capsys, "--help")
    words = " ".join(out.split())
    assert status == 0 and "[smoke 64 | quick 16000 | paper 700000]" in words
    for field in dataclasses.fields(M.Config):
        assert "--" + field.name.replace("_", "-") in words
