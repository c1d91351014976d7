# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""Model-based generalisation: why a learned model can beat replay, and when it cannot, in one file.

Young, Ramesh, Kirsch, Schmidhuber, "The Benefits of Model-Based Generalization in Reinforcement
Learning", ICML 2023, arXiv 2211.02222. [code]: read in the official release.

IDEA
  Q-learning can replay old experience, or train on what a learned model imagines. But the model
  comes from that same experience: what can it add? Both only exclude what contradicts the data. A
  transition s, a -> s' tells a value function that Q(s, a) = r + gamma max Q(s', .), one number. It
  tells a model which s' it was; if one rule moves many states, that rule is now settled for states
  never seen, and with it their values. Values generalise, too, but need more experience; and if
  every transition is a fact of its own, a model adds nothing. Here: a flute that sounds when its
  pipes are blown in one order, the tune, which the experience never contains.

ALGORITHM
  play N random actions                    the same experience for every learner
  fit a model: (o, a) -> o' and o -> r, by log likelihood                      (replay: skip this)
  repeat
    every K updates: from remembered states, act softly greedily for h steps in the model
                                           (world: in the true world; replay: skip this)
    minibatch of what was imagined         (replay: of what was played)
    Q <- Adam(Q, gradient of mean (Q(o, a) - (r + gamma max_b Q'(o', b)))^2)              (1)
    now and then Q' <- Q
  Control: the same flute and the same experience, each state shown as a random code of its own.

SYMBOLS, in the code, shape or meaning
  n, D     pipes, cells         as many actions as pipes; n (n + 1) / 2 cells, the bits of a state
  s        state       (B, D)   cells with air
  o        obs         (B, O)   what is seen of it: the cells, or 256 coin flips for each state
  a, r     action, reward (B,)  which pipe to blow; 1 if all pipes sound together
  Q        Q(obs)      (B, n)   action values; Q' is `target`
  model    (B, O), (B,)         logits of the bits of o', of r
  score    in [0, 1]            tunes that the greedy policy plays on purpose, of all possible

RESULT (quick: seeds 0-7, mean [95 % t interval], 3.4 minutes a seed on one core; `paper`: not run)
  Scores from 1,000 steps: model 0.718 [0.396, 1.039], replay 0.000 [-0.000, 0.000], with 5 x
  updates 0.000, counting and planning 0.000; true world as model 0.814 [0.751, 0.877]. Model
  minus replay, mean of three N: 0.761 [0.575, 0.947]. Coded: world 0.994, model 0.000: it cannot
  even fit what it saw. Counted, 4 of 16 transitions seen: a model leaves 96 values, Bellman 400.

DIFFERS
  1. One fixed random experience for all, in pieces of 50 steps, without the tune, not a stream that
     each learner makes for itself: generalisation apart from exploration.
  2. The model is fitted once, before, with strong decay [code: step by step with Q]. Small, falling
     rates, thousands of updates; rewards of 0 or 1 have a logit. `paper` is only longer and wider.
  3. Imagined bits are drawn with probability sigmoid(logit) [code: the logit itself, in effect a
     threshold: no luck is imagined]. Left out: latent-variable models, ProcMaze, ButtonGrid.

RUN
  python model_gen.py
"""
import argparse
import copy
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
from functools import partial
from importlib.metadata import version

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code: x]: the release has x."""
    pipes: int = 5                   # pipes and actions, n [code: 5]
    experience: int = 1000           # random steps, N; also 2 N and 4 N
    withhold: bool = True            # the whole tune is never in the experience, only its parts
    width: int = 64                  # units of the two hidden layers of all networks [code: 200]
    model_steps: int = 3000          # minibatches that fit the model
    model_rate: float = 2e-3         # of the model's AdamW at first; it falls to 0
    weight_decay: float = 2.0        # of the network of observations; of rewards a hundredth
    updates: int = 12_000            # of Q [code: a million]
    more: int = 5                    # times as many updates for a rival
    q_rate: float = 1e-3             # of Q's Adam at first; it falls to 0 [code: 1e-4, constant]
    batch: int = 256                 # transitions a minibatch of Q [code: 320]
    gamma: float = 0.9               # discount [code]
    target_every: int = 50           # updates between copies of Q into Q' [code: 100]
    refresh: int = 16                # updates between imagined rollouts, K [code: 1]
    rollouts: int = 512              # imagined at once [code: 32]
    rollout_length: int = 10         # imagined steps, h [code]
    temperature: float = 0.2         # of the softmax that acts in rollouts [code, tuned]
    orders: int = 10                 # random orders of the data in panel (a)
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 600             # updates between tests of the greedy policy
    save_every: int = 1600           # updates between checkpoints, a multiple of --refresh

    def __post_init__(self):
        if not 2 <= self.pipes <= 5:
            raise ValueError(f"--pipes must be 2 to 5, not {self.pipes}: 2^D states have codes")
        if min(self.width, self.model_steps, self.more, self.batch, self.target_every, self.refresh,
               self.rollouts, self.rollout_length, self.orders, self.experience - 1) < 1:
            raise ValueError("sizes must be at least 1, --experience at least 2")
        if self.updates < self.log_every or self.save_every % self.refresh:
            raise ValueError("--updates must be at least --log-every, --save-every a multiple of "
                             "--refresh: what was imagined is not saved")
        if not (0 < min(self.model_rate, self.q_rate) and 0 <= self.weight_decay < math.inf
                and 0.001 <= self.temperature < math.inf and 0 <= self.gamma < 1):
            raise ValueError("--model-rate, --q-rate must be positive, --weight-decay at least 0, "
                             "--temperature 0.001, --gamma in [0, 1)")


PRESETS = {
    "smoke": dict(pipes=3, experience=100, model_steps=64, updates=64, log_every=32, orders=2,
                  save_every=32, more=2),
    "quick": {},
    "paper": dict(width=200, experience=4000, model_steps=20_000, updates=100_000, rollouts=2048,
                  log_every=2000, save_every=8000),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------


class PanFlute:
    """n pipes; pipe i is a row of i + 1 cells along which air moves, a cell a step. Action i blows
    into pipe i. Reward 1 while the last cells of all pipes have air: blow n - 1, .., 1, 0, in this
    order, the tune. By luck, with probability 1 / n^2, all last cells have air anyway: so random
    play sees the reward, but not the way to it, one chance in n^n. [code: environments.py]
    codes (2^D, O): what is shown of each state, or None: its cells."""

    def __init__(self, pipes, device, codes=None):
        lengths = torch.arange(1, pipes + 1, device=device)
        self.pipes, self.codes, self.device = pipes, codes, device
        self.cells = pipes * (pipes + 1) // 2
        self.last = lengths.cumsum(0) - 1                    # last cell of each pipe
        self.first = self.last - lengths + 1                 # its first: air enters there
        self.before = (torch.arange(self.cells, device=device) - 1).clamp(min=0)

    def reset(self, B):
        """-> no air (B, D)."""
        return torch.zeros(B, self.cells, device=self.device)

    def step(self, state, action, luck=True):
        """state (B, D), action (B,) -> next state (B, D), reward (B,) for what sounds before it."""
        reward = state[:, self.last].prod(1)
        state = state[:, self.before]                        # a copy: air moves on, leaks into
        state[:, self.first] = F.one_hot(action, self.pipes).float()           # first cells: set
        if luck:
            lucky = torch.rand(len(state), 1, device=self.device) < 1 / self.pipes**2
            state[:, self.last] = torch.maximum(state[:, self.last], lucky.float())
        return state, reward

    def number(self, state):
        """state (B, D) -> (B,) long in 0 .. 2^D - 1."""
        return (state.long() << torch.arange(self.cells, device=self.device)).sum(1)

    def observe(self, state):
        """state (B, D) -> obs (B, O)."""
        return state if self.codes is None else self.codes[self.number(state)]


def play_randomly(flute, steps, withhold, length=50):
    """Uniform actions in pieces of 50 steps, one piece after the other -> state (N, D), action
    (N,), reward (N,), next state (N, D). withhold: a note that would complete the tune is drawn
    again, so that no piece contains it."""
    pieces, n, rows = math.ceil(steps / length), flute.pipes, []
    state = flute.reset(pieces)
    wanted = torch.full((pieces,), n - 1, device=flute.device)       # next note of the tune
    for _ in range(length):
        action = torch.randint(n, (pieces,), device=flute.device)
        if withhold:
            other = torch.randint(1, n, (pieces,), device=flute.device)
            action = torch.where((wanted == 0) & (action == 0), other, action)
        restart = torch.where(action == n - 1, n - 2, n - 1)
        wanted = torch.where(action == wanted, wanted - 1, restart)
        after, reward = flute.step(state, action)
        rows.append((state, action, reward, after))
        state = after
    return [torch.stack(column, 1).flatten(0, 1)[:steps] for column in zip(*rows)]


# ---- 3. MODEL ----------------------------------------------------------------------------------


def mlp(inputs, width, outputs):
    """Two hidden layers; ELU as in [code]."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ELU(), nn.Linear(width, width), nn.ELU(),
                         nn.Linear(width, outputs))


class WorldModel(nn.Module):
    """A flute that was learned: p(o' | o, a), a product over bits, and p(r = 1 | o), by a network
    each [code]. The product cannot say that luck makes all last cells sound together."""

    def __init__(self, O, pipes, width):
        super().__init__()
        self.pipes = pipes
        self.dynamics, self.reward = mlp(O + pipes, width, O), mlp(O, width, 1)

    def forward(self, obs, action):
        """obs (B, O), action (B,) -> logits of the next obs (B, O) and of the reward (B,)."""
        action = F.one_hot(action, self.pipes).float()
        return self.dynamics(torch.cat([obs, action], 1)), self.reward(obs)[:, 0]

    def step(self, obs, action):
        """-> imagined next obs (B, O), expected reward (B,)."""
        after, reward = self(obs, action)
        return torch.bernoulli(after.sigmoid()), reward.sigmoid()

    def observe(self, obs):
        """What it imagines are observations."""
        return obs


# ---- 4. LEARNING RULE --------------------------------------------------------------------------


def model_loss(model, obs, action, reward, after):
    """-log p(o', r | o, a): a sum over bits, a mean over transitions."""
    bits, rewards = model(obs, action)
    cost = F.binary_cross_entropy_with_logits
    return cost(bits, after, reduction="none").sum(1).mean() + cost(rewards, reward)


def q_loss(Q, target, obs, action, reward, after, gamma):
    """(1): mean (Q(o, a) - (r + gamma max_b Q'(o', b)))^2; the flute never ends."""
    with torch.no_grad():
        goal = reward + gamma * target(after).amax(1)
    return (Q(obs).gather(1, action[:, None])[:, 0] - goal).square().mean()


@torch.no_grad()
def roll_out(simulator, state, Q, steps, temperature):
    """Act in a simulator, learned or true, from remembered states -> transitions, a row each: obs,
    action, reward, next obs. P(a) is proportional to exp(Q(o, a) / temperature)."""
    rows = []
    for _ in range(steps):
        obs = simulator.observe(state)
        action = torch.distributions.Categorical(logits=Q(obs) / temperature,
                                                 validate_args=False).sample()
        state, reward = simulator.step(state, action)
        rows.append((obs, action, reward, simulator.observe(state)))
    return [torch.cat(column) for column in zip(*rows)]


# ---- 5. TRAINING -------------------------------------------------------------------------------


def fit_model(cfg, run, stage, data):
    """Maximum likelihood on data (obs, action, reward, next obs) -> WorldModel."""
    model = WorldModel(data[0].shape[1], cfg.pipes, cfg.width).to(run.device)
    # Copying cells is a simple rule, which decay finds; a reward is rare, and decay forgets it
    parts = [{"params": model.dynamics.parameters(), "weight_decay": cfg.weight_decay},
             {"params": model.reward.parameters(), "weight_decay": cfg.weight_decay / 100}]
    adam = torch.optim.AdamW(parts, cfg.model_rate)
    loss_function = run.compile(model_loss)
    for step in run.steps(stage, cfg.model_steps, model=model, adam=adam):
        # COLLECT
        index = torch.randint(len(data[0]), (128,), device=run.device)
        # UPDATE
        for group in adam.param_groups:
            group["lr"] = cfg.model_rate * (1 - step / cfg.model_steps)
        adam.zero_grad()
        loss = loss_function(model, *(part[index] for part in data))
        loss.backward()
        adam.step()
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.model_steps:
            run.log(loss=loss.item())
    return model


def learn_values(cfg, run, stage, flute, data, simulator=None, start=None, updates=None):
    """Q-learning from data (replay), or from what a simulator makes of `start` (states, or what the
    model takes for states) -> score, a mean of the last third of tests: greedy policies flicker."""
    Q = mlp(data[0].shape[1], cfg.width, cfg.pipes).to(run.device)
    target, total, pool = copy.deepcopy(Q), updates or cfg.updates, data
    log_every = cfg.log_every * total // cfg.updates         # as many tests for all learners
    adam = torch.optim.Adam(Q.parameters(), cfg.q_rate, fused=True)
    loss_function = run.compile(q_loss)
    for step in run.steps(stage, total, Q=Q, target=target, adam=adam):
        # COLLECT
        if simulator and step % cfg.refresh == 0:
            index = torch.randint(len(start), (cfg.rollouts,), device=run.device)
            pool = roll_out(simulator, start[index], Q, cfg.rollout_length, cfg.temperature)
        index = torch.randint(len(pool[0]), (cfg.batch,), device=run.device)
        # UPDATE
        if step % cfg.target_every == 0:
            target.load_state_dict(Q.state_dict())
        adam.param_groups[0]["lr"] = cfg.q_rate * (1 - step / total)
        adam.zero_grad()
        loss = loss_function(Q, target, *(part[index] for part in pool), cfg.gamma)
        loss.backward()
        adam.step()
        # LOG
        if (step + 1) % log_every == 0 or step + 1 == total:
            run.log(score=score(flute, Q), loss=loss.item())
    scores = [row["score"] for row in run.rows if row["stage"] == stage]
    return statistics.fmean(scores[-max(1, len(scores) // 3):])


# ---- 6. EVALUATION -----------------------------------------------------------------------------


def after_random_play(flute, rows, luck):
    """-> states (rows, D) and random actions (rows,) there; without luck the same in every call."""
    generator = torch.Generator().manual_seed(12345)         # training's random numbers stay
    actions = torch.randint(flute.pipes, (2 * flute.pipes + 1, rows), generator=generator)
    state, actions = flute.reset(rows), actions.to(flute.device)
    for action in actions[:-1]:
        state, _ = flute.step(state, action, luck)
    return state, actions[-1]


@torch.no_grad()
def score(flute, Q):
    """Tunes that the greedy policy plays on purpose (luck off) from random starts, by the most
    that is possible, a tune every n steps -> between 0 and 1."""
    (state, _), steps, played = after_random_play(flute, 64, luck=False), 12 * flute.pipes, 0.0
    for t in range(flute.pipes + steps):                     # the first n: for the first tune
        action = Q(flute.observe(state)).argmax(1)
        state, reward = flute.step(state, action, luck=False)
        played += reward.mean().item() if t >= flute.pipes else 0.0
    return played * flute.pipes / steps


def plan_in_table(flute, state, action, reward, after, gamma):
    """All that the experience allows without generalisation: count what followed each (state,
    action), solve that by value iteration; what was never tried is worth 0 -> Q, of obs = state."""
    n, size = flute.pipes, 2**flute.cells
    pair, after = flute.number(state) * n + action, flute.number(after)
    count = torch.bincount(pair, minlength=size * n).clamp(min=1)
    mean = torch.bincount(pair, reward, size * n) / count    # reward of each pair
    V = torch.zeros(size, device=flute.device)
    for _ in range(150):                                     # 0.9^150 is 1e-7
        Q = (mean + gamma * torch.bincount(pair, V[after], size * n) / count).view(size, n)
        V = Q.amax(1)
    return lambda obs: Q[flute.number(obs)] + 1e-6 * torch.rand_like(Q[:len(obs)])            # ties


@torch.no_grad()
def unseen_accuracy(flute, model, state, action):
    """Share of next observations that are right in all bits (the likelier values, luck off), among
    the pairs of random play that are not among (state, action)."""
    new_state, new_action = after_random_play(flute, 2000, luck=True)
    seen = torch.isin(flute.number(new_state) * flute.pipes + new_action,
                      flute.number(state) * flute.pipes + action)
    truth = flute.observe(flute.step(new_state, new_action, luck=False)[0])
    bits, _ = model(flute.observe(new_state), new_action)
    right = ((bits > 0) == (truth > 0.5)).all(1)[~seen].float()
    return right.mean().item() if len(right) else 1.0        # all were seen


# The theorem, counted. Both learners start from one class of models and their values. Left are
#   model:    {Q*_m : m agrees with the data}
#   Bellman:  {Q*_m : Q*_m(s, a) = r + gamma max_b Q*_m(s', b) for all (s, a, r, s') of the data}
# The first is in the second: where m agrees, Q*_m solves its own equation. r is known to both.


def structured_models(bits):
    """Each cell's next value is, for each action, one of: 0, 1, a copy of a cell, its opposite.
    bits (8, 3) of the states -> next states (262144, 16): (8^3)^2 models, 16 pairs (s, a)."""
    zero = torch.zeros(1, 8, dtype=torch.long)
    rules = torch.cat([zero, 1 - zero, bits.T, 1 - bits.T])                    # (8 rules, 8 states)
    of_cells = torch.cartesian_prod(*3 * [torch.arange(8)])                    # (512, 3)
    after = (rules[of_cells] << torch.arange(3)[:, None]).sum(1)               # (512, 8)
    both = torch.cartesian_prod(torch.arange(512), torch.arange(512))
    return torch.stack([after[both[:, 0]], after[both[:, 1]]], 2).flatten(1)


def unstructured_models(truth):
    """Each pair has two candidates of its own, the truth and one other state -> (2^16, 16)."""
    other = (truth + torch.randint(1, 8, truth.shape)) % 8
    choice = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
    return torch.where(choice == 0, truth, other)


def value_functions_left(models, truth, reward, orders, gamma=0.5):
    """models (M, 16) -> [model, Bellman], each 17 counts: distinct Q* left when 0 to 16 pairs have
    been seen, means over random orders."""
    V = torch.zeros(len(models), 8, dtype=torch.float64)
    for _ in range(40):                                      # gamma^40 is 1e-12
        Q = reward + gamma * V.gather(1, models)
        V = Q.view(-1, 8, 2).amax(2)
    whole = (Q * 2**30).round().long()                       # integers: floats would not be equal
    key = (whole * torch.randint(2**60, (16,))).sum(1)       # equal Q*, equal key, modulo 2^64
    name = key.unique(return_inverse=True)[1]
    keeps = models == truth, (V.gather(1, models) - V[:, truth]).abs() < 1e-9
    counts = torch.zeros(2, 17)
    for _ in range(orders):
        order = torch.randperm(16)
        for row, keep in zip(counts, keeps):
            left = torch.ones(len(models), dtype=torch.bool)
            row[0] += len(name.unique()) / orders
            for seen, pair in enumerate(order, 1):
                left &= keep[:, pair]
                row[seen] += len(name[left].unique()) / orders
    return counts.tolist()


def count_theorem(orders):
    """The flute of two pipes without luck, 8 states, 16 pairs -> {class of models: counts}."""
    flute = PanFlute(2, torch.device("cpu"))
    bits = (torch.arange(8)[:, None] >> torch.arange(3)) & 1
    pairs = bits.float().repeat_interleave(2, 0), torch.arange(2).repeat(8)
    after, reward = flute.step(*pairs, luck=False)
    truth, reward = flute.number(after), reward.double()
    classes = {"structured": structured_models(bits), "unstructured": unstructured_models(truth)}
    return {name: value_functions_left(models, truth, reward, orders)
            for name, models in classes.items()}


def experiment(cfg, run):
    """All learners of one seed -> {"headline": {name: number}, ..}."""
    torch.manual_seed(run.seed)
    left, N, head = count_theorem(cfg.orders), cfg.experience, {}
    flute = PanFlute(cfg.pipes, run.device)
    codes = torch.randint(2, (2**flute.cells, 256), device=run.device).float()
    worlds = {"flute": flute, "coded": PanFlute(cfg.pipes, run.device, codes)}
    played = play_randomly(flute, 4 * N, cfg.withhold)       # the same in both worlds
    for name, size in (("flute", N), ("flute", 2 * N), ("flute", 4 * N), ("coded", N)):
        world, (state, action, reward, after) = worlds[name], (part[:size] for part in played)
        data, stage = [world.observe(state), action, reward, world.observe(after)], f"{name}_{size}"
        learn = partial(learn_values, cfg, run, flute=world, data=data)
        model = fit_model(cfg, run, f"{stage}_fit", data)
        head[f"{stage}_unseen_accuracy"] = unseen_accuracy(world, model, state, action)
        head[f"{stage}_replay"] = learn(f"{stage}_replay")
        head[f"{stage}_model"] = learn(f"{stage}_model", simulator=model, start=data[0])
        if size == N:
            head[f"{stage}_world"] = learn(f"{stage}_world", simulator=world, start=state)
        if stage == f"flute_{N}":
            more = learn(f"{stage}_replay_more", updates=cfg.more * cfg.updates)
            head[f"{stage}_replay_more"] = more
        if name == "flute":
            table = plan_in_table(flute, state, action, reward, after, cfg.gamma)
            head[f"{stage}_counting"] = score(flute, table)
    sizes = [N, 2 * N, 4 * N]
    gains = [head[f"flute_{size}_model"] - head[f"flute_{size}_replay"] for size in sizes]
    head["model_minus_replay"] = statistics.fmean(gains)
    head["model_minus_replay_more"] = head[f"flute_{N}_model"] - head[f"flute_{N}_replay_more"]
    head["values_left_model"], head["values_left_bellman"] = (row[4] for row in left["structured"])
    differences = [abs(a - b) for a, b in zip(*left["unstructured"])]
    head["unstructured_largest_difference"] = max(differences)
    history = {row["stage"]: [] for row in run.rows if "score" in row}
    for row in run.rows:
        history.get(row["stage"], []).append((row["step"], row.get("score")))
    return {"headline": head, "left": left, "history": history, "sizes": sizes}


BESIDE = {"values_left_model": "of 58,296, after 4 of 16", "model_minus_replay": "mean of three N"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"model": "#0072B2", "replay": "#E69F00", "replay_more": "#8B5A2B", "world": "#009E73",
           "counting": "#777777"}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Four panels from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    figure = Figure((12, 8.4), layout="constrained")
    a, b, c, d = figure.subplots(2, 2).flat
    seeds, N = summary["per_seed"], summary["config"]["experience"]
    for kind, style in (("structured", "-"), ("unstructured", ":")):
        for row, name in enumerate(("model", "replay")):
            label = f"{kind}, {('agree with the data', 'solve Bellman on it')[row]}"
            curves = [seed["left"][kind][row] for seed in seeds]
            lines(a, range(17), curves, COLOURS[name], label, style)
    a.set(yscale="log", xlabel="transitions seen, of 16", ylabel="value functions left",
          title="(a) A model excludes more, if models have structure")
    for name in ("model", "replay", "replay_more", "world"):
        rows = [seed["history"][f"flute_{N}_{name}"] for seed in seeds]
        steps = [step for step, _ in rows[0]]
        lines(b, steps, [[score for _, score in row] for row in rows], COLOURS[name], name)
    b.set(xscale="log", xlabel="updates of Q", title=f"(b) {N} random steps (world: and the truth)")
    sizes = seeds[0]["sizes"]
    for name in ("model", "replay", "counting"):
        curves = [[seed["headline"][f"flute_{size}_{name}"] for size in sizes] for seed in seeds]
        lines(c, sizes, curves, COLOURS[name], name)
    c.set(xlabel="random steps", title="(c) With more experience")
    for i, name in enumerate(("model", "replay", "world")):
        for place, world in enumerate(("flute", "coded")):
            values = [seed["headline"][f"{world}_{N}_{name}"] for seed in seeds]
            x, label = [place + 0.2 * (i - 1)] * len(seeds), name if place else None
            d.plot(x, values, "o", color=COLOURS[name], alpha=0.6, label=label)
    d.set_xticks((0, 1), ("cells are seen", "a random code is seen"))
    d.set_title(f"(d) {N} steps, and what is seen of a state")
    for axis in (b, c, d):
        axis.set(ylim=(-0.03, 1.05), ylabel="tunes played, of all possible")
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
