"""policy_gen.py: slices and policies by plain loops, environments against gymnasium, replay, rivals, short runs."""
import itertools
import math
import sys
import types
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import policy_gen as P

CPU, TINY = torch.device("cpu"), P.Config(**P.PRESETS["smoke"])


class Alone:
    """A `Run` that keeps its rows and the state of its last stage."""
    device, compile, seed = CPU, staticmethod(lambda function: function), 0

    def steps(self, stage, total, **state):
        self.stage, self.state, self.rows = stage, state, getattr(self, "rows", [])
        for self.step in range(total):
            yield self.step

    def log(self, **numbers):
        self.rows.append({"stage": self.stage, "step": self.step + 1, **numbers})


def test_reach_by_hand():                                    # straight to the targets, standing still, fleeing
    torch.manual_seed(0)
    env = P.Reach()
    state = env.reset(50, 2, CPU)
    assert torch.equal(state[:50], state[50:]) and 0.9 < state.abs().max() <= 1
    for pull, expected in ((5.0, 100.0), (0.0, 0.0), (-5.0, -100.0)):
        x, total = state, torch.zeros(100)
        for t in range(40):
            assert t % 10 or torch.equal(x[:, :4], state[:, 4 + t // 10 * 4:][:, :4])          # the next target
            x, reward, over = env.step(x, (pull * x[:, :4]).clamp(-1, 1), t)
            assert not over.any() and (t % 10 == 9 or not reward.any())
            total += reward
        torch.testing.assert_close(total, torch.full((100,), expected), atol=1e-3, rtol=0)
    state[:, :4] *= 0.5                                      # half of the way is left when its time is over
    torch.testing.assert_close(env.step(state, torch.zeros(100, 4), 9)[1], torch.full((100,), 12.5))


def test_gym_rows_equal_single_simulators_also_after_an_end():
    """Each row is what a simulator of its own does with the row's actions; nothing moves after its end."""
    torch.manual_seed(3)
    env = P.Gym("gym:InvertedPendulum-v5")
    state, over = env.reset(2, 2, CPU), [False] * 4
    assert torch.equal(state[:2], state[2:])
    torch.manual_seed(3)
    singles = [gymnasium.make("InvertedPendulum-v5") for _ in range(4)]
    for single, seed in zip(singles, torch.randint(2**31, (2,)).tolist() * 2):
        single.reset(seed=seed)
    for t in range(60):
        action, before = torch.randn(4, 1).clamp(-3, 3), state
        state, reward, done = env.step(state, action, t)
        for i, single in enumerate(singles):
            obs, r = (before[i], 0.0) if over[i] else single.step(action[i].numpy())[:2]
            assert np.allclose(state[i], obs, atol=1e-6) and reward[i].item() == pytest.approx(r)
            over[i] = over[i] or abs(obs[1].item()) > 0.2                      # the pole has fallen
        assert done.tolist() == over
    assert all(over) and (env.observations, env.actions, env.limit, env.horizon) == (4, 1, 3.0, 1000)


def test_mountain_car_equals_gymnasiums():
    torch.manual_seed(0)
    searches = [P.Search(TINY, env, CPU, 16, 16) for env in (P.MountainCar(), P.Gym("MountainCarContinuous-v0"))]
    theta, state = torch.randn(6, 3 * 16 + 17 * 16 + 17), searches[1].env.reset(2, 6, CPU)
    (ours, seen), (theirs, seen_theirs) = (search.play(theta, state) for search in searches)
    assert len(seen) == len(seen_theirs) < 12 * 999 and (theirs > 50).any() and (theirs < 0).any()
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0)
    torch.testing.assert_close(seen, seen_theirs, atol=1e-3, rtol=0)
    place, speed = P.MountainCar().reset(1000, 1, CPU).T
    assert -0.6 <= place.min() < -0.59 and -0.41 < place.max() <= -0.4 and not speed.any()


@pytest.mark.parametrize("O, A, policy, generator", [(8, 2, 68_610, 528_066), (2, 1, 66_817, 499_025)])
def test_parameter_counts_of_the_papers_networks(O, A, policy, generator):
    """Of the official classes: Swimmer, MountainCarContinuous."""
    sizes, cfg = (O, 256, 256, A), P.Config(**P.PRESETS["paper"])
    G, V = P.Generator(sizes, cfg.hidden), P.Evaluator(cfg, sizes, 1.0, True)
    assert sum(x.numel() for x in G.parameters()) == generator and G(torch.zeros(1)).shape == (1, policy)
    assert O == 2 or sum(x.numel() for x in V.parameters()) == 170_305
    assert 0 <= V.states.min() and 0.9 < V.states.max() < 1


def test_generated_policies_equal_an_explicit_loop_over_slices():
    """Weights and biases slice by slice, in theta's order, and the actions of plain linear layers made of them."""
    torch.manual_seed(0)
    sizes, command, obs = (3, 32, 32, 2), torch.tensor([0.3, -1.0]).double(), torch.randn(2, 6, 3).double()
    G = P.Generator(sizes, 16).double()
    actions = P.policy_act(G(command), sizes, obs, 1.5)
    for b, x in enumerate(obs):
        flat = []
        for net, n_in, n_out in zip(G.layers, sizes, sizes[1:]):
            W, bias, (tiles_in, tiles_out) = torch.zeros(n_out, n_in).double(), 0.0, net.z.shape[:2]
            down, right = n_out // tiles_out, n_in // tiles_in
            for m, n in itertools.product(range(tiles_in), range(tiles_out)):
                z = torch.cat([net.z[m, n], command[b, None]])
                W[n * down:(n + 1) * down, m * right:(m + 1) * right] = net.H_w(z).view(down, right)
                bias = bias + F.pad(net.H_b(z), (n * down, n_out - (n + 1) * down)) / tiles_in
            x = F.linear(x, 2 / math.sqrt(n_in) * W, 2 / math.sqrt(n_in) * bias).tanh()
            flat += [2 / math.sqrt(n_in) * W.flatten(), 2 / math.sqrt(n_in) * bias]
        torch.testing.assert_close(torch.cat(flat), G(command)[b], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(1.5 * x, actions[b], rtol=1e-10, atol=1e-10)


def test_fingerprints_see_what_a_policy_does_not_how():      # hidden units permuted
    torch.manual_seed(0)
    order, theta = torch.randperm(16), torch.randn(3, 64 + 16 + 256 + 84)      # policies 4-16-16-4
    W1, b1, W2, rest = theta.split((64, 16, 256, 84), 1)
    W1, W2 = W1.view(3, 16, 4)[:, order].flatten(1), W2.view(3, 16, 16)[..., order].flatten(1)
    twin = torch.cat([W1, b1[:, order], W2, rest], 1)
    for fingerprint in (True, False):
        V = P.Evaluator(TINY, (4, 16, 16, 4), 1.0, fingerprint)
        assert torch.allclose(V(theta), V(twin), atol=1e-3) == fingerprint


def test_the_generators_gradient_by_finite_differences():
    """Along a random direction of all weights: through V and the policies' actions, while V gets no gradient."""
    torch.manual_seed(0)
    sizes, returns = (4, 16, 16, 4), torch.tensor([-60.0, 10.0, 80.0]).double()
    G, V = P.Generator(sizes, 8).double(), P.Evaluator(TINY, sizes, 1.0, True).double().requires_grad_(False)
    assert P.hindsight_loss(lambda c: c[:, None], None, 3 + returns[:, None], returns, 1.0) == 9     # imitation
    P.generator_loss(G, V, None, returns, 200.0).backward()
    assert all(x.grad is None for x in V.parameters())
    way = [torch.randn_like(x) for x in G.parameters()]
    slope = sum((x.grad * d).sum() for x, d in zip(G.parameters(), way)).item()
    losses = []
    for h in (1e-6, -2e-6):
        for x, d in zip(G.parameters(), way):
            x.data += h * d
        losses.append(P.generator_loss(G, V, None, returns, 200.0).item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4)


def test_replay_prefers_recent_iterations_and_leaves_the_band_out():
    """Frequencies of 200,000 draws: the brief's five numbers for K = 1, omega = 1.1; pairs that share an age."""
    torch.manual_seed(0)
    search, numbers = P.Search(TINY, P.Reach(), CPU), torch.arange(6.0)
    search.returns, search.theta = numbers[:5], numbers[:5, None]
    theta, drawn = P.sample_replay(replace(TINY, policies=1, batch=200_000), search)
    expected = torch.tensor([0.079, 0.101, 0.139, 0.217, 0.464])
    assert torch.equal(theta[:, 0], drawn)
    torch.testing.assert_close(torch.bincount(drawn.long()) / len(drawn), expected, atol=0.005, rtol=0)
    search.returns, search.theta, search.band = numbers, numbers[:, None], (2.0, 4.0)
    drawn = P.sample_replay(replace(TINY, policies=2, batch=200_000), search)[1].long()
    weights = torch.tensor([3**-1.1, 3**-1.1, 0, 0, 1, 1])
    torch.testing.assert_close(torch.bincount(drawn) / len(drawn), weights / weights.sum(), atol=0.005, rtol=0)
    search.band = (-1.0, 9.0)                                # all in the band: none can be left out
    assert search.kept().all()


def test_what_is_over_pays_no_more_and_is_seen_no_more():
    """Episode i ends after i + 1 steps of six, each of which pays 1; policies see standardised observations."""
    env = types.SimpleNamespace(observations=1, actions=1, limit=1.0, horizon=6, step=lambda state, action, t: (
        acted.append(action[:, 0]) or state, torch.ones(4), (state[:, 0] <= t) & (state[:, 0] >= t)))
    search, acted = P.Search(TINY, env, CPU), []
    search.moments = torch.tensor([[9.0], [1.0], [4.0]])
    returns, seen = search.play(torch.tensor([[1.0, 0.0]] * 2), torch.arange(4.0)[:, None])
    assert returns.tolist() == [[1, 2], [3, 4]] and sorted(seen[:, 0].tolist()) == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    torch.testing.assert_close(acted[0], ((torch.arange(4.0) - 1) / 2).tanh())


def test_moments_are_those_of_all_observations_also_far_from_zero(monkeypatch):
    torch.manual_seed(0)
    search, parts = P.Search(TINY, P.MountainCar(), CPU), [1000 + 0.1 * torch.randn(n, 2) for n in (9, 30, 2, 70, 4)]
    for part in parts:
        part += torch.rand(2)
        monkeypatch.setattr(search, "play", lambda theta, state: (torch.zeros(3, 1), part))
        search.add(torch.zeros(3, 4))
    everything = torch.cat(parts).double()
    assert search.moments[0, 0] == 115 and search.theta.shape == (15, 4) and search.returns.shape == (15,)
    torch.testing.assert_close(search.moments[1].double(), everything.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(search.moments[2].double(), everything.var(0, correction=0), rtol=0.02, atol=0)


def test_tests_are_of_the_same_first_states_and_draw_no_random_numbers():
    search, theta, before = P.Search(TINY, P.Reach(), CPU), torch.randn(3, 20), torch.get_rng_state()
    torch.testing.assert_close(search.evaluate(theta[1:2]), search.evaluate(theta)[1:2])
    assert torch.equal(before, torch.get_rng_state())


def test_one_policy_without_mixture_is_the_papers_loop(monkeypatch):
    """K = 1: the first command 1, then the best so far + beta; 4 steps of V, 19 of G, while V stays as it is."""
    cfg, run, asked, trained = replace(TINY, policies=1, command_mix=0.0, iterations=4), Alone(), [], []
    forward, v, g = P.Generator.forward, P.evaluator_loss, P.generator_loss
    monkeypatch.setattr(P.Generator, "forward", lambda G, c: asked.append(200 * c) or forward(G, c))
    monkeypatch.setattr(P, "evaluator_loss", lambda V, *x: trained.append(V.states.requires_grad) or v(V, *x))
    monkeypatch.setattr(P, "generator_loss", lambda G, V, *x: trained.append(V.states.requires_grad) or g(G, V, *x))
    search, _, _ = P.train(cfg, run, P.Reach(), "generator")
    rollouts = [asked[i].item() for i in range(0, len(asked), 21)]             # then 19 in losses, one in the log
    best = [search.returns[:i].max().item() + cfg.increment for i in (1, 2, 3)]
    assert rollouts == pytest.approx([1.0, *best], rel=1e-4) and trained == ([True] * 4 + [False] * 19) * 4
    assert all((command[:, None] - search.returns).abs().min(1).values.max() < 1e-3
               for i, command in enumerate(asked) if i % 21)                   # commands of losses: returns achieved
    torch.manual_seed(0)
    P.Generator(search.sizes, cfg.hidden)
    assert not torch.equal(run.state["V"].states, P.Evaluator(cfg, search.sizes, 1.0, True).states)      # they learn


def test_half_of_the_commands_are_for_any_return_so_far(monkeypatch):
    cfg, asked, forward = replace(TINY, policies=400, iterations=2), [], P.Generator.forward
    monkeypatch.setattr(P.Generator, "forward", lambda G, c: asked.append(200 * c) or forward(G, c))
    search, G, _ = P.train(cfg, Alone(), P.Reach(), "untrained")
    low, high = search.returns[:400].min(), search.returns[:400].max() + cfg.increment
    command = next(c for c in asked[1:] if len(c) == 400)
    torch.testing.assert_close(command[200:], high.expand(200), atol=1e-3, rtol=0)
    spread = ((command[:200] - low) / (high - low)).sort().values
    assert (spread - torch.linspace(0, 1, 200)).abs().max() < 0.13             # uniform (Kolmogorov, 0.1 %)
    torch.manual_seed(0)                                     # it is untrained: as it was drawn
    assert torch.equal(G.layers[1].z, P.Generator(search.sizes, cfg.hidden).layers[1].z)
    noise = search.theta[400:] - forward(G, command / 200)   # and each policy has noise of its own
    assert noise.std().item() == pytest.approx(cfg.noise, rel=0.02) and (noise[0] - noise[1]).abs().mean() > 0.05


def test_a_checkpoint_holds_the_replay_as_far_as_it_is_filled(tmp_path, capsys):
    cfg = P.Config(**{**P.PRESETS["paper"], "env": "Reach", "hidden": 16, "probes": 4, "batch": 2, "save_every": 3})
    run = P.Run(cfg, 0, tmp_path, CPU, False)
    steps = run.steps                                        # of 3,000 iterations of `paper`
    run.steps = lambda *arguments, **state: itertools.islice(steps(*arguments, **state), 4)    # the third is saved
    P.train(cfg, run, P.Reach(), "generator")
    assert torch.load(tmp_path / "seed0-generator.pt")["state"]["theta"].shape == (3, 5 * 256 + 257 * 256 + 257 * 4)
    assert 4 * 3 * 68_100 < (tmp_path / "seed0-generator.pt").stat().st_size < 4 * 30 * 68_100


def test_ars_by_hand(monkeypatch):
    """Returns linear in M: one step from zero along the best four of eight pairs of directions, by sigma_R."""
    torch.manual_seed(0)
    slope, tried = torch.randn(20), []
    monkeypatch.setattr(P.Search, "add", lambda search, theta: tried.append(theta) or theta @ slope)
    _, M = P.ars(replace(TINY, iterations=1), Alone(), P.Reach())
    delta, expected = tried[0][:8], 0.0
    assert torch.equal(delta, -tried[0][8:]) and delta.std().item() == pytest.approx(0.3, rel=0.2)
    best = sorted(range(8), key=lambda i: -abs(delta[i] @ slope))[:4]
    sigma = torch.stack([sign * (delta[i] @ slope) for i in best for sign in (1, -1)]).std()
    for i in best:
        expected = expected + 0.1 / (4 * sigma) * 2 * (delta[i] @ slope) * delta[i] / 0.3
    torch.testing.assert_close(M[0], expected)


def test_a_table_plays_the_nearest_stored_policy(monkeypatch):
    search, asked = P.Search(TINY, P.Reach(), CPU), torch.tensor([-90.0, 0.0, 20.0, 60.0])
    search.theta, search.returns = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([-50.0, 15.0, 80.0])
    again = torch.tensor([[70.0, 90], [-40, -60], [15, 5]])
    monkeypatch.setattr(search, "evaluate", lambda theta: theta[:, 0])
    monkeypatch.setattr(search, "play", lambda theta, state: (again, None))
    assert P.table(search, asked).tolist() == [0, 1, 1, 2] and P.table(search, asked, fresh=2).tolist() == [1, 2, 2, 0]
    search.band = (10.0, 30.0)
    assert P.table(search, asked).tolist() == [0, 0, 2, 2]


def test_experiment_names_what_it_compares(monkeypatch):
    train, found = P.train, {}
    monkeypatch.setattr(P, "train", lambda *x: found.setdefault(x[-1], train(*x)))
    out = P.experiment(replace(TINY, iterations=1, eval_episodes=1), Alone())
    head, answers = out["headline"], out["answers"]
    for name, (asked, achieved) in answers.items():
        error = head["tracking_error" if name == "generator" else f"{name}_error"]
        assert error == pytest.approx(np.abs(np.subtract(achieved, asked)).mean() / 200)
        assert (len(asked), min(asked) > 10, max(asked) < 30) == ((5, 1, 1) if "band" in name else (21, 0, 0))
    assert head["pearson"] == pytest.approx(np.corrcoef(*answers["generator"])[0, 1], abs=1e-4)
    assert [method for method, (search, *_) in found.items() if search.band == P.BAND] == ["band"] and len(found) == 6
    tables = {"table_own_replay", "random_search", "ars_table", "band_table"}
    assert set(answers) == {*P.COLOURS, "band", "mountaincar", "generator"} - {"tracking"} | tables | {
        f"{name}_again" for name in tables}


@pytest.mark.parametrize("honest", [True, False], ids=["returns", "shuffled returns"])
def test_short_run_writes_policies_on_request(honest, monkeypatch):
    """60 iterations of `quick`, seeds 0-9: error 0.045 to 0.092; with the returns of an iteration shuffled among its
    policies 0.183 to 0.276 (the middle of the range, whatever is asked: 0.262). No return can be above 100."""
    add = P.Search.add

    def shuffled(search, theta):
        search.returns[-len(theta):] = add(search, theta)[torch.randperm(len(theta))]
    if not honest:
        monkeypatch.setattr(P.Search, "add", shuffled)
    cfg, asked = P.Config(iterations=60, eval_episodes=16, log_every=1000), torch.linspace(-100, 100, 21)
    search, G, _ = P.train(cfg, Alone(), P.Reach(), "generator")
    error = (search.evaluate(G(asked / 200)) - asked).abs().mean().item() / 200
    assert (error < 0.14) == honest and error > 0.01 and search.returns.max() < 100


@pytest.mark.parametrize("options, message", [
    ("--env gym:Nowhere-v0", "Nowhere"), ("--env Nowhere", "Nowhere"), ("--env gym:CartPole-v1", "CartPole"),
    ("--env gym:FrozenLake-v1", "FrozenLake"), ("--lowest 5 --highest 5", "--highest"), ("--command-mix 2", "-mix"),
    ("--policy-hidden 24", "--policy-hidden"), ("--policies 0", "at least 1"), ("--env gym:Swimmer-v5", "gymnasium")])
def test_bad_options(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if message == "gymnasium":                               # as if it were not installed
        monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(SystemExit) as stop:
        P.main(options.split())
    assert message in stop.value.code and "\n" not in stop.value.code and not list(tmp_path.rglob("*.json"))
