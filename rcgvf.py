# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""RC-GVF: exploration by random curiosity with general value functions, in one file.

Ramesh, Kirsch, van Steenkiste, Schmidhuber, "Exploring through Random Curiosity with General Value
Functions", NeurIPS 2022, arXiv 2211.10282. [code]: read in the authors' two releases.

IDEA
  Where rewards are rare, an agent needs a reward of its own for going where it knows little. RND
  has a network predict random features of an observation; its error is the reward. But observations
  are soon predicted, also those from which nobody knows how to go on. RC-GVF takes the features as
  pseudo-rewards z and predicts their discounted sum over the future, a general value function; it
  is wrong while the future is open or behaviour changes, though the observation is known. Two heads
  predict; the reward is their error times their disagreement.

ALGORITHM (one update)
  T steps with the policy in N environments; once, before the passes: z_t = Z(o_t) of a fixed random
  network Z, predictions v^k_t of head k, targets and rewards
    G^k_t = z_t + gamma_z m_t [(1 - lambda_z) v^k_{t+1} + lambda_z G^k_{t+1}],  m_t = 0 at an end
    R_t   = beta sum_d Var_k[v^k_t] mean_k (G^k_t - v^k_t)^2
  some passes in minibatches: PPO on r_t + R_t (one critic, GAE; MiniGrid: cut to [-1, 1]), and
  v^k <- towards G^k. A time limit is an end, too.
  Rivals: no_future, gamma_z = 0: the same ensemble predicts z_t itself; error, disagreement: one of
  the factors of R_t; rnd: R_t = beta |z_t - p(o_t)|, p <- towards z; rnd4: its 4th power; ppo: 0

SYMBOLS, in the code, shape or meaning
  T, N      rollout, envs                       time; environments side by side
  d, K      cumulants, HEADS                    pseudo-rewards, heads of the predictor
  o         obs       (T + 1, N, ..)            observations; first (T + 1, N): an episode starts
  z, v, G   z, v, G   (T, N, d), (T, N, K, d)   pseudo-rewards, predictions, targets
  memory    memory    (N, 2 M)                  of an LSTM of M units; (N, 0) of nets without

RESULT (quick: seeds 0-4, mean [95 % t interval], 1.1 minutes a seed on one core; `paper`: not run)
  Farthest column, mean over the run, of 16: RC-GVF 11.87 [11.11, 12.62]; more than no_future by
  1.92 [1.41, 2.43], error 1.22 [-0.56, 3.00], disagreement 2.60 [1.52, 3.69], rnd 2.86 [0.98,
  4.75], rnd4 2.27 [0.17, 4.37], ppo 8.94 [8.21, 9.66]. At the end 16 in all seeds, rnd 14.0. Greedy
  return 7.0 [3.7, 10.3], rnd 2.2, ppo 0. MultiRoom, 3 seeds: .77 .70 .77, rnd .03 .77 .77, ppo 0.

DIFFERS
  1. quick and minigrid are small: 16 columns (paper: 100), few frames, small networks, large rates,
     which do not fall. The lock's betas: searched, for each method alike (results/README.md).
  2. One optimiser; between passes no memory is refreshed, and no segment shifted.
  3. Left out: NovelD, AGAC, counts, the panorama of views, KeyCorridor, ObstructedMaze.

RUN
  python rcgvf.py --preset minigrid     # MultiRoom-N4-S5; without it, the lock
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

RND = ("rnd", "rnd4", "ppo")          # ppo has RND's predictor, too, and beta = 0
SEGMENT, HEADS = 4, 2                # steps back-propagated through memory (lock: 1); K [code]
BETAS = "rcgvf:450,rnd:1.25,no_future:1111,error:1,disagreement:3.3,rnd4:10,ppo:0"


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code: x]: the release has x."""
    env: str = "lock"                # lock, or MultiRoom-N4-S5: 4 rooms of sides up to 5, any two
    methods: str = "rcgvf,rnd,no_future,ppo"   # also error, disagreement, rnd4: ablation
    betas: str = BETAS               # method:beta, size of its intrinsic reward
    horizon: int = 16                # columns of the lock, H [code: 100]
    frames: int = 250_000            # steps of all environments, for each method
    envs: int = 96                   # environments side by side, N [code: 16]
    rollout: int = 16                # steps between updates, T [code: 100]
    minibatch: int = 192             # steps in a minibatch [code: 200]
    epochs: int = 5                  # passes over a rollout
    learning_rate: float = 1e-3      # of the agent [code: 5e-4]
    rcgvf_rate: float = 0.5          # of RC-GVF's predictor, times the agent's
    rnd_rate: float = 0.25           # of RND's predictor, times the agent's
    entropy: float = 0.01            # coefficient of the policy's entropy
    grad_norm: float = 2.5           # limit of each network's gradient norm
    hidden: int = 64                 # units of the agent [code: 256]
    predictor_hidden: int = 64       # units of RC-GVF's predictor [code: 256]
    feature_hidden: int = 64         # units of Z and of RND's predictor, on the lock [code: 128]
    cumulants: int = 32              # pseudo-rewards, d [code: 128]
    gamma_z: float = 0.6             # discount of pseudo-rewards
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 4               # updates between logs
    save_every: int = 40             # updates between checkpoints

    def __post_init__(self):
        if not re.fullmatch(r"lock|MultiRoom-N([2-9]|1[0-2])-S([4-9]|10)", self.env):
            raise ValueError(f"--env must be lock or MultiRoom-N4-S5 and the like, not {self.env}")
        for method in self.methods.split(","):
            if method not in COLOURS or not re.search(rf"\b{method}:[\d.e+-]+(,|$)", self.betas):
                raise ValueError(f"--methods: {method!r} is unknown or has no number in --betas")
        if min(self.horizon - 1, self.frames, self.envs, self.epochs, self.rollout, self.minibatch,
               self.hidden, self.predictor_hidden, self.feature_hidden, self.cumulants) < 1:
            raise ValueError("sizes must be at least 1, --horizon at least 2")
        if self.env != "lock" and math.gcd(self.rollout, self.minibatch, self.hidden,
                                           self.cumulants) % SEGMENT:
            raise ValueError("--rollout, --minibatch, --hidden, --cumulants: 4 n for MultiRoom")


PRESETS = {
    "smoke": dict(horizon=5, frames=256, envs=8, rollout=8, minibatch=16, hidden=16, log_every=1,
                  save_every=2),
    "quick": {},
    "paper": dict(methods="rcgvf,rnd,ppo", betas="rcgvf:20,rnd:0.5,ppo:0", horizon=100, envs=16,
                  frames=20_000_000, rollout=100, minibatch=200, learning_rate=5e-4, hidden=256,
                  predictor_hidden=256, feature_hidden=128, cumulants=128, log_every=100),
    "ablation": dict(methods="rcgvf,rnd,no_future,error,disagreement,rnd4,ppo"),
    "minigrid": dict(env="MultiRoom-N4-S5", methods="rcgvf,rnd,ppo", betas="rcgvf:3,rnd:0.01,ppo:0",
                     frames=800_000, envs=64, rollout=32, minibatch=512, epochs=4, rcgvf_rate=0.75,
                     rnd_rate=0.75, entropy=1e-3, grad_norm=0.5, cumulants=64,
                     predictor_hidden=128),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# Two kinds of environments, N copies stepped at once: observe() -> (N, ..); step(action (N,)) ->
# reward, done (N,); what has ended starts anew. As modules, they save their buffers with a run.


class DiabolicalLock(nn.Module):
    """A corridor of H columns and two rows; in each cell one of ten actions is right (Misra et al.,
    arXiv 1911.05815). A right action leads to a random row of the next column and costs
    1 / (H - 1); the last pays 10. A wrong one leads to a dead row for the rest of the H steps.
    Giving up at once returns 0, the best policy 9. Of each copy: row (2 is dead) and column `at`;
    opt (2, H): right actions; farthest: the most right actions in a row, ever and of all copies."""
    actions = 10

    def __init__(self, horizon, N, device, opt=None):
        super().__init__()
        self.horizon, mix = horizon, torch.ones(1, 1, device=device)
        while len(mix) < horizon + 4:                        # Sylvester's matrices of Hadamard
            mix = torch.cat([torch.cat([mix, mix], 1), torch.cat([mix, -mix], 1)])
        opt = torch.randint(10, (2, horizon), device=device) if opt is None else opt
        self.register_buffer("mix", mix)
        self.register_buffer("opt", opt)
        self.register_buffer("row", torch.randint(2, (N,), device=device))
        self.register_buffer("at", torch.zeros_like(self.row))
        self.register_buffer("farthest", torch.zeros_like(self.row[0]))

    def observe(self):
        """(N, size): one-hots of row and column (of H + 1), plus noise, padded to a power of 2 with
        zeros, times the Hadamard matrix."""
        noise = 0.1 * torch.randn(len(self.row), self.horizon + 4, device=self.row.device)
        return self.mix[self.row] + self.mix[3 + self.at] + noise @ self.mix[:self.horizon + 4]

    def step(self, action):
        """A pull of each of N locks -> reward, done."""
        right = (self.row < 2) & (action == self.opt[self.row.clamp(max=1), self.at])
        random_row, start = torch.randint(2, (2, len(action)), device=action.device)
        self.row, self.at = torch.where(right, random_row, 2), self.at + 1
        self.farthest = torch.maximum(self.farthest, (right * self.at).max())
        done = self.at == self.horizon
        reward = torch.where(right, torch.where(done, 10, -1 / (self.horizon - 1)), 0)
        self.row = torch.where(done, start, self.row)        # a new episode, in either row
        self.at = torch.where(done, 0, self.at)              # its first column
        return reward, done

    @torch.no_grad()
    def report(self, agent):
        """-> farthest column, and mean return of 96 episodes of most probable actions."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):          # logs change nothing
            test, greedy = DiabolicalLock(self.horizon, 96, self.row.device, self.opt), 0.0
            for _ in range(self.horizon):
                logits, _, _ = agent(test.observe()[None], self.mix.new_zeros(96, 0), None)
                greedy += test.step(logits[0].argmax(-1))[0].mean().item()
        return {"farthest": float(self.farthest), "greedy": greedy}


# MiniGrid's MultiRoom, number for number as Farama's package has it: tests compare every step.
# A cell is one integer: object + 16 colour + 128 closed.
EMPTY, WALL, DOOR, GOAL, CLOSED = 1, 2 + 16 * 5, 4, 8 + 16, 128
LEFT, RIGHT, FORWARD, TOGGLE = 0, 1, 2, 5                    # actions 3, 4 and 6 do nothing here
SIDE, MARGIN, WIDTH = 25, 6, 37      # of a map, of walls as far as the eye reaches, of both


def below(n):
    """A random integer, 0 .. n - 1."""
    return int(torch.randint(n, ()))


def room_chain(rooms, largest):
    """-> rooms (x, y, w, h), each sharing a wall with the one before, and the doors in these walls;
    None if one found no place in 8 tries. Sides: right 0, bottom 1, left 2, top 3."""
    def fits(x, y, w, h):
        return x >= 0 and y >= 0 and x + w <= SIDE and y + h < SIDE            # < as in minigrid
    chain = [(below(SIDE - 2), below(SIDE - 2), 4 + below(largest - 3), 4 + below(largest - 3))]
    doors, way_in = [], 2
    while len(chain) < rooms and fits(*chain[0]):
        X, Y, W, H = chain[-1]
        for _ in range(8):
            w, h = 4 + below(largest - 3), 4 + below(largest - 3)
            side = (way_in + 1 + below(3)) % 4               # not where one came in
            if side % 2 == 0:                                # the door, and the new room behind it
                door = X + (W - 1) * (side == 0), Y + 1 + below(H - 2)
                x, y = door[0] - (w - 1) * (side == 2), door[1] - 1 - below(h - 2)
            else:
                door = X + 1 + below(W - 2), Y + (H - 1) * (side == 1)
                x, y = door[0] - 1 - below(w - 2), door[1] - (h - 1) * (side == 3)
            if fits(x, y, w, h) and all(x + w < a or a + c <= x or y + h < b or b + d <= y
                                        for a, b, c, d in chain[:-1]):
                break
        else:                                                # 8 tries were in vain
            return None
        chain.append((x, y, w, h))
        doors.append(door)
        way_in = (side + 2) % 4
    return (chain, doors) if fits(*chain[0]) else None


def multi_room(rooms, largest):
    """A level: a chain of rooms, the goal in the last -> cells (SIDE, SIDE), the agent's (x, y)."""
    while not (found := room_chain(rooms, largest)):
        pass
    (chain, doors), cells, colour = found, torch.full((SIDE, SIDE), EMPTY), below(6)
    for x, y, w, h in chain:
        cells[[x, x + w - 1], y:y + h] = WALL                # left and right
        cells[x:x + w, [y, y + h - 1]] = WALL                # top and bottom
    for door in doors:
        cells[door] = DOOR + 16 * colour + CLOSED
        colour = (colour + 1 + below(5)) % 6                 # never the colour before
    (x, y, w, h), (X, Y, W, H) = chain[0], chain[-1]
    cells[X + 1 + below(W - 2), Y + 1 + below(H - 2)] = GOAL
    return cells, (x + 1 + below(w - 2), y + 1 + below(h - 2))


class MiniGrid(nn.Module):
    """N environments of MultiRoom, a new level for each episode. cells (N, places): maps with their
    margins, flat. Of each copy: place `at`, direction (right, down, left, up), count of steps.
    score: sums, over episodes that ended, of returns, of doors open at the end, of ones."""
    actions = 7

    def __init__(self, name, N, device):
        super().__init__()
        self.rooms, self.largest = map(int, re.findall(r"\d+", name))
        self.register_buffer("cells", torch.full((N, WIDTH**2), WALL, device=device))
        for key in ("at", "direction", "count"):
            self.register_buffer(key, torch.zeros(N, dtype=torch.long, device=device))
        self.register_buffer("score", torch.zeros(3, device=device))
        self.ahead = torch.tensor([WIDTH, 1, -WIDTH, -1], device=device)
        # View cell (i, j) is 6 - j steps ahead and i - 3 to the right
        i, j = torch.arange(7, device=device)[:, None], torch.arange(7, device=device)
        self.view = torch.stack([(self.ahead[d] * (6 - j) + self.ahead[(d + 1) % 4] * (i - 3))
                                 .flatten() for d in range(4)])                # (4, 49)
        self.renew(torch.ones(N, dtype=torch.bool, device=device))

    def renew(self, done):
        """A new level where done (N,)."""
        for n in done.nonzero()[:, 0].tolist():
            cells, (x, y) = multi_room(self.rooms, self.largest)
            inner = self.cells[n].view(WIDTH, -1)[MARGIN:-MARGIN, MARGIN:-MARGIN]
            inner.copy_(cells)                               # its margin stays
            self.at[n] = (x + MARGIN) * WIDTH + y + MARGIN
            self.direction[n] = below(4)
        self.count = torch.where(done, 0, self.count)

    def observe(self):
        """What the agents see (N, 7, 7, 3): object, colour, state; 0 where it is too dark. Each is
        at (3, 6) and looks up, along -j."""
        def beside(row):
            return F.max_pool1d(row.float(), 3, 1, 1).bool()                   # cells, neighbours
        seen = self.cells.gather(1, self.at[:, None] + self.view[self.direction]).view(-1, 7, 7)
        seen[:, 3, 6] = EMPTY                                # where the agent stands
        clear = (seen != WALL) & ((seen & 15 != DOOR) | (seen < CLOSED))
        lit = torch.zeros_like(seen, dtype=torch.bool)
        lit[:, 3, 6] = True
        for j in range(6, -1, -1):                           # light goes sideways, then a row ahead
            for _ in range(6):
                lit[..., j] |= beside(lit[..., j] & clear[..., j])
            if j:
                lit[..., j - 1] = beside(lit[..., j] & clear[..., j])
        seen = seen * lit
        return torch.stack([seen & 15, seen >> 4 & 7, seen >> 7], -1).float()

    def step(self, action):
        """-> reward, done. A success pays 1 - 0.9 count / limit; the limit is 20 steps a room."""
        self.count = self.count + 1
        front = (self.at + self.ahead[self.direction])[:, None]                # (N, 1)
        facing = self.cells.gather(1, front)[:, 0]
        door = facing & 15 == DOOR                           # open or closed
        self.direction = (self.direction + (action == RIGHT) - (action == LEFT).long()) % 4
        free = (facing == EMPTY) | (facing == GOAL) | door & (facing < CLOSED)
        enter = (action == FORWARD) & free                   # (N,)
        self.at = torch.where(enter, front[:, 0], self.at)
        turn = (action == TOGGLE) & door
        self.cells.scatter_(1, front, torch.where(turn, facing ^ CLOSED, facing)[:, None])
        won, limit = enter & (facing == GOAL), 20 * self.rooms
        reward = torch.where(won, 1 - 0.9 * self.count / limit, 0)
        done = won | (self.count >= limit)
        doors = ((self.cells & 15 == DOOR) & (self.cells < CLOSED)).sum(1)
        self.score += torch.stack([(reward * done).sum(), (doors * done).sum(), done.sum()])
        self.renew(done)
        return reward, done

    def report(self, agent):
        """-> mean return, and doors open at the end, of the episodes that ended since the last."""
        total, doors, episodes = self.score.tolist()
        self.score.zero_()
        return {"return": total / max(1, episodes), "doors": doors / max(1, episodes)}


# ---- 3. MODEL ----------------------------------------------------------------------------------
# Networks read sequences (L, B, ..). The lock shows all there is to see: no memory. MiniGrid's are
# convolutions and an LSTM.


def mlp(*sizes, act=nn.ReLU):
    """Linear layers with `act` between."""
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class Features(nn.Module):
    """Observations (L, B, ..) -> n numbers each. hidden: of the layers between, on the lock."""

    def __init__(self, cfg, size, n, *hidden):
        super().__init__()
        self.images = cfg.env != "lock"
        self.net = mlp(size, *hidden, n)
        if self.images:                                      # 7 x 7 -> 6, pooled to 3, -> 2 -> 1
            self.net = nn.Sequential(
                nn.Conv2d(size, n // 4, 2), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(n // 4, n // 2, 2), nn.ReLU(), nn.Conv2d(n // 2, n, 2), nn.Flatten())
            self.net.to(memory_format=torch.channels_last)   # twice as fast on a CPU

    def forward(self, obs):
        if not self.images:
            return self.net(obs)
        return self.net(obs.flatten(0, 1).movedim(3, 1)).unflatten(0, obs.shape[:2])


def remember(cell, x, memory, first):
    """An LSTM that forgets where an episode starts: x (L, B, n), memory (B, 2 M), first (L, B) ->
    outputs (L, B, M), memories after each step (L, B, 2 M)."""
    memories = []
    for x_t, first_t in zip(x, first):
        h, c = (memory * (1 - first_t)[:, None]).chunk(2, 1)                   # (B, M) each
        memory = torch.cat(cell(x_t, (h, c)), 1)
        memories.append(memory)
    memories = torch.stack(memories)
    return memories.chunk(2, 2)[0], memories


class Agent(nn.Module):
    """Policy and value: logits (L, B, A), values (L, B), memories after each step (L, B, 2 M)."""

    def __init__(self, cfg, size, actions):
        super().__init__()
        M, self.cell, heads = cfg.hidden, None, [cfg.hidden]
        self.trunk = Features(cfg, size, M, M, M)
        if cfg.env != "lock":
            self.cell, heads = nn.LSTMCell(M, M), [M, M]
        self.actor, self.critic = mlp(*heads, actions, act=nn.Tanh), mlp(*heads, 1, act=nn.Tanh)
        for layer in self.modules():                         # [code]: weight vectors of length 1
            if isinstance(layer, nn.Linear):
                layer.weight.data = F.normalize(torch.randn_like(layer.weight))
                layer.bias.data.zero_()

    def forward(self, obs, memory, first):
        x, memories = self.trunk(obs).relu(), memory.expand(len(obs), -1, -1)  # (L, B, 0)
        if self.cell:
            x, memories = remember(self.cell, x, memory, first)
        return self.actor(x), self.critic(x)[..., 0], memories


class Predictor(nn.Module):
    """K general value functions (L, B, K, d), and memories. On the lock K networks; on MiniGrid K
    heads on one memory of observations, last actions and last z. RND's: one, of the observation."""

    def __init__(self, cfg, size, actions, method):
        super().__init__()
        d, h, self.actions, self.cell = cfg.cumulants, cfg.predictor_hidden, actions, None
        sizes = size, h, h, d
        if cfg.env != "lock" and method not in RND:
            self.trunk, self.of_image = Features(cfg, size, d), nn.Linear(d, d // 2)
            self.of_action, self.of_z = nn.Linear(actions, d // 4), nn.Linear(d, d // 4)
            self.cell, sizes = nn.LSTMCell(d, d), (d, h, d)
        self.heads = nn.ModuleList(mlp(*sizes) for _ in range(HEADS))
        if method in RND:
            self.heads = nn.ModuleList([Features(cfg, size, d, cfg.feature_hidden)])

    def forward(self, obs, memory, first, last_action, last_z):
        x, memories = obs, memory.expand(len(obs), -1, -1)
        if self.cell:
            x = torch.cat([self.of_image(self.trunk(obs).relu()), self.of_z(last_z),
                           self.of_action(F.one_hot(last_action, self.actions).float())], -1)
            x, memories = remember(self.cell, x, memory, first)
        return torch.stack([head(x) for head in self.heads], 2), memories


# ---- 4. LEARNING RULE --------------------------------------------------------------------------


def td_returns(reward, value, done, gamma, lam):
    """TD(lambda) returns: reward (T, N, ..), value (T + 1, N, ..), done (T, N) -> (T, N, ..).
    Of pseudo-rewards, targets of the general value functions, each head's on its own predictions;
    of rewards, PPO's: return minus value is the generalised advantage estimate."""
    G, m = value.clone(), (~done).view(*done.shape, *[1] * (value.dim() - 2))
    for t in reversed(range(len(reward))):
        # G_t = z_t + gamma m_t [(1 - lambda) v_{t+1} + lambda G_{t+1}],  G_T = v_T
        G[t] = reward[t] + gamma * m[t] * ((1 - lam) * value[t + 1] + lam * G[t + 1])
    return G[:-1]


def intrinsic_reward(v, G, method):
    """R_t / beta (T, N), of predictions v and targets G (T, N, K, d). Var_k is unbiased: with two
    heads (v^1 - v^2)^2 / 2."""
    error = (G - v).square().mean(2)                         # (T, N, d)
    if method in RND:
        return error.sum(-1) ** (0.5 if method == "rnd" else 2)
    # R_t = beta sum_d Var_k[v^k_t] mean_k (G^k_t - v^k_t)^2, or one of the factors
    spread = v.var(2)                                        # (T, N, d)
    return {"error": error, "disagreement": spread}.get(method, spread * error).sum(-1)


def ppo_loss(logits, value, batch, entropy_weight, clip=0.2):
    """PPO's loss of policy, logits (L, B, A), and value (L, B); batch: dictionary of (L, B)."""
    policy = torch.distributions.Categorical(logits=logits, validate_args=False)
    rho = (policy.log_prob(batch["action"]) - batch["log_p"]).exp()
    # -min(rho A, clip(rho) A): A is not normalised [code]
    A = batch["advantage"]
    gain = torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)
    # 1/2 max((V - return)^2, (V_old + clip(V - V_old) - return)^2)
    near = batch["value"] + (value - batch["value"]).clamp(-clip, clip)
    error = torch.maximum((value - batch["return"]).square(), (near - batch["return"]).square())
    return (0.5 * error - gain - entropy_weight * policy.entropy()).mean()


# ---- 5. TRAINING -------------------------------------------------------------------------------
# A rollout: dictionary of (T, N, ..), or T + 1 of obs, first, value. carry: what the next one needs
# of it, changed in place, and saved with a run.


@torch.no_grad()
def collect(cfg, env, agent, carry):
    """T steps of all environments -> a rollout; changes carry."""
    rows = []
    for t in range(cfg.rollout + 1):
        obs, first, memory = (carry[name].clone() for name in ("obs", "first", "memory"))
        logits, value, after = agent(obs[None], memory, first[None])
        rows.append({"obs": obs, "first": first, "value": value[0]})
        if t < cfg.rollout:                                  # the last: only to bootstrap from
            logits = logits[0].nan_to_num()                  # if it diverges, the log stops the run
            policy = torch.distributions.Categorical(logits=logits, validate_args=False)
            action = policy.sample()
            reward, done = env.step(action)
            rows[-1] |= {"memory": memory, "action": action, "log_p": policy.log_prob(action),
                         "reward": reward, "done": done}
            carry["obs"].copy_(env.observe())
            carry["first"].copy_(done)
            carry["memory"].copy_(after[0])
    return {name: torch.stack([row[name] for row in rows if name in row]) for name in rows[0]}


@torch.no_grad()
def curiosity(cfg, method, predictor, features, roll, carry):
    """The intrinsic reward of each step (T, N). Adds what the predictor's update needs: targets,
    memories before each step, last actions and z (not cleared where an episode starts [code])."""
    z = features(roll["obs"])                                # (T + 1, N, d)
    last_action = torch.cat([carry["action"][None], roll["action"]])           # (T + 1, N)
    last_z = torch.cat([carry["z"][None], z[:-1]])           # (T + 1, N, d)
    memory = carry["predictor_memory"].clone()
    v, after = predictor(roll["obs"], memory, roll["first"], last_action, last_z)
    gamma_z = 0.0 if method in RND or method == "no_future" else cfg.gamma_z   # 0: G = z
    G = td_returns(z[:-1, :, None], v, roll["done"], gamma_z, 0.9)             # [code]
    roll |= {"last_action": last_action[:-1], "last_z": last_z[:-1], "G": G,
             "predictor_memory": torch.cat([memory[None], after[:-2]])}
    carry["action"].copy_(roll["action"][-1])
    carry["z"].copy_(z[-2])
    carry["predictor_memory"].copy_(after[-2])               # after o_{T-1}: o_T is read again
    betas = dict(item.split(":") for item in cfg.betas.split(","))
    return float(betas[method]) * intrinsic_reward(v[:-1], G, method)


def update(cfg, agent, predictor, adam, roll, loss_function):
    """Some passes over the rollout, cut in segments of L steps, in minibatches in random order."""
    T, N, L = cfg.rollout, cfg.envs, 1 if cfg.env == "lock" else SEGMENT
    parts = {name: x[:T].unflatten(0, (T // L, L)).transpose(0, 1).flatten(1, 2)
             for name, x in roll.items()}                    # (L, T / L * N, ..)
    for _ in range(cfg.epochs):
        order = torch.randperm(T // L * N, device=roll["obs"].device)          # of segments
        for index in order.split(cfg.minibatch // L):
            batch = {name: x[:, index] for name, x in parts.items()}           # (L, B, ..)
            logits, value, _ = agent(batch["obs"], batch["memory"][0], batch["first"])
            v, _ = predictor(batch["obs"], batch["predictor_memory"][0], batch["first"],
                             batch["last_action"], batch["last_z"])
            adam.zero_grad()
            loss = loss_function(logits, value, batch, cfg.entropy) + F.mse_loss(v, batch["G"])
            loss.backward()                                  # they share no parameter
            for net in (agent, predictor):
                nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_norm)
            adam.step()


def train(cfg, run, method):
    """One method from the start -> rows of its log. All methods have the same lock, first agent."""
    torch.manual_seed(run.seed)
    N, lock, device = cfg.envs, cfg.env == "lock", run.device
    env = DiabolicalLock(cfg.horizon, N, device) if lock else MiniGrid(cfg.env, N, device)
    obs, d = env.observe(), cfg.cumulants
    agent = Agent(cfg, obs.shape[-1], env.actions).to(device)
    features = Features(cfg, obs.shape[-1], d, cfg.feature_hidden).to(device)
    predictor = Predictor(cfg, obs.shape[-1], env.actions, method).to(device)
    rate = cfg.learning_rate * (cfg.rnd_rate if method in RND else cfg.rcgvf_rate)
    adam = torch.optim.Adam([{"params": agent.parameters(), "lr": cfg.learning_rate},
                             {"params": predictor.parameters(), "lr": rate}], fused=True)
    carry = {"obs": obs, "first": obs.new_ones(N),
             "memory": obs.new_zeros(N, 2 * cfg.hidden if agent.cell else 0),
             "predictor_memory": obs.new_zeros(N, 2 * d if predictor.cell else 0),
             "action": torch.zeros_like(env.at), "z": obs.new_zeros(N, d)}
    loss_function, updates = run.compile(ppo_loss), max(1, cfg.frames // (cfg.rollout * N))
    for step in run.steps(method, updates, agent=agent, predictor=predictor, features=features,
                          adam=adam, env=env, **carry):
        # COLLECT
        roll = collect(cfg, env, agent, carry)
        bonus = curiosity(cfg, method, predictor, features, roll, carry)
        reward = roll["reward"] + bonus
        reward = reward if lock else reward.clamp(-1, 1)     # [code]
        roll["return"] = td_returns(reward, roll["value"], roll["done"], 0.99, 0.95)
        roll["advantage"] = roll["return"] - roll["value"][:-1]
        # UPDATE
        update(cfg, agent, predictor, adam, roll, loss_function)
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == updates:
            run.log(frames=(step + 1) * cfg.rollout * N, bonus=bonus.mean().item(),
                    value=roll["value"].mean().item(), **env.report(agent))
    return [row for row in run.rows if row["stage"] == method]


# ---- 6. EVALUATION -----------------------------------------------------------------------------


def experiment(cfg, run):
    """Train all methods with one seed -> {"headline": {name: number}, ..}."""
    methods = cfg.methods.split(",")
    curves, head = {method: train(cfg, run, method) for method in methods}, {}
    for method, rows in curves.items():
        if cfg.env == "lock":
            head |= {f"{method}_mean_column": statistics.fmean(row["farthest"] for row in rows),
                     f"{method}_final_column": rows[-1]["farthest"],
                     f"{method}_greedy_return": rows[-1]["greedy"]}
        else:
            tenth = rows[-len(rows) // 10:]                  # the last
            head |= {f"{method}_{key}": statistics.fmean(row[key] for row in tenth)
                     for key in ("return", "doors")}
    mean = {method: head[f"{method}_mean_column"] for method in methods if cfg.env == "lock"}
    head |= {f"rcgvf_minus_{method}": mean["rcgvf"] - mean[method] for method in mean
             if "rcgvf" in mean and method != "rcgvf"}
    return {"headline": head, "curves": curves}


BESIDE = {"rcgvf_final_column": "16 columns in quick", "rcgvf_greedy_return": "best 9, give up 0"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"rcgvf": "#0072B2", "rnd": "#E69F00", "ppo": "#777777", "no_future": "#CC79A7",
           "error": "#009E73", "disagreement": "#56B4E9", "rnd4": "#8B5A2B"}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Three panels of the lock, or two of MiniGrid, from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    seeds, cfg = summary["per_seed"], summary["config"]
    lock, rooms = cfg["env"] == "lock", re.findall(r"\d+", cfg["env"])
    figure = Figure((12 if lock else 8, 4.2), layout="constrained")
    a, b, *c = figure.subplots(1, 3 if lock else 2)
    keys = ("farthest", "greedy") if lock else ("return", "doors")
    most = (cfg["horizon"], 9) if lock else (1, int(rooms[0]) - 1)
    titles = ("Farthest column", "Greedy return") if lock else ("Return", "Open doors")
    for letter, axis, key, best, title in zip("ab", (a, b), keys, most, titles):
        for method, rows in seeds[0]["curves"].items():
            curves = [[row[key] for row in seed["curves"][method]] for seed in seeds]
            lines(axis, [row["frames"] / 1000 for row in rows], curves, COLOURS[method], method)
        axis.axhline(best, color="k", ls="--", lw=1, label="most")
        axis.set(xlabel="thousand frames", title=f"({letter}) {title}")
    for method in seeds[0]["curves"] if lock else ():
        values = [seed["headline"][f"{method}_mean_column"] for seed in seeds]
        c[0].plot([method] * len(values), values, "o", color=COLOURS[method], alpha=0.6)
        c[0].plot(method, statistics.fmean(values), "_", color=COLOURS[method], ms=24)
        c[0].set_title("(c) Mean of (a) over the run")
        c[0].tick_params("x", rotation=20)
    a.legend(fontsize=8)
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
