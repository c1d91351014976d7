"""rcgvf.py: returns and rewards by plain loops, the lock, MiniGrid against the real package, memories, a short run."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import rcgvf as P

CPU = torch.device("cpu")
LOCK = P.Config(**P.PRESETS["smoke"])
GRID = P.Config(**{**P.PRESETS["minigrid"], "env": "MultiRoom-N2-S4", "envs": 4, "rollout": 8, "minibatch": 16,
                   "hidden": 8, "betas": P.Config.betas, "cumulants": 8, "predictor_hidden": 16, "frames": 96,
                   "log_every": 1})


class Alone:
    """A `Run` that keeps its rows and the state of its last stage."""
    device, compile = CPU, staticmethod(lambda function: function)

    def __init__(self, seed=0):
        self.seed, self.rows = seed, []

    def steps(self, stage, total, **state):
        self.stage, self.state = stage, state
        for self.step in range(total):
            yield self.step

    def log(self, **numbers):
        self.rows.append({"stage": self.stage, "step": self.step + 1, **numbers})


def test_td_returns_by_plain_loops():
    """(1 - lambda) sum_n lambda^(n - 1) of the n-step returns; nothing comes from beyond an end."""
    torch.manual_seed(0)
    T, N, K, d, gamma, lam = 6, 4, 2, 3, 0.7, 0.9
    z, v, done = torch.randn(T, N, d), torch.randn(T + 1, N, K, d), torch.rand(T, N) < 0.3
    G = P.td_returns(z[:, :, None], v, done, gamma, lam)

    def n_step(t, n, b, k):
        total, weight = torch.zeros(d), 1.0
        for i in range(n):
            total = total + weight * z[t + i, b]
            weight *= 0.0 if done[t + i, b] else gamma
        return total + weight * v[t + n, b, k]
    for t, b, k in itertools.product(range(T), range(N), range(K)):
        expected = sum((1 - lam) * lam**(n - 1) * n_step(t, n, b, k) for n in range(1, T - t))
        torch.testing.assert_close(G[t, b, k], expected + lam**(T - t - 1) * n_step(t, T - t, b, k))


def test_return_minus_value_is_the_generalised_advantage():
    torch.manual_seed(0)
    reward, value, done = torch.randn(7, 3), torch.randn(8, 3), torch.rand(7, 3) < 0.3
    A = P.td_returns(reward, value, done, 0.99, 0.95) - value[:-1]
    for b in range(3):
        later = 0.0
        for t in reversed(range(7)):
            later = reward[t, b] - value[t, b] + ~done[t, b] * 0.99 * (value[t + 1, b] + 0.95 * later)
            torch.testing.assert_close(A[t, b], later)


def test_intrinsic_rewards_by_plain_loops():
    torch.manual_seed(0)
    v, G = torch.randn(4, 3, 2, 5), torch.randn(4, 3, 2, 5)
    found = {method: P.intrinsic_reward(v, G, method) for method in ("rcgvf", "no_future", "error", "disagreement")}
    one = {method: P.intrinsic_reward(v[:, :, :1], G[:, :, :1], method) for method in ("rnd", "rnd4")}
    for t, b in itertools.product(range(4), range(3)):
        spread = [v[t, b, :, j].var().item() for j in range(5)]                # (v^1 - v^2)^2 / 2
        assert spread[0] == pytest.approx((v[t, b, 0, 0] - v[t, b, 1, 0]).item()**2 / 2, rel=1e-5)
        error = [((G[t, b, :, j] - v[t, b, :, j])**2).mean().item() for j in range(5)]
        product = sum(s * e for s, e in zip(spread, error))
        expected = {"rcgvf": product, "error": sum(error), "disagreement": sum(spread)}
        for method in found:
            assert found[method][t, b].item() == pytest.approx(expected[method.replace("no_future", "rcgvf")], rel=1e-4)
        for method, power in (("rnd", 1), ("rnd4", 4)):
            assert one[method][t, b] == pytest.approx((G[t, b, 0] - v[t, b, 0]).norm().item()**power, rel=1e-4)


def test_ppo_loss_by_hand():
    torch.manual_seed(0)
    logits, value, action = torch.randn(2, 3, 4), torch.randn(2, 3), torch.randint(4, (2, 3))
    batch = {name: torch.randn(2, 3) for name in ("advantage", "value", "return")}
    batch |= {"action": action, "log_p": -torch.rand(2, 3) - 1}
    expected = 0.0
    for i, j in itertools.product(range(2), range(3)):
        log_p, A = logits[i, j].log_softmax(0), batch["advantage"][i, j]
        rho = (log_p[action[i, j]] - batch["log_p"][i, j]).exp()
        old, goal = batch["value"][i, j], batch["return"][i, j]
        error = max((value[i, j] - goal)**2, (old + (value[i, j] - old).clamp(-0.2, 0.2) - goal)**2)
        entropy = -(log_p.exp() * log_p).sum()
        expected += (error / 2 - min(rho * A, rho.clamp(0.8, 1.2) * A) - 0.03 * entropy) / 6
    torch.testing.assert_close(P.ppo_loss(logits, value, batch, 0.03), expected)


def test_the_lock():
    torch.manual_seed(0)
    lock, total, rows = P.DiabolicalLock(12, 500, CPU), torch.zeros(500), []
    torch.testing.assert_close(lock.mix @ lock.mix.T, 16 * torch.eye(16))
    assert (lock.observe() - lock.mix[lock.row] - lock.mix[3 + lock.at]).std() == pytest.approx(0.4, rel=0.05)
    for t in range(12):                                      # the right actions return 9
        rows.append(lock.row.clone())
        reward, done = lock.step(lock.opt[lock.row, lock.at])
        total += reward
        assert done.all() == (t == 11) and lock.farthest == t + 1
    torch.testing.assert_close(total, torch.full((500,), 9.0))
    assert all(0.4 < row.double().mean() < 0.6 for row in rows) and (lock.at == 0).all()       # rows are random
    for t in range(24):                                      # a wrong one is final, until the end
        reward, done = lock.step((lock.opt[lock.row.clamp(max=1), lock.at] + (t % 12 == 3)) % 10)
        assert (lock.row == 2).all() == (3 <= t % 12 < 11) and (reward != 0).all() == (t % 12 < 3)


def real(name):
    gymnasium, _ = pytest.importorskip("gymnasium"), pytest.importorskip("minigrid")
    return gymnasium.make(f"MiniGrid-{name}").unwrapped


def encoded(cells):
    """Our map of one environment -> the package's encoding (25, 25, 3)."""
    inner = cells.view(P.WIDTH, P.WIDTH)[P.MARGIN:-P.MARGIN, P.MARGIN:-P.MARGIN]
    return torch.stack([inner & 15, inner >> 4 & 7, inner >> 7], -1).numpy().astype(np.uint8)


def place(at):
    return int(at) // P.WIDTH - P.MARGIN, int(at) % P.WIDTH - P.MARGIN


def copy_level(ours, n, theirs):
    from minigrid.core.grid import Grid
    theirs.grid, _ = Grid.decode(encoded(ours.cells[n]))
    theirs.agent_pos, theirs.agent_dir = place(ours.at[n]), int(ours.direction[n])
    theirs.carrying, theirs.step_count, theirs.max_steps = None, 0, 20 * ours.rooms


@pytest.mark.parametrize("name", ["MultiRoom-N2-S4", "MultiRoom-N6-S10"])
def test_minigrid_equals_the_package_step_by_step(name):
    torch.manual_seed(4)
    ours, theirs, endings = P.MiniGrid(name, 8, CPU), [real(name.removesuffix("-S10") + "-v0") for _ in range(8)], 0
    for n, env in enumerate(theirs):
        env.reset(seed=0)
        copy_level(ours, n, env)
    for t in range(300):
        image = ours.observe().numpy()
        for n, env in enumerate(theirs):
            assert (env.gen_obs()["image"] == image[n]).all() and (env.grid.encode() == encoded(ours.cells[n])).all()
            assert (*env.agent_pos, env.agent_dir) == (*place(ours.at[n]), int(ours.direction[n]))
        action = torch.multinomial(torch.tensor([1, 1, 5, 0.1, 0.1, 2, 0.1]), 8, True)
        reward, done = ours.step(action)
        for n, env in enumerate(theirs):
            _, r, terminated, truncated, _ = env.step(int(action[n]))
            assert abs(r - reward[n].item()) < 1e-6 and (terminated or truncated) == done[n].item()
            endings += terminated
            if done[n]:
                copy_level(ours, n, env)
    assert endings > 3 or ours.rooms == 6


def facts(grid, x, y):
    """Numbers of levels (n, 25, 25, 3) whose distribution should agree."""
    kind, X, Y = grid[..., 0], *np.indices((25, 25))
    out = {"agent x": x, "agent y": y, "agent xy": x * y}
    for name, code in (("wall", 2), ("door", 4), ("goal", 8)):
        mask = kind == code
        out |= {name: mask.sum((1, 2)), f"{name} x": (mask * X).sum((1, 2)), f"{name} y": (mask * Y).sum((1, 2)),
                f"{name} colour": (mask * grid[..., 1]).sum((1, 2)), f"{name} state": (mask * grid[..., 2]).sum((1, 2))}
    return out


@pytest.mark.parametrize("ours, theirs", [((4, 5), "MultiRoom-N4-S5-v0"), ((6, 10), "MultiRoom-N6-v0")])
def test_level_statistics_agree_with_the_package(ours, theirs):
    """Means within 4.5 standard errors, 300 levels against 1,500 (seeds fixed); deviations within a quarter."""
    env, grids, agents = real(theirs), [], []
    if theirs.startswith("MultiRoom-N4"):                    # the package's v0 has other sizes
        env.minNumRooms = env.maxNumRooms = 4
        env.maxRoomSize = 5
    for seed in range(300):
        env.reset(seed=seed)
        grids.append(env.grid.encode())
        agents.append(env.agent_pos)
    b = facts(np.array(grids), *np.array(agents).T)
    torch.manual_seed(3)
    levels = [P.multi_room(*ours) for _ in range(1500)]
    cells = torch.stack([cells for cells, _ in levels])
    assert (cells[..., 24] == P.EMPTY).all() and not (cells[:, 24] == P.EMPTY).all()           # y + h < 25, x + w <= 25
    grids = torch.stack([cells & 15, cells >> 4 & 7, cells >> 7], -1).numpy()
    a = facts(grids, *np.array([at for _, at in levels]).T)
    for key in a:
        error = math.sqrt(a[key].var() / 1500 + b[key].var() / 300)
        assert abs(a[key].mean() - b[key].mean()) <= 4.5 * error + 1e-9, key
        assert abs(a[key].std() - b[key].std()) <= 0.25 * b[key].std() + 0.05, key


def test_score_counts_returns_and_open_doors_of_episodes():
    torch.manual_seed(0)
    env, total = P.MiniGrid("MultiRoom-N2-S4", 16, CPU), torch.zeros(2)
    for t in range(200):
        reward, done = env.step(torch.multinomial(torch.tensor([1, 1, 3, 0, 0, 2.0, 0]), 16, True))
        total += torch.stack([reward.sum(), done.sum()])
    found = env.report(None)
    assert found["return"] == pytest.approx((total[0] / total[1]).item()) and 0.2 < found["doors"] < 0.9
    assert env.report(None) == {"return": 0, "doors": 0}


def test_memory_forgets_where_an_episode_starts():
    torch.manual_seed(0)
    cell, x, first = torch.nn.LSTMCell(3, 4), torch.randn(6, 2, 3), torch.zeros(6, 2)
    first[3, 1] = 1
    memory = torch.randn(2, 8)
    out, memories = P.remember(cell, x, memory, first)
    h, c = memory.chunk(2, 1)
    for t in range(6):
        h, c = cell(x[t], (h * (1 - first[t])[:, None], c * (1 - first[t])[:, None]))
        torch.testing.assert_close(memories[t], torch.cat([h, c], 1))
        torch.testing.assert_close(out[t], h)


@pytest.mark.parametrize("cfg", [LOCK, GRID], ids=["lock", "minigrid"])
@pytest.mark.parametrize("method", ["rcgvf", "rnd", "no_future"])
def test_updates_see_what_acting_saw(cfg, method, monkeypatch):
    """Before the first gradient step, segments from stored memories give the log-probabilities, values and predictions
    that the rollout had; and the next rollout goes on where this one ended."""
    seen = []

    def check(cfg, agent, predictor, adam, roll, loss_function):
        L = 1 if cfg.env == "lock" else P.SEGMENT
        with torch.no_grad():
            for start in range(0, cfg.rollout, L):
                part = {name: x[start:start + L] for name, x in roll.items()}
                logits, value, _ = agent(part["obs"], part["memory"][0], part["first"])
                log_p = torch.distributions.Categorical(logits=logits).log_prob(part["action"])
                torch.testing.assert_close(log_p, part["log_p"], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(value, part["value"], atol=1e-5, rtol=1e-4)
        names = "obs", "predictor_memory", "first", "last_action", "last_z"
        T = cfg.rollout
        v, after = predictor(*(roll[name][0] if name == "predictor_memory" else roll[name][:T] for name in names))
        present = roll["last_z"][1:, :, None].expand_as(roll["G"][:-1])        # z of all steps but the last
        assert torch.equal(roll["G"][:-1], present) == (method != "rcgvf")
        if cfg.env != "lock" and method == "rcgvf":
            half, _ = predictor(*(roll[name][4] if name == "predictor_memory" else roll[name][4:8] for name in names))
            torch.testing.assert_close(half, v[4:8], atol=1e-5, rtol=1e-4)
        seen.append({name: x.clone() for name, x in roll.items()} | {"after": after[-1].detach()})
    monkeypatch.setattr(P, "update", check)
    P.train(cfg, Alone(), method)
    for a, b in zip(seen, seen[1:]):
        assert torch.equal(a["obs"][-1], b["obs"][0]) and torch.equal(a["first"][1:], a["done"].float())
        assert torch.equal(a["first"][-1], b["first"][0]) and torch.equal(a["action"][-1], b["last_action"][0])
        torch.testing.assert_close(a["after"], b["predictor_memory"][0])
    assert len(seen) == cfg.frames // (cfg.envs * cfg.rollout) > 1


def test_an_update_reads_each_step_once_in_segments(monkeypatch):
    """Segments of consecutive steps of one environment; rates and clipped gradients of both networks."""
    torch.manual_seed(0)
    run, read = Alone(), []

    def loss_function(logits, value, batch, entropy):
        read.append(batch["reward"])
        return P.ppo_loss(logits, value, batch, entropy)
    run.compile = lambda function: loss_function
    code, collect = torch.arange(8.0)[:, None] + 100 * torch.arange(4), P.collect
    monkeypatch.setattr(P, "collect", lambda *parts: collect(*parts) | {"reward": code})
    P.train(replace(GRID, frames=32, epochs=1), run, "rcgvf")
    assert all(batch.shape == (4, 4) and (batch.diff(dim=0) == 1).all() for batch in read)
    assert sorted(torch.cat(read, 1).flatten().tolist()) == sorted(code.flatten().tolist())
    rates = [group["lr"] for group in run.state["adam"].param_groups]
    assert rates == [GRID.learning_rate, GRID.rcgvf_rate * GRID.learning_rate]
    for name in ("agent", "predictor"):
        assert 0 < torch.cat([p.grad.flatten() for p in run.state[name].parameters()]).norm() <= GRID.grad_norm + 1e-4


def test_methods_do_not_depend_on_each_other():
    def rows(methods):
        run = Alone()
        P.experiment(replace(LOCK, methods=methods), run)
        return {method: [row for row in run.rows if row["stage"] == method] for method in methods.split(",")}
    both = rows("ppo,rcgvf")
    assert both["rcgvf"] == rows("rcgvf")["rcgvf"] and rows("rcgvf,ppo")["ppo"] == both["ppo"]
    assert both["ppo"][-1]["bonus"] == 0 < both["rcgvf"][-1]["bonus"]


def farthest(seed, method):
    """Mean column over 40,000 frames of a lock of 6 columns."""
    cfg = P.Config(horizon=6, rollout=6, frames=40_000, methods=method, betas="rcgvf:150,ppo:0")
    return sum(row["farthest"] for row in P.train(cfg, Alone(seed), method)) / (40_000 // 576 // 4)


def test_curiosity_goes_farther():
    """Seeds 0-9: RC-GVF 4.4 to 5.8, PPO 2.1 to 3.2."""
    assert 3.8 < farthest(0, "rcgvf") < 6.5 and farthest(0, "ppo") < 3.6


def test_bad_options_are_refused():
    for options, words in (({"env": "MultiRoom-N4-S5-v0"}, "--env"), ({"env": "DoorKey-8x8"}, "--env"), (
            {"env": "MultiRoom-N1-S5"}, "--env"), ({"horizon": 1}, "sizes"), ({"minibatch": 0}, "sizes"), (
            {"methods": "rcgvf,noveld"}, "'noveld'"), ({"methods": "rnd", "betas": "xrnd:1"}, "'rnd'"), (
            {"betas": "rcgvf:a"}, "'rcgvf'"), ({"env": "MultiRoom-N4-S5", "rollout": 6}, "--rollout")):
        with pytest.raises(ValueError, match=words):
            P.Config(**options)
