# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""RC-GVF: exploration by random curiosity with general value functions, in one file.

Ramesh, Kirsch, van Steenkiste, Schmidhuber, "Exploring through Random Curiosity with General Value
Functions", arXiv 2211.10282. "[code]" marks what was read in the two official releases, [minigrid]
what was read in Farama's minigrid 3.2; of the paper only the abstract was at hand, no number of it
is quoted.

IDEA
  Where rewards are rare an agent needs a reward of its own for going where it knows little. RND
  predicts random features of an observation; the error is the reward. But where many situations
  look alike, every single observation is soon predicted and the bonus dies before anything was
  explored. Here the random features are pseudo-rewards z, and what is predicted is their discounted
  sum over the future: general value functions. A value depends on what comes next and on how the
  agent behaves, so that it cannot be learned from one frame, and a change of behaviour makes old
  places interesting again. Several heads predict; the bonus is their error times their
  disagreement, which drops the part of an error that no data would remove.

ALGORITHM (one update)
  T steps with the policy pi in N environments; z_t = Z(o_t) with a fixed random network Z;
  v^k_t of head k, by the predictor as it was when acting
  G^k_t = z_t + gamma_z m_t [(1 - lambda_z) v^k_(t+1) + lambda_z G^k_(t+1)],  m_t = 0 at an end
  R_t   = beta sum_d Var_k[v^k_t] mean_k (G^k_t - v^k_t)^2                    intrinsic reward
  PPO on r_t + R_t (one critic, GAE; MiniGrid: clamped to [-1, 1]), `epochs` passes in minibatches;
  with each minibatch also v^k <- towards G^k, which stays fixed
  The end of an episode's time counts as an end, as in [code].

  RND:    R_t = beta n_t,  n_t = |z_t - p(o_t)|, p trained towards z. It rewards a_t, as in [code].
  NovelD: R_t = beta max(n_(t+1) - n_t / 2, 0).

SYMBOLS
  symbol      in the code                shape              meaning
  S, N        leading axes                                  seeds, and environments of a seed
  T           rollout                                       steps between two updates
  o           obs, curiosity_obs         (T+1, S, N, ...)   observation, and what curiosity sees
  d, K        cumulants, heads                              pseudo-rewards; heads of the predictor
  z           z                          (T+1, S, N, d)     pseudo-rewards
  v           v                          (K, T+1, S, N, d)  predictions
  G           target                     (T, S, N, K, d)    TD(lambda) targets, see gvf_returns
  R           bonus                      (T, S, N)          intrinsic reward
  m           1 - done                   (T, S, N)          0 at an end
              first                      (T+1, S, N)        1: the first observation of an episode
              memory, curiosity_memory   (T, S, N, 2 M)     of an LSTM of M units, before each step
  L, B        in networks                (S, L, B, ...)     sequences of L steps, B side by side
  A, H        lock_actions, horizon                         actions and columns of the lock

RESULT
  quick, a lock of 16 columns, 250,000 frames, seeds 0-4, 3.4 minutes for all nine runs on 2 CPU
  cores (AMD EPYC); mean with its 95 % interval:
                      farthest column      greedy return (optimum 9), each seed
    RC-GVF            15.8 [15.2, 16.4]     8.9   9.0   0.2   9.0  -0.8     open in 4 of 5 seeds
    RND               13.6 [12.2, 15.0]    -0.7  -0.6  -0.7  -0.8  -0.4
    NovelD            13.6 [11.3, 15.9]     0.3  -0.6  -0.6  -0.6  -0.4
    PPO                2.8 [2.2, 3.4]       0.0 in all
    official betas: RC-GVF (20) 5.4 [4.0, 6.8], RND (0.5) 8.4 [6.3, 10.5]
    ablations: error only 15.6, disagreement only 15.6, gamma_z = 0 14.8 (return 4.3, 5.3, 1.4)
  RC-GVF minus RND, paired: 2.2 [0.8, 3.6] columns; on ten other seeds (10-19) 2.2 [0.6, 3.8], 16.0
  against 13.8, greedy return 6.8 against 1.4. Run on to 300,000 frames it is 1.6 [-0.5, 3.7] on
  seeds 0-4 (seen before the length was set): RND comes after, and there is no column beyond 16.
  Open: passed once, while exploring; greedily 3 of 5 pass it, the other two miss the last two or
  three columns (panel d). Error and disagreement do as well alone, and gamma_z = 0 not much
  worse: this world is too simple to tell. RC-GVF's bonus falls 306-fold within 25,000 frames.
  MiniGrid MultiRoom-N4-S5, 800,000 frames, seeds 0-2, 10.5 minutes: return at the end (mean of the
  last tenth) RC-GVF 0.77 0.77 0.77, RND 0.51 0.77 0.01, PPO 0.
  paper preset (one GPU): not run yet.

DIFFERS
  1. quick: a lock of 16 columns, networks of 64 units, 96 environments, larger rates. The betas of
     all methods and ablations were searched alike on seeds 100-104, in factors of 2 to 3 until the
     best was not at an end; the released betas are run beside them.
  2. RC-GVF's predictor is deeper, doubled and on the lock trained at twice RND's rate, as in
     [code]: comparing with RND does not separate the bonus from that.
  3. Mistakes of [code] that are not repeated: NovelD's targets shifted against its samples; the
     farthest column counted before the step, which never reads H.
  4. On MiniGrid [code] lets only the predictor's rate fall, we (--preset paper) both, once an
     update. Its NovelD divides by episodic counts; here --counts does so for all methods, or none.
  5. The baseline AGAC, and bonuses from counts alone, are left out. MultiRoom-N4-S5 here has four
     rooms, ObstructedMaze-2Dlhb fair levels (both the package's v1). On MiniGrid quick has smaller
     curiosity networks, more environments, a larger rate and entropy, and betas of its own.
  6. torchrun shares minibatches out; every process makes the same rollouts.
  7. Long, for the lock and all of MiniGrid's mechanics are in it.

RUN
  python rcgvf.py --num-seeds 5
  python rcgvf.py --task minigrid --env MultiRoom-N4-S5 --methods rcgvf,rnd,ppo --num-seeds 3
  torchrun --standalone --nproc_per_node=8 rcgvf.py --preset paper --num-seeds 8
"""
import argparse
import contextlib
import copy
import ctypes
import inspect
import json
import math
import os
import pathlib
import platform
import re
import shlex
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------

SETTINGS = {   # of a task at a scale, for options left at -1; paper: the official releases', [code]
    ("lock", "small"): dict(
        horizon=16, frames=250_000, envs=96, rollout=16, minibatch=192, epochs=5, recurrence=1,
        learning_rate=1e-3, rcgvf_rate=0.5, rnd_rate=0.25, entropy_coefficient=0.01, grad_norm=2.5,
        hidden=64, cumulants=32, predictor_hidden=64, feature_hidden=64, beta_rcgvf=150.0,
        beta_rnd=1.25, beta_noveld=5.0, anneal=0),
    ("lock", "paper"): dict(
        horizon=100, frames=20_000_000, envs=16, rollout=100, minibatch=200, epochs=5, recurrence=1,
        learning_rate=5e-4, rcgvf_rate=0.5, rnd_rate=0.25, entropy_coefficient=0.01, grad_norm=2.5,
        hidden=256, cumulants=128, predictor_hidden=256, feature_hidden=128, beta_rcgvf=20.0,
        beta_rnd=0.5, beta_noveld=0.5, anneal=100_000_000),    # NovelD's: ours, as RND's
    ("minigrid", "small"): dict(
        horizon=0, frames=800_000, envs=64, rollout=32, minibatch=512, epochs=4, recurrence=4,
        learning_rate=1e-3, rcgvf_rate=0.75, rnd_rate=0.75, entropy_coefficient=1e-3, grad_norm=0.5,
        hidden=64, cumulants=64, predictor_hidden=128, feature_hidden=64, beta_rcgvf=3.0,
        beta_rnd=0.01, beta_noveld=0.01, anneal=0),
    ("minigrid", "paper"): dict(
        horizon=0, frames=30_000_000, envs=16, rollout=128, minibatch=256, epochs=4, recurrence=4,
        learning_rate=2e-4, rcgvf_rate=0.75, rnd_rate=0.75, entropy_coefficient=1e-5, grad_norm=0.5,
        hidden=64, cumulants=128, predictor_hidden=256, feature_hidden=128, beta_rcgvf=0.1,
        beta_rnd=5e-4, beta_noveld=0.01, anneal=30_000_000),
}
METHODS = {"rcgvf": "RC-GVF", "rnd": "RND", "noveld": "NovelD", "ppo": "PPO"}


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. -1: as SETTINGS says for the task
    and the scale."""
    task: str = "lock"               # lock or minigrid
    env: str = "MultiRoom-N4-S5"     # of minigrid; or KeyCorridorS4R3, DoorKey-8x8, ...: any sizes
    scale: str = "small"             # small or paper
    methods: str = "rcgvf,rnd,noveld,ppo"   # which to compare
    extras: bool = True              # lock: also their official betas, and ablations of RC-GVF
    counts: bool = False             # divide bonuses by the root of episodic visits (privileged)
    first_visit: bool = False        # with --counts: a bonus at the first visit only
    panorama: bool = False           # minigrid: curiosity sees all four directions
    horizon: int = -1                # length of the lock, H; 0 on MiniGrid
    lock_actions: int = 10           # actions of the lock, A
    frames: int = -1                 # steps of all environments, a seed and method
    envs: int = -1                   # parallel environments a seed, N
    rollout: int = -1                # steps between updates, T
    minibatch: int = -1              # frames of a minibatch, a seed
    epochs: int = -1                 # passes over a rollout
    recurrence: int = -1             # steps back-propagated through memory, L
    gamma: float = 0.99              # discount of rewards
    lam: float = 0.95                # of generalised advantage estimates
    clip: float = 0.2                # of probability ratios, and of values in reward units
    learning_rate: float = -1        # of the agent
    rcgvf_rate: float = -1           # of RC-GVF's predictor, in learning rates
    rnd_rate: float = -1             # of RND's and NovelD's predictor, in learning rates
    anneal: int = -1                 # frames over which rates fall to 0; 0: constant
    entropy_coefficient: float = -1    # of the policy's entropy
    value_coefficient: float = 0.5   # of the value loss
    grad_norm: float = -1            # limit of each network's gradient norm
    cumulants: int = -1              # pseudo-rewards, d
    heads: int = 2                   # predictors in the ensemble, K
    gamma_z: float = 0.6             # discount of pseudo-rewards
    lambda_z: float = 0.9            # trace of their TD(lambda) targets
    bonus: str = "product"           # of error and disagreement; or error, disagreement, std
    beta_rcgvf: float = -1           # size of RC-GVF's intrinsic reward
    beta_rnd: float = -1             # size of RND's intrinsic reward
    beta_noveld: float = -1          # size of NovelD's intrinsic reward
    noveld_alpha: float = 0.5        # NovelD: next novelty minus this times the present one
    hidden: int = -1                 # units of the agent
    predictor_hidden: int = -1       # units of RC-GVF's predictors
    feature_hidden: int = -1         # units of the random network, and of RND's predictor
    eval_episodes: int = 96          # greedy episodes of each test on the lock
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds trained side by side: seed, seed + 1, ...
    log_every: int = 8               # updates between lines of the log
    save_every: int = 50             # updates between checkpoints

    def __post_init__(self):
        choices = {"task": ("lock", "minigrid"), "scale": ("small", "paper"),
                   "bonus": ("product", "error", "disagreement", "std")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} is {' or '.join(known)}, not {getattr(self, name)!r}")
        for name in self.methods.split(","):
            if name not in METHODS:
                raise ValueError(f"no method {name!r}: {', '.join(METHODS)}")
        for name, value in SETTINGS[self.task, self.scale].items():
            if getattr(self, name) == -1:
                object.__setattr__(self, name, value)
        zero = {"seed", "anneal", "horizon", "gamma_z", "lambda_z", "gamma", "lam", "noveld_alpha",
                "entropy_coefficient"}
        high = dict.fromkeys(("gamma_z", "lambda_z", "gamma", "lam"), 1) | {"seed": 1 << 24}
        for name, value in asdict(self).items():
            above = value >= 0 if name in zero else type(value) is str or value > 0
            if type(value) in (int, float) and not (above and value <= high.get(name, 1e300)):
                raise ValueError(f"--{name.replace('_', '-')} must be "
                                 + ("at least 0" if name in zero else "above 0")
                                 + (f" and at most {high[name]}" if name in high else " and finite")
                                 + f", not {value}")
        if self.task == "lock" and self.horizon < 2:
            raise ValueError(f"--horizon must be at least 2, not {self.horizon}")
        if self.task == "lock" and (self.panorama or self.counts):
            raise ValueError("--panorama and --counts are for --task minigrid")
        if self.first_visit and not self.counts:
            raise ValueError("--first-visit goes with --counts")
        if self.task == "minigrid" and (self.cumulants % 4 or self.hidden % 4):
            raise ValueError("--cumulants and --hidden must be multiples of 4 on MiniGrid, not "
                             f"{self.cumulants} and {self.hidden}")
        if 1 < self.recurrence and 2 * self.recurrence > self.rollout:
            raise ValueError(f"--recurrence {self.recurrence} is more than half of --rollout "
                             f"{self.rollout}")
        if self.rollout % self.recurrence or self.minibatch % self.recurrence:
            raise ValueError(f"--recurrence {self.recurrence} must divide --rollout {self.rollout} "
                             f"and --minibatch {self.minibatch}")
        if self.heads < 2:
            raise ValueError(f"--heads must be at least 2, to disagree, not {self.heads}")
        minigrid_family(self.env)


PRESETS = {
    "smoke": dict(horizon=5, frames=192, envs=8, rollout=8, minibatch=16, hidden=16, cumulants=8,
                  predictor_hidden=16, feature_hidden=16, eval_episodes=8,
                  log_every=1, save_every=1),
    "quick": dict(),
    "paper": dict(scale="paper", extras=False, log_every=100, save_every=500),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# Two environments with one interface, many copies at once: `batch` rows for each of S seeds, seeds
# first. reset(); observe() -> observations (S*batch, ...); step(actions (S*batch,)) -> reward,
# terminated, truncated, each (S*batch,). What has ended starts anew inside step.


def stream(seed, purpose, device):
    """Random generator of one seed for one purpose: 0-9 training of each stage, 10 environments
    (the same for all stages: the same lock), 20-25 tests, 26-31 weights. The numbers are small,
    because torch's CPU generator keeps only 32 bits."""
    return torch.Generator(device).manual_seed(32 * seed + purpose)


def per_seed(sampler, generators, *shape):
    """sampler(shape) of each generator -> (S, *shape): a seed alone equals its slice of all."""
    return torch.stack([sampler(shape, generator=g, device=g.device) for g in generators])


def hadamard(n):
    """Sylvester's matrix of +1 and -1 (n, n), n a power of 2: H H^T = n I."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class DiabolicalLock:
    """A corridor of H columns and two rows; in each of their cells one action of A is right (after
    Misra et al., arXiv 1911.05815). Every right action costs 1 / (H - 1) but the last, which pays
    10; a wrong one leads to a dead row for the rest of the H steps. Optimal return: 9.

    row, col (S*batch,): row 2 is dead;  opt (S, 2, H): the right actions;  farthest (S*batch,): the
    farthest column reached alive so far, counted after the step.
    """

    def __init__(self, horizon, actions, batch, generators, opt=None):
        if horizon < 2 or batch < 1:
            raise ValueError(f"a lock needs a horizon of at least 2 and a batch of at least 1, not "
                             f"{horizon} and {batch}")
        self.horizon, self.actions, self.batch = horizon, actions, batch
        self.generators = generators
        self.size = 2 ** math.ceil(math.log2(horizon + 4))                     # of observations, D
        self.hadamard = hadamard(self.size).to(generators[0].device)
        self.opt = (per_seed(torch.rand, generators, 2, horizon) * actions).long()
        if opt is not None:
            self.opt.copy_(opt)
        self.reset()
        self.farthest = torch.zeros_like(self.col)

    def coin(self):
        """A row, 0 or 1, for each."""
        return (2 * per_seed(torch.rand, self.generators, self.batch)).long().flatten()

    def reset(self):
        self.row = self.coin()
        self.col = torch.zeros_like(self.row)

    def clean(self, row, col):
        """Observations without noise: one-hot row and column, mixed by the Hadamard matrix."""
        return self.hadamard[row] + self.hadamard[3 + col]

    def observe(self):
        """(S*batch, D): two one-hot codes, noise of deviation 0.1 on each entry, padded, mixed."""
        size = self.horizon + 4
        noise = 0.1 * per_seed(torch.randn, self.generators, self.batch, size).flatten(0, 1)
        return self.clean(self.row, self.col) + noise @ self.hadamard[:size]

    def step(self, action):
        seed = torch.arange(len(self.row), device=self.row.device) // self.batch
        alive = self.row < 2
        right = alive & (action == self.opt[seed, self.row.clamp(max=1), self.col])
        self.row = torch.where(right, self.coin(), 2)
        self.col = self.col + 1
        self.farthest = torch.where(right, torch.maximum(self.farthest, self.col), self.farthest)
        end = self.col == self.horizon
        reward = torch.where(right, -1 / (self.horizon - 1), 0)
        reward = torch.where(end, 10.0 * right, reward)      # the last right action does not cost
        self.row, self.col = torch.where(end, self.coin(), self.row), torch.where(end, 0, self.col)
        return reward, end, torch.zeros_like(end)


# MiniGrid. A cell is one integer: object + 16 colour + 128 state + 512 (1 + colour of the key in a
# box). All numbers as in the minigrid package, whose every step the tests compare.
EMPTY, WALL, FLOOR, DOOR, KEY, BALL, BOX, GOAL, LAVA = 1, 2 + 16 * 5, 3, 4, 5, 6, 7, 8 + 16, 9
OPEN, CLOSED, LOCKED = 0, 1, 2
GREEN_COLOUR, BLUE_COLOUR, YELLOW_COLOUR, GREY_COLOUR = 1, 2, 4, 5
LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE = range(6)          # action 6, done, does nothing
MARGIN = 6                                                   # walls around a map: the view's reach


def cell(kind, colour=0, state=0, inside=-1):
    """Code of a cell; colours 0-5: red, green, blue, purple, yellow, grey."""
    return (kind & 15) + 16 * colour + 128 * state + 512 * (inside + 1)


def decode(cells):
    """Codes (...) -> object, colour and state (..., 3), uint8: minigrid's encoding."""
    return torch.stack([cells & 15, cells >> 4 & 7, cells >> 7 & 3], -1).byte()


class Levels:
    """n new levels at once: cells (n, W, H), agent x, y and direction (n,), the target's code.

    Every draw is uniform over what minigrid's rejection sampling accepts.
    """

    def __init__(self, n, width, height, generator):
        self.n, self.generator, self.device = n, generator, generator.device
        self.cells = torch.full((n, width, height), EMPTY, dtype=torch.int16, device=self.device)
        self.x, self.y = (torch.arange(size, device=self.device) for size in (width, height))
        self.target = torch.zeros(n, dtype=torch.int16, device=self.device)

    def integers(self, low, high, shape=None):
        """Uniform in low .. high - 1, (n,) or `shape`; the bounds may be tensors."""
        u = torch.rand(shape or (self.n,), generator=self.generator, device=self.device)
        return low + (u * (high - low)).long()

    def within(self, x, y, width, height):
        """Which cells are in the rectangle -> (n or 1, W, H)."""
        column = lambda a: a[:, None] if isinstance(a, torch.Tensor) else a
        x, y, width, height = map(column, (x, y, width, height))
        in_x, in_y = ((axis >= a) & (axis < a + size) for axis, a, size in (
            (self.x, x, width), (self.y, y, height)))
        return in_x.view(-1, len(self.x), 1) & in_y.view(-1, 1, len(self.y))

    def walls(self, x, y, width, height):
        """Draw the border of a rectangle."""
        interior = self.within(x + 1, y + 1, width - 2, height - 2)
        self.cells.masked_fill_(self.within(x, y, width, height) & ~interior, WALL)

    def put(self, code, x, y):
        """Write a code, or one a level (n,), into the cells x, y."""
        rows = torch.arange(self.n, device=self.device)
        self.cells[rows, x, y] = code.short() if isinstance(code, torch.Tensor) else code

    def choose(self, mask):
        """One of the True entries of each row of mask (n, k), uniformly -> (n,)."""
        total = mask.cumsum(1)
        return (total <= self.integers(0, total[:, -1])[:, None]).sum(1)

    def free(self, area):
        """An empty cell in the area (n or 1, W, H) -> x, y."""
        index = self.choose(((self.cells == EMPTY) & area).flatten(1))
        return index // len(self.y), index % len(self.y)

    def agent(self, area, facing=False):
        """The agent on an empty cell, in any direction; facing: what is empty or a wall."""
        mask = ((self.cells == EMPTY) & area)[:, None].repeat(1, 4, 1, 1)
        if facing:
            clear = ((self.cells == EMPTY) | (self.cells == WALL)).long()
            front = [clear.roll(shift, axis) for shift, axis in ((-1, 1), (-1, 2), (1, 1), (1, 2))]
            mask &= torch.stack(front, 1).bool()
        index, size = self.choose(mask.flatten(1)), mask[0, 0].numel()
        self.direction, index = index // size, index % size
        self.position = index // len(self.y), index % len(self.y)


def empty_level(levels, size, anywhere=False):
    """A square room with a goal in the corner; anywhere: the agent starts in any cell."""
    levels.walls(0, 0, size, size)
    levels.put(GOAL, size - 2, size - 2)
    if anywhere:
        return levels.agent(levels.within(1, 1, size - 2, size - 2))
    one = torch.ones(levels.n, dtype=torch.long, device=levels.device)
    levels.position, levels.direction = (one, one), 0 * one


def door_key_level(levels, size):
    """A wall with a locked door between agent and goal, the key on the agent's side."""
    levels.walls(0, 0, size, size)
    levels.put(GOAL, size - 2, size - 2)
    split = levels.integers(2, size - 2)
    levels.cells.masked_fill_(levels.within(split, 0, 1, size), WALL)
    left = levels.within(0, 0, split, size)
    levels.agent(left)
    levels.put(cell(DOOR, YELLOW_COLOUR, LOCKED), split, levels.integers(1, size - 2))
    taken = torch.zeros_like(left)
    taken[torch.arange(levels.n, device=levels.device), *levels.position] = True
    levels.put(cell(KEY, YELLOW_COLOUR), *levels.free(left & ~taken))


def multi_room_level(levels, rooms, largest):
    """A chain of rooms, each beyond a door in a wall of the one before. A room that finds no place
    in 8 tries sends its whole level back to the start."""
    box = torch.zeros(levels.n, rooms, 4, dtype=torch.long, device=levels.device)  # x, y, w, h
    door = torch.zeros(levels.n, rooms, 2, dtype=torch.long, device=levels.device)
    todo, rounds = torch.arange(levels.n, device=levels.device), 0
    while len(todo):
        n, rounds = len(todo), rounds + 1
        if rounds > 20_000:
            raise ValueError(f"found no place for {rooms} rooms of up to {largest} cells")
        random = lambda low, high, *more: levels.integers(low, high, (n, *more))
        new, doors = torch.zeros_like(box[todo]), torch.zeros_like(door[todo])
        entry = torch.full((n,), 2, device=levels.device)    # sides: right, bottom, left, top
        size, corner = random(4, largest + 1, 2), random(0, 23, 2)
        new[:, 0] = torch.cat([corner, size], 1)
        alive = (corner + size)[:, 0] <= 25                  # minigrid's own comparisons: <= and <
        alive &= (corner + size)[:, 1] < 25
        for room in range(1, rooms):
            x, y, wide, high = new[:, room - 1].unbind(1)
            placed, came = torch.zeros_like(alive), entry
            for _ in range(8):
                size = random(4, largest + 1, 2)
                (w, h), side = size.unbind(1), (came + 1 + random(0, 3)) % 4   # the way out
                across = side % 2 == 0
                spot = random(1, torch.where(across, high, wide) - 1)          # of the door
                back = random(1, torch.where(across, h, w) - 1)
                dx = x + torch.where(across, (wide - 1) * (side == 0), spot)
                dy = y + torch.where(across, spot, (high - 1) * (side == 1))
                left = dx - torch.where(across, (w - 1) * (side == 2), back)
                top = dy - torch.where(across, back, (h - 1) * (side == 3))
                fits = (left >= 0) & (top >= 0) & (left + w <= 25) & (top + h < 25) & ~placed
                for X, Y, W, H in (new[:, r].unbind(1) for r in range(room - 1)):
                    fits &= (left + w < X) | (X + W <= left) | (top + h < Y) | (Y + H <= top)
                candidate, way_in = torch.stack([left, top, w, h], 1), torch.stack([dx, dy], 1)
                new[:, room] = torch.where(fits[:, None], candidate, new[:, room])
                doors[:, room] = torch.where(fits[:, None], way_in, doors[:, room])
                entry = torch.where(fits, (side + 2) % 4, entry)
                placed |= fits
            alive &= placed
        box[todo[alive]], door[todo[alive]] = new[alive], doors[alive]
        todo = todo[~alive]
    colour = levels.integers(0, 6)
    for room in range(rooms):
        levels.walls(*box[:, room].unbind(1))
        if room:
            levels.put(cell(DOOR, colour, CLOSED), *door[:, room].unbind(1))
            colour = (colour + 1 + levels.integers(0, 5)) % 6                  # another colour
    levels.agent(levels.within(*box[:, 0].unbind(1)))
    levels.put(GOAL, *levels.free(levels.within(*box[:, -1].unbind(1))))


def room_grid(levels, columns, rows, size):
    """Rooms that share walls -> where their doors can be, (n, columns, rows, 2, 2): of the right
    and of the lower wall, x and y."""
    stride, spot = size - 1, levels.integers(1, size - 1, (levels.n, columns, rows, 2))
    i, j = levels.x[:columns, None] * stride, levels.y[None, :rows] * stride
    for x in i.flatten().tolist():
        for y in j.flatten().tolist():
            levels.walls(x, y, size, size)
    right = torch.stack([i + stride + 0 * spot[..., 0], j + spot[..., 0]], -1)
    lower = torch.stack([i + spot[..., 1], j + stride + 0 * spot[..., 1]], -1)
    return torch.stack([right, lower], 3)


def key_corridor_level(levels, size, rows):
    """A hallway, rooms on both sides; one on the right is locked and holds the ball to pick up, the
    key lies in one on the left."""
    spots, stride = room_grid(levels, 3, rows, size), size - 1
    room = lambda i, j: levels.within(i * stride, j * stride, size, size)
    for j in range(1, rows):
        levels.cells.masked_fill_(levels.within(stride + 1, j * stride, size - 2, 1), EMPTY)
    every, locked = torch.arange(levels.n, device=levels.device), levels.integers(0, rows)
    colour, ball = levels.integers(0, 6), cell(BALL, levels.integers(0, 6))
    levels.put(cell(DOOR, colour, LOCKED), *spots[every, 1, locked, 0].unbind(1))
    levels.put(ball, *levels.free(room(2, locked)))
    levels.target = ball.short()
    levels.put(cell(KEY, colour), *levels.free(room(0, levels.integers(0, rows))))
    levels.agent(room(1, rows // 2), facing=True)
    # Doors at random until all rooms are connected. group: rooms 3 j + i with one number can be
    # reached from each other, 0: from the hallway
    group = torch.arange(1, 3 * rows + 1, device=levels.device).repeat(levels.n, 1)
    group[:, 1::3], group[every, 3 * locked + 2] = 0, 0
    while (todo := (group != 0).any(1)).any():
        i, j, side = levels.integers(0, 3), levels.integers(0, rows), levels.integers(0, 4)
        i, j, lower = i - (side == 2).long(), j - (side == 3).long(), side % 2
        good = todo & (i >= 0) & (j >= 0) & torch.where(lower == 1, j < rows - 1, i < 2)
        i, j = i.clamp(min=0), j.clamp(min=0)
        a, b = 3 * j + i, (3 * j + i + 1 + 2 * lower).clamp(max=3 * rows - 1)
        x, y = spots[every, i, j, lower].unbind(1)
        good &= (levels.cells[every, x, y] == WALL) & (a != 3 * locked + 2) & (b != 3 * locked + 2)
        door = cell(DOOR, levels.integers(0, 6), CLOSED).short()
        levels.put(torch.where(good, door, levels.cells[every, x, y]), x, y)
        both = group[every[:, None], torch.stack([a, b], 1)]                   # (n, 2)
        joined = (group[:, :, None] == both[:, None]).any(2) & good[:, None]
        group = torch.where(joined, both.amin(1)[:, None], group)


def obstructed_maze_level(levels):
    """2Dlhb-v1: two locked doors, a ball before each, keys in boxes; the blue ball is wanted."""
    spots = room_grid(levels, 3, 3, 6)
    room = lambda i, j: levels.within(5 * i, 5 * j, 6, 6)
    colours = torch.rand(levels.n, 6, generator=levels.generator, device=levels.device).argsort(1).T
    levels.put(cell(DOOR, colours[0], CLOSED), *spots[:, 1, 1, 0].unbind(1))
    for j, colour, step in ((0, colours[5], 1), (1, colours[1], -1)):          # up, down
        x, y = spots[:, 2, j, 1].unbind(1)
        levels.put(cell(DOOR, colour, LOCKED), x, y)
        levels.put(cell(BALL, GREEN_COLOUR), x, y + step)
    for colour in (colours[5], colours[1]):
        levels.put(cell(BOX, GREY_COLOUR, 0, colour), *levels.free(room(2, 1)))
    levels.put(cell(BALL, BLUE_COLOUR), *levels.free(room(2, 0)))
    levels.target += cell(BALL, BLUE_COLOUR)
    levels.agent(room(2, 1), facing=True)


def minigrid_family(env_id):
    """Name -> width, height, largest number of steps, function that draws a level."""
    numbers = lambda pattern: re.fullmatch(r"(?:MiniGrid-)?" + pattern + r"(?:-v\d)?", env_id)
    if (m := numbers(r"Empty-(Random-)?(\d+)x\2")) and (n := int(m[2])) >= 4:
        return n, n, 4 * n * n, lambda levels: empty_level(levels, n, bool(m[1]))
    if (m := numbers(r"DoorKey-(\d+)x\1")) and (n := int(m[1])) >= 5:
        return n, n, 10 * n * n, lambda levels: door_key_level(levels, n)
    if (m := numbers(r"MultiRoom-N(\d+)(?:-S(\d+))?")) and int(m[1]) > 1 and int(m[2] or 10) >= 4:
        n, k = int(m[1]), int(m[2] or 10)
        return 25, 25, 20 * n, lambda levels: multi_room_level(levels, n, k)
    if (m := numbers(r"KeyCorridorS(\d+)R(\d+)")) and int(m[1]) >= 3 and int(m[2]) > 0:
        s, r = int(m[1]), int(m[2])
        return 3 * s - 2, r * (s - 1) + 1, 30 * s * s, lambda levels: key_corridor_level(
            levels, s, r)
    if numbers("ObstructedMaze-2Dlhb"):
        return 16, 16, 576, obstructed_maze_level
    raise ValueError(f"no environment {env_id!r}: Empty-8x8, Empty-Random-8x8, DoorKey-8x8, "
                     "MultiRoom-N6-S10, KeyCorridorS4R3 (any sizes), ObstructedMaze-2Dlhb")


def spread_light():
    """A row of the view and what it lights: 7 bits `lit` and 7 bits `opaque` -> lit cells of this
    row + 128 * lit cells of the row above, for all (128 * 128,) pairs."""
    lit, opaque = torch.arange(128).repeat_interleave(128), torch.arange(128).repeat(128)
    for _ in range(6):                                       # sideways, through what is transparent
        through = lit & ~opaque
        lit = lit | (through << 1 | through >> 1) & 127
    through = lit & ~opaque
    return lit + 128 * ((through | through << 1 | through >> 1) & 127)


class MiniGrid:
    """Farama's MiniGrid, `batch` environments for each generator, all stepped at once.

    State, S*batch rows: cells (rows, places) codes of the map with its margin, `places` cells;  at
    (rows,) the agent's;  direction 0-3 (right, down, left, up);  carrying (rows,) a code or 0;
    step_count;  target: the code that wins when picked up, or 0.
    """
    actions = 7

    def __init__(self, env_id, batch, generators):
        if batch < 1:
            raise ValueError(f"MiniGrid needs a batch of at least 1, not {batch}")
        self.width, self.height, self.max_steps, _ = minigrid_family(env_id)
        self.env_id, self.batch, self.generators = env_id, batch, generators
        device = generators[0].device
        self.see_through = "Empty" in env_id
        self.stride, rows = self.height + 2 * MARGIN, batch * len(generators)
        self.places = (self.width + 2 * MARGIN) * self.stride
        self.cells = torch.full((rows, self.places), WALL, dtype=torch.int16, device=device)
        self.at, self.direction, self.step_count = torch.zeros(3, rows, dtype=torch.long,
                                                               device=device)
        self.carrying, self.target = torch.zeros(2, rows, dtype=torch.int16, device=device)
        self.ahead = torch.tensor([self.stride, 1, -self.stride, -1], device=device)
        # View cell (i, j) is 6 - j steps ahead and i - 3 to the right
        i, j = torch.arange(7, device=device)[:, None], torch.arange(7, device=device)
        self.view = torch.stack([self.ahead[d] * (6 - j) + self.ahead[(d + 1) % 4] * (i - 3)
                                 for d in range(4)]).view(4, 49)
        self.light = spread_light().to(device)
        S, size = len(generators), 4 * batch                 # a stock of new levels for each seed
        new = lambda kind, *shape: torch.zeros(S, size, *shape, dtype=kind, device=device)
        self.stock = {"grid": new(torch.int16, self.width, self.height), "at": new(torch.long),
                      "direction": new(torch.long), "target": new(torch.int16)}
        self.used = torch.full((S,), size, device=device)
        self.reset()

    def reset(self):
        self.renew(torch.ones(len(self.at), dtype=torch.bool, device=self.at.device))

    def renew(self, done):
        """New levels where `done`: the next ones of each seed's stock, each used once."""
        size, done = self.stock["at"].shape[1], done.view(-1, self.batch)
        short = self.used + done.sum(1) > size
        for s in short.nonzero().flatten().tolist():         # seldom: a stock lasts many episodes
            levels = Levels(size, self.width, self.height, self.generators[s])
            minigrid_family(self.env_id)[3](levels)
            x, y = levels.position
            new = {"grid": levels.cells, "at": (x + MARGIN) * self.stride + y + MARGIN,
                   "direction": levels.direction, "target": levels.target}
            for name, part in new.items():
                self.stock[name][s] = part
            self.used[s] = 0
        index = self.used[:, None] + done.cumsum(1) - 1
        self.used += done.sum(1)
        seed, which = done.nonzero().T[0], index[done]
        done = done.flatten()
        for name, stock in self.stock.items():
            getattr(self, name)[done] = stock[seed, which]
        self.carrying[done], self.step_count[done] = 0, 0

    def load(self, grid, position, direction, carrying=0, step_count=0, target=0):
        """Set all rows: grid (rows, W, H) of codes, position (rows, 2) x, y, the others (rows,)."""
        self.grid[:] = grid
        self.at = (position[:, 0] + MARGIN) * self.stride + position[:, 1] + MARGIN
        for name, value in (("direction", direction), ("carrying", carrying),
                            ("step_count", step_count), ("target", target)):
            setattr(self, name, torch.zeros_like(getattr(self, name)) + value)

    @property
    def grid(self):
        """Codes of the map without its margin, (rows, W, H)."""
        return self.cells.view(-1, self.width + 2 * MARGIN, self.stride)[
            :, MARGIN:-MARGIN, MARGIN:-MARGIN]

    def see(self, direction):
        """What an agent with this direction sees -> codes (rows, 7, 7), 0 where it is too dark."""
        seen = self.cells.gather(1, self.at[:, None] + self.view[direction])
        seen[:, 27] = torch.where(self.carrying > 0, self.carrying, EMPTY)     # (3, 6), its place
        seen = seen.view(-1, 7, 7)
        if self.see_through:
            return seen
        kind, shut = seen & 15, seen >> 7 & 3
        opaque = (kind == WALL & 15) | (kind == DOOR) & (shut != OPEN)
        bit = torch.arange(7, device=seen.device)
        opaque = (opaque << bit[:, None]).sum(1)                               # (rows, j)
        lit, seen_bits = torch.full_like(self.at, 8), [None] * 7
        for j in range(6, -1, -1):
            packed = self.light[lit << 7 | opaque[:, j]]
            seen_bits[j], lit = packed & 127, packed >> 7
        visible = torch.stack(seen_bits, 1)[:, None] >> bit[:, None] & 1       # (rows, i, j)
        return seen * visible.short()

    def observe(self):
        """Image (rows, 7, 7, 3) uint8: object, colour, state; the agent at (3, 6), looking up."""
        return decode(self.see(self.direction))

    def panorama(self):
        """All four directions, whatever the agent's own: (rows, 7, 7, 12), channel 4 c + k for
        direction 2, 3, 0, 1 and c object, colour, state."""
        views = [decode(self.see(torch.full_like(self.direction, d))) for d in (2, 3, 0, 1)]
        return torch.stack(views, -1).flatten(-2)

    def step(self, action):
        self.step_count = self.step_count + 1
        front = (self.at + self.ahead[self.direction])[:, None]
        facing = self.cells.gather(1, front)[:, 0]
        kind, colour, shut = facing & 15, facing >> 4 & 7, facing >> 7 & 3
        # Move
        self.direction = (self.direction + (action == RIGHT) - (action == LEFT).long()) % 4
        open_door = (kind == DOOR) & (shut == OPEN)
        free = (kind == EMPTY) | (kind == FLOOR) | (kind == GOAL & 15) | (kind == LAVA) | open_door
        enter = (action == FORWARD) & free
        self.at = torch.where(enter, front[:, 0], self.at)
        # Pick up, drop
        thing = (kind == KEY) | (kind == BALL) | (kind == BOX)
        take = (action == PICKUP) & thing & (self.carrying == 0)
        drop = (action == DROP) & (facing == EMPTY) & (self.carrying > 0)
        new = torch.where(take, EMPTY, torch.where(drop, self.carrying, facing))
        # Toggle: a door, if locked only with the key of its colour; a box gives its key
        key = (self.carrying & 15 == KEY) & (self.carrying >> 4 & 7 == colour)
        turn = (action == TOGGLE) & (kind == DOOR) & ((shut != LOCKED) | key)
        new = torch.where(turn, cell(DOOR, colour, (shut == OPEN).short()), new)
        held = facing >> 9                                   # 1 + colour, or 0 for nothing
        key = torch.where(held > 0, cell(KEY, held - 1), EMPTY)
        new = torch.where((action == TOGGLE) & (kind == BOX), key, new)
        self.carrying = torch.where(take, facing, torch.where(drop, 0, self.carrying))
        self.cells.scatter_(1, front, new[:, None])
        # End
        won = enter & (kind == GOAL & 15) | take & (facing == self.target)
        terminated, truncated = won | enter & (kind == LAVA), self.step_count >= self.max_steps
        reward = torch.where(won, 1 - 0.9 * self.step_count / self.max_steps, 0)
        self.renew(terminated | truncated)
        return reward, terminated, truncated


def environment(cfg, batch, generators, opt=None):
    """The environment of a configuration, `batch` copies for each generator."""
    if cfg.task == "lock":
        return DiabolicalLock(cfg.horizon, cfg.lock_actions, batch, generators, opt)
    return MiniGrid(cfg.env, batch, generators)


# ---- 3. MODEL ----------------------------------------------------------------------------------
# Every network carries a leading axis S: one set of weights a seed, all trained in the same matrix
# products. Inputs are sequences (S, L, B, ...): L steps of B environments or segments. Networks
# without memory pass on memories of size 0, so that one training loop serves both tasks.


class Linear(nn.Module):
    """Linear layers side by side, (S, rows, n_in) -> (S, rows, n_out), torch's initial scale; unit:
    weight vectors of length 1, no bias at first, for the policy [code]. Each seed has `copies`."""

    def __init__(self, n_in, n_out, generators, copies=1, unit=False, bound=None):
        super().__init__()
        bound = bound or 1 / math.sqrt(n_in)
        draw = lambda *shape: bound * (2 * per_seed(torch.rand, generators, copies, *shape) - 1)
        weight, bias = draw(n_in, n_out), draw(1, n_out)
        if unit:
            weight = F.normalize(per_seed(torch.randn, generators, copies, n_in, n_out), dim=2)
            bias = torch.zeros_like(bias)
        self.weight, self.bias = (nn.Parameter(part.flatten(0, 1)) for part in (weight, bias))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Module):
    """Layers with `act` between: (S, rows, sizes[0]) -> (S, rows, sizes[-1])."""

    def __init__(self, sizes, generators, act=torch.relu, last=None, **options):
        super().__init__()
        self.act, self.last = act, last
        self.layers = nn.ModuleList(Linear(*pair, generators, **options)
                                    for pair in zip(sizes, sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        x = self.layers[-1](x)
        return self.last(x) if self.last else x


class Convolutions(nn.Module):
    """Images (S, rows, 7, 7, C) -> (S, rows, widths[-1]): three 2 x 2 convolutions, as products
    over neighbourhoods, ReLU between, the largest of 2 x 2 after the first: 7 -> 6 -> 3 -> 2 -> 1.
    """

    def __init__(self, channels, widths, generators, last=torch.relu):
        super().__init__()
        self.last = last
        self.layers = nn.ModuleList(Linear(4 * a, b, generators)
                                    for a, b in zip((channels, *widths), widths))

    def forward(self, x):
        for n, layer in enumerate(self.layers):
            a, b = x[:, :, :-1], x[:, :, 1:]
            x = torch.cat([a[..., :-1, :], b[..., :-1, :], a[..., 1:, :], b[..., 1:, :]], -1)
            x = layer(x.flatten(1, 3)).unflatten(1, x.shape[1:4])
            x = x.relu() if n < 2 else self.last(x)
            if n == 0:
                x = x.unflatten(2, (3, 2)).unflatten(4, (3, 2)).amax((3, 5))
        return x[:, :, 0, 0]


class LSTM(nn.Module):
    """x (S, L, B, n_in), memory before (S, B, 2 M), first (S, L, B): 1 where an episode starts ->
    outputs (S, L, B, M), memories after each step (S, L, B, 2 M)."""

    def __init__(self, n_in, size, generators):
        super().__init__()
        self.size, bound = size, 1 / math.sqrt(size)
        self.input = Linear(n_in, 4 * size, generators, bound=bound)
        self.recurrent = Linear(size, 4 * size, generators, bound=bound)

    def forward(self, x, memory, first):
        memories, x = [], self.input(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        for step in range(x.shape[1]):
            h, c = (memory * (1 - first[:, step, :, None])).chunk(2, 2)
            i, f, g, o = (x[:, step] + self.recurrent(h)).chunk(4, 2)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            memory = torch.cat([o.sigmoid() * c.tanh(), c], 2)
            memories.append(memory)
        memories = torch.stack(memories, 1)
        return memories[..., :self.size], memories


def by_row(net, x):
    """Apply a network of rows to sequences: (S, L, B, ...) -> (S, L, B, ...)."""
    return net(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def feature_net(cfg, channels, generators):
    """The random network Z, and RND's and NovelD's predictor: observations -> d numbers."""
    if cfg.task == "lock":
        return MLP((channels, cfg.feature_hidden, cfg.cumulants), generators)
    d = cfg.cumulants
    return Convolutions(channels, (d // 4, d // 2, d), generators, last=nn.Identity())


class Agent(nn.Module):
    """Policy and value: (S, L, B, ...) -> logits (S, L, B, A), values (S, L, B), memories."""

    def __init__(self, cfg, channels, actions, generators):
        super().__init__()
        M, self.recurrent = cfg.hidden, cfg.task == "minigrid"
        if self.recurrent:
            self.trunk = Convolutions(channels, (M // 4, M // 2, M), generators)
            self.lstm, head = LSTM(M, M, generators), (M, M)
        else:
            self.trunk = MLP((channels, M, M, M), generators, last=torch.relu, unit=True)
            head = (M,)
        self.memory_size = 2 * M * self.recurrent
        self.actor, self.critic = (MLP((*head, n), generators, act=torch.tanh, unit=True)
                                   for n in (actions, 1))

    def forward(self, obs, memory, first):
        x, memories = by_row(self.trunk, obs), memory[:, None].expand(-1, obs.shape[1], -1, -1)
        if self.recurrent:
            x, memories = self.lstm(x, memory, first)
        return by_row(self.actor, x), by_row(self.critic, x)[..., 0], memories


class Predictor(nn.Module):
    """An ensemble of general value functions: (S, L, B, ...) -> v (K, S, L, B, d), memories.

    lock: K separate networks. MiniGrid: K heads on one history of observations, last actions and
    last pseudo-rewards.
    """

    def __init__(self, cfg, channels, actions, generators):
        super().__init__()
        d, self.recurrent, self.actions = cfg.cumulants, cfg.task == "minigrid", actions
        hidden = cfg.predictor_hidden
        if self.recurrent:
            self.trunk = Convolutions(channels, (d // 4, d // 2, d), generators)
            self.of_image, self.of_action, self.of_z = (
                Linear(n, m, generators) for n, m in ((d, d // 2), (actions, d // 4), (d, d // 4)))
            self.lstm, sizes = LSTM(d, d, generators), (d, hidden, d)
        else:
            sizes = (channels, hidden, hidden, d)
        self.memory_size, self.heads = 2 * d * self.recurrent, cfg.heads
        self.ensemble = MLP(sizes, generators, copies=cfg.heads)

    def forward(self, obs, memory, first, action, z):
        """action (S, L, B), z (S, L, B, d): of the step before each."""
        x, memories = obs, memory[:, None].expand(-1, obs.shape[1], -1, -1)
        if self.recurrent:
            one_hot = F.one_hot(action, self.actions).float()
            x = torch.cat([by_row(self.of_image, by_row(self.trunk, obs)),
                           by_row(self.of_action, one_hot), by_row(self.of_z, z)], -1)
            x, memories = self.lstm(x, memory, first)
        S, K = len(x), self.heads
        v = by_row(self.ensemble, x.repeat_interleave(K, 0))                   # (S*K, L, B, d)
        return v.unflatten(0, (S, K)).transpose(0, 1), memories


class FeaturePredictor(nn.Module):
    """RND's and NovelD's predictor in the same form, K = 1."""
    memory_size = 0

    def __init__(self, cfg, channels, actions, generators):
        super().__init__()
        self.net = feature_net(cfg, channels, generators)

    def forward(self, obs, memory, first, action, z):
        return by_row(self.net, obs)[None], memory[:, None].expand(-1, obs.shape[1], -1, -1)


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# RC-GVF's targets and bonus, those of the baselines, and PPO on the sum of both rewards.


def gvf_returns(z, v, v_last, done, gamma_z, lambda_z):
    """TD(lambda) targets of the general value functions, each head on its own predictions.

    G_t = z_t + gamma_z m_t [(1 - lambda_z) v_(t+1) + lambda_z G_(t+1)],  m_t = 0 where done_t
    z (T, ..., d), v (K, T, ..., d), v_last (K, ..., d) at step T, done (T, ...) -> (K, T, ..., d).
    The sum starts with the present observation's z: with gamma_z = 0 the target is RND's.
    """
    returns, G, following = torch.empty_like(v), v_last, v_last
    for t in reversed(range(len(z))):
        mix = torch.lerp(following, G, lambda_z)
        G = returns[:, t] = z[t] + gamma_z * (1 - done[t].float())[..., None] * mix
        following = v[:, t]
    return returns


def intrinsic_reward(v, returns, beta, kind="product"):
    """beta sum_d Var_k[v] mean_k (G - v)^2: disagreement times error, (K, T, ..., d) -> (T, ...).

    Var is unbiased. kind: product (the method), error or disagreement alone, or std (the deviation
    in place of the variance).
    """
    error = (returns - v).square().mean(0)
    variance = (v - v.mean(0)).square().sum(0) / (len(v) - 1)
    parts = {"product": error * variance, "error": error, "disagreement": variance,
             "std": error * variance.sqrt()}
    return beta * parts[kind].sum(-1)


def novelty_reward(n, n_last, beta, alpha=None):
    """RND: beta n_t; NovelD, with its alpha: beta max(n_(t+1) - alpha n_t, 0). n (T, ...), n_last
    (...): distances |z - p|, not squared; after an end, n_(t+1) is that of the new start."""
    if alpha is None:
        return beta * n
    return beta * (torch.cat([n[1:], n_last[None]]) - alpha * n).clamp(min=0)


def gae(reward, value, value_last, done, gamma, lam):
    """Generalised advantage estimates: reward, value, done (T, ...), value_last (...) -> (T, ...).

    A_t = delta_t + gamma lambda m_t A_(t+1),  delta_t = r_t + gamma m_t V_(t+1) - V_t
    """
    advantages, advantage, following = torch.empty_like(value), 0, value_last
    for t in reversed(range(len(reward))):
        m = 1 - done[t].float()
        error = reward[t] + gamma * m * following - value[t]
        advantage = advantages[t] = error + gamma * lam * m * advantage
        following = value[t]
    return advantages


def ppo_loss(logits, value, batch, cfg):
    """Sequences (S, L, B, ...) -> loss (S,), entropy (S,), with rho the ratio of probabilities:

    mean of -min(rho advantage, clip(rho) advantage) - c_e entropy
            + c_v max((V - return)^2, (V_old + clip(V - V_old) - return)^2)
    """
    log_p = logits.log_softmax(-1)
    ratio = (log_p.gather(-1, batch["action"][..., None])[..., 0] - batch["log_p"]).exp()
    advantage = batch["advantage"]                           # not normalised
    policy = torch.minimum(ratio * advantage,
                           ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * advantage)
    near = batch["value"] + (value - batch["value"]).clamp(-cfg.clip, cfg.clip)
    error = torch.maximum((value - batch["return"]).square(), (near - batch["return"]).square())
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = cfg.value_coefficient * error - policy - cfg.entropy_coefficient * entropy
    return loss.mean((1, 2)), entropy.detach().mean((1, 2))


def predictor_loss(v, target):
    """Mean over heads of the squared error to fixed targets, (K, S, L, B, d) each -> (S,)."""
    return (v - target).square().mean((0, 2, 3, 4))


def descend(losses, networks, optimisers, limit, run):
    """One Adam step of each network by the sum of the losses (S,); the gradient of each seed and
    network is clipped to the norm `limit`."""
    lists = [[*net.parameters()] for net in networks]
    gradients = list(torch.autograd.grad(losses.sum(), [p for part in lists for p in part]))
    run.average(gradients)
    for parameters, adam in zip(lists, optimisers):
        own, gradients = gradients[:len(parameters)], gradients[len(parameters):]
        by_seed = [g.view(len(losses), -1) for g in own]
        norm = torch.cat(by_seed, 1).norm(dim=1, keepdim=True)
        for p, g, part in zip(parameters, own, by_seed):
            part *= (limit / (norm + 1e-6)).clamp(max=1)
            p.grad = g
        adam.step()


# ---- 5. TRAINING -------------------------------------------------------------------------------
# `run` (class Run, section 8) stands for the machine: run.steps(stage, total, state) counts the
# steps, restores and saves `state`; run.share(batch), run.average(tensors) are for many processes.
# Buffers are (T, S, N, ...): time first.


def networks(cfg, run, env, method):
    """Fresh agent, predictor (None for PPO) and random network, the same first weights of a seed
    for all methods."""
    starts = lambda purpose: [stream(seed, purpose, "cpu") for seed in run.seeds]
    channels = env.size if cfg.task == "lock" else 3
    curious = 12 if cfg.panorama else channels
    agent = Agent(cfg, channels, env.actions, starts(26))
    kind = Predictor if method == "rcgvf" else FeaturePredictor
    predictor = kind(cfg, curious, env.actions, starts(27)) if method != "ppo" else None
    features = feature_net(cfg, curious, starts(28)).requires_grad_(False)
    return [net and net.to(run.device) for net in (agent, predictor, features)]


def begin(cfg, env, agent, predictor, S):
    """What the first rollout starts from: observations, 1 as all are first in their episodes,
    memories of agent and predictor, last actions and last z."""
    obs = env.observe().unflatten(0, (S, -1))
    zeros = lambda *shape: torch.zeros(*obs.shape[:2], *shape, device=obs.device)
    carry = {"obs": obs, "first": zeros() + 1, "memory": zeros(agent.memory_size),
             "curiosity_memory": zeros(predictor.memory_size if predictor else 0),
             "action": zeros().long(), "z": zeros(cfg.cumulants)}
    if cfg.counts:
        carry["visits"] = torch.zeros(len(env.at), env.places, dtype=torch.int32, device=obs.device)
    return carry


@torch.no_grad()
def rollout(cfg, env, agent, carry, streams, S):
    """T steps of all environments -> buffers (T, S, N, ...), T + 1 of obs, first and value.

    carry: what it starts from, see `begin`; in place, what the next one will start from.
    """
    rows, buffer = lambda x: x.unflatten(0, (S, -1)), {}
    put = lambda **tensors: [buffer.setdefault(name, []).append(x) for name, x in tensors.items()]
    for t in range(cfg.rollout + 1):
        logits, value, memories = agent(carry["obs"][:, None].float(), carry["memory"],
                                        carry["first"][:, None])
        put(obs=carry["obs"], value=value[:, 0], first=carry["first"])
        if cfg.panorama:
            put(curiosity_obs=rows(env.panorama()))
        if t == cfg.rollout:
            break
        log_p = logits[:, 0].log_softmax(-1)
        u = per_seed(torch.rand, streams, cfg.envs)
        action = (log_p.exp().cumsum(-1) < u[..., None]).sum(-1).clamp(max=env.actions - 1)
        put(memory=carry["memory"], action=action, log_p=log_p.gather(2, action[..., None])[..., 0])
        if cfg.counts:
            visits, here = carry["visits"], env.at[:, None]                     # (S*N, places)
            visits.scatter_add_(1, here, torch.ones_like(here, dtype=visits.dtype))
            put(visits=rows(visits.gather(1, here)[:, 0]))
        reward, terminated, truncated = env.step(action.flatten())
        done = terminated | truncated
        if cfg.counts:
            visits *= ~done[:, None]
        put(reward=rows(reward), done=rows(done))
        carry |= {"obs": rows(env.observe()), "memory": memories[:, 0], "first": rows(done).float()}
    return {name: torch.stack(parts) for name, parts in buffer.items()}


@torch.no_grad()
def curiosity(cfg, method, beta, predictor, features, buffer, carry):
    """The intrinsic reward of each step (T, S, N), by the predictor as it was when acting. Adds to
    the buffer what the predictor's update needs: memories, last actions, last z, targets.

    Last actions and z are not cleared where an episode starts, memories are [code].
    """
    sequence = lambda x: x.movedim(0, 1)                     # (T, S, N, ...) -> (S, T, N, ...)
    obs = sequence(buffer.get("curiosity_obs", buffer["obs"])).float()
    z = by_row(features, obs)
    last_action = torch.cat([carry["action"][:, None], sequence(buffer["action"])], 1)
    last_z = torch.cat([carry["z"][:, None], z[:, :-1]], 1)
    memory = carry["curiosity_memory"]
    v, memories = predictor(obs, memory, sequence(buffer["first"]), last_action, last_z)
    buffer["curiosity_memory"] = torch.cat([memory[:, None], memories[:, :-2]], 1).movedim(1, 0)
    if predictor.memory_size:
        buffer["last_action"], buffer["last_z"] = last_action.movedim(1, 0), last_z.movedim(1, 0)
    carry |= {"curiosity_memory": memories[:, -2], "action": last_action[:, -1], "z": last_z[:, -1]}
    z, v = z.movedim(1, 0), v.movedim(2, 1)                  # (T + 1, S, N, d), (K, T + 1, S, N, d)
    if method == "rcgvf":
        target = gvf_returns(z[:-1], v[:, :-1], v[:, -1], buffer["done"], cfg.gamma_z, cfg.lambda_z)
        bonus = intrinsic_reward(v[:, :-1], target, beta, cfg.bonus)
    else:
        target, n = z[None, :-1], (z - v[0]).norm(dim=-1)
        alpha = cfg.noveld_alpha if method == "noveld" else None
        bonus = novelty_reward(n[:-1], n[-1], beta, alpha)
    buffer["target"] = target.movedim(0, -2)                 # (T, S, N, K, d)
    if cfg.counts:
        visits = buffer["visits"].float()
        bonus = bonus * (visits == 1) if cfg.first_visit else bonus / visits.sqrt()
    return bonus


def minibatches(cfg, streams, shifted):
    """Indices into flattened buffers, each (S, L, n): n segments of L steps, in random order.

    shifted, every second epoch if L > 1: segments start half their length later, and those that
    would leave the rollout are left out [code].
    """
    T, N, L, S = cfg.rollout, cfg.envs, cfg.recurrence, len(streams)
    shift = L // 2 if shifted else 0
    steps = torch.arange(shift, T - L + 1, L) * S * N
    starts = (torch.arange(N)[:, None] + steps).flatten().to(streams[0].device)
    order = per_seed(torch.rand, streams, len(starts)).argsort(1)
    seed = torch.arange(S, device=starts.device)[:, None] * N
    step = torch.arange(L, device=starts.device)[:, None] * S * N
    for part in (starts[order] + seed).split(cfg.minibatch // L, 1):
        yield part[:, None] + step


def train(cfg, run, stage, order, method, beta):
    """One method on all seeds at once -> agent, environment."""
    S, N, device = len(run.seeds), cfg.envs, run.device
    generators = [stream(seed, 10, device) for seed in run.seeds]
    env = environment(cfg, N, generators)
    agent, predictor, features = networks(cfg, run, env, method)
    streams = [stream(seed, order, device) for seed in run.seeds]
    nets = [net for net in (agent, predictor) if net]
    losses_of = run.compile(both_losses)
    rates = [cfg.learning_rate, cfg.learning_rate * (
        cfg.rcgvf_rate if method == "rcgvf" else cfg.rnd_rate)]
    adams = [torch.optim.Adam(net.parameters(), lr=rate, fused=device.type != "mps")
             for net, rate in zip(nets, rates)]
    carry = begin(cfg, env, agent, predictor, S)
    per_update = cfg.rollout * N
    total = max(1, round(cfg.frames / per_update))
    # Returns: of the running episode; of those that ended, their sum and number
    finished, epochs = torch.zeros(S, N, 3, device=device), [0]
    latest = torch.zeros(S, device=device)                   # mean return of what ended last
    state = {"nets": nets, "adams": adams, "streams": streams, "env": vars(env), "carry": carry,
             "finished": finished, "latest": latest, "epochs": epochs}
    for number in run.steps(stage, total, state):
        # COLLECT
        buffer = rollout(cfg, env, agent, carry, streams, S)
        bonus = torch.zeros_like(buffer["reward"])
        if predictor:
            bonus = curiosity(cfg, method, beta, predictor, features, buffer, carry)
        reward = buffer["reward"] + bonus
        reward = reward.clamp(-1, 1) if cfg.task == "minigrid" else reward
        value, value_last = buffer["value"][:-1], buffer["value"][-1]
        buffer["advantage"] = gae(reward, value, value_last, buffer["done"], cfg.gamma, cfg.lam)
        buffer["return"] = value + buffer["advantage"]
        for t in range(cfg.rollout):
            finished[..., 0] += buffer["reward"][t]
            finished[..., 1] += buffer["done"][t] * finished[..., 0]
            finished[..., 2] += buffer["done"][t]
            finished[..., 0] *= ~buffer["done"][t]
        # UPDATE: agent and predictor, on the same minibatches
        if cfg.anneal:
            for adam, rate in zip(adams, rates):
                adam.param_groups[0]["lr"] = rate * (1 - min(1, number * per_update / cfg.anneal))
        flat = {name: part[:cfg.rollout].flatten(0, 2) for name, part in buffer.items()
                if name not in ("reward", "done", "visits")}
        for _ in range(cfg.epochs):
            for index in minibatches(cfg, streams, epochs[0] % 2 and cfg.recurrence > 1):
                losses, entropy = update(cfg, run, nets, adams, flat, index, losses_of)
            epochs[0] += 1
        run.watch(losses)
        # LOG
        if (number + 1) % cfg.log_every == 0 or number + 1 == total or number == 0:
            with run.clock("evaluation"):
                _, total_return, ended = finished.sum(1).T
                latest[ended > 0] = (total_return / ended)[ended > 0]
                numbers = {"bonus": bonus.mean((0, 2)), "entropy": entropy, "return": latest}
                if cfg.task == "lock":
                    numbers["farthest"] = env.farthest.view(S, N).amax(1).float()
                    numbers["greedy"] = greedy_return(cfg, run, agent, env)
                finished[..., 1:] = 0
                run.log([{"seed": seed, "frames": (number + 1) * per_update,
                          **{name: x[s].item() for name, x in numbers.items()}}
                         for s, seed in enumerate(run.seeds)])
    return agent, env


def both_losses(cfg, nets, batch):
    """Agent and predictor on segments, memories from the stored first one -> summed losses (S,),
    entropy (S,), memories after each step."""
    logits, value, memories = nets[0](batch["obs"].float(), batch["memory"][:, 0], batch["first"])
    losses, entropy = ppo_loss(logits, value, batch, cfg)
    fresh = {"memory": memories}
    if len(nets) > 1:
        obs = batch.get("curiosity_obs", batch["obs"]).float()
        v, fresh["curiosity_memory"] = nets[1](
            obs, batch["curiosity_memory"][:, 0], batch["first"], batch.get("last_action"),
            batch.get("last_z"))
        losses = losses + predictor_loss(v, batch["target"].movedim(-2, 0))
    return losses, entropy, fresh


def update(cfg, run, nets, adams, flat, index, losses_of=both_losses):
    """One gradient step of both networks on the segments `index` (S, L, n) -> losses, entropy (S,).

    Weights move on while a rollout is used again and again, stored memories would not: those of a
    segment's later steps are overwritten with what this pass has computed [code].
    """
    own = run.share(index, 2)
    losses, entropy, fresh = losses_of(cfg, nets, {name: part[own] for name, part in flat.items()})
    descend(losses, nets, adams, cfg.grad_norm, run)
    for name, memories in fresh.items():
        if cfg.recurrence > 1 and memories.shape[-1]:
            flat[name][own[:, 1:]] = memories[:, :-1].detach()
            exchange(run, flat[name], index, own)
    return losses.detach(), entropy


def exchange(run, memory, index, own):
    """With several processes: every one gets the memories that the others have overwritten."""
    if run.world > 1:
        new = torch.zeros_like(memory)
        new[own[:, 1:]] = run.world * memory[own[:, 1:]]
        run.average([new])
        memory[index[:, 1:]] = new[index[:, 1:]]


# ---- 6. EVALUATION -----------------------------------------------------------------------------


@torch.no_grad()
def greedy_return(cfg, run, agent, env):
    """Mean return of one lock episode of the most probable actions, (S,); 9 is the optimum."""
    S, N = len(run.seeds), cfg.eval_episodes
    generators, total = [stream(seed, 20, run.device) for seed in run.seeds], 0
    test = environment(cfg, N, generators, env.opt)
    nothing, first = torch.zeros(S, N, 0, device=run.device), torch.ones(S, 1, N, device=run.device)
    for _ in range(cfg.horizon):
        logits, _, _ = agent(test.observe().unflatten(0, (S, 1, N)), nothing, first)
        total = total + test.step(logits.argmax(-1).flatten())[0]
    return total.view(S, N).mean(1)


@torch.no_grad()
def opening_probability(cfg, run, agent, env):
    """Probability of the right action in each living state of the lock, without noise (S, 2, H)."""
    S, H = len(run.seeds), cfg.horizon
    state = torch.arange(2 * H, device=run.device)
    obs = env.clean(state // H, state % H).expand(S, 1, -1, -1)
    logits, _, _ = agent(obs, obs.new_zeros(S, 2 * H, 0), obs.new_ones(S, 1, 2 * H))
    return logits.softmax(-1)[:, 0].gather(2, env.opt.view(S, -1, 1)).view(S, 2, H)


def draw_level(cfg, seed=0):
    """One level for the figure: its codes' objects, colours and states (W, H, 3), the agent's place
    and direction, and the cells that it sees, as lists."""
    env = MiniGrid(cfg.env, 1, [stream(seed, 21, "cpu")])
    place = lambda index: [index // env.stride - MARGIN, index % env.stride - MARGIN]
    seen = (env.at + env.view[env.direction])[0][env.see(env.direction).flatten() > 0]
    seen = [[x, y] for x, y in map(place, seen.tolist())
            if 0 <= x < env.width and 0 <= y < env.height]
    return {"grid": decode(env.grid[0]).tolist(), "agent": place(env.at.item()),
            "direction": env.direction.item(), "seen": seen}


def stages(cfg):
    """What a run trains: name -> method, beta, changed settings. The betas of the ablations were
    searched like the others, for the small lock."""
    betas = {"rcgvf": cfg.beta_rcgvf, "rnd": cfg.beta_rnd, "noveld": cfg.beta_noveld, "ppo": 0.0}
    extras = {"RC-GVF, official beta": ("rcgvf", 20.0, {}), "RND, official beta": ("rnd", 0.5, {}),
              "error only": ("rcgvf", 1.0, {"bonus": "error"}),
              "disagreement only": ("rcgvf", 10.0, {"bonus": "disagreement"}),
              "gamma_z = 0": ("rcgvf", 10_000.0, {"gamma_z": 0.0})}
    chosen = {METHODS[name]: (name, betas[name], {}) for name in cfg.methods.split(",")}
    fits = cfg.extras and (cfg.task, cfg.scale, cfg.bonus) == ("lock", "small", "product")
    return chosen | {name: stage for name, stage in extras.items()
                     if fits and METHODS[stage[0]] in chosen}


def plan(cfg, flops_per_second):
    """What a run of `cfg` does and how long it should take at this rate of matrix products."""
    d, h, H = cfg.cumulants, cfg.hidden, cfg.predictor_hidden
    weights = 3 * h * h + 2 * H * (H + d) + 2 * d * d        # of a forward pass, roughly
    weights += 16 * (h * h + d * d) if cfg.task == "minigrid" else 0
    work = cfg.frames * cfg.num_seeds * (6 * cfg.epochs + 6) * weights
    updates = cfg.frames / (cfg.envs * cfg.rollout)
    calls = cfg.rollout * 2.5e-4 + 7e-4 * cfg.epochs * cfg.envs * cfg.rollout / cfg.minibatch
    minutes = len(stages(cfg)) * (work / (0.3 * flops_per_second) + updates * calls) / 60
    what = f"a lock of {cfg.horizon} columns" if cfg.task == "lock" else cfg.env
    return (f"explores {what} with {', '.join(stages(cfg))}: {cfg.num_seeds} seed(s), "
            f"{cfg.frames:,} frames each: about {minutes:.1f} min here")


def experiment(cfg, run):
    """Train all methods, compare -> {"per_seed": a dictionary per seed with "headline" numbers,
    "beside": notes for the closing table, "level": for the figure}."""
    knows, level = None, draw_level(cfg)
    for order, (stage, (method, beta, changes)) in enumerate(stages(cfg).items()):
        agent, env = train(replace(cfg, **changes), run, stage, order, method, beta)
        if cfg.task == "lock" and stage == "RC-GVF":
            knows = opening_probability(cfg, run, agent, env)
    columns = ("frames", *(("farthest", "greedy") if cfg.task == "lock" else ("return",)), "bonus",
               "entropy")
    per_seed = []
    for s, seed in enumerate(run.seeds):
        curves, numbers = {}, {}
        for row in run.rows:
            if row["seed"] == seed:
                curves.setdefault(row["stage"], []).append(
                    [float(f"{row[key]:.6g}") for key in columns])
        for stage, points in curves.items():
            key = re.sub(r"\W+", "_", stage.replace("-", "").lower())
            if cfg.task == "lock":
                numbers[f"{key}_farthest_column"] = points[-1][1]
                numbers[f"{key}_greedy_return"] = points[-1][2]
            else:
                last = points[-max(1, len(points) // 10):]
                numbers[f"{key}_return"] = statistics.fmean(point[1] for point in last)
        if "RC-GVF" in curves:
            bonus = [(point[0], point[-2]) for point in curves["RC-GVF"]]
            later = next((b for frames, b in bonus if frames >= 20_000), bonus[-1][1])
            numbers["bonus_decay"] = bonus[0][1] / max(later, 1e-12)
            if cfg.task == "lock" and "RND" in curves:
                numbers["rcgvf_minus_rnd_column"] = (
                    numbers["rcgvf_farthest_column"] - numbers["rnd_farthest_column"])
        per_seed.append({"seed": seed, "headline": numbers, "curves": curves,
                         **({} if knows is None else {"knows": knows[s].tolist()})})
    notes = {name: "  ".join(f"{row['headline'][name]:.3g}" for row in per_seed)
             for name in per_seed[0]["headline"]}
    return {"per_seed": per_seed, "beside": notes, "columns": columns, "level": level}


# ---- 7. FIGURE ---------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, RED, GREY, PINK = (                                       # Okabe and Ito
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777", "#CC79A7")
COLOURS = {"RC-GVF": BLUE, "RND": ORANGE, "NovelD": GREEN, "PPO": GREY}


def plot(summary, path):
    """Draw the panels from a summary alone; thin lines: seeds, thick: means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "legend.fontsize": 8})
    cfg, rows = summary["config"], summary["per_seed"]
    lock = cfg["task"] == "lock"
    panels = [plot_farthest, plot_greedy] if lock else [plot_returns]
    panels += [plot_bonus, *([plot_knows] if lock and "knows" in rows[0] else []), plot_final,
               plot_level]
    columns = 3 if len(panels) > 4 else 2
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained",
                                figsize=(13.8 if columns > 2 else 10.4, 4 * lines))
    for letter, axis, panel in zip("abcdef", axes.flat, panels):
        axis.set_title(f"({letter}) {panel(axis, summary, rows)}")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    what = f"a diabolical lock of {cfg['horizon']} columns" if lock else cfg["env"]
    figure.suptitle(f"Random curiosity with general value functions: {what}. "
                    f"Thin: each of {len(rows)} seed(s); thick: mean")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): thin lines and their thick mean."""
    for curve in curves if len(curves) > 1 else []:
        axis.plot(x, curve, color=colour, ls=style, lw=0.7, alpha=0.5)
    axis.plot(x, np.mean(curves, 0), color=colour, ls=style, lw=2.2, label=label)


def plot_column(axis, summary, rows, name):
    """One logged number of all methods against frames; -> the frames."""
    column = summary["columns"].index(name)
    for stage, colour in COLOURS.items():
        if stage in rows[0]["curves"] and not (name == "bonus" and stage == "PPO"):
            points = np.array([row["curves"][stage] for row in rows])          # (seeds, logs, n)
            plot_lines(axis, points[0, :, 0] / 1000, points[:, :, column], colour, stage)
    axis.set(xlabel="thousand frames")
    return np.array(next(iter(rows[0]["curves"].values())))[:, 0]


def plot_farthest(axis, summary, rows):
    """Farthest column reached alive -> title."""
    x, cfg = plot_column(axis, summary, rows, "farthest"), summary["config"]
    H, A = cfg["horizon"], cfg["lock_actions"]
    axis.plot(x / 1000, np.log(np.maximum(x / H, 1)) / np.log(A), "k:", lw=1,
              label="random, about")
    axis.axhline(H, color="black", ls="--", lw=1, label="the lock is open")
    axis.set(ylabel="farthest column so far")
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0.95))
    return "Farthest column that any environment has reached"


def plot_greedy(axis, summary, rows):
    """Return of the greedy policy -> title."""
    plot_column(axis, summary, rows, "greedy")
    axis.axhline(9, color="black", ls="--", lw=1, label="optimum")
    axis.set(ylabel="return of the greedy policy")
    axis.legend(loc="upper left")
    return "Return of the greedy policy"


def plot_returns(axis, summary, rows):
    """Return of MiniGrid's episodes -> title."""
    plot_column(axis, summary, rows, "return")
    axis.set(ylabel="mean return of episodes that ended")
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
    return "Return while it learns"


def plot_bonus(axis, summary, rows):
    """Mean intrinsic reward -> title."""
    plot_column(axis, summary, rows, "bonus")
    axis.set(ylabel="mean intrinsic reward a step", yscale="log")
    axis.legend(loc="upper right") if axis.lines else None
    return "Intrinsic reward"


def plot_knows(axis, summary, rows):
    """RC-GVF's probability of the right action in each state -> title."""
    knows = np.array([row["knows"] for row in rows])                           # (S, 2, H)
    image = axis.imshow(knows.reshape(-1, knows.shape[2]), cmap="viridis", vmin=0, vmax=1,
                        aspect="auto", interpolation="nearest")
    for n in range(1, len(rows)):
        axis.axhline(2 * n - 0.5, color="white", lw=2)
    axis.set_yticks(np.arange(len(rows)) * 2 + 0.5, [f"seed {row['seed']}" for row in rows])
    axis.set(xlabel="column (two rows a seed)")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
    return "RC-GVF: probability of the right action"


def plot_final(axis, summary, rows):
    """All runs at the end -> title."""
    lock, stages = summary["config"]["task"] == "lock", list(rows[0]["curves"])
    names = [name for name in rows[0]["headline"] if name.endswith(
        "_farthest_column" if lock else "_return")]
    for place, (stage, name) in enumerate(zip(stages, names)):
        values = [row["headline"][name] for row in rows]
        axis.barh(place, np.mean(values), color=COLOURS.get(stage, PINK), alpha=0.7)
        axis.plot(values, [place] * len(values), "|", color="black", ms=12)
    axis.set_yticks(range(len(stages)), stages)
    axis.invert_yaxis()
    axis.set(xlabel="farthest column" if lock else "return")
    return "At the end (bar: mean, marks: seeds)"


def plot_level(axis, summary, rows):
    """A MiniGrid level, and what the agent in it sees -> title."""
    from matplotlib.patches import Circle, Rectangle, RegularPolygon
    level, grid = summary["level"], np.array(summary["level"]["grid"])         # (W, H, 3)
    paints = (RED, GREEN, BLUE, "#9467bd", "#F0E442", GREY)
    background = np.where((grid[..., 0] == WALL & 15)[..., None], 0.45, np.ones(3))
    for x, y in level["seen"]:
        background[x, y] = 0.75 * background[x, y] + 0.25 * np.array([1, 0.75, 0.2])
    axis.imshow(background.transpose(1, 0, 2), interpolation="nearest")
    for x, y in np.argwhere(np.isin(grid[..., 0], (DOOR, KEY, BALL, BOX, GOAL & 15))):
        kind, colour, state = grid[x, y]
        paint = paints[colour]
        if kind == DOOR:
            axis.add_patch(Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, fc=paint if state == LOCKED else
                                     "white", ec=paint, lw=3))
        elif kind == GOAL & 15:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=paint))
        elif kind == BALL:
            axis.add_patch(Circle((x, y), 0.3, fc=paint))
        else:
            axis.text(x, y, "key" if kind == KEY else "box", color=paint, ha="center", va="center",
                      fontsize=8, weight="bold")
    axis.add_patch(RegularPolygon(level["agent"], 3, radius=0.45, fc=RED,
                                  orientation=-math.pi / 2 + level["direction"] * math.pi / 2))
    drawn = np.argwhere(grid[..., 0] != EMPTY)               # a small maze on a large map
    (left, top), (right, bottom) = drawn.min(0), drawn.max(0)
    axis.set(xlim=(left - 0.6, right + 0.6), ylim=(bottom + 0.6, top - 0.6))
    axis.set_axis_off()
    config = summary["config"]
    return f"The other task: {config['env']}" if config["task"] == "lock" else (
        f"{config['env']}, tinted: what is seen")


# ---- 8. RUN ------------------------------------------------------------------------------------
# Command line, run folder, exact resume, signals, devices, processes: the same text in all six
# scripts. It knows no paper; of the script it uses the imports, Config (with seed, num_seeds and
# save_every), PRESETS, plan(cfg, flops_per_second) -> a line, plot(summary, path) and
# experiment(cfg, run) -> {"per_seed": [{"headline": {name: number}}, ..], "beside": {name: text}}.

SCRIPT = os.path.basename(__file__)


def die(message, status=2):
    """End the program with one line on standard error."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def write(path, save):
    """Write a whole file or nothing: save(part) makes it beside the old one, then it moves."""
    part = path.with_suffix(".part")
    try:
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:         # RuntimeError: torch.save, for a full disk
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        why = error.strerror if isinstance(error, OSError) else "is the disk full?"
        die(f"cannot write {path} ({why}); what was there is unharmed", 1)


def pack(thing):
    """Modules, optimisers, generators and containers of them -> tensors and plain containers."""
    if isinstance(thing, dict):
        return {key: pack(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [pack(value) for value in thing]
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, torch.Tensor):
        return thing.detach()
    return pack(thing.state_dict()) if hasattr(thing, "state_dict") else thing


def healthy(packed):
    """Is no number in what `pack` returned infinite or NaN?"""
    if isinstance(packed, (dict, list)):
        return all(map(healthy, packed.values() if isinstance(packed, dict) else packed))
    return not isinstance(packed, torch.Tensor) or bool(packed.isfinite().all())


def unpack(thing, saved):
    """Put what `pack` returned back in place; -> `thing`, or `saved` where that has no inside."""
    if isinstance(thing, dict):
        thing.update({key: unpack(thing.get(key), value) for key, value in saved.items()})
    elif isinstance(thing, list):
        thing[:] = [unpack(*pair) for pair in zip(thing, saved)] if thing else saved
    elif isinstance(thing, torch.Generator):
        thing.set_state(saved)
    elif isinstance(thing, torch.Tensor):
        thing.detach().copy_(saved)
    elif hasattr(thing, "load_state_dict"):
        thing.load_state_dict(saved)
    else:
        return saved
    return thing


def interval(values):
    """Mean over n seeds with a 95 % Student-t interval (None for one seed)."""
    n, mean = len(values), statistics.fmean(values)
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
    quantile = t[n - 2] if 2 <= n <= 14 else 1.96 + 2.37 / max(1, n - 1) + 2.9 / max(1, n - 1)**2
    half = quantile * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0
    return {"mean": mean, "ci95": [mean - half, mean + half] if n > 1 else None, "n": n,
            "per_seed": values}


def synchronise(device):
    """Wait until the device has done its work, so that a clock read now means something."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def median_seconds(device, works, repeats=5):
    """Median time of each function, all called in turn: ratios compare the same moments."""
    times = [[] for _ in works]
    for _ in range(repeats + 2):
        for work, spent in zip(works, times):
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent[2:]) for spent in times]                   # two to warm up


class Run:
    """The machine as `experiment` sees it: device, processes, folder, log, checkpoints, clocks."""

    def __init__(self, cfg, args):
        self.cfg, self.seeds = cfg, list(range(cfg.seed, cfg.seed + cfg.num_seeds))
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        kind = next((k for k in here if here[k]), "cpu") if args.device == "auto" else args.device
        if not here.get(kind, True):
            die(f"--device {kind}: this machine has none")
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")                         # TF32
        if kind == "cpu" and sys.platform == "linux":
            with contextlib.suppress(AttributeError):        # glibc: keep the memory of freed large
                for option in (-1, -3):              # tensors; new pages cost up to 25 % of a step
                    ctypes.CDLL(None).mallopt(option, 2**31 - 1)
        self.device = torch.device(kind)
        self.compiled = kind == "cuda" if args.compile is None else args.compile
        self.compile = torch.compile if self.compiled else lambda function: function
        self.folder = run_folder(cfg, args)
        self.rows, self.stages, self.seconds = [], {}, {"total": 0, "training": 0, "evaluation": 0}
        self.rates, self.losses, self.watched = {}, [], 0
        self.opened, self.in_step, self.signal = False, False, 0
        self.look(args.resume)
        self.started = time.perf_counter() - self.seconds["total"]
        if self.world > 1:                           # signals end all processes; resume is exact
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
        else:
            signal.signal(signal.SIGINT, self.interrupt)
            signal.signal(signal.SIGTERM, self.interrupt)

    def look(self, resume):
        """Refuse a folder that holds another run; with --resume, read its checkpoint."""
        names = ("config.json", "summary.json", "checkpoint.pt")
        paths = [self.folder / name for name in names if (self.folder / name).exists()]
        if paths and not resume:
            die(f"{self.folder} holds a run: --resume goes on with it, --out FOLDER goes elsewhere")
        folder = self.folder.absolute()
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            die(f"--out {self.folder}: {above} is not a folder that one can write to")
        for path in paths:
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True) if (
                    path.suffix == ".pt") else json.loads(path.read_text())
                config = saved if path.name == "config.json" else saved["config"]
                differing = [name for name, value in asdict(self.cfg).items()
                             if config.get(name) != value]
                if path.suffix == ".pt":
                    for name in ("stages", "rows", "seconds", "rates"):
                        setattr(self, name, saved[name])
            except Exception as error:               # a damaged file raises almost anything
                die(f"{path} is damaged ({type(error).__name__}): delete it and start again")
            for name in differing:
                die(f"{path} is of another run: {name} was {config.get(name)!r}, "
                    f"now {getattr(self.cfg, name)!r}")

    def interrupt(self, number, frame):
        """Ctrl-C and SIGTERM: finish the step, save, leave. Outside a step or twice: leave."""
        if self.signal or not self.in_step:
            die("stopped between two checkpoints; --resume goes on from the last", 128 + number)
        self.signal = number

    def steps(self, stage, total, state):
        """Yield the numbers of the steps still to do of one stage of training.

        `state` holds all that the stage changes: a dictionary of modules, optimisers, generators,
        tensors and containers of these. It is restored before the first step and saved every
        `save_every` steps and at the end: a run killed at any moment goes on as if it had not been.
        """
        if not self.opened and self.rank == 0:       # not before: bad input leaves nothing behind
            write(self.folder / "config.json", lambda part: (part.parent.mkdir(
                parents=True, exist_ok=True), part.write_text(json.dumps(asdict(self.cfg)))))
            write(self.folder / "metrics.jsonl", lambda part: part.write_text(
                "".join(json.dumps(row) + "\n" for row in self.rows)))
        self.opened, self.stage, self.step, spent = True, stage, 0, []
        self.seconds.setdefault("setup", time.perf_counter() - self.started)
        if stage in self.stages:
            self.step = self.stages[stage]["step"]
            unpack(state, self.stages[stage]["state"])
        self.bar = tqdm(total=total, initial=self.step, desc=stage,
                        disable=self.rank > 0 or not sys.stderr.isatty())
        while self.step < total:
            self.in_step = True                      # from here on a signal waits for the end
            start = time.perf_counter() - self.seconds["evaluation"]      # evaluations do not count
            yield self.step
            spent.append(time.perf_counter() - self.seconds["evaluation"] - start)
            self.seconds["training"] += spent[-1]
            self.step += 1
            self.bar.update()
            saving = self.step % self.cfg.save_every == 0 or self.step == total or self.signal
            if saving or self.device.type == "cpu":
                self.check()
            if saving and len(spent) > 10:           # the first steps warm up
                rate = (len(spent) - 10) / sum(spent[10:])
                self.rates.setdefault("steps_per_second", {})[stage] = rate
            if saving:
                self.stages[stage] = {"step": self.step, "state": pack(state)}
                if not healthy(self.stages[stage]):
                    die(f"NaN or infinity after step {self.step} of {stage}, seeds {self.seeds}", 1)
                if self.step == total:               # a later stage may change the same tensors
                    self.stages[stage] = copy.deepcopy(self.stages[stage])
                self.save()
            if self.signal:
                die(f"stopped after step {self.step} of {stage}; --resume goes on",
                    128 + self.signal)
        self.in_step = False
        self.bar.close()

    def save(self):
        """Write the checkpoint."""
        self.seconds["total"] = time.perf_counter() - self.started
        content = {"config": asdict(self.cfg), "stages": self.stages, "rows": self.rows,
                   "seconds": self.seconds, "rates": self.rates}
        if self.rank == 0:
            write(self.folder / "checkpoint.pt", lambda part: torch.save(content, part))

    def watch(self, losses):
        """Note the losses of a step, seeds first; to look at once would make a GPU wait."""
        self.losses.append(losses.detach().flatten())
        self.watched = self.step + 1

    def check(self):
        """Stop at the first loss that is not a number; the checkpoint before it stays."""
        losses = torch.stack(self.losses) if self.losses else torch.zeros(0, 1)        # (steps, S)
        for n, i in (~losses.isfinite()).nonzero().tolist()[:1]:
            step, seed = self.watched - len(losses) + n + 1, i * len(self.seeds) // len(losses[0])
            die(f"the loss is {losses[n, i]} at step {step} of {self.stage}, "
                f"seed {self.seeds[seed]}", 1)
        self.losses.clear()

    def log(self, rows):
        """Append flat dictionaries, one a run, to metrics.jsonl; show their numbers' means."""
        self.check()
        rows = [{"stage": self.stage, "step": self.step + 1, **row} for row in rows]
        self.rows += rows
        shown = "  ".join(f"{name} {statistics.fmean(row[name] for row in rows):.4g}"
                          for name, value in rows[0].items() if isinstance(value, float))
        self.bar.set_postfix_str(shown)
        if self.rank == 0:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            if self.bar.disable:
                print(f"{self.stage} {self.step + 1}/{self.bar.total}  {shown}", flush=True)

    @contextlib.contextmanager
    def clock(self, name):
        """Add the time spent inside to `seconds[name]`."""
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] += time.perf_counter() - start

    def share(self, batch, dim=1):
        """This process's part of the global batch, which every process has sampled alike."""
        if batch.shape[dim] % self.world:
            die(f"{self.world} processes cannot share a batch of {batch.shape[dim]} evenly")
        return batch.chunk(self.world, dim)[self.rank]

    def average(self, tensors):
        """Average over processes, in place; DDP's hooks miss autograd.grad and functional_call."""
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            torch.distributed.all_reduce(flat)
            parts = (flat / self.world).split([t.numel() for t in tensors])
            for tensor, part in zip(tensors, parts):
                tensor.copy_(part.view_as(tensor))

    def setting(self):
        """Hardware, device, threads, processes, precision, versions, peak memory."""
        gpu, cpu, memory = self.device.type == "cuda", pathlib.Path("/proc/cpuinfo"), None
        name = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
        name = name[1] if name else platform.processor() or platform.machine()
        with contextlib.suppress(ImportError):       # there is no such module on Windows
            import resource
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory /= 2**(30 if sys.platform == "darwin" else 20)
        return {"hardware": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} x {name}",
                "device": self.device.type, "threads": torch.get_num_threads(),
                "processes": self.world, "matmul": "TF32" if gpu else "float32",
                "compiled": self.compiled, "python": platform.python_version(),
                "versions": {module.__name__: module.__version__ for module in (torch, np)},
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30 if gpu else memory}


def run_folder(cfg, args):
    """runs/NAME/PRESET-seedN, or --out. A Config may have a `suffix`: runs of another kind."""
    last = f"-{cfg.seed + cfg.num_seeds - 1}" if cfg.num_seeds > 1 else ""
    last += getattr(cfg, "suffix", "")
    return pathlib.Path(args.out or f"runs/{SCRIPT[:-3]}/{args.preset}-seed{cfg.seed}{last}")


def parse(argv=None):
    """Command line -> (Config, other options): a preset first, explicit options on top."""
    notes = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(prog=SCRIPT, description=__doc__.split("\n\n")[0],
                                     allow_abbrev=False)
    parser.error, add, switch = die, parser.add_argument, argparse.BooleanOptionalAction
    add("--preset", help="set of defaults", choices=PRESETS, default="quick")
    add("--device", help="where to run", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--compile", help="torch.compile the hot functions (default: on CUDA)", action=switch)
    add("--out", help="run folder (default: runs/NAME/PRESET-seedN)")
    add("--resume", help="go on with the run in the folder", action="store_true")
    add("--replot", help="only draw the folder's summary.json again", action="store_true")
    for field in fields(Config):
        values = " | ".join(f"{k} {p.get(field.name, field.default)}" for k, p in PRESETS.items())
        add("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
            help=f"{notes.get(field.name, '')} [{values}]".replace("%", "%%"),
            **({"action": switch} if field.type is bool else {"type": field.type}))
    options = vars(parser.parse_args(argv))
    own = {field.name: options.pop(field.name) for field in fields(Config) if field.name in options}
    try:
        return Config(**{**PRESETS[options["preset"]], **own}), argparse.Namespace(**options)
    except ValueError as error:
        die(error)


def show(folder):
    """Draw the figure and print the closing table, from the summary alone."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        die(f"nothing to draw: {error}")
    if not isinstance(summary, dict) or SCRIPT not in summary.get("command", ""):
        die(f"nothing to draw: {folder / 'summary.json'} is not a summary of {SCRIPT}")
    plot(summary, folder / "figure.png")
    width = max(map(len, summary["headline"]), default=0)
    for name, row in summary["headline"].items():
        spread = "[{:.4g}, {:.4g}]".format(*row["ci95"]) if row["ci95"] else ""
        print(f"{name:<{width}}  {row['mean']:<9.4g} {spread:<18} "
              f"{summary['beside'].get(name, '')}")
    print(f"{summary['minutes']:.1f} minutes; {folder / 'figure.png'}", flush=True)


def main(argv=None):
    """Run, resume or redraw."""
    cfg, args = parse(argv)
    folder = run_folder(cfg, args)
    if args.replot:
        return show(folder)
    run = Run(cfg, args)
    if (folder / "summary.json").exists():           # resumed, but finished already
        return show(folder) if run.rank == 0 else None
    if run.rank == 0:
        square = torch.randn(1024, 1024, device=run.device)
        flops_per_second = 2 * 1024**3 / median_seconds(run.device, [lambda: square @ square])[0]
        print(f"{SCRIPT} {plan(cfg, flops_per_second)}")
        print(", ".join(f"{name} {value}" for name, value in run.setting().items()))
        print(f"into {folder}{' (resumed)' if run.stages else ''}", flush=True)
    try:
        result = experiment(cfg, run)
    except (OSError, ValueError) as error:
        if run.opened and isinstance(error, ValueError):       # after the first step, a bug of ours
            raise
        die(error, 1 if run.opened else 2)
    run.seconds["total"] = time.perf_counter() - run.started
    rows = [row["headline"] for row in result["per_seed"]]
    summary = {"headline": {name: interval([row[name] for row in rows]) for name in rows[0]},
               "seeds": run.seeds, "minutes": run.seconds["total"] / 60, "seconds": run.seconds,
               "rates": run.rates, **run.setting(), "config": asdict(cfg),
               "command": shlex.join(["python", SCRIPT, *(argv or sys.argv[1:])]), **result}
    if run.rank == 0:
        write(folder / "summary.json", lambda part: part.write_text(json.dumps(summary)))
        show(folder)
    if run.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
