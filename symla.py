# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""SymLA: a black box with the symmetries of a learning rule must learn, in one file.

Kirsch, Flennerhag, van Hasselt, Friesen, Oh, Chen, "Introducing Symmetries to Black Box Meta
Reinforcement Learning", AAAI 2022, arXiv 2109.10781. No code was released.

IDEA
  A recurrent network that sees observations, its last actions and rewards can learn to learn: its
  weights are the learning algorithm, its memory is what was learned. But trained in few
  environments it recalls their answers. Backpropagation cannot: its rule is the same at every
  weight, for any size and order of inputs and outputs. SymLA has these symmetries. Where a network
  has the weight from input a to output b, it has a little LSTM; all share their weights. Row a of
  this grid hears entry a of the observation, column b whether action b was the last one, all hear
  the reward, and they exchange sums. Only its past tells a cell from the others: weights cannot
  store which entry or action is right, only a way to find it.

ALGORITHM
  a step of a life, for all cells (a, b) at once; messages are those of the step before
    h_ab <- LSTM_theta(h_ab; obs_a, before_a, back_a; was_b, reward, was_b reward, ahead_b)  (1)
    logit_b, ahead_b <- sum_a W_ahead h_ab;   back_a <- mean_b W_back h_ab                   (2)
    action ~ softmax_b(logit_b)                                                              (3)
  meta-training: theta <- Adam(theta, -g), an evolution strategy with antithetic pairs of members
    eps_i ~ N(0, 1),   F(theta) = mean reward of whole lives
    g = 1 / (2 P sigma) sum_i (F(theta + sigma eps_i) - F(theta - sigma eps_i)) eps_i        (4)

SYMBOLS, in the code, shape or meaning
  E, O, A, T                    environments side by side, observation's entries, actions, steps
  N, M, P                       numbers in a cell's state, in a message; pairs of members
  h, c             (E, O, A, N) state of the cells: output and memory of an LSTM
  obs, before, was (E, O or A)  observation, the last one, last action: one-hot, the first two x 3
  ahead, back (E, O or A, M)    messages along columns, towards the actions, and back along rows
  theta, eps  {name: w}         shared weights; noise (P, ..); vmap plays the 2 P members at once

RESULT (quick: seeds 0-4, mean [95 % t interval], 2.7 minutes a seed on one core; `paper`: not run)
  Reward in 40 steps with four cues (chance 0.333; best without knowledge 0.900, and a little more
  as one button is right twice). Seen: SymLA 0.909 [0.900, 0.918], meta-RNN 0.999 [0.999, 0.999];
  shuffled: 0.909 [0.899, 0.918], 0.351, trained on shuffled ones 0.373 [0.362, 0.383].
  Shuffled anew in mid-life: SymLA 0.415 [0.268, 0.562], with --upheaval --lifetime 80 0.91. Other
  tasks: above chance, below Q-learning. Grids without messages do as well.

DIFFERS (the paper's text was not at hand: inputs and sizes are pieced together from other accounts)
  1. Environments are ours, small enough for two cores: cues and buttons, bandits, rooms.
  2. quick: cells also hear the observation before and last action times reward; all symmetries
     stay. Without, normal arms score 0.63, not 0.79. `paper` has neither; its sizes are guesses.
  3. Logits beside the messages, tanh on these, means back; one layer, one tick a step; observations
     x 3, large first weights; fitness is expected, not drawn reward. --compile does nothing.

RUN
  python symla.py
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
import torch.nn.functional as F
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help."""
    hidden: int = 8                  # numbers in the state of a cell, N
    message: int = 4                 # numbers in a message, M
    previous_obs: bool = True        # cells also see the observation that the last reward answers
    product: bool = True             # cells also see the product of last action and reward
    iterations: int = 400            # steps of the evolution strategy, for each learner
    pairs: int = 32                  # antithetic pairs of members, P
    sigma: float = 0.1               # standard deviation of the members' noise
    learning_rate: float = 0.05      # of Adam at first, for all; it falls to a tenth
    environments: int = 8            # of each kind in an iteration, E
    lifetime: int = 40               # steps of a life in meta-training, T
    upheaval: bool = False           # in meta-training, too, places change in mid-life
    tests: str = "cues_6x4,cues_2x8,noisy_cues_3x3,arms_15,normal_arms_5,room_3"   # kind_size, ...
    test_lifetime: int = 100         # steps of a life in tests
    test_environments: int = 1000    # of each test
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 20              # iterations between lines of the log
    save_every: int = 100            # iterations between checkpoints

    def __post_init__(self):
        if min(self.hidden, self.message, self.iterations, self.pairs, self.environments,
               self.lifetime - self.upheaval, self.test_environments, self.test_lifetime - 1) < 1:
            raise ValueError("sizes must be at least 1, lives that change in the middle at least 2")
        if not (0 < self.sigma < math.inf and 0 < self.learning_rate < math.inf):
            raise ValueError("--sigma and --learning-rate must be positive")
        n = r"([2-9]|[1-9]\d)"
        for name in self.tests.split(","):
            if not re.fullmatch(rf"(noisy_)?cues_{n}x{n}|(normal_)?arms_{n}|room_{n}", name):
                raise ValueError(f"--tests: {name!r} is not like cues_6x4, noisy_cues_3x3, "
                                 "arms_15, normal_arms_5 or room_3, with sizes from 2 to 99")


PRESETS = {
    "smoke": dict(iterations=10, pairs=4, test_environments=8, log_every=5, save_every=4),
    "quick": {},
    "paper": dict(hidden=16, message=8, previous_obs=False, product=False,
                  iterations=10_000, pairs=256, lifetime=100, log_every=100, save_every=500),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------


class Environments:
    """E small environments side by side, as tables (E, S, A). In state s action a pays 1 with
    probability pay[s, a], else 0 (normal: a draw of that mean and variance 1), and leads to state
    goes[s, a] (-1: to any). State s is seen as a one-hot vector: entry code[s] of S."""

    def __init__(self, pay, goes=None, normal=False):
        self.pay, self.normal, (self.size, self.states, self.actions) = pay, normal, pay.shape
        self.rows = torch.arange(self.size, device=pay.device)
        self.goes = torch.full(pay.shape, -1, device=pay.device) if goes is None else goes
        self.code = torch.arange(self.states, device=pay.device).expand(self.size, -1)

    def shuffled(self):
        """-> the same, but entries and actions change places, differently in each environment."""
        order = torch.rand_like(self.pay[:, :1]).argsort(2).expand(self.pay.shape)
        other = Environments(self.pay.gather(2, order), self.goes.gather(2, order), self.normal)
        other.code = torch.rand_like(self.pay[:, :, 0]).argsort(1)
        return other

    def reset(self):
        """-> states (E,), any."""
        return torch.randint(self.states, (self.size,), device=self.pay.device)

    def see(self, state):
        """state (E,) -> observation (E, S), 3 or 0: large, so that cells soon differ."""
        return 3.0 * F.one_hot(self.code[self.rows, state], self.states)

    def step(self, state, action):
        """state, action (E,) -> next state, reward (E,)."""
        mean = self.pay[self.rows, state, action]
        dice = torch.randn_like(mean) if self.normal else torch.rand_like(mean)
        reward = mean + dice if self.normal else (dice < mean).float()
        after = self.goes[self.rows, state, action]
        return torch.where(after < 0, self.reset(), after), reward


def rooms(E, n, device):
    """n x n places, four directions, a goal: to step on it pays; the step after leads anywhere."""
    place = torch.arange(n * n, device=device)
    y, x = place // n, place % n
    goes = torch.stack([(y - 1).clamp(min=0) * n + x, (y + 1).clamp(max=n - 1) * n + x,
                        y * n + (x - 1).clamp(min=0), y * n + (x + 1).clamp(max=n - 1)], 1)
    goal = torch.randint(n * n, (E, 1, 1), device=device)
    at_goal = place[:, None] == goal                         # (E, S, 1)
    pay = ((goes == goal) & ~at_goal).float()                # (E, S, 4)
    return Environments(pay, torch.where(at_goal, -1, goes))


def seen(E, device):
    """Meta-training -> {kind: environments}. The right answer never varies, so that weights could
    hold it: cues have the same buttons in each life, the first arm of a bandit is the best. Each
    kind has simple skills to begin with: one button is right for two cues; reward is of use."""
    right = F.one_hot(torch.tensor([0, 1, 0, 2], device=device), 3).expand(E, 4, 3).float()
    arms = torch.rand(E, 1, 3, device=device).sort(2, descending=True)[0]
    return {"cues": Environments(right), "two_cues": Environments(right[:, :2]),
            "arms": Environments(arms)}


def unseen(name, E, device):
    """name: kind_size as in --tests -> environments. Cues come in any order, and one button is
    right for each, drawn anew; arms pay with probabilities uniform in (0, 1), or by N(0, 1)."""
    kind, size = name.rsplit("_", 1)
    S, A = [int(n) for n in size.split("x")] if "x" in size else (1, int(size))
    if kind == "room":
        return rooms(E, A, device)
    if kind == "arms":
        return Environments(torch.rand(E, 1, A, device=device))
    if kind == "normal_arms":
        return Environments(torch.randn(E, 1, A, device=device), normal=True)
    pay = F.one_hot(torch.randint(A, (E, S), device=device), A).float()
    return Environments(0.2 + 0.6 * pay if kind == "noisy_cues" else pay)


# ---- 3. MODEL ----------------------------------------------------------------------------------
# A learner: (obs (E, O), was (E, A), reward (E,), memory) -> logits (E, A), memory, None at birth.


def linear(inputs, outputs, scale, gates=None):
    """Weights of deviation scale / sqrt(inputs); no biases, or one for each of four gates."""
    layer = nn.Linear(inputs, outputs, bias=gates is not None)
    nn.init.normal_(layer.weight, std=scale / inputs**0.5)
    if gates:
        layer.bias.data = torch.tensor(gates).repeat_interleave(outputs // 4)
    return layer


def lstm(gates, x, h, c):
    """x (.., I), h, c (.., N) -> h, c, as nn.LSTMCell, which vmap cannot take. gates: linear."""
    i, f, o, new = gates(torch.cat([x, h], -1)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * new.tanh()
    return o.sigmoid() * c.tanh(), c


class SymLA(nn.Module):
    """The grid of LSTMs. Its weights know neither O nor A: it fits any environment. mute: of the
    messages only the logits remain, so that cells never hear of each other."""

    def __init__(self, N, M, previous_obs=True, product=True, mute=False):
        super().__init__()
        self.N, self.M, self.talk = N, M, 0.0 if mute else 1.0
        self.previous_obs, self.product = previous_obs, product
        # Five entries of rows and columns; gates at first let little in and keep 0.95 of it
        self.gates = linear(5 + 2 * M + N, 4 * N, 2.0, gates=(-1.0, 3.0, 0.0, 0.0))
        self.ahead, self.back = linear(N, 1 + M, 2.0), linear(N, M, 2.0)

    def forward(self, obs, was, reward, memory=None):
        (E, O), A = obs.shape, was.shape[1]
        if memory is None:
            cells, messages = obs.new_zeros(E, O, A, self.N), obs.new_zeros(E, O + A, self.M)
            memory = cells, cells, messages[:, :A], messages[:, A:], torch.zeros_like(obs)
        h, c, ahead, back, before = memory
        # (1) what row a hears, what column b hears, and both for each cell
        row = torch.stack([obs, self.previous_obs * before], 2)
        column = torch.stack([was, reward[:, None].expand(E, A),
                              self.product * was * reward[:, None]], 2)
        row, column = torch.cat([row, back], 2), torch.cat([column, ahead], 2)  # (E, O, 2 + M), ..
        x = torch.cat([row[:, :, None].expand(-1, -1, A, -1),
                       column[:, None].expand(-1, O, -1, -1)], 3)
        h, c = lstm(self.gates, x, h, c)                     # (E, O, A, N)
        # (2) sums towards the actions (an observation is one-hot: a mean would dilute it)
        ahead, back = self.ahead(h.sum(1)), self.back(h.mean(2))
        logits, ahead = ahead[..., 0], self.talk * ahead[..., 1:].tanh()
        return logits, (h, c, ahead, self.talk * back.tanh(), obs)


class MetaRNN(nn.Module):
    """The usual black box, one LSTM for at most O entries. It hears all that cells hear."""

    def __init__(self, O, A, units=32):
        super().__init__()
        self.O, self.units = O, units
        self.gates = linear(2 * O + 2 * A + 1 + units, 4 * units, 2.0, gates=(-1.0, 3.0, 0.0, 0.0))
        self.out = linear(units, A, 2.0)

    def forward(self, obs, was, reward, memory=None):
        if obs.shape[1] > self.O:                            # pad would crop it silently
            raise ValueError(f"this meta-RNN sees {self.O} entries, not {obs.shape[1]}")
        obs = F.pad(obs, (0, self.O - obs.shape[1]))
        zeros = obs.new_zeros(len(obs), self.units)
        h, c, before = memory or (zeros, zeros, torch.zeros_like(obs))
        x = torch.cat([obs, before, was, reward[:, None], was * reward[:, None]], 1)
        h, c = lstm(self.gates, x, h, c)
        return self.out(h), (h, c, obs)


# ---- 4. LEARNING RULE --------------------------------------------------------------------------


def live(model, envs, T, then=None, theta=None):
    """A life of T steps in each environment, from T / 2 on in those of `then` -> (T, E), the reward
    that the policy expects: less noise than that which it drew. theta: weights {name: w}."""
    state, memory, pay = envs.reset(), None, []
    was, reward = torch.zeros_like(envs.pay[:, 0]), torch.zeros_like(envs.pay[:, 0, 0])      # none
    for t in range(T):
        envs = then if then and t == T // 2 else envs
        inputs = envs.see(state), was, reward, memory
        logits, memory = torch.func.functional_call(model, theta or {}, inputs)
        pay.append((logits.softmax(1) * envs.pay[envs.rows, state]).sum(1))
        # (3) a draw from the softmax is the largest sum of a logit and Gumbel noise
        gumbel = -(-torch.rand_like(was).log()).log()
        action = (logits + gumbel).argmax(1)                 # (E,)
        state, reward = envs.step(state, action)
        was = F.one_hot(action, envs.actions).float()
    return torch.stack(pay)


@torch.no_grad()
def es_gradient(fitness, model, pairs, sigma):
    """(4): leaves the gradient of -F in .grad -> (K,), mean over members. fitness: weights of one
    member {name: w} -> (K,), of which F is the mean; dice are the same for all (randomness)."""
    theta = dict(model.named_parameters())
    eps = {name: torch.randn(pairs, *w.shape, device=w.device) for name, w in theta.items()}
    members = {name: torch.cat([w + sigma * eps[name], w - sigma * eps[name]])
               for name, w in theta.items()}                 # (2 P, ..)
    values = torch.vmap(fitness, randomness="same")(members)                   # (2 P, K)
    plus, minus = values.mean(1).chunk(2)
    for name, w in theta.items():
        w.grad = -torch.einsum("p,p...->...", plus - minus, eps[name]) / (2 * pairs * sigma)
    return values.mean(0)


# ---- 5. TRAINING -------------------------------------------------------------------------------


def meta_train(cfg, run, stage, model, augment=False):
    """Evolve a learner in the environments of `seen`. augment: shuffled ones."""
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    for step in run.steps(stage, cfg.iterations, model=model, adam=adam):
        # COLLECT: environments of this iteration, for all members
        kinds = seen(cfg.environments, run.device)
        envs = [kind.shuffled() if augment else kind for kind in kinds.values()]
        then = [kind.shuffled() if cfg.upheaval else None for kind in kinds.values()]

        def fitness(theta):
            return torch.stack([live(model, first, cfg.lifetime, second, theta).mean()
                                for first, second in zip(envs, then)])
        # META UPDATE
        adam.param_groups[0]["lr"] = cfg.learning_rate * (1 - 0.9 * step / cfg.iterations)
        means = es_gradient(fitness, model, cfg.pairs, cfg.sigma)
        adam.step()
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.iterations:
            run.log(**dict(zip(kinds, means.tolist())))


# ---- 6. EVALUATION -----------------------------------------------------------------------------


def tabular(envs, T, bonus, discount):
    """Q-learning with a bonus for what was tried rarely -> pay (T, E). It knows the state.
    a = argmax Q(s, .) + bonus / sqrt(1 + n(s, .));  Q += (r + discount max Q' - Q) / n(s, a)"""
    rows, state, pay = envs.rows, envs.reset(), []
    Q, n = torch.zeros_like(envs.pay), torch.zeros_like(envs.pay)
    for _ in range(T):
        value = Q[rows, state] + bonus / (1 + n[rows, state]).sqrt()           # (E, A)
        action = (value + 1e-6 * torch.rand_like(value)).argmax(1)             # ties: any
        pay.append(envs.pay[rows, state, action])
        after, reward = envs.step(state, action)
        n[rows, state, action] += 1
        error = reward + discount * Q[rows, after].amax(1) - Q[rows, state, action]
        Q[rows, state, action] += error / n[rows, state, action]
        state = after
    return torch.stack(pay)


def best_possible(S, A, T):
    """Expected pay at each step (T,) of the best player of S cues whose right buttons are drawn:
    try no button twice. Of a cue seen m < A times before, the next try is wrong with probability
    1 - (m + 1) / A; m is binomial(t, 1 / S)."""
    return [1 - sum(math.comb(t, m) * (1 / S) ** m * (1 - 1 / S) ** (t - m) * (1 - (m + 1) / A)
                    for m in range(min(A, t + 1))) for t in range(T)]


def planned(envs, T, choose):
    """Mean pay a step, over T steps, of a player who knows the environment, by dynamic programming:
    V(s) <- choose_a [pay(s, a) + V(after)]. choose: torch.amax is the best, torch.mean chance."""
    V, rows = torch.zeros_like(envs.pay[..., 0]), envs.rows[:, None, None]     # V: (E, S)
    for _ in range(T):
        after = torch.where(envs.goes < 0, V.mean(1)[:, None, None], V[rows, envs.goes])
        V = choose(envs.pay + after, 2)
    return V.mean().item() / T


@torch.no_grad()
def evaluate(cfg, learners, device):
    """Lives with the four cues of meta-training, as they were (seen) or shuffled, and in mid-life
    shuffled anew -> {"seen", "shuffled": {learner: expected reward (T,)}}; and in other sizes and
    kinds -> {test: {grid: score}}, 0: as any action, 1: as the best ones."""
    curves, scores, T = {"seen": {}, "shuffled": {}}, {}, cfg.test_lifetime
    for place, row in curves.items():
        for name, model in learners.items():
            torch.manual_seed(12345)                         # the same tests for all
            envs = seen(cfg.test_environments, device)["cues"]
            envs = envs.shuffled() if place == "shuffled" else envs
            row[name] = live(model, envs, T, envs.shuffled()).mean(1).tolist()
    for test in cfg.tests.split(","):
        torch.manual_seed(12345)
        envs, pay = unseen(test, cfg.test_environments, device), {}
        low, high = planned(envs, T, torch.mean), planned(envs, T, torch.amax)
        for name in ("symla", "mute", "untrained"):
            torch.manual_seed(54321)                         # the same dice for all
            pay[name] = live(learners[name], envs, T).mean().item()
        pay["tabular"] = max(tabular(envs, T, bonus, discount).mean().item()   # the best of 12 here
                             for discount in (0.0, 0.9) for bonus in (0.0, 0.1, 0.3, 0.6, 1.0, 2.0))
        scores[test] = {name: (value - low) / (high - low) for name, value in pay.items()}
    return curves, scores


def experiment(cfg, run):
    """Meta-train four learners and test them -> {"headline": {name: number}, ..}."""
    torch.manual_seed(run.seed)
    sizes = cfg.hidden, cfg.message, cfg.previous_obs, cfg.product
    learners = {"symla": SymLA(*sizes), "mute": SymLA(*sizes, mute=True),
                "rnn": MetaRNN(4, 3), "rnn_augmented": MetaRNN(4, 3)}
    for name, model in learners.items():
        torch.manual_seed(run.seed)                          # whatever was trained before
        meta_train(cfg, run, name, model.to(run.device), augment=name == "rnn_augmented")
    history = {name: [(row["step"], row["cues"]) for row in run.rows if row["stage"] == name]
               for name in learners}
    torch.manual_seed(run.seed)
    learners["untrained"] = SymLA(*sizes).to(run.device)     # where symla started
    curves, scores = evaluate(cfg, learners, run.device)
    half = cfg.test_lifetime // 2
    n = min(half, cfg.lifetime)                              # at most as many as in meta-training
    head = {"best_without_knowledge": statistics.fmean(best_possible(4, 3, n))}
    for name in learners:
        for place in curves:
            head[f"{place}_{name}"] = statistics.fmean(curves[place][name][:n])
        head[f"shuffled_again_{name}"] = statistics.fmean(curves["shuffled"][name][half:half + n])
    head |= {f"{test}_{name}": score for test, row in scores.items() for name, score in row.items()}
    return {"headline": head, "curves": curves, "scores": scores, "history": history}


BESIDE = {"best_without_knowledge": "chance 0.333"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"symla": "#0072B2", "mute": "#D55E00", "rnn": "#E69F00", "rnn_augmented": "#8B5A2B",
           "untrained": "#777777", "tabular": "#009E73"}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Four panels from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    figure = Figure((12, 8.4), layout="constrained")
    a, b, c, d = figure.subplots(2, 2).flat
    seeds, T = summary["per_seed"], summary["config"]["test_lifetime"]
    for name in seeds[0]["history"]:
        steps = [step for step, _ in seeds[0]["history"][name]]
        lines(a, steps, [[reward for _, reward in seed["history"][name]] for seed in seeds],
              COLOURS[name], name)
        for axis, place, end in ((b, "seen", T // 2), (c, "shuffled", T)):
            curves = [seed["curves"][place][name][:end] for seed in seeds]
            lines(axis, range(1, end + 1), curves, COLOURS[name], name)
    a.set(title="(a) Meta-training, four cues: all members", xlabel="iteration", ylabel="reward")
    titles = "(b) A life with these cues", f"(c) The cues shuffled, and anew after {T // 2}"
    for axis, title in zip((b, c), titles):
        best = best_possible(4, 3, T // 2)
        axis.plot(range(1, T // 2 + 1), best, "k--", lw=1, label="best without knowledge")
        axis.axhline(1 / 3, color="k", ls=":", lw=1, label="chance")
        axis.set(title=title, xlabel="step of a life", ylabel="expected reward", ylim=(0, 1.04))
    tests = list(seeds[0]["scores"])
    for j, name in enumerate(("symla", "mute", "untrained", "tabular")):
        x = [i + 0.15 * j - 0.2 for i in range(len(tests))]
        values = [[seed["scores"][test][name] for seed in seeds] for test in tests]
        d.plot(x, values, "o", color=COLOURS[name], alpha=0.6)[0].set_label(name)
    d.set_xticks(range(len(tests)), tests, rotation=15)
    d.set(title="(d) Other sizes and kinds", ylabel="0: any action, 1: always the best")
    for axis in (a, b, c, d):
        axis.legend(fontsize=8)
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
