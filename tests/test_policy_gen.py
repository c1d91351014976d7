"""policy_gen.py: environments against Gymnasium and MuJoCo, networks by hand, the loop, the command line."""
import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch

import policy_gen as P

CPU = torch.device("cpu")
EXACT = dict(atol=1e-9, rtol=0)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds or (0,)]


def config(**more):
    return P.Config(**{**P.PRESETS["smoke"], **more})


class Alone:
    """A `Run` that trains in this process and keeps nothing."""
    device, world, compiled = CPU, 1, False
    compile = staticmethod(lambda function: function)
    average = staticmethod(lambda tensors: None)
    share = staticmethod(lambda batch, dim=1: batch)
    watch = staticmethod(lambda losses: None)

    def __init__(self, *seeds):
        self.seeds, self.rows, self.rates = list(seeds), [], {}

    def steps(self, stage, total, state):
        for self.step in range(total):
            self.stage = stage
            yield self.step

    def clock(self, name):
        return P.contextlib.nullcontext()

    def log(self, rows):
        self.rows += [{"stage": self.stage, "step": self.step + 1, **row} for row in rows]


real_steps = Alone.steps


# ---- environments ----

gymnasium = pytest.importorskip("gymnasium")


def absolute(joints):
    """MuJoCo's joint coordinates (5,) -> ours."""
    return torch.cat([joints[:2], joints[2:].cumsum(0)])


def test_swimmer_equals_mujoco_step_by_step():
    """200 random actions and 200 from states near and beyond the joint limits: within 1e-8 a step."""
    env, ours = gymnasium.make("Swimmer-v5").unwrapped, P.Swimmer(dtype=torch.float64)
    draw, worst, touched = np.random.default_rng(0), 0.0, 0
    env.reset(seed=0)
    for t in range(400):
        if t >= 200 and t % 10 == 0:
            q, v = env.data.qpos.copy(), env.data.qvel.copy()
            q[3:], v[3:] = draw.uniform(-1.85, 1.85, 2), draw.uniform(-5, 5, 2)
            env.set_state(q, v)
        state = torch.cat([absolute(torch.tensor(part.copy())) for part in (env.data.qpos, env.data.qvel)])[None]
        action = draw.uniform(-1.3, 1.3, 2)
        seen, reward, *_ = env.step(np.clip(action, -1, 1))
        state, own, done = ours.step(state, torch.tensor(action)[None])
        worst = max(worst, np.abs(ours.obs(state)[0].numpy() - seen).max(), abs(own.item() - reward))
        touched += (np.abs(env.data.qpos[3:]) > math.radians(100)).any()
        assert not done.any()
    assert worst < 1e-8 and touched > 20


def test_inverted_pendulum_equals_mujoco():
    env, ours = gymnasium.make("InvertedPendulum-v5").unwrapped, P.InvertedPendulum()
    draw, worst = np.random.default_rng(0), 0.0
    env.reset(seed=0)
    for _ in range(200):
        env.set_state(draw.uniform(-1, 1, 2) * [0.99, 0.19], draw.uniform(-1, 1, 2))
        state = torch.tensor(np.concatenate([env.data.qpos, env.data.qvel]))[None]
        action = draw.uniform(-4, 4, 1)
        seen, _, over, *_ = env.step(np.clip(action, -3, 3))
        state, reward, done = ours.step(state, torch.tensor(action)[None])
        worst = max(worst, np.abs(state[0].numpy() - seen).max())
        assert done.item() == over and reward.item() == 1
    assert worst < 1e-9


def test_pendulum_at_the_end_of_its_rail():
    """Beyond |x| = 1 a soft force: MuJoCo iterates it to a tolerance of its own."""
    env, ours = gymnasium.make("InvertedPendulum-v5").unwrapped, P.InvertedPendulum()
    draw, worst = np.random.default_rng(1), 0.0
    env.reset(seed=0)
    for _ in range(100):
        env.set_state(draw.choice([-1, 1]) * draw.uniform(0.98, 1.05, 2) * [1, 0.1], draw.uniform(-1, 1, 2))
        state = torch.tensor(np.concatenate([env.data.qpos, env.data.qvel]))[None]
        seen, *_ = env.step(np.zeros(1))
        worst = max(worst, np.abs(ours.step(state, torch.zeros(1, 1))[0][0].numpy() - seen).max())
    assert worst < 1e-5


def test_pendulum_without_action_falls_at_step_25():
    env = P.InvertedPendulum()
    state, fell = torch.tensor([[0.005, -0.007, 0.003, 0.009]]).double(), []
    for t in range(30):
        state, _, done = env.step(state, torch.zeros(1, 1))
        fell += [t + 1] * done.item()
    assert fell[0] == 25


@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
def test_mountain_car_equals_gymnasium(strength):
    """A whole episode that reaches the goal, reward and end included: within 1e-6."""
    env, ours = gymnasium.make("MountainCarContinuous-v0").unwrapped, P.MountainCarContinuous()
    env.reset(seed=3)
    state, over, total = torch.tensor(np.array(env.state, dtype=np.float64))[None], False, 0.0
    for _ in range(999):
        action = strength * (1.0 if state[0, 1] >= 0 else -1.0)
        seen, reward, over, *_ = env.step(np.array([action]))
        state, own, done = ours.step(state, torch.tensor([[action]]).double())
        assert np.abs(state[0].numpy() - seen).max() < 1e-6 and abs(own.item() - reward) < 1e-6
        assert done.item() == over
        total += reward
        if over:
            break
    assert over and total > 70


def test_mountain_car_facts():
    """Nothing 0, full throttle -99.9, bang-bang from -0.5: 89.4 in 106 steps, at half strength 94.7 in 212."""
    env = P.MountainCarContinuous()
    totals = []
    for act in (lambda v: 0.0, lambda v: 1.0, lambda v: 1.0 if v >= 0 else -1.0, lambda v: 0.5 if v >= 0 else -0.5):
        state, total = torch.tensor([[-0.5, 0.0]]).double(), 0.0
        for t in range(999):
            state, reward, done = env.step(state, torch.tensor([[act(state[0, 1].item())]]).double())
            total += reward.item()
            if done:
                break
        totals.append((round(total, 1), t + 1))
    assert totals == [(0.0, 999), (-99.9, 999), (89.4, 106), (94.7, 212)]


def gait(env, steps=250):
    state, total = torch.zeros(1, 10).double(), 0.0
    for t in range(steps):
        phase = 2 * math.pi * 0.04 * t / 2
        state, reward, _ = env.step(state, torch.tensor([[math.sin(phase), math.sin(phase - 1.5)]]).double())
        total += reward.item()
    return total


def test_swimmer_gait():
    """A gait's return in MuJoCo: 14.08598 [the same actions from rest]."""
    assert gait(P.Swimmer(dtype=torch.float64)) == pytest.approx(14.08598, abs=1e-4)
    assert gait(P.SwimmerCoarse(dtype=torch.float64)) == pytest.approx(17.61, abs=0.01)        # another implementation's
    rest = torch.zeros(3, 10)
    state, reward, _ = P.Swimmer().step(rest, torch.zeros(3, 2))
    assert torch.equal(state, rest) and not reward.any()


def free_swimmer():
    """No fluid and no armature: an isolated chain of rods."""
    class Free(P.Swimmer):
        armature, joint_limit = 0.0, math.inf
    env = Free(dtype=torch.float64)
    env.drag = [(0.0, 0.0)] * 3
    return env


def mechanics(env, q, v):
    """Momentum (2), angular momentum about the origin, kinetic energy of the three rods, by plain loops."""
    px = py = spin = energy = 0.0
    for i in range(3):
        cx, cy, ux, uy = q[0], q[1], v[0], v[1]
        for j in range(3):
            L = [[1, 0, 0], [0.5, -0.5, 0], [0.5, -1, -0.5]][i][j]
            cx, cy = cx + L * math.cos(q[2 + j]), cy + L * math.sin(q[2 + j])
            ux, uy = ux - L * math.sin(q[2 + j]) * v[2 + j], uy + L * math.cos(q[2 + j]) * v[2 + j]
        px, py = px + env.mass * ux, py + env.mass * uy
        spin += env.mass * (cx * uy - cy * ux) + env.across_inertia * v[2 + i]
        energy += 0.5 * env.mass * (ux**2 + uy**2) + 0.5 * env.across_inertia * v[2 + i] ** 2
    return np.array([px, py, spin, energy])


def test_swimmer_conserves_momentum_and_energy_without_fluid():
    env = free_swimmer()
    state = torch.tensor([[0.3, -0.2, 0.1, 0.5, -0.4, 0.2, 0.1, 1.0, -0.7, 0.4]]).double()
    before = mechanics(env, state[0, :5].tolist(), state[0, 5:].tolist())
    for _ in range(25):                                      # a second
        state, *_ = env.step(state, torch.zeros(1, 2).double())
    after = mechanics(env, state[0, :5].tolist(), state[0, 5:].tolist())
    np.testing.assert_allclose(after, before, atol=1e-6, rtol=1e-6)


def test_swimmer_mirror_and_drag():
    env = P.Swimmer(dtype=torch.float64)
    state = env.reset(torch.rand(4, 10, generator=generators(1)[0])).double()
    sign = torch.tensor([1.0, -1, -1, -1, -1] * 2).double()
    mirrored, action = state * sign, torch.tensor([[0.7, -0.4]] * 4).double()
    for _ in range(20):
        state, r1, _ = env.step(state, action)
        mirrored, r2, _ = env.step(mirrored, -action)
    torch.testing.assert_close(state * sign, mirrored, **EXACT)
    torch.testing.assert_close(r1, r2, **EXACT)
    free, energies = P.Swimmer(dtype=torch.float64), []
    free.joint_limit = math.inf
    state = env.reset(torch.rand(1, 10, generator=generators(2)[0])).double()
    for _ in range(20):
        energies.append(mechanics(free, state[0, :5].tolist(), state[0, 5:].tolist())[3]
                        + 0.05 * ((state[0, 5:7] ** 2).sum() + (state[0, 7:] @ free.D.T).square().sum()).item())
        state, *_ = free.step(state, torch.zeros(1, 2).double())
    assert all(b <= a for a, b in zip(energies, energies[1:]))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1)])
def test_swimmer_beyond_both_limits_equals_mujoco(signs):
    """Both joints pushed back at once, alone, or one by the other's push."""
    real = gymnasium.make("Swimmer-v5", exclude_current_positions_from_observation=False).unwrapped
    real.reset(seed=0)
    env, draw = P.Swimmer(dtype=torch.float64), np.random.default_rng(1)
    for _ in range(40):
        q, v = draw.normal(size=5), 2 * draw.normal(size=5)
        q[3:] = np.array(signs) * np.radians(100 + draw.uniform(-0.05, 0.3, 2))
        real.set_state(q, v)
        state = torch.cat([absolute(torch.tensor(q)), absolute(torch.tensor(v))])[None]
        action = draw.uniform(-1, 1, 2)
        real.step(action)
        after, _, _ = env.step(state, torch.tensor(action)[None])
        torch.testing.assert_close(after[0, :5], absolute(torch.tensor(real.data.qpos.copy())), atol=1e-8, rtol=0)
        torch.testing.assert_close(after[0, 5:], absolute(torch.tensor(real.data.qvel.copy())), atol=1e-7, rtol=0)


def test_first_states_and_constants_are_gymnasiums():
    low, high = torch.zeros(1, 10), torch.ones(1, 10)
    for name, size, a, b in (("MountainCarContinuous", 1, [-0.6, 0], [-0.4, 0]), ("InvertedPendulum", 4, [-0.01] * 4, [0.01] * 4)):
        env = P.ENVIRONMENTS[name]()
        assert torch.allclose(env.reset(low[:, :size]), torch.tensor([a])) and torch.allclose(env.reset(high[:, :size]), torch.tensor([b]))
    swimmer = P.Swimmer()
    obs = swimmer.obs(swimmer.reset(high))                   # joint angles without the first, rates
    assert torch.allclose(obs, torch.full((1, 8), 0.1)) and torch.allclose(swimmer.obs(swimmer.reset(low)), -obs)
    facts = {name: (env.horizon, env.returns, env.limit) for name, env in P.ENVIRONMENTS.items()}
    assert facts == {"MountainCarContinuous": (999, (-100, 100), 1.0), "InvertedPendulum": (1000, (0, 1000), 3.0),
                     "Swimmer": (1000, (-100, 365), 1.0), "swimmer_coarse": (250, (-25, 90), 1.0)}


@pytest.mark.parametrize("name", list(P.ENVIRONMENTS))
def test_float32_rows_are_independent(name):
    env = P.environment(config(env=name), CPU)
    u = torch.rand(5, env.draws, generator=generators(3)[0])
    action = 2 * torch.rand(5, env.actions, generator=generators(4)[0]) - 1
    state, order = env.reset(u), torch.tensor([3, 0, 4, 1, 2])
    assert env.reset(7).shape == (7, state.shape[1]) and env.obs(state).shape == (5, env.observations)
    for _ in range(10):
        after, reward, done = env.step(state, action)
        again = env.step(state[order], action[order])
        torch.testing.assert_close(again[0], after[order], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(again[1], reward[order], atol=1e-5, rtol=1e-5)
        state = after


# ---- networks ----

def sized(hidden=32, env="Swimmer"):
    return P.policy_sizes(P.ENVIRONMENTS[env], hidden)


@pytest.mark.parametrize("env, policy, generator", [
    ("Swimmer", 68610, 528066), ("InvertedPendulum", 67329, 507249), ("MountainCarContinuous", 66817, 499025)])
def test_parameter_counts_of_the_paper(env, policy, generator):
    sizes = sized(256, env)
    assert P.policy_size(sizes) == policy
    count = lambda model: sum(p[0].numel() for p in model.parameters())
    assert count(P.Generator(sizes, 16, 256, 8, generators())) == generator
    if env == "Swimmer":
        assert count(P.Evaluator(sizes, 200, 256, 1.0, generators())) == 170305


def test_slices_equal_an_explicit_loop():
    sizes = sized()
    model, command = P.Generator(sizes, 16, 24, 8, generators(0, 1)).double(), torch.tensor([[0.3, -1.0]] * 2).double()
    theta = model(command)
    assert theta.shape == (2, 2, P.policy_size(sizes))

    def mlp(net, s, x):
        for n, layer in enumerate(net):
            x = x @ layer.weight[s] + layer.bias[s, 0]
            x = x.relu() if n < 2 else x
        return x
    for s in range(2):
        for b in range(2):
            for (W, bias), layer, n_in in zip(P.split_policy(theta[s, b][None], sizes), model.layers, sizes):
                biases = torch.zeros_like(bias[0])
                for n in range(layer.tiles_out):
                    for m in range(layer.tiles_in):
                        z = torch.cat([layer.embeddings[s, m * layer.tiles_out + n], command[s, b, None]])
                        rows = slice(n * layer.slice_out, (n + 1) * layer.slice_out)
                        columns = slice(m * layer.slice_in, (m + 1) * layer.slice_in)
                        block = mlp(layer.weights, s, z).view(layer.slice_out, layer.slice_in)
                        torch.testing.assert_close(W[0, rows, columns], 2 / math.sqrt(n_in) * block, **EXACT)
                        biases[rows] += 2 / math.sqrt(n_in) * mlp(layer.biases, s, z) / layer.tiles_in
                torch.testing.assert_close(bias[0], biases, **EXACT)


def test_policy_forward_equals_linear_layers():
    sizes = sized()
    theta = torch.randn(4, P.policy_size(sizes), generator=generators()[0]).double()
    obs = torch.randn(4, 3, 8, generator=generators(1)[0]).double()
    actions = P.policy_forward(theta, obs, sizes, limit=3.0)
    for n in range(4):
        h, rest = obs[n], theta[n]
        for n_in, n_out in zip(sizes, sizes[1:]):
            W, b, rest = rest[:n_in * n_out].view(n_out, n_in), rest[n_in * n_out:(n_in + 1) * n_out], \
                rest[(n_in + 1) * n_out:]
            h = torch.nn.functional.linear(h, W, b).tanh()
        torch.testing.assert_close(actions[n], 3 * h, **EXACT)


def permuted(theta, sizes):
    """The same policy with its first hidden units renamed."""
    (W1, b1), (W2, b2), (W3, b3) = (tuple(part.clone() for part in layer) for layer in P.split_policy(theta, sizes))
    order = torch.randperm(W1.shape[1], generator=generators(9)[0])
    return torch.cat([part.flatten(1) for part in (W1[:, order], b1[:, order], W2[:, :, order], b2, W3, b3)], 1)


def test_fingerprints_see_what_a_policy_does_not_how():
    sizes = sized()
    theta = torch.randn(1, 3, P.policy_size(sizes), generator=generators()[0]).double()
    other = permuted(theta[0], sizes)[None]
    assert not torch.equal(theta, other)
    finger, flat = (P.Evaluator(sizes, probes, 16, 1.0, generators(1)).double() for probes in (5, 0))
    torch.testing.assert_close(finger(theta), finger(other), **EXACT)
    assert (flat(theta) - flat(other)).abs().min() > 1e-6
    assert finger.states.min() >= 0 and finger.states.max() < 1


def test_evaluator_equals_torch_networks():
    sizes = P.policy_sizes(P.InvertedPendulum(), 16)
    V = P.Evaluator(sizes, 5, 12, 50.0, generators(1, 2), limit=3.0)
    theta = torch.randn(2, 4, P.policy_size(sizes), generator=generators()[0])
    for s in range(2):
        layers = []
        for layer in V.net:
            layers += [torch.nn.Linear(*layer.weight.shape[1:]), torch.nn.ReLU()]
            layers[-2].load_state_dict({"weight": layer.weight[s].T, "bias": layer.bias[s, 0]})
        for k in range(4):
            actions = P.policy_forward(theta[s, k:k + 1], V.states[s][None], sizes, 3.0).flatten()
            wanted = 50 * torch.nn.Sequential(*layers[:-1])(actions)
            torch.testing.assert_close(V(theta)[s, k], wanted[0], atol=1e-4, rtol=1e-4)


def test_first_weights():
    layer = P.Linear(25, 4000, generators())
    for part in (layer.weight, layer.bias):                  # torch's: uniform up to 1 / sqrt(25)
        assert 0.199 < part.abs().max() <= 0.2 and abs(part.mean()) < 0.005
        assert part.std().item() == pytest.approx(0.2 / math.sqrt(3), rel=0.03)
    net = P.Hypernet(64, 64, 16, 16, 8, 500, generators())
    assert net.embeddings.std().item() == pytest.approx(1, rel=0.05) and abs(net.embeddings.mean()) < 0.05
    states = P.Evaluator(sized(), 500, 8, 1.0, generators()).states
    assert states.min() >= 0 and states.max() > 0.95 and states.mean().item() == pytest.approx(0.5, abs=0.03)


def test_hindsight_loss_by_hand():
    G = P.Generator(sized(16), 16, 8, 4, generators(1, 2))
    theta, returns = torch.randn(2, 3, P.policy_size(sized(16)), generator=generators()[0]), torch.tensor([[1., 2, 3], [4, 5, 6]])
    wanted = [sum((G(returns / 10)[s, i] - theta[s, i]).square().mean() for i in range(3)) / 3 for s in range(2)]
    torch.testing.assert_close(P.hindsight_loss(G, theta, returns, 10.0), torch.stack(wanted))
    cfg = config(iterations=2)
    before, _ = P.networks(cfg, P.environment(cfg, CPU), Alone(0))
    after = P.train(cfg, Alone(0), "x", 0, P.environment(cfg, CPU), "hindsight")[0]
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_each_step_moves_its_own_network_only():
    sizes = sized(16)
    G, V = P.Generator(sizes, 16, 16, 8, generators()), P.Evaluator(sizes, 5, 16, 1.0, generators())
    snapshot = lambda model: [p.detach().clone() for p in model.parameters()]
    same = lambda a, b: [torch.equal(x, y) for x, y in zip(a, b)]
    theta, returns = torch.randn(1, 6, P.policy_size(sizes)), torch.randn(1, 6)
    g, v = snapshot(G), snapshot(V)
    of_g, of_v = [*G.parameters()], [*V.parameters()]
    P.descend(P.generator_loss(G, V, returns, 1.0), of_g, torch.optim.Adam(of_g), Alone(0))
    assert all(same(v, snapshot(V))) and not any(same(g, snapshot(G)))
    g = snapshot(G)
    P.descend(P.evaluator_loss(V, theta, returns), of_v, torch.optim.Adam(of_v), Alone(0))
    assert all(same(g, snapshot(G))) and not any(same(v, snapshot(V)))         # the probing states too


def test_generator_alone_reaches_its_commands():
    """With V replaced by the mean of theta, L_G falls below a thousandth of the commands' variance."""
    G = P.Generator(sized(16), 16, 32, 8, generators())
    parameters = [*G.parameters()]
    adam, commands = torch.optim.Adam(parameters, lr=1e-3), torch.linspace(-0.5, 0.5, 16)[None]
    for _ in range(400):
        loss = P.descend(P.generator_loss(G, lambda theta: theta.mean(-1), commands, 1.0), parameters, adam, Alone(0))
    assert loss.item() < 1e-3 * commands.var().item()


def test_evaluator_overfits_sixteen_policies():
    V = P.Evaluator(sized(), 32, 64, 1.0, generators())
    theta, returns = 0.3 * torch.randn(1, 16, P.policy_size(sized()), generator=generators(1)[0]), \
        torch.randn(1, 16, generator=generators(2)[0])
    parameters = [*V.parameters()]
    adam = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(500):
        loss = P.descend(P.evaluator_loss(V, theta, returns), parameters, adam, Alone(0))
    assert loss.item() < 0.01 * returns.var().item()


# ---- replay, rollouts, measures ----

def test_recency():
    p = P.recency_probabilities(5, 1.1)
    assert p.tolist() == pytest.approx([0.079, 0.101, 0.139, 0.217, 0.464], abs=6e-4) and p.sum() == 1
    assert (p[-1] / p[0]).item() == pytest.approx(5**1.1)
    assert P.recency_probabilities(4, 0.0).tolist() == [0.25] * 4


def test_replay_is_drawn_as_said():
    """Chi-square over 1e5 draws of 5 iterations of 2 policies; nothing beyond `count`."""
    cfg = config(policies=2, batch=10)
    returns = torch.arange(20.0).expand(1, 20)
    theta, draw, counts = returns[..., None], generators(5), torch.zeros(20)
    for _ in range(10000):
        own, got = P.sample_replay(theta, returns, 10, cfg, draw)
        assert torch.equal(own[..., 0], got)
        counts += torch.bincount(got[0].long(), minlength=20)
    expected = P.recency_probabilities(5, 1.1).repeat_interleave(2) / 2 * 1e5
    assert counts[10:].sum() == 0
    assert ((counts[:10] - expected) ** 2 / expected).sum() < 27.9             # 9 degrees, P = 0.001


def test_replay_without_recency_is_uniform():
    cfg, n = config(policies=2, recency=0.0, batch=4000), 40
    returns = torch.arange(n).float()[None]
    _, drawn = P.sample_replay(torch.zeros(1, n, 1), returns, n, dataclasses.replace(cfg), generators())
    many = torch.cat([P.sample_replay(torch.zeros(1, n, 1), returns, n, cfg, generators(seed))[1] for seed in range(100)], 1)
    counts = torch.bincount(many.long().flatten(), minlength=n).float()
    assert drawn.shape == (1, n) and ((counts - 100).square() / 100).sum() < 75     # chi-square, 39 degrees


class Countdown:
    """Ends after `state` steps, reward 1 a step: for the rollout's bookkeeping."""
    observations, actions, limit, horizon, draws = 2, 1, 1.0, 10, 1

    def reset(self, u):
        return (u * 10).round()

    def obs(self, state):
        return torch.cat([state, state**2], 1)

    def step(self, state, action):
        reward = torch.where(state[:, 0] < 1, torch.nan, 1)  # what happens after the end is not seen
        return state - 1, reward, state[:, 0] <= 1


def test_rollout_freezes_what_has_ended():
    noise = torch.tensor([[[0.2], [0.5]], [[0.3], [1.5]]])   # lives of 2, 5, 3 steps, and too long
    moments = torch.zeros(2, 2), torch.ones(2, 2)
    returns, (count, total, squares) = P.rollout(Countdown(), lambda obs: obs[:, :1], moments, noise)
    assert returns.tolist() == [[2, 5], [3, 10]] and count[:, 0].tolist() == [7, 13]
    lives = [[2, 1, 5, 4, 3, 2, 1], [3, 2, 1, *range(15, 5, -1)]]
    assert total[:, 0].tolist() == [sum(life) for life in lives]
    assert squares[:, 1].tolist() == [sum(s**4 for s in life) for life in lives]
    swapped, _ = P.rollout(Countdown(), lambda obs: obs[:, :1], moments, noise[:, [1, 0]])
    assert torch.equal(swapped, returns[:, [1, 0]])          # a permuted batch


def test_statistics_of_a_rollout_are_wide():
    class Still(Countdown):
        horizon = 1000
        reset = staticmethod(lambda u: torch.cat([0 * u + 9.81, 1000 + u], 1))
        obs = staticmethod(lambda state: state)
        step = staticmethod(lambda state, action: (state, torch.ones(len(state)), torch.zeros(len(state)).bool()))
    own, starts = P.Normaliser(1, 2, CPU), torch.rand(1, 50, 1, generator=generators()[0])
    own.add(*P.rollout(Still(), lambda obs: obs[:, :1], own.moments(), starts)[1])
    mean, std = own.moments()
    assert std[0, 0] < 1e-4 and ((torch.tensor(9.81) - mean[0, 0]) / std[0, 0]).abs() < 1
    assert std[0, 1].item() == pytest.approx((1000 + starts).double().std(unbiased=False).item(), rel=0.01)


def test_normaliser():
    own = P.Normaliser(1, 2, CPU)
    mean, std = own.moments()
    assert mean.tolist() == [[0, 0]] and std.tolist() == [[1, 1]]              # raw at first
    x = torch.randn(50, 2, generator=generators()[0]).double() + 3
    own.add(torch.tensor([[50.0]]), x.sum(0)[None], x.square().sum(0)[None])
    mean, std = own.moments()
    torch.testing.assert_close(mean[0].double(), x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std[0].double(), x.std(0, unbiased=False), atol=1e-5, rtol=1e-5)


def test_tracking_error_and_pearson_by_hand():
    commands, achieved = torch.tensor([[0.0, 5.0, 10.0], [0, 5, 10]]), torch.tensor([[1.0, 5.0, 8.0], [10, 5, 0]])
    assert P.tracking_error(commands, achieved).tolist() == pytest.approx([0.1, 20 / 30])
    r = np.corrcoef(commands[0], achieved[0])[0, 1]
    assert P.pearson(commands, achieved).tolist() == pytest.approx([r, -1.0])
    assert P.spectrum(torch.tensor([[3.0, -1.0, 7.0]]), 5).tolist() == [[-1, 1, 3, 5, 7]]


# ---- the loop ----

def plain_loop(cfg, seed, iterations):
    """The paper's loop, one seed and one policy at a time, with torch.optim and Python lists."""
    env, run = P.environment(cfg, CPU), Alone(seed)
    G, V = P.networks(cfg, env, run)
    sizes, scale, (draw,) = P.policy_sizes(env, cfg.policy_hidden), 200.0, [P.stream(seed, 0, CPU)]
    adam_g = torch.optim.Adam(G.parameters(), lr=cfg.generator_rate)
    adam_v = torch.optim.Adam(V.parameters(), lr=cfg.evaluator_rate)
    thetas, returns, seen, commands = [], [], [], []
    for iteration in range(iterations):
        c = max(returns) + cfg.increment if returns else 1.0
        commands.append(c)
        if returns:
            torch.rand(cfg.policies, generator=draw)         # the mixture's numbers, not used
        with torch.no_grad():
            theta = G(torch.tensor([[c / scale]]))[0, 0]
        theta = theta + cfg.noise * torch.randn(1, len(theta), generator=draw)[0]
        obs = np.array(seen)
        mean, std = (obs.mean(0), obs.std(0)) if seen else (np.zeros(2), np.ones(2))
        p, total = -0.6 + 0.2 * torch.rand(1, 1, generator=draw)[0, 0].item(), 0.0
        state = torch.tensor([[p, 0.0]])
        for _ in range(env.horizon):
            seen.append(state[0].numpy())
            normal = (state - torch.tensor(mean).float()) / (torch.tensor(std).float() + 1e-8)
            state, reward, done = env.step(state, P.policy_forward(theta[None], normal[None], sizes)[0])
            total += reward.item()
            if done:
                break
        thetas.append(theta), returns.append(total)
        n = len(returns)

        def minibatch():
            p = np.array([(n - i) ** -cfg.recency for i in range(n)])
            u = torch.rand(2, min(cfg.batch, n), generator=draw)
            index = [min(int(np.searchsorted(np.cumsum(p / p.sum()), value)), n - 1) for value in u[0].tolist()]
            return torch.stack([thetas[i] for i in index])[None], torch.tensor([[returns[i] for i in index]])
        for _ in range(4):
            theta_i, r_i = minibatch()
            adam_v.zero_grad()
            (V(theta_i) - r_i).square().mean().backward()
            adam_v.step()
        for _ in range(19):
            _, r_i = minibatch()
            adam_g.zero_grad()
            (V(G(r_i / scale)) - r_i).square().mean().backward()
            adam_g.step()
    return G, V, returns, commands


def test_one_policy_without_mixture_is_the_papers_loop():
    cfg = config(policies=1, command_mix=0.0, increment=20.0, iterations=4, schedule=False, generator_rate=1e-4,
                 return_scale=1.0)
    G, V, returns, commands = plain_loop(cfg, 3, 4)
    g, v, _, own = P.train(cfg, Alone(3), "x", 0, P.environment(cfg, CPU))
    assert commands[0] == 1 and commands[1] == returns[0] + 20
    assert own[0].tolist() == pytest.approx(returns, abs=1e-3)
    for a, b in zip([*G.parameters(), *V.parameters()], [*g.parameters(), *v.parameters()]):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_seeds_trained_side_by_side_equal_seeds_alone():
    cfg = config(iterations=4, policies=3)
    env = P.environment(cfg, CPU)
    joint, alone = P.train(cfg, Alone(4, 5, 6), "x", 0, env), P.train(cfg, Alone(5), "x", 0, env)
    torch.testing.assert_close(joint[3][1], alone[3][0], atol=1e-4, rtol=1e-4)
    for a, b in zip(joint[0].parameters(), alone[0].parameters()):
        torch.testing.assert_close(a[1], b[0], atol=1e-4, rtol=1e-3)


def test_commands_of_an_iteration(monkeypatch):
    """First 1, then the best + increment for half, anywhere from worst to there for the others."""
    cfg, asked = config(iterations=3, policies=8, command_mix=0.5, increment=10.0), []
    real = P.Generator.forward
    monkeypatch.setattr(P.Generator, "forward", lambda self, command: (asked.append(200 * command), real(self, command))[1])
    returns = P.train(cfg, Alone(0, 1), "x", 0, P.environment(cfg, CPU), "none")[3]
    collected = [command for command in asked if command.shape[1] == 8]
    assert (collected[0] == 1).all()
    for n, command in enumerate(collected[1:], 1):
        best, worst = returns[:, :8 * n].amax(1), returns[:, :8 * n].amin(1)
        torch.testing.assert_close(command[:, 4:], (best + 10)[:, None].expand(2, 4), atol=1e-3, rtol=1e-5)
    for s in range(2):                                       # the same numbers, drawn by hand
        draw, size = P.stream(s, 0, CPU), P.policy_size(P.policy_sizes(P.MountainCarContinuous(), 16))
        for n, command in enumerate(collected):
            u = torch.rand(8, generator=draw) if n else None
            torch.randn(8, size, generator=draw), torch.rand(8, 1, generator=draw)
            if n:
                worst, top = returns[s, :8 * n].min(), returns[s, :8 * n].max() + 10
                torch.testing.assert_close(command[s, :4], worst + (top - worst) * u[:4], atol=1e-2, rtol=1e-4)


def test_each_policy_has_its_own_noise_and_start(monkeypatch):
    cfg, played, real = config(iterations=2, policies=3), [], P.rollout
    monkeypatch.setattr(P, "rollout", lambda env, act, moments, starts, step=None: (played.append(starts), real(
        env, act, moments, starts, step))[1])
    stored = {}
    monkeypatch.setattr(Alone, "steps", lambda self, stage, total, state: (stored.update(state), real_steps(
        self, stage, total, state))[1])
    P.train(cfg, Alone(0), "x", 0, P.environment(cfg, CPU), "none")
    assert all(len(starts.flatten().unique()) == 3 for starts in played if starts.shape[1] == 3)
    G, draw = P.networks(cfg, P.environment(cfg, CPU), Alone(0))[0], P.stream(0, 0, CPU)
    clean = G(torch.full((1, 3), 1 / 200))[0].detach()
    noise = torch.randn(3, clean.shape[1], generator=draw)
    torch.testing.assert_close(stored["replay"][0, :3], clean + 0.1 * noise)


def test_commands_are_tested_one_by_one():
    cfg = config(eval_episodes=3)
    env, run, commands = P.environment(cfg, CPU), Alone(4, 5), torch.tensor([[0.0, 50.0], [-50.0, 90.0]])
    G, V = P.networks(cfg, env, run)
    normaliser = P.Normaliser(2, 2, CPU)
    normaliser.add(torch.full((2, 1), 10.0), torch.full((2, 2), 5.0), torch.full((2, 2), 40.0))
    together = P.test_commands(cfg, run, env, G, normaliser, commands)
    sizes, (mean, std) = P.policy_sizes(env, cfg.policy_hidden), normaliser.moments()
    for s, seed in enumerate(run.seeds):
        starts = torch.rand(3, 1, generator=P.stream(seed, 10, CPU))           # the same for both commands
        for i in range(2):
            theta = G(commands / 200)[s, i].detach()
            act = P.follow(theta.expand(1, 3, -1), env, sizes)
            wanted = P.rollout(env, act, (mean[s:s + 1], std[s:s + 1]), starts[None])[0].mean()
            assert together[s, i].item() == pytest.approx(wanted.item(), abs=1e-3)
    run.stage, run.step = "x", 0
    P.report_commands(cfg, run, env, G, V, normaliser, torch.tensor([[0.0, 50.0], [-50.0, 90.0]]))
    assert [row["command"] for row in run.rows if row["seed"] == 5] == pytest.approx([-50 + 7 * i for i in range(21)])
    for row in run.rows:
        s = row["seed"] - 4
        c = torch.full((2, 1), row["command"])
        assert row["predicted"] == pytest.approx(V(G(c / 200))[s, 0].item(), abs=1e-3)
        assert row["achieved"] == pytest.approx(P.test_commands(cfg, run, env, G, normaliser, c)[s, 0].item(), abs=1e-2)


def test_paper_preset():
    cfg = P.Config(**P.PRESETS["paper"])
    assert (cfg.env, cfg.policies, cfg.command_mix, cfg.increment, cfg.noise, cfg.recency) == ("Swimmer", 1, 0, 20, 0.1, 1.1)
    assert (cfg.generator_rate, cfg.evaluator_rate, cfg.schedule, cfg.return_scale) == (2e-6, 5e-3, False, 1)
    assert (cfg.policy_hidden, cfg.hyper_hidden, cfg.evaluator_hidden, cfg.probes, cfg.z_dim) == (256, 256, 256, 200, 8)
    assert (cfg.generator_steps, cfg.evaluator_steps, cfg.batch, cfg.slice_size, cfg.iterations) == (19, 4, 16, 16, 3000)


def test_random_search_learns_nothing_and_ars_learns():
    cfg = config(iterations=3)
    env, run = P.environment(cfg, CPU), Alone(0)
    fresh = P.networks(cfg, env, run)[0]
    after = P.train(cfg, run, "x", 1, env, "none")[0]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), after.parameters()))

    class Bowl:                                              # reward: minus the distance of the action from 2 x
        observations, actions, limit, horizon, draws, returns = 1, 1, 5.0, 5, 1, (0, 1)
        reset = staticmethod(lambda u: 2 * u - 1)
        obs = staticmethod(lambda state: state)
        step = staticmethod(lambda state, action: (-state, -(action - 2 * state).abs()[:, 0],
                                                   torch.zeros(len(state), dtype=torch.bool)))
    cfg = config(iterations=160, policies=16, ars_step=0.2)
    _, last = P.ars(cfg, Alone(0, 1), Bowl())
    assert (last > -1.0).all()                               # at first about -5


def test_the_generators_rate_rises_then_falls(monkeypatch):
    """A tenth of the rate at first, all of it after a fifth of the iterations, a tenth at the end."""
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: (rates.append(adam.param_groups[0]["lr"]), step(adam))[1])
    for schedule in (True, False):
        rates.clear()
        cfg = config(iterations=10, generator_steps=1, evaluator_steps=0, schedule=schedule, generator_rate=1e-3)
        P.train(cfg, Alone(0), "x", 0, P.environment(cfg, CPU))
        shape = [0.1, 0.55, *(1.225 - 1.125 * n / 10 for n in range(2, 10))] if schedule else [1.0] * 10
        assert rates == pytest.approx([1e-3 * part for part in shape])


def test_experiment_compares_what_its_names_say(monkeypatch):
    """Which rule and which configuration each stage is trained with; all with the same episodes."""
    seen, real = {}, P.train

    def spy(cfg, run, stage, order, env, rule="evaluator", report=()):
        seen[stage] = order, rule, cfg
        return real(cfg, run, stage, order, env, rule, report)
    monkeypatch.setattr(P, "train", spy)
    cfg = config(iterations=2)
    P.experiment(cfg, Alone(0))
    assert {stage: row[1] for stage, row in seen.items()} == {
        "generator": "evaluator", "random search": "none", "hindsight": "hindsight", "no fingerprint": "evaluator",
        "uniform replay": "evaluator"}
    assert len({row[0] for row in seen.values()}) == 5       # streams of their own
    for stage, change in (("generator", {}), ("random search", {}), ("hindsight", {}), ("no fingerprint", {"probes": 0}),
                          ("uniform replay", {"recency": 0.0})):
        assert seen[stage][2] == dataclasses.replace(cfg, **change)


def test_ars_takes_the_best_directions_by_hand(monkeypatch):
    """One update against plain loops: mirrored returns, the best by their maximum, the step's scale."""
    class Line:                                              # return of a policy: its only weight, cubed
        observations, actions, limit, horizon, draws, returns = 1, 1, 100.0, 1, 1, (0, 1)
        reset = staticmethod(lambda u: torch.ones_like(u))
        obs = staticmethod(lambda state: state)
        step = staticmethod(lambda state, action: (state, action[:, 0] ** 3, torch.ones(len(state), dtype=torch.bool)))
    cfg, played, real = config(iterations=1, policies=16, ars_step=0.5, ars_noise=0.3), [], P.rollout
    monkeypatch.setattr(P, "rollout", lambda *a: (played.append(real(*a)), played[-1])[1])
    P.ars(cfg, Alone(3), Line())
    delta = torch.randn(8, 1, 1, generator=P.stream(3, 5, CPU)).flatten().tolist()
    plus, minus = [(0.3 * d) ** 3 for d in delta], [(-0.3 * d) ** 3 for d in delta]
    assert played[0][0][0].tolist() == pytest.approx(plus + minus, rel=1e-4, abs=1e-6)
    top = sorted(range(8), key=lambda k: -max(plus[k], minus[k]))[:4]
    sigma = np.std([r[k] for r in (plus, minus) for k in top], ddof=1)
    weight = 0.5 / (4 * sigma) * sum((plus[k] - minus[k]) * delta[k] for k in top)
    # the last policy, on observations that are now constant: normalised to 0
    mean, std = 1.0, 0.0
    assert played[1][0][0, 0].item() == pytest.approx((weight * (1 - mean) / (std + 1e-8)) ** 3, abs=1e-6)
    states = []
    monkeypatch.setattr(Alone, "steps", lambda self, stage, total, state: (
        states.append(state), real_steps(self, stage, total, state))[1])
    P.ars(cfg, Alone(3), Line())
    assert states[0]["M"].item() == pytest.approx(weight, rel=1e-3)


# ---- short runs reach expected returns ----

@pytest.mark.parametrize("control", [False, True])
def test_short_run_tracks_commands(control):
    """40 iterations at the sizes of quick. Tracking error over the seeds 100-109: median 0.159, from 0.08 to 0.49 (one
    collapsed); control, random search: 0.36 to 0.41. 2026-11-25, AMD EPYC, torch 2.13.0. Judged: the median of 4 seeds."""
    cfg, rule = P.Config(iterations=40, log_every=40), "none" if control else "evaluator"
    run = Alone(0, 1, 2, 3)
    _, _, _, returns = P.train(cfg, run, "x", 0, P.environment(cfg, CPU), rule, (40,))
    table = torch.tensor([[row["command"], row["achieved"]] for row in run.rows if "command" in row]).view(4, 21, 2)
    error = P.tracking_error(table[..., 0], table[..., 1]).sort().values[1:3].mean().item()
    assert error > 0.33 if control else error < 0.3
    assert (returns.amax(1) > 80).sum() >= 2                 # noise alone finds the goal, too
    assert all(math.isfinite(row["evaluator_loss"]) for row in run.rows if "evaluator_loss" in row)


# ---- behaviour ----

SMOKE = ["--preset", "smoke"]


def comparable(folder):
    """All numbers of a summary that do not depend on the clock."""
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("headline", "per_seed", "beside")}


def run_here(capsys, *options):
    """main() in this process -> (exit status, standard output, standard error)."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        P.main([str(option) for option in options])
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_smoke_run_then_ask(tmp_path, capsys):
    status, out, error = run_here(capsys, *SMOKE, "--num-seeds", 2, "--out", tmp_path / "a")
    assert status == 0, error
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert {"best_seen_at_least_90", "command_best_return", "tracking_pearson", "tracking_error", "ars_best",
            "untrained_tracking_error", "random_search_best", "hindsight_tracking_error"} <= set(summary["headline"])
    for row in summary["per_seed"]:                          # every headline again, from the rows below it
        head, last = row["headline"], lambda stage: torch.tensor(row["tests"][stage]["3"]).T[:2, None]
        for stage, key in (("generator", ""), ("hindsight", "hindsight_"), ("no fingerprint", "no_fingerprint_"),
                           ("uniform replay", "uniform_replay_")):
            assert head[key + "tracking_error"] == pytest.approx(P.tracking_error(*last(stage)).item(), abs=1e-3)
            assert head[key + "tracking_pearson"] == pytest.approx(P.pearson(*last(stage)).item(), abs=1e-2)
        for stage, key in (("generator", "best_seen"), ("random search", "random_search_best"), ("ARS", "ars_best")):
            assert head[key] == pytest.approx(row["curves"][stage][-1][1], abs=1e-3)
        assert head["command_best_return"] == pytest.approx(row["curves"]["generator"][-1][2])
        assert head["best_seen_at_least_90"] == (head["best_seen"] >= 90)
        assert row["curves"]["generator"][-1][3] <= 3 * 2 * 100                # steps of its episodes
    assert (tmp_path / "a" / "figure.png").stat().st_size > 10_000
    path = tmp_path / "a" / "checkpoint.pt"
    status, out, error = run_here(capsys, *SMOKE, "--seed", 1, "--ask", "75,-20", "--checkpoint", path,
                                  "--out", tmp_path / "b")
    assert status == 0 and "asked_75" in out and "asked_-20" in out, error
    written = np.load(tmp_path / "b" / "policies.npz")
    cfg = config(seed=1)
    state = torch.load(path, weights_only=True)["stages"]["generator"]["state"]["generator"]
    G, _ = P.networks(cfg, P.environment(cfg, CPU), Alone(1))
    G.load_state_dict({name: part[1:] for name, part in state.items()})        # the second seed's
    np.testing.assert_allclose(written["theta"], G(torch.tensor([[75.0, -20.0]]) / 200).detach(), atol=1e-6)
    env, asked = P.environment(cfg, CPU), json.loads((tmp_path / "b" / "summary.json").read_text())["per_seed"][0]
    starts = torch.rand(1, cfg.eval_episodes, 1, generator=P.stream(1, 10, CPU))
    mean, std = torch.tensor(written["mean"]), torch.tensor(written["std"])    # the file alone plays the policy
    for i, c in enumerate((75.0, -20.0)):
        theta = torch.tensor(written["theta"][0, i])
        act = lambda obs: written["limit"].item() * P.policy_forward(theta.expand(len(obs), -1), obs[:, None],
                                                                     tuple(written["sizes"].tolist()))[:, 0]
        assert P.rollout(env, act, (mean, std), starts)[0].mean().item() == pytest.approx(
            asked["headline"][f"asked_{c}"], abs=1e-3)
    for options, message in ((["--policy-hidden", 32], "has --policy-hidden 16, not 32"), (["--z-dim", 4], "--z-dim 8"),
                             (["--horizon", 50], "--horizon 100"), (["--seed", 3], "2 seed(s)"),
                             (["--env", "Swimmer"], "has --env MountainCarContinuous"), (["--seed", 9], "2 seed(s)")):
        status, _, error = run_here(capsys, *SMOKE, "--ask", 5, "--checkpoint", path, *options, "--out", tmp_path / "c")
        assert status == 2 and message in error and not (tmp_path / "c").exists()


def test_asking_needs_no_folder_of_its_own(tmp_path, capsys, monkeypatch):
    """The docstring's two commands, one after the other, with default folders."""
    monkeypatch.chdir(tmp_path)
    quiet = ["--no-baselines", "--no-ablations"]
    assert run_here(capsys, *SMOKE, *quiet)[0] == 0
    checkpoint = "runs/policy_gen/smoke-seed0/checkpoint.pt"
    for asked in (75, 20):
        status, _, error = run_here(capsys, *SMOKE, *quiet, "--ask", asked, "--checkpoint", checkpoint)
        assert status == 0, error
        assert (tmp_path / "runs" / "policy_gen" / f"smoke-seed0-ask{asked}" / "policies.npz").exists()


@pytest.mark.parametrize("moment", ["generator 3/", "hindsight 4/"])
def test_resume_after_kill_equals_uninterrupted(moment, tmp_path, script):
    options = [*SMOKE, "--num-seeds", 2, "--iterations", 8]
    whole = script("policy_gen.py", *options, "--out", tmp_path / "whole", wait=False)   # beside the other
    process = script("policy_gen.py", *options, "--out", tmp_path / "cut", wait=False)
    while moment not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    done = script("policy_gen.py", *options, "--out", tmp_path / "cut", "--resume")
    assert done.returncode == 0 and "(resumed)" in done.stdout
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_two_processes_equal_one(tmp_path, capsys, script):
    options = [*SMOKE, "--device", "cpu", "--no-baselines", "--no-ablations"]
    assert run_here(capsys, *options, "--out", tmp_path / "one")[0] == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = script("policy_gen.py", *options, "--out", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    states = [torch.load(tmp_path / name / "checkpoint.pt")["stages"]["generator"]["state"] for name in ("one", "two")]
    for network in ("generator", "evaluator"):
        for name in states[0][network]:
            torch.testing.assert_close(states[0][network][name], states[1][network][name], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("options, message", [
    (["--polices", 3], "--polices"), (["--policy-hidden", 40], "not a multiple of --slice-size 16"),
    (["--env", "Hopper"], "no environment 'Hopper': MountainCarContinuous"), (["--ask", "nan", "--checkpoint", "x"], "finite"),
    (["--ask", "high", "--checkpoint", "x"], "finite"), (["--ask", 75], "go together"), (["--ask", ","], "finite"), (["--ask", "1e30"], "finite"), (["--noise", -1], "--noise must be"),
    (["--ask", 75, "--checkpoint", "none.pt"], "none.pt is missing"), (["--env", "gym:NoSuch-v0"], "NoSuch"),
    (["--env", "gym:CartPole-v1"], "continuous actions"), (["--env", "gym:Blackjack-v1"], "flat observations")])
def test_bad_options(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = run_here(capsys, *SMOKE, *options)
    assert status == 2 and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_gym_without_gymnasium(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    status, _, error = run_here(capsys, *SMOKE, "--env", "gym:Pendulum-v1", "--out", tmp_path / "a")
    assert status == 2 and "pip install" in error and not (tmp_path / "a").exists()


def test_gym_bridge_equals_our_own_mountain_car(capsys, tmp_path):
    """The same policies from the same first states: the same returns."""
    cfg = config(env="gym:MountainCarContinuous-v0", horizon=60)
    bridge, own = P.environment(cfg, CPU), P.environment(config(horizon=60), CPU)
    assert (bridge.observations, bridge.actions, bridge.limit) == (2, 1, 1.0)
    theta = torch.randn(1, 3, P.policy_size(P.policy_sizes(own, 16)), generator=generators()[0])
    act, moments = P.follow(theta, own, P.policy_sizes(own, 16)), (torch.zeros(1, 2), torch.ones(1, 2))
    noise = torch.rand(1, 3, 1, generator=generators(1)[0])
    first = bridge.reset(noise[0])
    own.reset = lambda u: first
    returns, (count, *_) = P.rollout(bridge, act, moments, noise)
    torch.testing.assert_close(returns, P.rollout(own, act, moments, noise)[0], atol=1e-3, rtol=1e-3)
    assert count.item() == 180
    status, _, error = run_here(capsys, *SMOKE, "--env", "gym:Pendulum-v1", "--iterations", 1, "--no-baselines",
                                "--no-ablations", "--horizon", 10, "--out", tmp_path / "a")
    assert status == 0, error


def test_help_shows_every_field(capsys):
    status, out, _ = run_here(capsys, "--help")
    words = " ".join(out.split())
    assert status == 0 and "[smoke 3 | quick 250 | paper 3000]" in words
    for field in dataclasses.fields(P.Config):
        assert "--" + field.name.replace("_", "-") in words
