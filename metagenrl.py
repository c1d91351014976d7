# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""MetaGenRL: a learned neural loss trains new agents in new environments, in one file.

Kirsch, van Steenkiste, Schmidhuber, "Improving Generalization in Meta Reinforcement Learning using
Learned Objectives", ICLR 2020, arXiv 1910.04098. [code]: read in the official release.

IDEA
  A reinforcement-learning algorithm is at bottom a loss: from what an agent did and the rewards it
  got, its gradient says how to change the policy. People write that loss (REINFORCE, PPO, DDPG).
  Here it is learned: a small network L, shared by a population of ordinary off-policy actor-critics
  in different environments, whose policies follow the gradient of L. The critics judge L: make one
  step of a policy with L, ask the critic how good the actions are now, and differentiate the answer
  through the step. L is given actions, rewards and values, never states, and no gradient of a
  critic. Then L is frozen, and trains new agents in environments never seen.

ALGORITHM
  for each lifetime of a population: new agents; then at each iteration, for every agent
    now and then: an episode with pi_phi(s) + noise, the first at random; store (s, a, r, d)
    (1) theta <- Adam(theta, gradient of (Q_theta(s, a) - y)^2),  y: TD3's target, twin critics
    every second time, after a warm-up; (2) and (3) draw sequences tau of T steps anew
    (2) phi   <- Adam(phi, clipped gradient of mean L_alpha(tau, pi_phi(s), V)),  V = Q(s, pi(s))
    (3) phi'   = phi - lambda_3 clipped grad_phi mean L_alpha(tau, ..), a trial step on B of 2 B
    (4) alpha <- Adam(alpha, mean over agents of clipped grad_alpha -J),  J = mean Q(s, pi_phi'(s))
  Meta-test: alpha frozen, new agents; critics learn by (1), only to give V, policies by (2) alone.

SYMBOLS, in the code, shape or meaning
  n, E                           agents of an environment (vmap's axis), episodes side by side
  B, T, S, A                     sequences of a minibatch, their steps; sizes of states and actions
  phi, theta, alpha   the same   weights {name: w}: of policies (n, ..), critics (n, 2, ..), L (..)
  pi, a       (B, T, A)          the policy's actions at replayed states, the actions taken there
  s, r, d, V  (B, T), V T + 1    states (.., S), rewards, ends; values Q(s, pi(s)), constants for L

RESULT (quick: seeds 0-4, mean [95 % t interval], 1.9 minutes a seed on one core; `paper`: not run)
  Score (untrained L 0, DDPG 1): seen 0.995 [0.986, 1.005], unseen 0.975 [0.852, 1.099], noisy in
  reacher; all four 0.99, "reinforce" 1.00, -L -0.81; L told V = 0, in pendulum, -0.01. L beats an
  untrained one in 80 of 80 agents. Cosine with "reinforce", least of tasks 0.428 [0.360, 0.497].

DIFFERS
  1. Tasks are ours, none ends early: d is 0. quick: small, gamma 0.9, larger rates, a warm-up.
     [code] starts with 10,000 random steps, Glorot's weights, DDPG's loss mixed in: not here.
  2. Aids of quick, which `paper` does without: the trial step clipped, too; L made even in (a, pi);
     last layers start, lambda_4 ends at a tenth; alpha averaged; new agents every 440 iterations.
  3. "reinforce" learns from replay without importance weights [code]; advantages are standardised,
     V is a constant. Left out: EPG, RL^2, PPO. --compile does nothing here.

RUN
  python metagenrl.py
"""
import argparse
import copy
import datetime
import inspect
import itertools
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
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code: x]: the release has x."""
    train: str = "pendulum,point"    # environments of meta-training; all four are in the meta-test
    agents: int = 4                  # of each environment, n [code: 10]
    copies: int = 8                  # episodes that an agent plays side by side, E [code: 1]
    horizon: int = 40                # steps of an episode, iterations between them [code: 1000]
    lives: int = 9                   # populations, one after another [code: 1]
    life: int = 440                  # iterations of a population [code: 700,000]
    test_life: int = 440             # iterations of a meta-test
    warmup: int = 80                 # first iterations of a lifetime: critics only [code: 0]
    batch: int = 16                  # sequences of an agent's minibatch, B [code: 100]
    length: int = 6                  # of a sequence, T [code: 20]
    gamma: float = 0.9               # discount [code: 0.99]
    noise: float = 0.5               # of exploration [code: 0.1]
    polyak: float = 0.05             # share of new weights in the targets [code: 0.005]
    hidden: int = 32                 # units of policies' and critics' two hidden layers [code: 350]
    critic_rate: float = 4e-3        # lambda_1, Adam [code: 1e-3]
    policy_rate: float = 1e-3        # lambda_2, Adam, by whatever rule [code]
    inner_rate: float = 0.1          # lambda_3, SGD [code: 2; it sums 2,000 steps, times 1e-3]
    objective_rate: float = 1e-2     # lambda_4, Adam [code: 1e-3]
    aids: bool = True                # what a small population needs, see DIFFERS [code: no]
    width: int = 16                  # units in L [code: 32]
    layers: int = 1                  # hidden layers in L, over actions 2 layers - 1 [code: 2, 3]
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 20              # iterations between logs
    save_every: int = 220            # iterations between checkpoints

    def __post_init__(self):
        if not set(self.train.split(",")) < set(TASKS):
            raise ValueError(f"--train must be some of {','.join(TASKS)}, not {self.train}")
        if min(self.agents, self.copies, self.batch, self.hidden, self.layers, self.lives,
               self.length, self.width - 1, self.horizon - self.length + 1,
               self.life - self.warmup) < 1:
            raise ValueError("sizes >= 1, --width >= 2, --horizon >= --length, --life > --warmup")
        if self.test_life % max(1, self.log_every) or self.test_life < self.warmup + 20:
            raise ValueError("--test-life: a multiple of --log-every, at least --warmup + 20")


PRESETS = {
    "smoke": dict(lives=1, life=40, test_life=40, warmup=10, horizon=20, agents=2, copies=2,
                  hidden=8, width=4),
    "quick": {},
    "paper": dict(agents=10, copies=1, horizon=1000, lives=1, life=700_000, warmup=0,
                  test_life=700_000, batch=100, length=20, gamma=0.99, noise=0.1, polyak=0.005,
                  hidden=350, critic_rate=1e-3, inner_rate=2.0, objective_rate=1e-3, aids=False,
                  width=32, layers=2, log_every=10_000, save_every=10_000),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# An environment: reset(*shape) -> state (*shape, ..); see(state) -> observation (*shape, S);
# step(state, action in [-1, 1] (*shape, A)) -> state, reward, minus a cost. None ends early.


class Pendulum:
    """Gymnasium's Pendulum-v1 with a motor four times as strong, rewards times 0.2, the rate seen
    as a quarter: learned in a few hundred updates. State: angle, 0 upright, and its rate."""
    S, A = 3, 1

    def reset(self, *shape, device):
        limits = torch.tensor([math.pi, 1.0], device=device)  # of the first angle and rate
        return (2 * torch.rand(*shape, 2, device=device) - 1) * limits

    def see(self, state):
        angle, rate = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), rate / 4], -1)

    def step(self, state, action):
        angle, rate = state.unbind(-1)
        u = 8 * action[..., 0]                               # torque, in Gymnasium 2 at most
        away = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi         # from upright
        reward = -0.2 * (away**2 + 0.1 * rate**2 + 0.001 * u**2)
        rate = (rate + 0.05 * (15 * angle.sin() + 3 * u)).clamp(-8, 8)         # gravity and motor
        return torch.stack([angle + 0.05 * rate, rate], -1), reward


class Point:
    """A point that goes where it is told must reach the middle. State, seen as it is: place."""
    S, A, see = 2, 2, staticmethod(lambda state: state)

    def reset(self, *shape, device):
        return 2 * torch.rand(*shape, 2, device=device) - 1

    def step(self, state, action):
        state = (state + 0.15 * action).clamp(-1.5, 1.5)
        return state, -state.norm(dim=-1)


class Servo:
    """A carriage on a rail must reach the middle. State, seen as it is: place, velocity."""
    S, A, see = 2, 1, staticmethod(lambda state: state)

    def reset(self, *shape, device):
        place = 2 * torch.rand(*shape, 1, device=device) - 1
        return torch.cat([place, torch.zeros_like(place)], -1)

    def step(self, state, action):
        p, v = state.unbind(-1)
        v = v + 0.2 * (4 * action[..., 0] - 3 * v)           # motor and friction
        p = p + 0.2 * v
        v, p = torch.where(p.abs() > 1.5, 0, v), p.clamp(-1.5, 1.5)
        return torch.stack([p, v], -1), -p.abs()


class Reacher:
    """An arm of three links, length 1 in all, must touch a goal. State: links' directions, goal."""
    S, A = 8, 3

    def reset(self, *shape, device):
        uniform = torch.rand(*shape, 5, device=device)
        angles, radius = math.pi * (2 * uniform[..., :4] - 1), 0.3 + 0.6 * uniform[..., 4:]
        goal = torch.stack([angles[..., 3].cos(), angles[..., 3].sin()], -1) * radius
        return torch.cat([angles[..., :3], goal], -1)

    def apart(self, state):
        """From the tip to the goal."""
        links = state[..., :3]                               # (*shape, 3)
        return state[..., 3:] - torch.stack([links.cos().mean(-1), links.sin().mean(-1)], -1)

    def see(self, state):
        return torch.cat([state[..., :3].cos(), state[..., :3].sin(), self.apart(state)], -1)

    def step(self, state, action):
        state = torch.cat([state[..., :3] + 0.3 * action, state[..., 3:]], -1)
        return state, -self.apart(state).norm(dim=-1)


TASKS = {"pendulum": Pendulum, "point": Point, "servo": Servo, "reacher": Reacher}

# ---- 3. MODEL ----------------------------------------------------------------------------------
# All of it is written for one agent; vmap makes it a population.


def znorm(x):
    """Standardise an agent's minibatch (B, ..): it makes L blind to the scale of rewards."""
    x = x - x.mean()
    return x * (x.square().mean() + 1e-8).rsqrt()


def mlp(n_in, hidden, n_out):
    """A policy or a critic."""
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.LayerNorm(hidden),
                         nn.Linear(hidden, hidden), nn.ReLU(), nn.LayerNorm(hidden),
                         nn.Linear(hidden, n_out))


class Mixed(nn.Module):
    """Activation of L [code]: ReLU on half of the units, the square on the others."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([a.relu(), b.square()], -1)


def hidden_layers(n_in, width, count, norm=True):
    """Layers of L: linear, mixed activation, layer norm."""
    modules = []
    for i in range(count):
        modules += [nn.Linear(width if i else n_in, width), Mixed(), *[nn.LayerNorm(width)] * norm]
    return modules


class Objective(nn.Module):
    """The learned loss of every step, l (B, T), between -1000 and 1000 [code]."""

    def __init__(self, cfg):
        super().__init__()
        w, self.symmetric = cfg.width, cfg.aids
        self.action = nn.Sequential(*hidden_layers(2, w, 2 * cfg.layers - 1))  # of (a, pi)
        self.other = nn.Sequential(*hidden_layers(4, w, cfg.layers, norm=False), nn.Linear(w, 8))
        self.gates, self.recurrent = nn.Linear(w + 8, 4 * w), nn.Linear(w, 4 * w, bias=False)
        self.out = nn.Sequential(*hidden_layers(w, w, cfg.layers), nn.Linear(w, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):                 # TensorFlow's default [code]
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.out[-1].weight.data *= 0.1 if cfg.aids else 1   # see DIFFERS 2

    def forward(self, pi, a, r, d, V):
        """pi: the only way to phi;  V (B, T + 1): detached, else L could become DDPG."""
        # One dimension of actions at a time, then their mean: L fits any A
        pairs = torch.stack([a, pi], -1)                     # (B, T, A, 2)
        acts = self.action(pairs)
        if self.symmetric:
            acts = (acts + self.action(-pairs)) / 2
        V = torch.cat([V[:, :1], V[:, 1:] * (1 - d)], 1)     # nothing is to come after an end
        V, clock = znorm(V), torch.arange(r.shape[1], device=r.device) / r.shape[1]    # t / T
        other = torch.stack([znorm(r), clock.expand_as(r), V[:, 1:], V[:, :-1]], -1)   # (B, T, 4)
        # LSTM, backwards in time: what an action led to judges it. cuDNN's has no 2nd derivative
        x = self.gates(torch.cat([acts.mean(2), self.other(other)], -1))       # (B, T, 4 w)
        h = c = torch.zeros_like(x[:, 0, :x.shape[-1] // 4])
        outputs = []
        for t in reversed(range(r.shape[1])):
            i, f, o, g = (x[:, t] + self.recurrent(h)).chunk(4, -1)
            c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()  # + 1: it remembers at first
            h = o.sigmoid() * c.tanh()
            outputs.append(h)                                # (B, w)
        l = self.out(torch.stack(outputs[::-1], 1))[..., 0]  # (B, T)
        return 1000 * (l / 1000).tanh()


# ---- 4. LEARNING RULE --------------------------------------------------------------------------


class Batch(NamedTuple):
    """Sequences of one agent, or, with an axis n in front, of a population."""
    obs: torch.Tensor                # (B, T + 1, S)
    action: torch.Tensor             # (B, T, A)
    reward: torch.Tensor             # (B, T)
    end: torch.Tensor                # (B, T), 0 or 1: terminated; a time limit is no end


class Agent:
    """The networks and the losses of one agent; weights and batches come from outside."""

    def __init__(self, env, objective, cfg):
        self.cfg, self.objective = cfg, objective
        self.policy, self.critic = mlp(env.S, cfg.hidden, env.A), mlp(env.S + env.A, cfg.hidden, 1)

    def pi(self, phi, s):
        return functional_call(self.policy, phi, s).tanh()

    def Q(self, theta, s, a):
        return functional_call(self.critic, theta, torch.cat([s, a], -1))[..., 0]

    def critic_loss(self, theta, theta_target, phi_target, noise, batch):
        """Eq. 1 as TD3: two critics, theta (2, ..), the smaller target, a noisy target action."""
        s, a, r, d = batch
        twins = vmap(self.Q, (0, None, None))                # both critics: (2, B, T)
        after = self.pi(phi_target, s[:, 1:]) + (0.2 * noise).clamp(-0.5, 0.5)         # [code]
        y = r + self.cfg.gamma * (1 - d) * twins(theta_target, s[:, 1:], after.clamp(-1, 1)).amin(0)
        return (twins(theta, s[:, :-1], a) - y).square().mean((1, 2)).sum()

    def policy_loss(self, phi, theta, alpha, batch, rule):
        """rule: "ddpg" or "reinforce", which people wrote; "no_value", L told V = 0; else L."""
        s, a, r, d = batch
        pi = self.pi(phi, s)                                 # (B, T + 1, A)
        V = self.Q({name: w[0].detach() for name, w in theta.items()}, s, pi)  # of one critic
        if rule == "ddpg":                                   # -J: it judges L, too
            return -V[:, :-1].mean()
        V, pi = V.detach(), pi[:, :-1]
        if rule == "reinforce":
            # of -log of a Gaussian, times advantage. Replayed, without importance weights [code]
            return ((a - pi).square().mean(-1) * znorm(advantages(r, d, V, self.cfg.gamma))).mean()
        V = torch.zeros_like(V) if rule == "no_value" else V
        return functional_call(self.objective, alpha, (pi, a, r, d, V)).mean()


def advantages(r, d, V, gamma, lam=0.97):
    """Generalised advantage estimates (B, T), lambda as in [code]:
    A_t = r_t + g V_(t+1) - V_t + g lambda A_(t+1),  g = gamma (1 - d_t)"""
    A, out = torch.zeros_like(r[:, 0]), []
    for t in reversed(range(r.shape[1])):
        go_on = gamma * (1 - d[:, t])                        # g
        A = r[:, t] + go_on * V[:, t + 1] - V[:, t] + go_on * lam * A          # (B,)
        out.append(A)
    return torch.stack(out[::-1], 1)


def clip(grads):
    """Scale one agent's gradient {name: ..} down to norm 1, differentiably."""
    norm = (sum(g.square().sum() for g in grads.values()) + 1e-12).sqrt()
    return {name: g / norm.clamp(min=1) for name, g in grads.items()}


def gradient(losses, weights, create_graph=False):
    """Agents are independent: the gradient of the sum (n,) -> () is each one's own."""
    grads = torch.autograd.grad(losses.sum(), list(weights.values()), create_graph=create_graph)
    return dict(zip(weights, grads))


def meta_gradient(agent, alpha, phi, theta, batch, cfg):
    """Eqs. 3 and 4 of n agents -> each one's gradient of -J by its copy of alpha {name: (n, ..)}.
    batch: 2 B sequences; the trial step learns from the first half, all of them judge [code]."""
    n = len(batch.reward)                                    # agents
    alpha = {k: w.detach().expand(n, *w.shape).clone().requires_grad_() for k, w in alpha.items()}
    half = Batch(*(x[:, :cfg.batch] for x in batch))         # (n, B, ..)
    losses = vmap(lambda *x: agent.policy_loss(*x, "L"))(phi, theta, alpha, half)
    g = gradient(losses, phi, create_graph=True)
    g = vmap(clip)(g) if cfg.aids else g
    after = {k: w - cfg.inner_rate * g[k] for k, w in phi.items()}             # phi', eq. 3
    minus_J = vmap(lambda *x: agent.policy_loss(*x, "ddpg"))(after, theta, alpha, batch)
    return gradient(minus_J, alpha)                          # eq. 4


# ---- 5. TRAINING -------------------------------------------------------------------------------


def descend(adam, weights, grads):
    """One step of an optimiser with a given gradient {name: ..}."""
    for name, w in weights.items():
        w.grad = grads[name].detach()
    adam.step()


class Population:
    """n agents of one environment and age. phi (n, ..), theta (n, 2, ..), targets of both; replay:
    a Batch of all episodes of their lifetimes, (n, episodes, horizon, ..)."""

    def __init__(self, cfg, task, objective, device):
        self.cfg, self.env, self.device = cfg, TASKS[task](), device
        self.agent, self.age, self.replay = Agent(self.env, objective, cfg), 0, None
        S, A, n = self.env.S, self.env.A, cfg.agents
        policies = [mlp(S, cfg.hidden, A).to(device) for _ in range(n)]        # one an agent
        for policy in policies if cfg.aids else ():
            policy[-1].weight.data *= 0.1
        critics = [mlp(S + A, cfg.hidden, 1).to(device) for _ in range(2 * n)]   # twins
        self.phi, _ = stack_module_state(policies)
        theta, _ = stack_module_state(critics)               # (2 n, ..)
        self.theta = {k: w.detach().unflatten(0, (n, 2)).requires_grad_() for k, w in theta.items()}
        self.phi_target, self.theta_target = ({k: w.detach().clone() for k, w in weights.items()}
                                              for weights in (self.phi, self.theta))
        self.adam_phi = torch.optim.Adam(self.phi.values(), cfg.policy_rate)
        self.adam_theta = torch.optim.Adam(self.theta.values(), cfg.critic_rate)

    @torch.no_grad()
    def play(self, copies, noise=0.0, at_random=False):
        """An episode in each of E copies -> Batch (n, E, horizon, ..)."""
        state, steps = self.env.reset(self.cfg.agents, copies, device=self.device), []  # (n, E, ..)
        obs = [self.env.see(state)]
        for _ in range(self.cfg.horizon):
            a = vmap(self.agent.pi)(self.phi, obs[-1])       # (n, E, A)
            a = 2 * torch.rand_like(a) - 1 if at_random else a + noise * torch.randn_like(a)
            a = a.clamp(-1, 1)
            state, r = self.env.step(state, a)
            obs.append(self.env.see(state))
            steps.append((a, r, torch.zeros_like(r)))        # no end
        return Batch(torch.stack(obs, 2), *(torch.stack(x, 2) for x in zip(*steps)))

    def evaluate(self, episodes=32):
        """Mean return of each agent without noise (n,); the same first states in every call."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(12345)
            return self.play(episodes).reward.sum(-1).mean(1)

    def sample(self, count):
        """Sequences of T steps, anywhere in an episode of their agent -> Batch (n, count, ..)."""
        n, episodes, H = self.replay.reward.shape
        row = torch.arange(n, device=self.device)[:, None, None]
        episode = torch.randint(episodes, (n, count, 1), device=self.device)
        first = torch.randint(H - self.cfg.length + 1, (n, count, 1), device=self.device)
        t = first + torch.arange(self.cfg.length + 1, device=self.device)      # (n, count, T + 1)
        others = (x[row, episode, t[..., :-1]] for x in self.replay[1:])
        return Batch(self.replay.obs[row, episode, t], *others)

    def learn(self, alpha, rule, alpha_axis=None):
        """An iteration. alpha: weights of L; alpha_axis 0: of each agent's own."""
        cfg, agent = self.cfg, self.agent
        # COLLECT
        if self.age % cfg.horizon == 0:                      # every horizon iterations
            new = self.play(cfg.copies, cfg.noise, at_random=self.age == 0)
            old = self.replay or Batch(*(x[:, :0] for x in new))
            self.replay = Batch(*(torch.cat(pair, 1) for pair in zip(old, new)))
        # INNER UPDATE: the critics, eq. 1
        batch = self.sample(cfg.batch)                       # (n, B, ..)
        losses = vmap(agent.critic_loss)(self.theta, self.theta_target, self.phi_target,
                                         torch.randn_like(batch.action), batch)
        descend(self.adam_theta, self.theta, gradient(losses, self.theta))     # lambda_1
        # INNER UPDATE: the policies, eq. 2
        if self.age % 2 == 0:
            if self.age >= cfg.warmup:
                loss = vmap(lambda *x: agent.policy_loss(*x, rule), (0, 0, alpha_axis, 0))
                losses = loss(self.phi, self.theta, alpha, self.sample(cfg.batch))
                descend(self.adam_phi, self.phi, vmap(clip)(gradient(losses, self.phi)))  # lambda_2
            for weights, targets in ((self.phi, self.phi_target), (self.theta, self.theta_target)):
                for name, w in weights.items():
                    targets[name].lerp_(w.detach(), cfg.polyak)
        self.age += 1

    def state_dict(self):
        return {"weights": [self.phi, self.theta, self.phi_target, self.theta_target],
                "adams": [self.adam_phi.state_dict(), self.adam_theta.state_dict()],
                "age": self.age, "replay": list(self.replay or ())}

    def load_state_dict(self, saved):
        for own, theirs in zip(self.state_dict()["weights"], saved["weights"]):
            for name, w in own.items():
                w.data.copy_(theirs[name])
        self.adam_phi.load_state_dict(saved["adams"][0])
        self.adam_theta.load_state_dict(saved["adams"][1])
        self.age, self.replay = saved["age"], Batch(*saved["replay"])


def train(cfg, run):
    """Meta-train -> L with the average of alpha."""
    torch.manual_seed(run.seed)
    objective = Objective(cfg).to(run.device)
    alpha = dict(objective.named_parameters())
    average = AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(0.995 * cfg.aids))
    adam = torch.optim.Adam(alpha.values(), cfg.objective_rate)
    updates = cfg.lives * (cfg.life - cfg.warmup) // 2
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1, 0.1 if cfg.aids else 1, updates)
    for life in range(cfg.lives):
        born = {task: Population(cfg, task, objective, run.device) for task in cfg.train.split(",")}
        for age in run.steps(f"life{life + 1}", cfg.life, objective=objective, average=average,
                             adam=adam, decay=decay, **born):
            for population in born.values():
                population.learn(alpha, "L")
            # META UPDATE
            if age % 2 == 0 and age >= cfg.warmup:
                each = [vmap(clip)(meta_gradient(x.agent, alpha, x.phi, x.theta,
                                                 x.sample(2 * cfg.batch), cfg))
                        for x in born.values()]
                descend(adam, alpha, {k: torch.cat([g[k] for g in each]).mean(0) for k in alpha})
                decay.step()                                 # of lambda_4
                average.update_parameters(objective)
            # LOG
            if (age + 1) % cfg.log_every == 0 or age + 1 == cfg.life:
                run.log(**{task: x.evaluate().mean().item() for task, x in born.items()})
    return average.module


# ---- 6. EVALUATION -----------------------------------------------------------------------------


def cosines(population, alpha):
    """Cosines of L's gradient with other rules', over all policy weights of an agent -> means."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):              # logs change nothing
        batch, flat = population.sample(2 * population.cfg.batch), {}
    for rule in ("L", "reinforce", "ddpg"):
        loss = vmap(lambda *x: population.agent.policy_loss(*x, rule), (0, 0, None, 0))
        g = gradient(loss(population.phi, population.theta, alpha, batch), population.phi)
        flat[rule] = torch.cat([x.flatten(1) for x in g.values()], 1)          # (n, weights)
    return {f"cosine_{rule}": F.cosine_similarity(flat["L"], flat[rule]).mean().item()
            for rule in ("reinforce", "ddpg")}


def meta_test(cfg, run, rule, objective, tasks=TASKS):
    """New agents, the same for all rules, learn by one -> {task: {"curve": mean returns,
    "agents": last return of each, "cosine_..": of the rule L}}."""
    torch.manual_seed(10_000 + run.seed)
    born = {task: Population(cfg, task, objective, run.device) for task in tasks}
    alpha, axis = {k: w.detach() for k, w in objective.named_parameters()}, None
    if rule == "untrained":                                  # each agent has an L of its own
        alpha, _ = stack_module_state([Objective(cfg).to(run.device) for _ in range(cfg.agents)])
        axis = 0
    for step in run.steps(rule, cfg.test_life, **born):
        for population in born.values():
            population.learn(alpha, rule, axis)
        if (step + 1) % cfg.log_every == 0:
            row = {f"{task}_curve": x.evaluate().mean().item() for task, x in born.items()}
            for task, x in born.items() if rule == "L" and step + 1 >= cfg.warmup + 20 else ():
                row |= {f"{task}_{key}": value for key, value in cosines(x, alpha).items()}
            run.log(**row)
    rows = [row for row in run.rows if row["stage"] == rule]
    tests = {task: {"agents": x.evaluate().tolist()} for task, x in born.items()}
    for task, name in itertools.product(tasks, ("curve", "cosine_reinforce", "cosine_ddpg")):
        tests[task][name] = [row[f"{task}_{name}"] for row in rows if f"{task}_{name}" in row]
    return tests


def push(objective, T):
    """-dL/dpi at pi = 0 over actions a in -1 .. 1 -> a, push when values rise by one after it, push
    when they fall, (40,) each, over the largest. 2 x 40 made-up sequences; all else is 0."""
    x, middle = torch.linspace(-1, 1, 40), T // 2            # 40 leave out 0, a cusp of L
    a, V, zero = torch.zeros(80, T, 1), torch.zeros(80, T + 1), torch.zeros(80, T)
    a[:, middle, 0] = x.repeat(2)
    V[:40, middle + 1:], V[40:, middle + 1:] = 1, -1
    pi = torch.zeros_like(a, requires_grad=True)             # the policy says 0
    l = copy.deepcopy(objective).cpu()(pi, a, zero, zero, V)
    g = -torch.autograd.grad(l.sum(), pi)[0][:, middle, 0]
    return [x.tolist(), *(g / g.abs().max()).view(2, 40).tolist()]


def experiment(cfg, run):
    """Meta-train, meta-test and compare, with one seed -> {"headline": {name: number}, ..}."""
    L, seen, mean = train(cfg, run), cfg.train.split(","), statistics.fmean
    negated = copy.deepcopy(L)                               # tanh is odd: this is -L
    for w in negated.out[-1].parameters():
        w.data.neg_()
    tests = {rule: meta_test(cfg, run, rule, negated if rule == "negated" else L)
             for rule in ("L", "ddpg", "reinforce", "untrained", "negated")}
    tests["no_value"] = meta_test(cfg, run, "no_value", L, ["pendulum"])
    ends = {(rule, task): mean(test["agents"])
            for rule, tasks in tests.items() for task, test in tasks.items()}
    unseen = [task for task in TASKS if task not in seen]
    def score(rule, *tasks):
        return mean((ends[rule, x] - ends["untrained", x])
                    / (ends["ddpg", x] - ends["untrained", x]) for x in tasks)
    head = {f"score_{task}": score("L", task) for task in TASKS}
    head |= {"score_seen": score("L", *seen), "score_unseen": score("L", *unseen),
             "no_value_score_pendulum": score("no_value", "pendulum"),
             **{f"{rule}_score": score(rule, *TASKS) for rule in ("L", "negated", "reinforce")}}
    head["cosine_reinforce"] = min(mean(x["cosine_reinforce"]) for x in tests["L"].values())
    pairs = [zip(tests["L"][task]["agents"], tests["untrained"][task]["agents"]) for task in TASKS]
    head["wins_over_untrained"] = mean(a > b for pair in pairs for a, b in pair)
    return {"headline": head, "tests": tests, "push": push(L, cfg.length)}


BESIDE = {"score_unseen": "untrained L 0, DDPG 1"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"L": "#0072B2", "ddpg": "#E69F00", "reinforce": "#009E73", "untrained": "#777777",
           "negated": "#D55E00"}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Three panels, the first of an axis for each task, from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    figure, seeds = Figure((12, 8.4), layout="constrained"), summary["per_seed"]
    every, life, train = (summary["config"][key] for key in ("log_every", "test_life", "train"))
    *curves, push, angles = figure.subplots(2, 3).flat
    for place, (axis, task) in enumerate(zip(curves, TASKS)):
        for rule, colour in COLOURS.items():
            rows = [seed["tests"][rule][task]["curve"] for seed in seeds]
            lines(axis, range(every, life + 1, every), rows, colour, rule)
        known = "seen" if task in train.split(",") else "never seen"
        axis.set(title=f"(a) New agents, {task}: {known}", xlabel="iteration", ylabel="return")
        for key, marker in (("reinforce", "o"), ("ddpg", "s")):
            values = [statistics.fmean(seed["tests"]["L"][task][f"cosine_{key}"]) for seed in seeds]
            angles.plot([place] * len(seeds), values, marker, color=COLOURS[key], alpha=0.6)
    curves[0].legend(fontsize=8)
    for which, style in ((1, "-"), (2, "--")):
        rows = [seed["push"][which] for seed in seeds]
        lines(push, seeds[0]["push"][0], rows, COLOURS["L"], None, style)
    push.set(title="(b) Towards a if V rises (falls: dashed)", xlabel="a", ylabel="push on pi = 0")
    angles.set(title="(c) Cosine of L's gradient with theirs", xticks=range(4), xticklabels=TASKS)
    angles.legend(("reinforce", "ddpg"), fontsize=8)         # the first two of those plotted
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
