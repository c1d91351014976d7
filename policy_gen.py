# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""Generators of deep policies: "write me a policy with return c", in one file.

Faccio, Herrmann, Ramesh, Kirsch, Schmidhuber, "Goal-Conditioned Generators of Deep Policies",
arXiv 2207.01570. [code]: read in the official release; no number of the paper is quoted.

IDEA
  Told a return c, a *generator* writes all weights theta of a policy whose episodes return c. To
  imitate policies seen is not enough: different weights have the same return, and their average has
  another. So an *evaluator* V learns to predict a policy's return from what it does in a few
  learned probing states (its fingerprint), and the generator learns through V, until V(G(c)) = c.
  It explores by noise on weights, and by asking for a little more than the best return so far.

ALGORITHM
  repeat
    c = best return so far + beta (first c: 1);  theta = G_rho(c / Delta) + sigma eps
    r = sum of rewards of one episode of pi_theta;  add (theta, r) to the replay
    4 times   w   <- Adam(w,   gradient of L_V = mean (V_w(theta_i) - r_i)^2)
    19 times  rho <- Adam(rho, gradient of L_G = mean (V_w(G_rho(r_i / Delta)) - r_i)^2)
  G's commands here are returns r_i achieved. Both draw from the replay, P(i) ~ 1 / age^omega, age
  in iterations: V must be right about today's policies. quick: K policies an iteration.

SYMBOLS, in the code, shape or meaning (K, B, N, sigma, beta, omega: see Config)
  theta       theta            (n, P)     policies, one a row: P weights and biases
  c, r        command, returns (n,)       return asked for, return of one episode (noisy)
  Delta       span                        of the range of returns asked for, highest - lowest
  G_rho, V_w  G, V             (B, P) (B,)  hypernetworks that write theta; predicted returns
  Tracking error: mean |achieved - asked| / Delta, 21 commands; stored policies keep their noise.

RESULT (quick: seeds 0-7, mean [95 % t interval], 4.5 minutes a seed on one core; `paper`: in part)
  Tracking error 0.033 [0.026, 0.039]; a table of its own policies 0.075 [0.065, 0.085], of
  ARS' 0.108 [0.085, 0.131], hindsight 0.127 [0.113, 0.141]; but tables whose policies are measured
  again, with 17 times the episodes, 0.023 and 0.019. Policy for the best return 73.0 [69.0, 77.0],
  ARS 98.3: a linear law is near the best here. MountainCar 93.6. Swimmer: 343 after 1,000 episodes.

DIFFERS
  1. quick: our task, small networks, K = 16, half asked for any return; G's rate larger, V scaled.
  2. quick's probing states start normal: uniform in [0, 1) [code] is one orthant of 16 here.
  3. Observation statistics stay within an episode ([code]: updated): a policy is one function. The
     replay keeps all policies ([code]: 10,000); Hopper keeps its bonus for staying alive.
  4. [code]'s settings say 5 and 20 gradient steps, its loops make 4 and 19: so do we.

RUN
  python policy_gen.py
"""
import argparse
import datetime
import inspect
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
import torch.distributed
import torch.nn as nn
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code: x]: the release has x."""
    env: str = "Reach"           # with all rivals; MountainCar, or gym:ID: the generator alone
    lowest: float = -100.0       # lowest of the 21 returns asked for in a test
    highest: float = 100.0       # highest of them
    iterations: int = 300        # of an episode for each new policy, then updates
    policies: int = 16           # new in an iteration, K [code: 1]
    command_mix: float = 0.5     # share of them, rounded down, asked for any return [code: 0]
    increment: float = 10.0      # asked above the best return so far, beta [code: 20]
    noise: float = 0.1           # on every weight of a new policy, sigma [code]
    policy_hidden: int = 32      # units of a policy's two hidden layers [code: 256]
    hidden: int = 64             # units of the other networks' two hidden layers [code: 256]
    probes: int = 32             # probing states, N [code: 200]
    uniform_probes: bool = False     # they start uniform in [0, 1) [code], and not normal
    return_scale: float = 50.0   # V's output is multiplied by it, as returns are large [code: 1]
    generator_rate: float = 3e-4     # of Adam [code: 2e-6]
    evaluator_rate: float = 5e-3     # of Adam [code]
    batch: int = 64              # policies in a minibatch, B [code: 16]
    recency: float = 1.1         # omega [code]
    eval_episodes: int = 64      # of each policy that is tested, without noise [code: 10]
    seed: int = 0                # first seed
    num_seeds: int = 1           # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 10          # iterations between logs
    save_every: int = 50         # iterations between checkpoints

    def __post_init__(self):
        if not self.lowest < self.highest or not 0 <= self.command_mix <= 1:
            raise ValueError("--highest must be above --lowest, --command-mix between 0 and 1")
        if min(self.iterations, self.policies, self.hidden, self.probes, self.policy_hidden,
               self.batch, self.eval_episodes) < 1 or self.policy_hidden % SLICE:
            raise ValueError("sizes must be at least 1, --policy-hidden a multiple of 16")


SLICE = 16                       # units in a slice of a policy's weights [code]
BAND = (10.0, 30.0)              # single returns that one generator never learns from

PRESETS = {
    "smoke": dict(iterations=3, policy_hidden=16, hidden=16, probes=4, eval_episodes=4,
                  log_every=1, save_every=2),
    "quick": {},
    "paper": dict(env="gym:Swimmer-v5", highest=365.0, iterations=3000, policies=1, batch=16,
                  command_mix=0.0, increment=20.0, policy_hidden=256, hidden=256, probes=200,
                  uniform_probes=True, return_scale=1.0, generator_rate=2e-6, eval_episodes=10,
                  log_every=100, save_every=500),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# Episodes side by side, one a row. reset(n, copies, device) -> n first states, each `copies` times;
# step(state, action, t) -> state, reward, done. The first O columns of a state are what is seen.


class Reach:
    """Ours: a point in four dimensions, and a new target, anywhere, every 10 of 40 steps. Return:
    mean per cent of the distances closed, each cut at -100; single returns: deviation 10 to 25.
    State (rows, 20): the way left to go; the ways to the four targets, uniform in a cube."""
    observations, actions, limit, horizon = 4, 4, 1.0, 40

    def reset(self, n, copies, device):
        ways = 2 * torch.rand(n, 16, device=device) - 1      # to four targets
        return torch.cat([ways[:, :4], ways], 1).repeat(copies, 1)

    def step(self, state, action, t):
        left, ways = state[:, :4] - 0.2 * action, state[:, 4:].split(4, 1)     # (rows, 4) each
        reward = torch.zeros_like(left[:, 0])
        if t % 10 == 9:                                      # this target's time is over
            reward = 25 * (1 - left.norm(dim=1) / ways[t // 10].norm(dim=1)).clamp(min=-1)
            left = ways[min(t // 10 + 1, 3)]
        return torch.cat([left, *ways], 1), reward, torch.zeros_like(reward) > 0


class MountainCar:
    """Gymnasium's MountainCarContinuous-v0, a car too weak for its hill. State: position, speed."""
    observations, actions, limit, horizon = 2, 1, 1.0, 999

    def reset(self, n, copies, device):
        position = -0.6 + 0.2 * torch.rand(n, 1, device=device)  # in the valley, at rest
        return torch.cat([position, torch.zeros_like(position)], 1).repeat(copies, 1)

    def step(self, state, action, t):
        (p, v), a = state.unbind(1), action[:, 0]
        v = (v + 0.0015 * a - 0.0025 * (3 * p).cos()).clamp(-0.07, 0.07)
        p = (p + v).clamp(-1.2, 0.6)
        v = torch.where((p == -1.2) & (v < 0), 0, v)         # the wall on the left
        done = (p >= 0.45) & (v >= 0)                        # on top of the hill
        return torch.stack([p, v], 1), 100 * done - 0.1 * a.square(), done


class Gym:
    """An environment of gymnasium whose observations and actions are vectors; a simulator a row."""

    def __init__(self, name):
        try:
            import gymnasium                                 # pip install "gymnasium[mujoco]"
            self.make = lambda: gymnasium.make(name.removeprefix("gym:"))
            env = self.make()
            space, (self.observations,) = env.action_space, env.observation_space.shape
            (self.actions,), self.limit = space.shape, float(space.high[0])
            assert {*space.high} == {*-space.low} == {self.limit}, "limits of actions differ"
            self.simulators, self.horizon = [env], int(env.spec.max_episode_steps)
        except Exception as error:                           # gymnasium has many
            raise ValueError(f"--env {name} is no continuous environment here ({error})")

    def reset(self, n, copies, device):
        seeds = torch.randint(2**31, (n,)).tolist() * copies
        self.simulators += [self.make() for _ in range(len(seeds) - len(self.simulators))]
        rows = [env.reset(seed=seed)[0] for env, seed in zip(self.simulators, seeds)]
        self.done = [False] * len(rows)                      # of each simulator
        return torch.stack([torch.as_tensor(row) for row in rows]).float().to(device)

    def step(self, state, action, t):
        rows, reward = state.cpu().numpy().copy(), [0.0] * len(state)
        for i, a in enumerate(action.cpu().numpy()):
            if not self.done[i]:                             # what is done stays as it is
                rows[i], reward[i], self.done[i], _, _ = self.simulators[i].step(a)
        done = torch.tensor(self.done, device=state.device)
        return torch.tensor(rows, device=state.device), state.new_tensor(reward), done


# ---- 3. MODEL ----------------------------------------------------------------------------------
# A policy's weights are data: a row theta that the generator writes and the evaluator reads.


def policy_act(theta, sizes, x, limit):
    """n policies theta (n, P), observations (n, m, O) -> actions (n, m, A); tanh after every layer
    [code]. theta: W1 row by row, b1, W2, ..; sizes: (O, hidden, hidden, A)."""
    for n_in, n_out in zip(sizes, sizes[1:]):
        W, b, theta = theta.tensor_split((n_in * n_out, (n_in + 1) * n_out), 1)
        x = torch.baddbmm(b[:, None], x, W.unflatten(1, (n_out, n_in)).mT).tanh()  # (n, m, n_out)
    return limit * x


def mlp(n_in, hidden, n_out):
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, n_out))


class Hypernet(nn.Module):
    """Writes one layer of a policy slice by slice. Two networks, the same for all slices, read a
    slice's learned embedding z_mn (m-th along the inputs, n-th along the outputs) and the command:
    W[slice mn] = g H_w(z_mn, c),  b[rows n] = g mean_m H_b(z_mn, c),  g = 2 / sqrt(n_in) [code]"""

    def __init__(self, n_in, n_out, slice_in, slice_out, hidden):
        super().__init__()
        self.z = nn.Parameter(torch.randn(n_in // slice_in, n_out // slice_out, 8))   # [code]
        self.H_w = mlp(8 + 1, hidden, slice_out * slice_in)
        self.H_b = mlp(8 + 1, hidden, slice_out)
        self.slice, self.gain = (slice_out, slice_in), 2 / math.sqrt(n_in)

    def forward(self, command):
        """command (B,), divided by Delta -> W (B, n_out, n_in), b (B, n_out)."""
        z = self.z.expand(len(command), -1, -1, -1)          # (B, m, n, 8)
        x = torch.cat([z, command[:, None, None, None].expand_as(z[..., :1])], -1)
        W = self.H_w(x).unflatten(-1, self.slice)            # (B, m, n, slice_out, slice_in)
        W = W.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)                  # (B, n_out, n_in)
        return self.gain * W, self.gain * self.H_b(x).mean(1).flatten(1)


class Generator(nn.Module):
    """G_rho: commands (B,), by Delta, not centred [code]: 0 is 0 -> policies theta (B, P)."""

    def __init__(self, sizes, hidden):
        super().__init__()
        O, H, _, A = sizes
        shapes = (O, H, O, SLICE), (H, H, SLICE, SLICE), (H, A, SLICE, A)    # of layers, of slices
        self.layers = nn.ModuleList(Hypernet(*shape, hidden) for shape in shapes)

    def forward(self, command):
        return torch.cat([part.flatten(1) for net in self.layers for part in net(command)], 1)


class Evaluator(nn.Module):
    """V_w: policies theta (B, P) -> predicted returns (B,), from the fingerprint: what they do in
    learned probing states (N, O), normalised observations. An ablation: from theta itself."""

    def __init__(self, cfg, sizes, limit, fingerprint):
        super().__init__()
        self.sizes, self.limit, self.return_scale = sizes, limit, cfg.return_scale
        self.fingerprint, draw = fingerprint, torch.rand if cfg.uniform_probes else torch.randn
        self.states, n_in = nn.Parameter(draw(cfg.probes, sizes[0])), cfg.probes * sizes[-1]
        if not fingerprint:
            n_in = sum((units + 1) * n_out for units, n_out in zip(sizes, sizes[1:]))      # P
        self.net = mlp(n_in, cfg.hidden, 1)

    def forward(self, theta):
        features = theta                                     # (B, P)
        if self.fingerprint:
            states = self.states.expand(len(theta), -1, -1)  # (B, N, O)
            features = policy_act(theta, self.sizes, states, self.limit).flatten(1)
        return self.return_scale * self.net(features)[:, 0]


# ---- 4. LEARNING RULE --------------------------------------------------------------------------


def evaluator_loss(V, theta, returns):
    """L_V = mean_B (V_w(theta_i) - r_i)^2."""
    return (V(theta) - returns).square().mean()


def generator_loss(G, V, theta, returns, span):
    """L_G = mean_B (V_w(G_rho(r_i / Delta)) - r_i)^2. Not imitation: the theta_i that achieved r_i
    plays no part, any policy with that return will do."""
    return (V(G(returns / span)) - returns).square().mean()


def hindsight_loss(G, V, theta, returns, span):
    """Control, imitation without an evaluator: G_rho(r_i / Delta) should be theta_i."""
    return (G(returns / span) - theta).square().mean()


def sample_replay(cfg, search):
    """A minibatch of the replay, with replacement, P(i) proportional to 1 / age^omega -> theta
    (B, P), returns (B,). The K policies of an iteration share an age, 1 for the newest."""
    iteration = torch.arange(len(search.returns), device=search.returns.device) // cfg.policies
    age = iteration[-1] + 1 - iteration
    weights = search.kept() * age ** -cfg.recency            # 1 / age^omega
    index = torch.multinomial(weights, cfg.batch, replacement=True)
    return search.theta[index], search.returns[index]


# ---- 5. TRAINING -------------------------------------------------------------------------------


class Search:
    """What a method has tried: the replay, policies theta (m, P), returns (m,) of one episode each;
    moments (3, O): count, mean and variance of all observations, before the first 0, 0, 1."""

    def __init__(self, cfg, env, device, *hidden):
        self.cfg, self.env, self.sizes = cfg, env, (env.observations, *hidden, env.actions)
        self.theta, self.returns = torch.zeros(2, 0, device=device)            # grow with `add`
        self.moments = torch.tensor([[0.], [0.], [1.]], device=device).repeat(1, env.observations)
        self.band = (0.0, 0.0)

    def kept(self):
        """Which returns are not in the band that is left out (m,); all, if all are in it."""
        kept = (self.returns < self.band[0]) | (self.returns >= self.band[1])
        return kept | ~kept.any()

    @torch.no_grad()
    def play(self, theta, state):
        """An episode from each state, rows / n of them of each policy theta (n, P) -> returns
        (n, rows / n), all observations (steps, O)."""
        _, mean, variance = self.moments
        alive = torch.ones(len(state), dtype=torch.bool, device=theta.device)
        returns, seen, living = theta.new_zeros(len(state)), [], []
        for t in range(self.env.horizon):
            seen.append(state[:, :len(mean)])
            living.append(alive)
            obs = (seen[-1] - mean) / (variance.sqrt() + 1e-8)
            obs = obs.unflatten(0, (len(theta), -1))         # (n, rows / n, O)
            action = policy_act(theta, self.sizes, obs, self.env.limit).flatten(0, 1)
            state, reward, done = self.env.step(state, action, t)
            returns = returns + torch.where(alive, reward, 0)                  # none after the end
            alive = alive & ~done
        return returns.view(len(theta), -1), torch.stack(seen)[torch.stack(living)]

    def add(self, theta):
        """Try new policies theta (K, P), an episode each -> returns (K,)."""
        returns, seen = self.play(theta, self.env.reset(len(theta), 1, theta.device))
        self.theta.data = torch.cat([self.theta, theta])     # in place: checkpoints hold them
        self.returns.data = torch.cat([self.returns, returns[:, 0]])
        (n, mean, variance), m = self.moments, len(seen)     # exact moments of both sets together
        step = seen.mean(0) - mean                           # (O,)
        spread = n * variance + m * seen.var(0, correction=0) + step.square() * n * m / (n + m)
        self.moments.copy_(torch.stack([n + m, mean + step * m / (n + m), spread / (n + m)]))
        return returns[:, 0]

    def evaluate(self, theta):
        """theta (n, P) -> mean returns (n,), of the same first states for all, and in all calls."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(12345)
            state = self.env.reset(self.cfg.eval_episodes, len(theta), theta.device)
        return self.play(theta, state)[0].mean(1)


def train(cfg, run, env, method):
    """The paper's loop -> Search, G, rows of its log. Methods that differ: no_fingerprint (with V's
    rate searched); hindsight, no V (G's); untrained, no learning; band, returns left out."""
    torch.manual_seed(run.seed)
    search = Search(cfg, env, run.device, cfg.policy_hidden, cfg.policy_hidden)
    search.band = BAND if method == "band" else search.band
    span = cfg.highest - cfg.lowest
    steps_v, steps_g = {"hindsight": (0, 19), "untrained": (0, 0)}.get(method, (4, 19))
    G = Generator(search.sizes, cfg.hidden).to(run.device)
    V = Evaluator(cfg, search.sizes, env.limit, method != "no_fingerprint").to(run.device)
    rate_g = 3e-3 if method == "hindsight" else cfg.generator_rate
    rate_v = 1e-3 if method == "no_fingerprint" else cfg.evaluator_rate
    adam_g = torch.optim.Adam(G.parameters(), rate_g, fused=True)
    adam_v = torch.optim.Adam(V.parameters(), rate_v, fused=True)
    loss_v = run.compile(evaluator_loss)
    loss_g = run.compile(hindsight_loss if method == "hindsight" else generator_loss)
    for step in run.steps(method, cfg.iterations, G=G, V=V, adam_g=adam_g, adam_v=adam_v,
                          moments=search.moments, theta=search.theta, returns=search.returns):
        # COLLECT
        command = torch.ones(cfg.policies, device=run.device)                  # the first one
        if step:
            low, top = search.returns.min(), search.returns.max() + cfg.increment
            command = low + (top - low) * torch.rand_like(command)
            command[int(cfg.command_mix * cfg.policies):] = top
        with torch.no_grad():
            theta = G(command / span)
            search.add(theta + cfg.noise * torch.randn_like(theta))
        # UPDATE: the evaluator, with its probing states
        losses = {}                                          # the last of each, for the log
        for _ in range(steps_v):
            adam_v.zero_grad()
            losses["loss_v"] = loss_v(V, *sample_replay(cfg, search))
            losses["loss_v"].backward()
            adam_v.step()
        # UPDATE: the generator, through the evaluator, which stays as it is
        V.requires_grad_(False)
        for _ in range(steps_g):
            adam_g.zero_grad()
            losses["loss_g"] = loss_g(G, V, *sample_replay(cfg, search), span)
            losses["loss_g"].backward()
            adam_g.step()
        V.requires_grad_(True)
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.iterations:
            best, i = search.returns.max(0)
            pair = torch.cat([G(best[None] / span), search.theta[i][None]])
            written, again = search.evaluate(pair).tolist()
            run.log(episodes=len(search.returns), best_policy_return=written, best_seen=best.item(),
                    best_played_again=again, **{name: x.item() for name, x in losses.items()})
    return search, G, [row for row in run.rows if row["stage"] == method]


# ---- 6. EVALUATION -----------------------------------------------------------------------------


def ars(cfg, run, env, directions=8, top=4, alpha=0.1, nu=0.3):
    """Augmented random search, version 2 (Mania et al., arXiv 1803.07055), for as many episodes, of
    policies without hidden layers; tanh, where the original clips -> Search, last policy (1, P).
    M <- M + alpha / (b sigma_R) sum over the b best directions of (r+ - r-) delta"""
    torch.manual_seed(run.seed)
    search = Search(cfg, env, run.device)
    M = torch.zeros((env.observations + 1) * env.actions, device=run.device)
    for _ in range(max(1, cfg.iterations * cfg.policies // (2 * directions))):
        delta = torch.randn(directions, len(M), device=run.device)
        plus, minus = search.add(M + nu * torch.cat([delta, -delta])).chunk(2)   # r+, r-
        best = torch.maximum(plus, minus).topk(top).indices
        spread = torch.cat([plus[best], minus[best]]).std().clamp(min=1e-6)    # sigma_R
        M += alpha / (top * spread) * (plus - minus)[best] @ delta[best]
    return search, M[None]


def table(search, asked, fresh=0):
    """The simplest rival: play the stored policies whose returns are nearest to those asked (n,) ->
    achieved (n,). fresh: number of episodes to measure all stored policies again before."""
    theta, scores = search.theta[search.kept()], search.returns[search.kept()]
    if fresh:
        state = search.env.reset(fresh * len(theta), 1, theta.device)
        scores = search.play(theta, state)[0].mean(1)        # (m,)
    return search.evaluate(theta[(scores - asked[:, None]).abs().argmin(1)])


def experiment(cfg, run):
    """Train, ask and compare, with one seed -> {"headline": {name: number}, ..}."""
    span, full = cfg.highest - cfg.lowest, cfg.env == "Reach"
    asked = torch.linspace(cfg.lowest, cfg.highest, 21, device=run.device)
    inside = torch.linspace(*BAND, 7, device=run.device)[1:-1]                 # five returns
    env = {"Reach": Reach, "MountainCar": MountainCar}.get(cfg.env, lambda: Gym(cfg.env))()
    methods = "generator", "no_fingerprint", "hindsight", "untrained", "band", "mountaincar"
    searches, curves, answers = {}, {}, {}
    for method in methods if full else methods[:1]:
        commands = inside if method == "band" else asked
        task = MountainCar() if method == "mountaincar" else env
        searches[method], G, curves[method] = train(cfg, run, task, method)
        answers[method] = commands, searches[method].evaluate(G(commands / span))
    head = {}
    for method, rows in curves.items():
        of = "" if method == "generator" else method + "_"
        head |= {of + key: x for key, x in rows[-1].items() if key.startswith("best")}
    head["pearson"] = torch.stack(answers["generator"]).corrcoef()[0, 1].nan_to_num().item()
    if full:
        searches["ars"], policy = ars(cfg, run, env)
        head["ars_return"] = searches["ars"].evaluate(policy).item()
        for name, method in (("table_own_replay", "generator"), ("random_search", "untrained"),
                             ("ars_table", "ars"), ("band_table", "band")):
            commands = inside if method == "band" else asked
            answers[name] = commands, table(searches[method], commands)
            answers[f"{name}_again"] = commands, table(searches[method], commands, fresh=16)
    errors = {f"{name}_error": ((achieved - commands).abs().mean() / span).item()
              for name, (commands, achieved) in answers.items()}
    return {"headline": {"tracking_error": errors.pop("generator_error")} | head | errors,
            "answers": {name: [row.tolist() for row in pair] for name, pair in answers.items()},
            "curve": curves["generator"]}


BESIDE = {"tracking_error": "ignoring the command: 0.262"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"tracking": "#0072B2", "no_fingerprint": "#56B4E9", "hindsight": "#D55E00",
           "untrained": "#777777", "table_own_replay": "#009E73", "ars_table": "#E69F00",
           "random_search": "#CC79A7"}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Two panels, and of Reach two more, from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    seeds, full = summary["per_seed"], "ars_return" in summary["headline"]
    figure = Figure((12, 8.4 if full else 4.2), layout="constrained")
    a, b, c, d = [*figure.subplots(1 + full, 2).flat, None, None][:4]
    shown = ["generator", "table_own_replay", "hindsight"][:3 if full else 1]
    car = (d, ["mountaincar"], "(d) MountainCarContinuous: a staircase")
    for axis, names, title in [(a, shown, "(a) Policies on request"), car][:1 + full]:
        asked, _ = seeds[0]["answers"]["generator"]
        axis.plot(asked, asked, "k:", lw=1)
        axis.set(title=title, xlabel="return asked for", ylabel="return achieved")
        for name in names:
            rows = [seed["answers"][name][1] for seed in seeds]
            lines(axis, asked, rows, COLOURS.get(name, "#0072B2"), name.replace("_", " "))
        axis.legend(fontsize=8)
    if full:
        b.axhline(summary["headline"]["ars_return"]["mean"], color="#E69F00", ls="--", label="ARS")
        for name, colour in COLOURS.items():
            label = name.replace("tracking", "generator").replace("_", " ")
            for key, fill in ((f"{name}_error", "full"), (f"{name}_again_error", "none")):
                errors = [seed["headline"].get(key, math.nan) for seed in seeds]
                c.plot(errors, [label] * len(seeds), "o", color=colour, fillstyle=fill)
        c.set(title="(c) Error; hollow: 17 x the episodes", xlabel="tracking error", xlim=0)
    episodes = [row["episodes"] for row in seeds[0]["curve"]]
    for key, hue in ("policy_return", "#0072B2"), ("seen", "#8B5A2B"), ("played_again", "#009E73"):
        rows = [[row["best_" + key] for row in seed["curve"]] for seed in seeds]
        lines(b, episodes, rows, hue, "best " + key.replace("_", " "))
    b.set(title="(b) Its best, while it learns", xlabel="episodes", ylabel="return")
    b.legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---- 8. RUN ------------------------------------------------------------------------------------
# Command line, seeds, checkpoints, summary: the same text in every script. It uses Config (int,
# float, bool and str fields; seed, num_seeds, log_every, save_every among them), PRESETS, BESIDE
# {name: text}, plot(summary, path), experiment(cfg, run) -> {"headline": {name: number}, ..}.


class Run:
    """One seed, as `experiment` sees it: the device, steps that are saved, a log."""

    def __init__(self, cfg, seed, folder, device, compiled=None):
        self.seed, self.folder, self.save_every = seed, folder, cfg.save_every
        self.device, self.rows, self.stage, self.start = device, [], None, time.time()
        compiled = device.type == "cuda" if compiled is None else compiled
        self.compile = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.random = [torch] + [getattr(torch, device.type)] * (device.type != "cpu")
        torch.manual_seed(seed)

    def steps(self, stage, total, **state):
        """Yield the numbers of the steps still to do, and save after each `save_every` of them.
        stage: a name of its own. state: all modules, optimisers and tensors that a step changes.
        A run that goes on starts at the top; each stage gets back what its file has: one Config."""
        file, first, self.stage = self.folder / f"seed{self.seed}-{stage}.pt", 0, stage
        if file.exists():
            try:
                saved = torch.load(file, self.device, weights_only=True)
            except Exception as error:                       # a damaged file raises almost any
                sys.exit(f"{file} is damaged; without it, its stage starts anew ({error})")
            first, self.rows = saved["step"], saved["rows"]  # the log as it was then
            self.start = time.time() - saved["seconds"]      # the pause does not count
            for name, x in state.items():
                if hasattr(x, "load_state_dict"):
                    x.load_state_dict(saved["state"][name])
                else:
                    x.data = saved["state"][name]            # its size may have grown
            for module, numbers in zip(self.random, saved["random"]):
                module.set_rng_state(numbers.cpu())
        self.bar = tqdm(range(first, total), f"seed {self.seed} {stage}", total, initial=first,
                        disable=not sys.stderr.isatty())     # a file gets lines instead
        for self.step in self.bar:
            yield self.step
            if (self.step + 1) % self.save_every == 0 or self.step + 1 == total:
                saved = {name: x.state_dict() if hasattr(x, "state_dict") else x
                         for name, x in state.items()}
                part = file.with_suffix(".part")             # a kill leaves one of the two whole
                torch.save({"step": self.step + 1, "state": saved, "rows": self.rows,
                            "seconds": time.time() - self.start,
                            "random": [module.get_rng_state() for module in self.random]}, part)
                os.replace(part, file)

    def log(self, **numbers):
        """Note and show numbers of this step; stop at one that is not finite."""
        text = "  ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        where = f"seed {self.seed} {self.stage} {self.step + 1}/{self.bar.total}"
        if not all(map(math.isfinite, numbers.values())):
            sys.exit(f"{where}: not finite: {text}")
        self.rows.append({"stage": self.stage, "step": self.step + 1, **numbers})
        text_of_all = "".join(json.dumps(row) + "\n" for row in self.rows)
        (self.folder / f"seed{self.seed}.jsonl").write_text(text_of_all)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"{where}  {text}", flush=True)


def parse(argv):
    """Command line -> (Config, other options): a preset first, explicit options on top."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"{parser.prog}: error: {text}")      # one line
    add, switch, folder = parser.add_argument, argparse.BooleanOptionalAction, pathlib.Path
    there = [kind for kind in ("cuda", "cpu", "mps") if getattr(torch, kind).is_available()]
    add("--preset", choices=PRESETS, default="quick", help="defaults of the options below")
    add("--device", choices=there, default=there[0], help="where to compute [the first]")
    add("--compile", action=switch, help="torch.compile the hot functions [on CUDA]")
    add("--out", type=folder, metavar="FOLDER", help="of the run [a new one in runs/]")
    add("--resume", type=folder, metavar="FOLDER", help="go on with the run in this folder")
    add("--replot", type=folder, metavar="FOLDER", help="draw the figure of this run again")
    for name, default in asdict(Config()).items():           # each field is an option
        if type(default) not in (int, float, bool, str):
            parser.error(f"the default of Config.{name} must be an int, float, bool or str")
        values = "".join(f"; {key} {own[name]}" for key, own in PRESETS.items() if name in own)
        kind = {"action": switch} if type(default) is bool else {"type": type(default)}
        add("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
            help=f"{notes.get(name, '')} [{default}{values}]".replace("%", "%%"))
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", pathlib.Path(__file__).name, *argv])
    if (args.resume or args.replot) and sum(word.startswith("-") for word in argv) > 1:
        parser.error("--resume and --replot take all settings from their folder")
    own = {name: value for name, value in vars(args).items() if hasattr(Config, name)}
    try:
        if args.replot:
            json.loads((args.replot / "summary.json").read_text())             # is it there?
        if args.resume:
            saved = json.loads((args.resume / "config.json").read_text())
            own, args = saved.pop("config"), argparse.Namespace(**{**vars(args), **saved})
        cfg = Config(**{**PRESETS[args.preset], **own})      # its own checks
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(error)
    if min(cfg.num_seeds, cfg.log_every, cfg.save_every) < 1:
        parser.error("--num-seeds, --log-every and --save-every must be at least 1")
    return cfg, args


def new_folder(name, cfg, args):
    """Make the folder of a new run, with its configuration: nothing is ever overwritten."""
    new = (pathlib.Path("runs", name, f"{args.preset}-{n}") for n in range(1, 10**9))
    folder = args.out or next(path for path in new if not path.exists())
    try:
        folder.mkdir(parents=True)                           # only one run can make it
        saved = {key: vars(args)[key] for key in ("preset", "command", "device", "compile")}
        (folder / "config.json").write_text(json.dumps(saved | {"config": asdict(cfg)}))
    except OSError as error:
        sys.exit(f"{error}; a run that is there goes on with --resume")
    return folder


def interval(values):
    """Numbers of n seeds -> their mean, its 95 % Student-t interval, n (no interval for n = 1)."""
    n, mean = len(values), statistics.fmean(values)
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
    half = t.get(n, 1.96 + 2.72 / (n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else 0.0
    return {"mean": mean, "ci95": [mean - half, mean + half] if n > 1 else None, "n": n,
            "per_seed": values}


def show(folder):
    """Draw the figure and print the closing table, from the summary alone."""
    summary = json.loads((folder / "summary.json").read_text())
    plot(summary, folder / "figure.png")
    for name, row in summary["headline"].items():
        spread = "[{:.4g}, {:.4g}]".format(*row["ci95"]) if row["ci95"] else ""
        print(f"{name:<32} {row['mean']:<9.4g} {spread:<18} {BESIDE.get(name, '')}")
    print(f"{summary['minutes']:.1f} minutes; {folder / 'figure.png'}")


def main(argv=None):
    """Run, resume or redraw. Under torchrun, the processes divide the seeds among themselves."""
    cfg, args = parse(argv)
    if args.replot:
        return show(args.replot)
    name, device = pathlib.Path(__file__).stem, torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
        torch.set_float32_matmul_precision("high")           # TF32
    rank, world = 0, 1                                       # which process, of how many
    if torch.distributed.is_torchelastic_launched():         # torchrun keeps a store of keys
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*address, timeout=datetime.timedelta(days=30))
    if rank == 0:
        folder = args.resume or new_folder(name, cfg, args)
    if world > 1:
        if rank == 0:
            store.set("folder", str(folder))
        folder = pathlib.Path(store.get("folder").decode())  # waits for it
    print(f"{name} {args.preset} on {device}, torch {torch.__version__}, into {folder}")
    seeds, results, run = list(range(cfg.seed, cfg.seed + cfg.num_seeds)), {}, None
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):          # the caller's go on
            for seed in seeds[rank::world]:                  # the share of this process
                run = Run(cfg, seed, folder, device, args.compile)
                results[seed] = experiment(cfg, run) | {"minutes": (time.time() - run.start) / 60}
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume {folder} goes on from the last checkpoint")
    except (OSError, ValueError) as error:
        if run and run.stage:
            raise                                            # no bad input, but a fault
        if rank == 0 and not args.resume and not any(folder.glob("seed*")):
            (folder / "config.json").unlink()
            folder.rmdir()
        sys.exit(f"{name}: error: {error}")
    if world > 1:                                            # the first process gathers all
        for seed in results:
            store.set(f"seed{seed}", json.dumps(results[seed]))
        results = {seed: json.loads(store.get(f"seed{seed}")) for seed in seeds if rank == 0}
    if rank == 0:
        heads = [results[s]["headline"] for s in seeds]      # {name: number} each
        (folder / "summary.json").write_text(json.dumps({
            "headline": {key: interval([head[key] for head in heads]) for key in heads[0]},
            "seeds": seeds, "per_seed": [results[s] for s in seeds], "config": asdict(cfg),
            "minutes": sum(results[s]["minutes"] for s in seeds), "command": args.command,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "cores": os.cpu_count(), "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "numpy", "matplotlib", "tqdm")}}))
        show(folder)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)                       # a notebook's may not exist here
    main()
