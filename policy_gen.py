# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""Generators of deep policies: "write me a policy with return c", in one file.

Faccio, Herrmann, Ramesh, Kirsch, Schmidhuber, "Goal-Conditioned Generators of Deep Policies",
arXiv 2207.01570. "[code]" marks what was read in the official release (PyTorch); [gym] what was
read in Gymnasium and MuJoCo; the body of the paper could not be read again, no number of it is
quoted.

IDEA
  Ordinary reinforcement learning trains one policy, for as much reward as possible. Here a
  *generator* is trained: tell it a return c and it writes all the weights theta of a deep policy
  that achieves c. It cannot learn that by imitation of policies seen: very different weights give
  the same return, and their average gives neither. So an *evaluator* V learns to predict the return
  of a policy from what it does in a few learned probing states (its fingerprint), and the generator
  learns through the evaluator, until V(G(c)) = c. Only whole returns are used: no credit assignment
  to steps, no discount, no bootstrapping. It explores by noise on the weights and by asking for a
  little more than the best return so far, trusting the generator to extrapolate along c. Both nets
  learn mostly from recent policies: the evaluator must be right about those of today's generator.

ALGORITHM (the loop, for each seed)
  repeat
    c = best return so far + beta   (the first time 1);  theta = G_rho(c / Delta) + sigma eps
    r = sum of rewards of one episode of pi_theta;  add (theta, r) to the replay D
    4 times   w   <- Adam(w,   gradient of L_V = mean (V_w(theta_i) - r_i)^2)
    19 times  rho <- Adam(rho, gradient of L_G = mean (V_w(G_rho(r_i / Delta)) - r_i)^2)
  where (theta_i, r_i) are drawn from D with P(i) proportional to 1 / age^omega, for both nets.
  quick asks for K policies an iteration, half of them with commands from the whole range so far.

SYMBOLS
  symbol        in the code       shape (| : or)  meaning
  S             leading axis                      seeds, trained at once in the same products
  K             policies                          policies rolled out an iteration and seed
  B             batch                             policies in a minibatch of the replay
  O, A          observations, actions             sizes of an environment's observation, action
  P             policy_size(sizes)                number of a policy's weights and biases
  theta         theta             (S, K|B, P)     policies, one a row
  c, r          command, returns  (S, K|B)        commanded and achieved return of an episode
  Delta         scale                             nominal range of the returns, per environment
  G_rho         Generator         (S, B, P)       hypernetworks that write theta, slice by slice
  z_mn          embeddings        (S, tiles, 8)   learned, one a slice (m along inputs, n outputs)
  V_w           Evaluator         (S, B)          predicted returns
  s             states            (S, N, O)       N learned probing states (normalised)
  omega, beta   recency, increment                see the algorithm
  sigma         noise                             on every weight of a policy that is rolled out
  Tracking error: mean over 21 commands between the lowest and the highest return seen of
  |achieved - commanded| / (highest - lowest), noise-free policies, 4 episodes each. A
  generator that always achieves the middle of the range, whatever the command, scores 0.262.

RESULT
  quick, MountainCarContinuous, 8 seeds (0-7) of 1,000 episodes, in 4.5 minutes for all of them with
  baselines and ablations, 2 CPU cores (AMD EPYC); medians, and the range over seeds:
    policy for the best return seen                 96.5 (94.6 to 98.2, one -3.8), best seen 99.1
    tracking error                                  0.075 (0.055 to 0.166)
    correlation of achieved with commanded          0.955 (0.819 to 0.977)
    controls, tracking error: untrained 0.262, hindsight without evaluator 0.370;
    no fingerprint 0.114, uniform replay 0.068: recency does not help here. Each of the last three
    is asked for returns between the lowest and the highest that it has seen itself
    best return of random search 99.3, of ARS 99.2: at this size noise alone finds the goal
  Episodes score below 0 or 60 to 99, hardly anything between, so that the diagonal is a staircase
  there. Seed 3 flips by episode 240: what it writes for commands above 0 gets -4, and so says its
  evaluator, which no longer changes with c. Of 16 other seeds (20-27, 30-37) none did.
  swimmer_coarse, 8 seeds of 4,800 episodes, 8.2 minutes: tracking error 0.106 (0.060 to 0.160),
  untrained 0.319; noise-free policy for the best return seen 33.4, ARS' last policy 87.2; best
  episode 52.4, of ARS 94.2, of random search 35.6.
  paper preset (one GPU), exact Swimmer: not run yet.

DIFFERS
  1. quick: small networks, MountainCarContinuous, K = 4 policies an iteration with a mixture of
     commands, a larger rate of the generator, and an evaluator whose output is multiplied by
     --return-scale. The generator's rate rises over the first fifth and then falls to a tenth:
     before the evaluator knows anything, fast steps can drive policies into saturation (|a| = 1),
     where no gradient comes back (with --no-schedule 3 of seeds 0-7 flip, tracking error 0.156).
     The paper preset has K = 1, no mixture, constant rates.
  2. Observation statistics are frozen during an episode, so that a policy is one fixed function
     ([code] updates them within), and computed without a slip of [code]'s running variance.
  3. [code]'s settings say 5 and 20 gradient steps, its loops make 4 and 19: we make 4 and 19.
  4. swimmer_coarse is ours: the Swimmer with a coarser integrator. Never compare it with Swimmer.
  5. Budgets count episodes, not steps. The replay keeps all policies ([code]: the newest 10,000).
     Left out: the baseline DDPG, a dense generator, and what [code] has but switches off (commands
     drawn by importance or drifting). Hopper has contacts: only through gymnasium,
     --env gym:Hopper-v4.
  6. torchrun shares minibatches out; every process makes the same rollouts.
  7. Long, for MuJoCo's mechanics of two environments are in it.

RUN
  python policy_gen.py --num-seeds 8
  python policy_gen.py --ask=-80,-50,-20,90 --checkpoint runs/policy_gen/quick-seed0-7/checkpoint.pt
  torchrun --standalone --nproc_per_node=8 policy_gen.py --preset paper --num-seeds 16
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


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code]: as in the official
    release; [code: x]: the release has x."""
    env: str = "MountainCarContinuous"   # or InvertedPendulum, Swimmer, swimmer_coarse, gym:ID
    iterations: int = 250            # of rollouts and updates
    policies: int = 4                # policies rolled out an iteration and seed, K [code: 1]
    command_mix: float = 0.5         # share of them with commands from the range so far [code: 0]
    increment: float = 10.0          # asked above the best return so far, beta [code: 20]
    noise: float = 0.1               # on every weight of a policy that is rolled out, sigma [code]
    policy_hidden: int = 32          # units of a policy's two hidden layers [code: 256]
    slice_size: int = 16             # rows and columns that a hypernetwork writes at once [code]
    z_dim: int = 8                   # size of a slice's embedding [code]
    hyper_hidden: int = 64           # units of the hypernetworks' two hidden layers [code: 256]
    probes: int = 32                 # probing states; 0: the evaluator reads theta [code: 200]
    evaluator_hidden: int = 64       # units of the evaluator's two hidden layers [code: 256]
    return_scale: float = 50.0       # of the evaluator's output, as returns are large [code: 1]
    generator_rate: float = 1e-3     # of Adam [code: 2e-6]
    evaluator_rate: float = 5e-3     # of Adam [code]
    schedule: bool = True            # generator_rate rises for a fifth of training, then falls
    generator_steps: int = 19        # updates an iteration [code]
    evaluator_steps: int = 4         # updates an iteration [code]
    batch: int = 16                  # policies a minibatch, with replacement, B [code]
    recency: float = 1.1             # P(item) proportional to 1 / age^recency, omega [code]
    horizon: int = 0                 # steps of an episode; 0: the environment's own
    baselines: bool = True           # random search, ARS and hindsight, at equal episodes
    ablations: bool = True           # evaluator without fingerprints, uniform replay
    ars_step: float = 0.02           # step size of ARS, alpha
    ars_noise: float = 0.3           # perturbation of ARS, nu
    eval_episodes: int = 4           # episodes of each noise-free policy that is tested
    ask: str = ""                    # only write the policies for these returns: 75 or =-20,50
    checkpoint: str = ""             # of the generator to ask
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds trained side by side: seed, seed + 1, ...
    log_every: int = 10              # iterations between lines of the log
    save_every: int = 25             # iterations between checkpoints

    def __post_init__(self):
        zero = {"seed", "command_mix", "increment", "noise", "recency", "horizon", "probes",
                "generator_steps", "evaluator_steps"}
        low, high = dict.fromkeys(zero, 0), {"command_mix": 1, "seed": 1 << 24}
        for name, value in asdict(self).items():
            above = value >= low[name] if name in low else type(value) is str or value > 0
            if type(value) in (int, float) and not (above and value <= high.get(name, 1e300)):
                raise ValueError(f"--{name.replace('_', '-')} must be "
                                 + (f"at least {low[name]}" if name in low else "above 0")
                                 + (f" and at most {high[name]}" if name in high else " and finite")
                                 + f", not {value}")
        if self.env not in ENVIRONMENTS and not self.env.startswith("gym:"):
            raise ValueError(f"no environment {self.env!r}: {', '.join(ENVIRONMENTS)} or gym:ID")
        if self.policy_hidden % self.slice_size:
            raise ValueError(f"--policy-hidden {self.policy_hidden} is not a multiple of "
                             f"--slice-size {self.slice_size}")
        try:
            fine = all(abs(float(c)) < 1e6 for c in self.ask.split(",") if self.ask)
        except ValueError:
            fine = False
        if not fine:
            raise ValueError(f"--ask is a finite return, or several: 20,50,90, not {self.ask!r}")
        if bool(self.ask) != bool(self.checkpoint):
            raise ValueError("--ask RETURN and --checkpoint FILE go together")

    @property
    def suffix(self):
        """Of the run folder: what a generator is asked for stands beside the run that made it."""
        return f"-ask{self.ask}"[:60] if self.ask else ""


PRESETS = {
    "smoke": dict(iterations=3, policies=2, policy_hidden=16, hyper_hidden=16, probes=4,
                  evaluator_hidden=16, horizon=100, eval_episodes=2,
                  log_every=1, save_every=1),
    "quick": dict(),
    "paper": dict(env="Swimmer", iterations=3000, policies=1, command_mix=0.0, increment=20.0,
                  policy_hidden=256, hyper_hidden=256, probes=200, evaluator_hidden=256,
                  return_scale=1.0, generator_rate=2e-6, schedule=False, baselines=False,
                  ablations=False, eval_episodes=10, log_every=10, save_every=100),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# Environments on rows, each row an episode of its own: reset(n, or uniform numbers (n, draws)) ->
# state, obs(state), step(state, action) -> state, reward, terminated. `limit`: largest action;
# `horizon`: steps; `returns`: their nominal range, Delta is its width; `solved`: a level, or None.
# MuJoCo's InvertedPendulum and Swimmer have no contacts, so that what it computes for them can be
# written down; the masses and inertias are those of its compiled models of Gymnasium's XML files.
# The tests compare every step with the real packages.


def stream(seed, purpose, device):
    """Random generator of one seed for one purpose: 0-9 training of each stage, 10-19 tests, 20
    first weights. The numbers are small, because torch's CPU generator keeps only 32 bits."""
    return torch.Generator(device).manual_seed(32 * seed + purpose)


def per_seed(sampler, generators, *shape):
    """sampler(shape) of each generator -> (S, *shape): a seed alone equals its slice of all."""
    return torch.stack([sampler(shape, generator=g, device=g.device) for g in generators])


def draw(n, size):
    """What reset takes: uniform numbers (n, size), or a number of rows, for which it draws them."""
    return torch.rand(n, size) if isinstance(n, int) else n


def limit_push(r, rate, free, A, limit, inverse_weight, time_constant):
    """MuJoCo's soft joint limit |r| <= limit -> (sign, aim, compliance, touching), shaped as r.

    r, rate, free: position, velocity and acceleration of the joint without the limit;  A: its
    acceleration per unit of force (inverse inertia);  inverse_weight: the same at rest, a constant
    of the model. One limit alone pushes with sign * max(0, aim / compliance), if touching.
    solref = (time_constant, 1): 0.02 or two time steps. solimp = (0.9, 0.95, 0.001, 0.5, 2).
    """
    gap, sign = limit - r.abs(), -r.sign()                   # gap < 0: beyond the limit
    k, b = (0.95 * time_constant) ** -2, 2 / (0.95 * time_constant)
    x = (-gap / 0.001).clamp(0, 1)
    imp = 0.9 + 0.05 * torch.where(x < 0.5, 2 * x.square(), 1 - 2 * (1 - x).square())
    aim = -b * sign * rate - k * imp * gap - sign * free
    return sign, aim, A + (1 - imp) / imp * inverse_weight, gap < 0


def runge_kutta(acceleration, q, v, h, steps):
    """`steps` steps of h by MuJoCo's RK4 -> q, v;  acceleration(q, v) -> as v."""
    for _ in range(steps):
        a1 = acceleration(q, v)
        v2 = v + h / 2 * a1
        a2 = acceleration(q + h / 2 * v, v2)
        v3 = v + h / 2 * a2
        a3 = acceleration(q + h / 2 * v2, v3)
        v4 = v + h * a3
        a4 = acceleration(q + h * v3, v4)
        q, v = q + h / 6 * (v + 2 * v2 + 2 * v3 + v4), v + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return q, v


class MountainCarContinuous:
    """Gymnasium's MountainCarContinuous-v0: a car too weak for its hill. State (n, 2)."""
    observations, actions, limit, horizon, returns = 2, 1, 1.0, 999, (-100, 100)
    draws, solved = 1, 90

    def reset(self, n):
        """n rows, or uniform numbers (n, 1) -> state: position U(-0.6, -0.4), velocity 0."""
        u = draw(n, self.draws)
        return torch.cat([-0.6 + 0.2 * u, torch.zeros_like(u)], 1)

    def obs(self, state):
        return state

    def step(self, state, action):
        p, v = state.unbind(1)
        a = action[:, 0]
        v = (v + 0.0015 * a.clamp(-1, 1) - 0.0025 * (3 * p).cos()).clamp(-0.07, 0.07)
        p = (p + v).clamp(-1.2, 0.6)
        v = torch.where((p == -1.2) & (v < 0), 0, v)
        done = (p >= 0.45) & (v >= 0)
        return torch.stack([p, v], 1), 100 * done - 0.1 * a.square(), done


class InvertedPendulum:
    """Gymnasium's InvertedPendulum (MuJoCo): a pole on a cart. State (n, 4): x, angle, rates.

    Reward 1 a step, also on the last (v2 and v4, as in the paper's day; v5 gives 0 there).
    """
    observations, actions, limit, horizon, returns = 4, 1, 3.0, 1000, (0, 1000)
    draws, solved = 4, 950
    cart, pole, inertia, gravity = 10.471975512, 5.0185916414, 0.1887497669, 9.81
    lx, lz = 0.0005, 0.3             # the pole's centre of mass, from the hinge

    def reset(self, n):
        """n rows, or uniform numbers (n, 4) -> state: all from U(-0.01, 0.01)."""
        return 0.02 * draw(n, self.draws) - 0.01

    def obs(self, state):
        return state

    def acceleration(self, q, v, force):
        """q, v (n, 2), force (n,) -> (n, 2). M q'' = f, both joints with damping 1."""
        sin, cos, m = q[:, 1].sin(), q[:, 1].cos(), self.pole
        d1, d2 = self.lz * cos - self.lx * sin, -self.lx * cos - self.lz * sin
        mxx, mxt = self.cart + m, m * d1
        mtt = self.inertia + m * (self.lx**2 + self.lz**2)
        fx = force - v[:, 0] - m * d2 * v[:, 1].square()
        ft = -v[:, 1] - m * self.gravity * d2
        det = mxx * mtt - mxt.square()
        solve = lambda fx: torch.stack([mtt * fx - mxt * ft, mxx * ft - mxt * fx], 1) / det[:, None]
        free = solve(fx)
        sign, aim, compliance, touching = limit_push(q[:, 0], v[:, 0], free[:, 0], mtt / det,
                                                     1.0, 0.0836743381, 0.04)
        return solve(fx + torch.where(touching, sign * (aim / compliance).clamp(min=0), 0))

    def step(self, state, action):
        force = 100 * action[:, 0].clamp(-3, 3)
        q, v = runge_kutta(lambda q, v: self.acceleration(q, v, force), state[:, :2], state[:, 2:],
                           0.02, 2)
        done = q[:, 1].abs() > 0.2
        return torch.cat([q, v], 1), torch.ones_like(force), done


class Swimmer:
    """Gymnasium's Swimmer (MuJoCo): three rods in a viscous fluid. State (n, 10), absolute angles.

    q = (x, y, phi_1, phi_2, phi_3), then its rates; MuJoCo's joint angles are phi_1, phi_2 - phi_1,
    phi_3 - phi_2. Rod j points along u_j = (cos, sin) phi_j; n_j is u_j turned by 90 degrees; the
    rods' centres are (x, y) + sum_j L_ij u_j.
    """
    observations, actions, limit, horizon, returns = 8, 2, 1.0, 1000, (-100, 365)
    draws, solved, h = 10, 360, 0.01
    mass, across_inertia, along_inertia, armature = 35.6047167407, 3.917566039, 0.1738347935, 0.1
    density, viscosity, gear, joint_limit = 4000.0, 0.1, 150.0, math.radians(100)
    inverse_weights = 0.3852933416, 0.3933336741

    def __init__(self, device="cpu", dtype=torch.float32):
        """The constant matrices of the dynamics."""
        m, I = self.mass, self.across_inertia
        L = torch.tensor([[1.0, 0, 0], [0.5, -0.5, 0], [0.5, -1, -0.5]]).double()
        D = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [0, -1, 1]]).double()       # to joint rates
        self.total = 3 * m + self.armature
        reach = L.sum(0)
        # After x and y are eliminated: M_jk = P_jk cos(phi_j - phi_k) + Q_jk, a 3 x 3 system
        P = m * L.T @ L - m**2 * torch.outer(reach, reach) / self.total
        Q = I * torch.eye(3).double() + self.armature * D.T @ D
        to = lambda t: t.to(device, dtype)
        self.L, self.D, self.reach, self.P, self.Q = map(to, (L, D, m * reach, P, Q))
        # MuJoCo's fluid model acts on the box (b, b, l) of the same inertia as a rod
        b = math.sqrt(6 * self.along_inertia / m)
        l = math.sqrt(6 * (2 * I - self.along_inertia) / m)
        d, rho = (2 * b + l) / 3, self.density
        linear = 3 * math.pi * d * self.viscosity
        self.drag = [(linear, 0.5 * rho * b * b), (linear, 0.5 * rho * b * l),  # along, across,
                     (math.pi * d**3 * self.viscosity, rho * b * (b**4 + l**4) / 64)]  # turning

    def reset(self, n):
        """n rows, or uniform numbers (n, 10) -> state: joint positions and rates U(-0.1, 0.1)."""
        joints = 0.2 * draw(n, self.draws).to(self.L) - 0.1
        q, v = joints[:, :5], joints[:, 5:]
        absolute = lambda a: torch.cat([a[:, :2], a[:, 2:].cumsum(1)], 1)
        return torch.cat([absolute(q), absolute(v)], 1)

    def obs(self, state):
        q, v = state[:, :5], state[:, 5:]
        return torch.cat([q[:, 2:] @ self.D.T, v[:, :2], v[:, 2:] @ self.D.T], 1)

    def solve(self, M, f):
        """Symmetric systems M (n, 3, 3), f (n, 3) by the adjugate: elementwise, so it fuses.

        -> solution (n, 3), inverse of M (n, 3, 3)
        """
        a, b, c, d, e, g = M[:, 0, 0], M[:, 0, 1], M[:, 0, 2], M[:, 1, 1], M[:, 1, 2], M[:, 2, 2]
        A, B, C = d * g - e * e, c * e - b * g, b * e - c * d
        E, G, H = a * g - c * c, b * c - a * e, a * d - b * b
        det = a * A + b * B + c * C
        adjugate = torch.stack([A, B, C, B, E, G, C, G, H], 1).view(-1, 3, 3)
        return (adjugate @ f[..., None])[..., 0] / det[:, None], adjugate / det[:, None, None]

    def acceleration(self, q, v, torque):
        """q, v (n, 5), torque (n, 2) at the joints between rods -> (n, 5)."""
        cos, sin, w, m = q[:, 2:].cos(), q[:, 2:].sin(), v[:, 2:], self.mass   # (n, 3)
        vx = v[:, :1] - (sin * w) @ self.L.T
        vy = v[:, 1:2] + (cos * w) @ self.L.T                # of the rods' centres
        resist = lambda speed, k: -(k[0] + k[1] * speed.abs()) * speed
        along = resist(vx * cos + vy * sin, self.drag[0])
        across = resist(vy * cos - vx * sin, self.drag[1])
        fx = along * cos - across * sin + m * (w * w * cos) @ self.L.T         # with inertial terms
        fy = along * sin + across * cos + m * (w * w * sin) @ self.L.T
        f = cos * (fy @ self.L) - sin * (fx @ self.L) + resist(w, self.drag[2])
        f = f + F.pad(torque, (1, 0)) @ self.D
        sum_x, sum_y = fx.sum(1, keepdim=True), fy.sum(1, keepdim=True)        # (n, 1)
        f = f + self.reach * (sin * sum_x - cos * sum_y) / self.total
        M = self.P * (cos[:, :, None] * cos[:, None] + sin[:, :, None] * sin[:, None]) + self.Q
        w_dot, inverse = self.solve(M, f)                                      # (n, 3)
        r, rate = q[:, 3:] - q[:, 2:4], w[:, 1:] - w[:, :2]                    # joints, (n, 2)
        if q.is_cuda or (r.abs() > self.joint_limit).any():  # the branch spares a CPU most of it
            w_dot = w_dot + self.push(r, rate, w_dot, inverse)
        x_dot = (sum_x + (self.reach * (sin * w_dot)).sum(1, True)) / self.total
        y_dot = (sum_y - (self.reach * (cos * w_dot)).sum(1, True)) / self.total
        return torch.cat([x_dot, y_dot, w_dot], 1)

    def push(self, r, rate, w_dot, inverse):
        """Accelerations (n, 3) that the two joint limits add: complementary, with both at once."""
        J = self.D[1:]                                                         # (2, 3)
        A = J @ inverse @ J.T                                                  # (n, 2, 2)
        sign, aim, soft, touching = zip(*(limit_push(
            r[:, j], rate[:, j], w_dot @ J[j], A[:, j, j], self.joint_limit,
            self.inverse_weights[j], 2 * self.h) for j in (0, 1)))
        cross = A[:, 0, 1] * sign[0] * sign[1]
        alone = [torch.where(touching[j], (aim[j] / soft[j]).clamp(min=0), 0) for j in (0, 1)]
        det = soft[0] * soft[1] - cross.square()
        both = [(soft[1] * aim[0] - cross * aim[1]) / det,
                (soft[0] * aim[1] - cross * aim[0]) / det]
        joint = touching[0] & touching[1] & (both[0] >= 0) & (both[1] >= 0)
        # One side alone, where it leaves the other satisfied
        first = touching[0] & ~(touching[1] & (aim[1] - cross * alone[0] > 0))
        force = [torch.where(joint, both[0], torch.where(first, alone[0], 0)),
                 torch.where(joint, both[1], torch.where(first & (alone[0] > 0), 0, alone[1]))]
        pushes = torch.stack([sign[0] * force[0], sign[1] * force[1]], 1)      # (n, 2)
        return (inverse @ (pushes @ J)[..., None])[..., 0]

    def step(self, state, action):
        torque = self.gear * action.clamp(-1, 1)
        q, v = self.integrate(state[:, :5], state[:, 5:], torque)
        reward = (q[:, 0] - state[:, 0]) / 0.04 - 1e-4 * action.clamp(-1, 1).square().sum(1)
        return torch.cat([q, v], 1), reward, torch.zeros_like(reward, dtype=torch.bool)

    def integrate(self, q, v, torque):
        """An action lasts 0.04 s."""
        return runge_kutta(lambda q, v: self.acceleration(q, v, torque), q, v, self.h, 4)


class SwimmerCoarse(Swimmer):
    """Ours, for CPUs: the Swimmer by two steps of semi-implicit Euler, 250 steps. Other numbers!"""
    horizon, returns, solved, h = 250, (-25, 90), None, 0.02

    def integrate(self, q, v, torque):
        for _ in range(2):
            v = v + self.h * self.acceleration(q, v, torque)
            q = q + self.h * v
        return q, v


ENVIRONMENTS = {"MountainCarContinuous": MountainCarContinuous,
                "InvertedPendulum": InvertedPendulum, "Swimmer": Swimmer,
                "swimmer_coarse": SwimmerCoarse}


class GymEnvironment:
    """Any continuous environment of gymnasium, one simulator a row, stepped in a Python loop.

    Hopper goes without its survival bonus of 1 a step, in tests too ([code]: in training only).
    """
    draws, solved = 1, None
    ranges = {"Hopper": (-100, 3000), "HalfCheetah": (-100, 4000), "Walker2d": (-100, 3000),
              "InvertedDoublePendulum": (0, 10000), "Swimmer": (-100, 365),
              "MountainCarContinuous": (-100, 100)}          # [code]; others: 0 to 1000

    def __init__(self, name, device):
        try:
            import gymnasium
        except ImportError:
            raise ValueError(f"--env gym:{name} needs gymnasium: pip install "
                             f"'gymnasium[mujoco]'") from None
        self.make, self.device = lambda: gymnasium.make(name), device
        try:
            one = self.make()
        except Exception as error:                           # gymnasium raises kinds of its own
            raise ValueError(f"--env gym:{name}: {str(error).splitlines()[0]}") from None
        high = getattr(one.action_space, "high", np.array([np.inf])).flatten()
        if len(one.observation_space.shape or ()) != 1 or not np.isfinite(high).all() or (
                high != high[0]).any() or (one.action_space.low.flatten() != -high).any():
            raise ValueError(f"--env gym:{name}: needs flat observations and continuous actions "
                             "with the same finite limits -a and a")
        self.observations, self.actions = one.observation_space.shape[0], len(high)
        self.limit, self.horizon = float(high[0]), one.spec.max_episode_steps
        self.horizon = self.horizon or 1000
        self.bonus = 1.0 if name.startswith("Hopper") else 0.0
        self.returns = self.ranges.get(name.split("-")[0], (0, 1000))
        self.simulators = [one]

    def reset(self, u):
        while len(self.simulators) < len(u):
            self.simulators.append(self.make())
        seeds = (u[:, 0] * 2**31).long().tolist()
        first = [env.reset(seed=seed)[0] for env, seed in zip(self.simulators, seeds)]
        return torch.as_tensor(np.stack(first), dtype=torch.float32, device=self.device)

    def obs(self, state):
        return state

    def step(self, state, action):
        moves = [env.step(a) for env, a in zip(self.simulators, action.cpu().numpy())]
        state, reward, done = (np.array(part) for part in list(zip(*moves))[:3])
        to = lambda part: torch.as_tensor(part, dtype=torch.float32, device=self.device)
        return to(state), to(reward) - self.bonus, to(done).bool()


def environment(cfg, device):
    """The environment of a configuration, on `device`."""
    if cfg.env.startswith("gym:"):
        env = GymEnvironment(cfg.env[4:], device)
    else:
        kind = ENVIRONMENTS[cfg.env]
        env = kind(device) if issubclass(kind, Swimmer) else kind()
    env.horizon = cfg.horizon or env.horizon
    env.scale = env.returns[1] - env.returns[0]              # Delta
    return env


# ---- 3. MODEL ----------------------------------------------------------------------------------
# Every network carries a leading axis S: one set of weights a seed, all trained in the same matrix
# products. A policy's weights are data here, a vector theta that the generator writes.


class Linear(nn.Module):
    """S linear layers side by side, (S, rows, n_in) -> (S, rows, n_out), torch's initial scale."""

    def __init__(self, n_in, n_out, generators):
        super().__init__()
        draw = lambda *shape: nn.Parameter(
            (2 * per_seed(torch.rand, generators, *shape) - 1) / math.sqrt(n_in))
        self.weight, self.bias = draw(n_in, n_out), draw(1, n_out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


def policy_sizes(env, hidden):
    """Layer widths O, hidden, hidden, A."""
    return env.observations, hidden, hidden, env.actions


def policy_size(sizes):
    """P, the number of weights and biases."""
    return sum((n_in + 1) * n_out for n_in, n_out in zip(sizes, sizes[1:]))


def split_policy(theta, sizes):
    """theta (n, P) -> [(W (n, out, in), b (n, out)), ...]; in theta: W1 row by row, b1, W2, ..."""
    shapes = [part for n_in, n_out in zip(sizes, sizes[1:]) for part in ((n_out, n_in), (n_out,))]
    parts = theta.split([math.prod(shape) for shape in shapes], -1)
    parts = [part.unflatten(-1, shape) for part, shape in zip(parts, shapes)]
    return list(zip(parts[::2], parts[1::2]))


def policy_layers(layers, obs, limit):
    """layers as split_policy gives them, obs (n, m, O) -> actions (n, m, A)."""
    for W, b in layers:
        obs = torch.baddbmm(b[:, None], obs, W.mT).tanh()
    return limit * obs


def policy_forward(theta, obs, sizes, limit=1.0):
    """n policies theta (n, P), m observations each, obs (n, m, O) -> actions (n, m, A).

    a = limit tanh(W3 tanh(W2 tanh(W1 o + b1) + b2) + b3): deterministic, tanh also at the end.
    """
    return policy_layers(split_policy(theta, sizes), obs, limit)


class Hypernet(nn.Module):
    """Writes one layer of a policy, slice by slice: two small networks, shared by all slices, read
    a slice's embedding z_mn and the command.

    W[slice mn] = g H_w(z_mn, c),  b[rows n] = g mean_m H_b(z_mn, c),  g = 2 / sqrt(n_in)
    """

    def __init__(self, n_in, n_out, slice_in, slice_out, hidden, z_dim, generators):
        super().__init__()
        self.tiles_in, self.tiles_out = n_in // slice_in, n_out // slice_out
        self.slice_in, self.slice_out, self.gain = slice_in, slice_out, 2 / math.sqrt(n_in)
        self.embeddings = nn.Parameter(per_seed(
            torch.randn, generators, self.tiles_in * self.tiles_out, z_dim))
        net = lambda outputs: nn.ModuleList(Linear(a, b, generators) for a, b in (
            (z_dim + 1, hidden), (hidden, hidden), (hidden, outputs)))
        self.weights, self.biases = net(slice_out * slice_in), net(slice_out)

    def hidden(self, net, command):
        """command (S, B) -> last hidden layer (S, B, tiles, hidden). The first layer's parts of the
        embeddings and of the commands are computed apart, and added."""
        first, second, _ = net
        by_tile = torch.baddbmm(first.bias, self.embeddings, first.weight[:, :-1])
        h = (by_tile[:, None] + command[..., None, None] * first.weight[:, None, -1:]).relu()
        return second(h.flatten(1, 2)).relu().unflatten(1, h.shape[1:3])

    def forward(self, command):
        """command (S, B), scaled -> W (S, B, n_out, n_in), b (S, B, n_out)."""
        S, B = command.shape
        tiles = (S, B, self.tiles_in, self.tiles_out)
        W = self.weights[2](self.hidden(self.weights, command).flatten(1, 2))
        W = W.view(*tiles, self.slice_out, self.slice_in).permute(0, 1, 3, 4, 2, 5)
        h = self.hidden(self.biases, command).view(*tiles, -1).mean(2)         # linear: mean first
        b = self.biases[2](h.flatten(1, 2)).view(S, B, -1)
        return self.gain * W.reshape(S, B, b.shape[-1], -1), self.gain * b


class Generator(nn.Module):
    """G_rho: commands c / Delta (S, B) -> policies theta (S, B, P)."""

    def __init__(self, sizes, slice_size, hidden, z_dim, generators):
        super().__init__()
        O, H, _, A = sizes
        self.layers = nn.ModuleList(Hypernet(*shape, hidden, z_dim, generators) for shape in (
            (O, H, O, slice_size), (H, H, slice_size, slice_size), (H, A, slice_size, A)))

    def forward(self, command):
        parts = [part for layer in self.layers for part in layer(command)]
        return torch.cat([part.flatten(2) for part in parts], -1)


class Evaluator(nn.Module):
    """V_w: policies theta (S, B, P) -> predicted returns (S, B).

    Policy fingerprinting: V does not read theta, but what the policy does in `probes` learned
    states, in normalised observation space. probes = 0: it reads theta itself (ablation).
    """

    def __init__(self, sizes, probes, hidden, return_scale, generators, limit=1.0):
        super().__init__()
        self.sizes, self.return_scale, self.limit = sizes, return_scale, limit
        if probes:
            self.states = nn.Parameter(per_seed(torch.rand, generators, probes, sizes[0]))
        n_in = probes * sizes[-1] or policy_size(sizes)
        self.net = nn.ModuleList(Linear(a, b, generators) for a, b in (
            (n_in, hidden), (hidden, hidden), (hidden, 1)))

    def forward(self, theta):
        S, B, _ = theta.shape
        if hasattr(self, "states"):
            states = self.states[:, None].expand(S, B, -1, -1).flatten(0, 1)   # (S*B, N, O)
            actions = policy_forward(theta.flatten(0, 1), states, self.sizes, self.limit)
        first, second, last = self.net
        read = actions.view(S, B, -1) if hasattr(self, "states") else theta
        return self.return_scale * last(second(first(read).relu()).relu())[..., 0]


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# Two regressions: the evaluator's on returns seen, and the generator's through the evaluator.


def recency_probabilities(n, omega):
    """P(item) of n items, the newest last: proportional to 1 / age^omega, age 1 for the newest."""
    weight = torch.arange(n, 0, -1, dtype=torch.float64) ** -omega
    return weight / weight.sum()


def evaluator_loss(evaluator, theta, returns):
    """L_V = mean_B (V_w(theta_i) - r_i)^2: theta (S, B, P), returns (S, B) -> (S,)."""
    return (evaluator(theta) - returns).square().mean(1)


def generator_loss(generator, evaluator, returns, scale):
    """L_G = mean_B (V_w(G_rho(r_i / Delta)) - r_i)^2: returns (S, B) as commands -> (S,).

    Not imitation: the theta that achieved r_i plays no part, any policy with that return will do.
    """
    return (evaluator(generator(returns / scale)) - returns).square().mean(1)


def hindsight_loss(generator, theta, returns, scale):
    """Without an evaluator: G_rho(r_i / Delta) should be theta_i -> (S,). Averages of good policies
    are not good policies, which is the paper's reason for the evaluator."""
    return (generator(returns / scale) - theta).square().mean((1, 2))


def descend(losses, parameters, adam, run):
    """One Adam step, each seed by its own loss alone. Parameters not named here stay frozen."""
    gradients = torch.autograd.grad(losses.sum(), parameters)
    losses = losses.detach()
    run.average([*gradients, losses])
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient
    adam.step()
    return losses


# ---- 5. TRAINING -------------------------------------------------------------------------------
# `run` (class Run, section 8) stands for the machine: run.steps(stage, total, state) counts the
# steps, restores and saves `state`; run.share(batch), run.average(tensors) are for many processes.


class Normaliser:
    """Running mean and deviation of each seed's observations. Before the first: raw."""

    def __init__(self, S, O, device):
        zeros = lambda n: torch.zeros(S, n, device=device, dtype=wide(device))
        self.count, self.sum, self.squares = zeros(1), zeros(O), zeros(O)

    def moments(self):
        """-> mean, std (S, O), float32; std is never 0."""
        mean = self.sum / self.count.clamp(min=1)
        std = (self.squares / self.count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(self.count > 0, std, 1).float() + 1e-8

    def add(self, count, total, squares):
        """What `rollout` saw: count (S, 1), sums and sums of squares (S, O)."""
        self.count += count
        self.sum += total
        self.squares += squares


def wide(device):
    """The widest float of a device: sums of squares want float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def rollout(env, act, moments, starts, step=None):
    """One episode in every row -> returns (S, K), and what Normaliser.add takes.

    act(observations (S*K, O), normalised) -> actions (S*K, A);  moments: mean and std (S, O), fixed
    during the episode;  starts (S, K, n): uniform numbers for env.reset;  step: env.step, compiled
    """
    S, K, _ = starts.shape
    step, device = step or env.step, starts.device
    mean, std = (part.repeat_interleave(K, 0) for part in moments)             # (S*K, O)
    state = env.reset(starts.flatten(0, 1))
    alive = torch.ones(S * K, 1, device=device)
    returns, count = torch.zeros_like(alive), torch.zeros_like(alive)
    total, squares = torch.zeros(2, *mean.shape, device=device, dtype=wide(device))
    for t in range(env.horizon):
        obs = env.obs(state)
        seen = (alive * obs).to(total)
        count, total, squares = count + alive, total + seen, squares + seen.square()
        after, reward, done = step(state, act((obs - mean) / std))
        state = torch.where(alive > 0, after, state)         # an episode that ended stays as it was
        returns += torch.where(alive > 0, reward[:, None], 0)
        alive = alive * ~done[:, None]
        if t % 50 == 49 and not alive.any():                 # looking makes a GPU wait
            break
    by_seed = lambda part: part.unflatten(0, (S, K)).to(wide(device)).sum(1)
    return returns.view(S, K), (by_seed(count), by_seed(total), by_seed(squares))


def follow(theta, env, sizes):
    """theta (S, K, P) -> act(observations (S*K, O)) -> actions (S*K, A), for `rollout`."""
    layers = [(W.contiguous(), b) for W, b in split_policy(theta.flatten(0, 1), sizes)]
    return lambda obs: policy_layers(layers, obs[:, None], env.limit)[:, 0]


def networks(cfg, env, run):
    """Fresh generator and evaluator of all seeds."""
    sizes = policy_sizes(env, cfg.policy_hidden)
    starts = [stream(seed, 20, "cpu") for seed in run.seeds]
    return (Generator(sizes, cfg.slice_size, cfg.hyper_hidden, cfg.z_dim, starts).to(run.device),
            Evaluator(sizes, cfg.probes, cfg.evaluator_hidden, cfg.return_scale, starts,
                      env.limit).to(run.device))


def sample_replay(theta, returns, count, cfg, generators):
    """Minibatch with replacement from the first `count` policies of a replay, theta (S, n, P),
    returns (S, n) -> theta (S, B, P), returns (S, B). All K of one iteration share an age."""
    K, B, ages = cfg.policies, min(cfg.batch, count), count // cfg.policies
    p = recency_probabilities(ages, cfg.recency).to(returns)
    u = per_seed(torch.rand, generators, 2, B)                                 # (S, 2, B)
    iteration = torch.searchsorted(p.cumsum(0), u[:, 0].contiguous()).clamp(max=ages - 1)
    index = iteration * K + (u[:, 1] * K).long()
    return (theta.gather(1, index[..., None].expand(-1, -1, theta.shape[-1])),
            returns.gather(1, index))


def train(cfg, run, stage, order, env, rule="evaluator", report=()):
    """The paper's loop for all seeds at once -> generator, evaluator, normaliser, returns (S, n).

    rule: "evaluator" (the paper's), "hindsight" (without one), "none" (random search: the untrained
    generator's policies plus noise);  report: iterations after which all commands are tested
    """
    (generator, evaluator), S, K = networks(cfg, env, run), len(run.seeds), cfg.policies
    sizes, scale = policy_sizes(env, cfg.policy_hidden), env.scale
    streams = [stream(seed, order, run.device) for seed in run.seeds]
    of_g, of_v = [*generator.parameters()], [*evaluator.parameters()]
    adam_g = torch.optim.Adam(of_g, lr=cfg.generator_rate)
    adam_v = torch.optim.Adam(of_v, lr=cfg.evaluator_rate)
    replay = torch.zeros(S, cfg.iterations * K, policy_size(sizes), device=run.device)
    returns = torch.zeros(S, cfg.iterations * K, device=run.device)
    normaliser, step = Normaliser(S, env.observations, run.device), run.compile(env.step)
    mixed = torch.arange(K, device=run.device) < round(cfg.command_mix * K)
    state = {"generator": generator, "evaluator": evaluator, "adam_g": adam_g, "adam_v": adam_v,
             "streams": streams, "replay": replay, "returns": returns,
             "normaliser": vars(normaliser)}
    for iteration in run.steps(stage, cfg.iterations, state):
        # COLLECT
        n, losses = iteration * K, {}
        command = torch.ones(S, K, device=run.device)        # the first one
        if n:
            best, worst = returns[:, :n].amax(1)[:, None], returns[:, :n].amin(1)[:, None]
            command = best + cfg.increment + torch.zeros_like(command)
            anywhere = worst + (command - worst) * per_seed(torch.rand, streams, K)
            command = torch.where(mixed, anywhere, command)
        with torch.no_grad():
            theta = generator(command / scale)
            theta = theta + cfg.noise * per_seed(torch.randn, streams, *theta.shape[1:])
        got, seen = rollout(env, follow(theta, env, sizes), normaliser.moments(),
                            per_seed(torch.rand, streams, K, env.draws), step)
        normaliser.add(*seen)
        replay[:, n:n + K], returns[:, n:n + K] = theta, got
        minibatch = lambda: [        # shared out, but for the first ones, smaller than cfg.batch
            run.share(part) if part.shape[1] % run.world == 0 else part
            for part in sample_replay(replay, returns, n + K, cfg, streams)]
        # UPDATE: the evaluator, with its probing states
        for _ in range(cfg.evaluator_steps if rule == "evaluator" else 0):
            losses["evaluator_loss"] = descend(
                evaluator_loss(evaluator, *minibatch()), of_v, adam_v, run)
        # UPDATE: the generator, through the evaluator, which stays as it is
        if cfg.schedule:                                     # see DIFFERS 1
            done = iteration / cfg.iterations
            rate = cfg.generator_rate * min(0.1 + 4.5 * done, 1.225 - 1.125 * done)
            adam_g.param_groups[0]["lr"] = rate
        for _ in range(cfg.generator_steps if rule != "none" else 0):
            old, wanted = minibatch()
            losses["generator_loss"] = descend(
                generator_loss(generator, evaluator, wanted, scale) if rule == "evaluator" else
                hindsight_loss(generator, old, wanted, scale), of_g, adam_g, run)
        run.watch(losses.get("generator_loss", got.sum(1)))
        # LOG
        if (iteration + 1) % cfg.log_every == 0 or iteration + 1 == cfg.iterations:
            with run.clock("evaluation"):
                best = returns[:, :n + K].amax(1)
                reached = test_commands(cfg, run, env, generator, normaliser, best[:, None])[:, 0]
                numbers = {"best_seen": best, "command_best": reached,
                           "env_steps": normaliser.count[:, 0], **losses}
                run.log([{"seed": seed, **{name: v[s].item() for name, v in numbers.items()}}
                         for s, seed in enumerate(run.seeds)])
        if iteration + 1 in report:
            with run.clock("evaluation"):
                report_commands(cfg, run, env, generator, evaluator, normaliser,
                                returns[:, :n + K])
    return generator, evaluator, normaliser, returns


# ---- 6. EVALUATION -----------------------------------------------------------------------------


@torch.no_grad()
def test_commands(cfg, run, env, generator, normaliser, commands):
    """Commands (S, n), returns -> what their noise-free policies achieve, (S, n), mean over
    eval_episodes, whose first states are the same for all commands and calls."""
    theta = generator(commands / env.scale).repeat_interleave(cfg.eval_episodes, 1)
    starts = per_seed(torch.rand, [stream(seed, 10, run.device) for seed in run.seeds],
                      cfg.eval_episodes, env.draws).repeat(1, commands.shape[1], 1)
    act = follow(theta, env, policy_sizes(env, cfg.policy_hidden))
    returns, _ = rollout(env, act, normaliser.moments(), starts)
    return returns.unflatten(1, (-1, cfg.eval_episodes)).mean(2)


def spectrum(returns, n=21):
    """Returns seen (S, m) -> n commands (S, n) from the lowest to the highest."""
    low, high = returns.amin(1, keepdim=True), returns.amax(1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, n, device=returns.device)


def tracking_error(commands, achieved):
    """(S, n) each -> mean |achieved - commanded| over the range of the commands, (S,)."""
    span = commands.amax(1) - commands.amin(1)
    return (achieved - commands).abs().mean(1) / span.clamp(min=1e-9)


def pearson(x, y):
    """Correlation of the rows of x and y, (S, n) -> (S,); 0 where one of them is constant."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-9)


def report_commands(cfg, run, env, generator, evaluator, normaliser, returns):
    """Test and log the whole range of commands: a row a command."""
    commands = spectrum(returns)
    achieved = test_commands(cfg, run, env, generator, normaliser, commands)
    with torch.no_grad():
        predicted = evaluator(generator(commands / env.scale))
    run.log([{"seed": seed, "command": commands[s, i].item(), "achieved": achieved[s, i].item(),
              "predicted": predicted[s, i].item()}
             for s, seed in enumerate(run.seeds) for i in range(commands.shape[1])])


def ars(cfg, run, env, order=5, directions=8, top=4):
    """Augmented random search, version 2, with linear policies, at the same number of episodes ->
    best return of an episode seen (S,), noise-free return of the last policy (S,).

    M <- M + alpha / (b sigma_R) sum over the b best directions of (r+ - r-) delta
    """
    S, streams = len(run.seeds), [stream(seed, order, run.device) for seed in run.seeds]
    M = torch.zeros(S, env.actions, env.observations, device=run.device)
    normaliser, best = Normaliser(S, env.observations, run.device), torch.full((S,), -math.inf)
    best = best.to(run.device)
    total = max(1, cfg.iterations * cfg.policies // (2 * directions))

    def act(policies):
        """policies (S, K, A, O) -> for rollout."""
        flat = policies.flatten(0, 1)
        return lambda obs: (flat @ obs[..., None])[..., 0].clamp(-env.limit, env.limit)
    for iteration in run.steps("ARS", total, {"M": M, "streams": streams, "best": best,
                                              "normaliser": vars(normaliser)}):
        delta = per_seed(torch.randn, streams, directions, *M.shape[1:])       # (S, N, A, O)
        both = M[:, None] + cfg.ars_noise * torch.cat([delta, -delta], 1)
        starts = per_seed(torch.rand, streams, 2 * directions, env.draws)
        returns, seen = rollout(env, act(both), normaliser.moments(), starts)
        normaliser.add(*seen)
        best.copy_(torch.maximum(best, returns.amax(1)))
        plus, minus = returns.chunk(2, 1)                                      # (S, N)
        index = torch.maximum(plus, minus).topk(top, 1).indices
        plus, minus = plus.gather(1, index), minus.gather(1, index)
        spread = torch.cat([plus, minus], 1).std(1).clamp(min=1e-6)
        chosen = delta.gather(1, index[..., None, None].expand(-1, -1, *M.shape[1:]))
        M += (cfg.ars_step / (top * spread))[:, None, None] * (
            (plus - minus)[..., None, None] * chosen).sum(1)
        if (iteration + 1) % cfg.log_every == 0 or iteration + 1 == total:
            mean = returns.mean(1)
            run.log([{"seed": seed, "best_seen": best[s].item(), "mean_return": mean[s].item()}
                     for s, seed in enumerate(run.seeds)])
    starts = per_seed(torch.rand, [stream(seed, 10, run.device) for seed in run.seeds],
                      cfg.eval_episodes, env.draws)
    last = M[:, None].expand(-1, cfg.eval_episodes, -1, -1)
    return best, rollout(env, act(last), normaliser.moments(), starts)[0].mean(1)


def plan(cfg, flops_per_second):
    """What a run of `cfg` does and how long it should take at this rate of matrix products."""
    h, H, B = cfg.policy_hidden, cfg.hyper_hidden, cfg.batch
    tiles = (h / cfg.slice_size + 1) ** 2
    update = 6 * B * tiles * 2 * H * (H + cfg.slice_size**2)                   # flops of a step
    update += 6 * B * max(cfg.probes, 1) * h * h
    learning = cfg.num_seeds * update * (cfg.generator_steps + cfg.evaluator_steps)
    horizon = cfg.horizon or {"swimmer_coarse": 250}.get(cfg.env, 1000)
    force = {"Swimmer": 16, "swimmer_coarse": 2, "InvertedPendulum": 8}.get(cfg.env, 0)
    seconds = learning / (0.4 * flops_per_second) + 0.02 + horizon * (1.3e-4 + 4e-4 * force)
    runs = 1 + 1.5 * cfg.baselines + 2 * cfg.ablations
    minutes = 0.3 + cfg.iterations * runs * seconds / 60
    if cfg.ask:
        return f"asks a generator for policies of return {cfg.ask}"
    return (f"trains generators of policies for {cfg.env}, {cfg.num_seeds} seed(s), "
            f"{cfg.iterations} iterations of {cfg.policies} episodes: about {minutes:.1f} min here")


def experiment(cfg, run):
    """Train, test the whole range of commands, compare -> {"per_seed": a dictionary per seed with
    "headline" numbers, "beside": notes for the closing table, "solved": the environment's level}.
    """
    env = environment(cfg, run.device)
    if cfg.ask:
        return ask(cfg, run, env)
    n = cfg.iterations
    *_, normaliser, returns = train(
        cfg, run, "generator", 0, env, report=(math.ceil(n / 10), math.ceil(0.4 * n), n))
    with run.clock("evaluation"):
        commands, best = spectrum(returns), returns.amax(1)
        untrained = tracking_error(commands, test_commands(
            cfg, run, env, networks(cfg, env, run)[0], normaliser, commands))
    extra = {"untrained_tracking_error": untrained}
    if cfg.baselines:
        extra["random_search_best"] = train(cfg, run, "random search", 1, env, "none")[3].amax(1)
        train(cfg, run, "hindsight", 2, env, "hindsight", (n,))
        extra["ars_best"], extra["ars_last"] = ars(cfg, run, env)
    if cfg.ablations:
        train(replace(cfg, probes=0), run, "no fingerprint", 3, env, report=(n,))
        train(replace(cfg, recency=0.0), run, "uniform replay", 4, env, report=(n,))
    per_seed = []
    for s, seed in enumerate(run.seeds):
        own = [row for row in run.rows if row["seed"] == seed]
        curves, tests = {}, {}
        for row in own:
            if "command" in row:
                tests.setdefault(row["stage"], {}).setdefault(str(row["step"]), []).append(
                    [round(row[key], 3) for key in ("command", "achieved", "predicted")])
            else:
                curves.setdefault(row["stage"], []).append(
                    [row["step"], *(round(row.get(key, 0.0), 3) for key in
                                    ("best_seen", "command_best", "env_steps"))])
        numbers = {"best_seen": best[s].item(), "command_best_return": curves["generator"][-1][2]}
        if env.solved:
            numbers[f"best_seen_at_least_{env.solved}"] = float(best[s] >= env.solved)
        for stage, reports in tests.items():
            command, achieved, _ = torch.tensor(reports[str(n)]).T[:, None]
            key = "" if stage == "generator" else stage.replace(" ", "_") + "_"
            numbers[f"{key}tracking_error"] = tracking_error(command, achieved).item()
            numbers[f"{key}tracking_pearson"] = pearson(command, achieved).item()
        numbers |= {key: value[s].item() for key, value in extra.items()}
        per_seed.append({"seed": seed, "headline": numbers, "curves": curves, "tests": tests})
    notes = {}
    for name in per_seed[0]["headline"]:
        values = [row["headline"][name] for row in per_seed]
        notes[name] = "median {:.3f}, from {:.3f} to {:.3f}".format(
            statistics.median(values), min(values), max(values))
    return {"per_seed": per_seed, "beside": notes, "solved": env.solved}


def ask(cfg, run, env):
    """Write the policies for the returns in cfg.ask, from a run's checkpoint, and try them."""
    path, commands = cfg.checkpoint, [float(c) for c in cfg.ask.split(",")]
    try:
        saved = torch.load(path, map_location=run.device, weights_only=True)
        old, state = saved["config"], saved["stages"]["generator"]["state"]
    except FileNotFoundError:
        raise ValueError(f"--checkpoint {path} is missing") from None
    except Exception as error:                               # a damaged file raises almost anything
        raise ValueError(f"--checkpoint {path} is not a run's ({type(error).__name__})") from None
    for name in ("env", "horizon", "policy_hidden", "slice_size", "z_dim", "hyper_hidden"):
        if old[name] != getattr(cfg, name):
            raise ValueError(f"{path} has --{name.replace('_', '-')} {old[name]}, not "
                             f"{getattr(cfg, name)}: give its own")
    which = [seed - old["seed"] for seed in run.seeds]
    if not all(0 <= s < old["num_seeds"] for s in which):
        raise ValueError(f"{path} has {old['num_seeds']} seed(s) from {old['seed']} on")
    generator, _ = networks(cfg, env, run)
    generator.load_state_dict({name: part[which] for name, part in state["generator"].items()})
    normaliser = Normaliser(len(which), env.observations, run.device)
    vars(normaliser).update({name: part[which] for name, part in state["normaliser"].items()})
    wanted = torch.tensor(commands, device=run.device).expand(len(which), -1)
    seen = state["returns"][which]                           # (S, n)
    for _ in run.steps("ask", 1, {}):                        # nothing to train, but a run to record
        pass
    with torch.no_grad():
        achieved = test_commands(cfg, run, env, generator, normaliser, wanted)
        theta = generator(wanted / env.scale)
    mean, std = normaliser.moments()
    np.savez(run.folder / "policies.npz", theta=theta.cpu(), mean=mean.cpu(), std=std.cpu(),
             commands=commands, sizes=policy_sizes(env, cfg.policy_hidden), limit=env.limit)
    per_seed = [{"seed": seed, "headline": {f"asked_{c}": achieved[s, i].item()
                                            for i, c in enumerate(commands)}}
                for s, seed in enumerate(run.seeds)]
    notes = {f"asked_{c}": f"achieved by the policy in policies.npz; in training it saw "
             f"{seen.min():.1f} to {seen.max():.1f}" for c in commands}
    return {"per_seed": per_seed, "beside": notes, "solved": None}


# ---- 7. FIGURE ---------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, GREY, PINK, SKY = (                                       # Okabe and Ito
    "#0072B2", "#E69F00", "#009E73", "#777777", "#CC79A7", "#56B4E9")


def plot(summary, path):
    """Draw the four panels from a summary alone; thin lines: seeds, thick: medians."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "legend.fontsize": 8})
    cfg, rows = summary["config"], summary["per_seed"]
    panels = [plot_training, plot_tracking, plot_predicted, plot_bars]
    panels = [plot_asked] if cfg["ask"] else panels
    side = math.ceil(math.sqrt(len(panels)))
    figure, axes = plt.subplots(side, side, squeeze=False, layout="constrained",
                                figsize=(max(8.4, 5.2 * side), 4.2 * side))
    for letter, axis, panel in zip("abcd", axes.flat, panels):
        axis.set_title(f"({letter}) {panel(axis, summary, rows)}")
    figure.suptitle(f"Generators of deep policies: {cfg['env']}. "
                    f"Thin: each of {len(rows)} seed(s); thick: median")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): thin lines and their thick median."""
    for curve in curves if len(curves) > 1 else []:
        axis.plot(x, curve, color=colour, ls=style, lw=0.7, alpha=0.5)
    axis.plot(x, np.median(curves, 0), color=colour, ls=style, lw=2.2, label=label)


def plot_training(axis, summary, rows):
    """Returns against training episodes -> title."""
    K = summary["config"]["policies"]
    for stage, column, factor, colour, style, label in (
            ("generator", 2, K, BLUE, "-", "policy for the best return seen, no noise"),
            ("generator", 1, K, SKY, "--", "best return seen"),
            ("random search", 1, K, GREY, "--", "best seen by random search"),
            ("ARS", 1, 16, ORANGE, "--", "best seen by ARS")):
        if stage in rows[0]["curves"]:
            points = np.array([row["curves"][stage] for row in rows])          # (seeds, logs, 4)
            plot_lines(axis, points[0, :, 0] * factor, points[:, :, column], colour, label, style)
    if summary["solved"]:
        axis.axhline(summary["solved"], color=GREEN, ls=":", label="solved [gym]")
    axis.set(xlabel="training episodes", ylabel="return")
    axis.legend(loc="lower right")
    return "Returns while it learns"


def plot_tracking(axis, summary, rows):
    """Achieved against commanded return, at three times in training -> title."""
    for step, colour in zip(rows[0]["tests"]["generator"], ("#a6cbe3", "#4d99c9", BLUE)):
        points = np.array([row["tests"]["generator"][step] for row in rows])   # (seeds, 21, 3)
        x = np.median(points[..., 0], 0)
        low, middle, high = np.quantile(points[..., 1], [0.25, 0.5, 0.75], axis=0)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(x, middle, color=colour, lw=2.2, label=f"after {int(step)} iterations")
    for seed in points:
        axis.plot(seed[:, 0], seed[:, 1], color=BLUE, lw=0.6, alpha=0.4)
    axis.plot([x[0], x[-1]], [x[0], x[-1]], "k:", lw=1, label="as asked")
    axis.set(xlabel="commanded return", ylabel="achieved return (noise-free)")
    axis.legend(loc="upper left")
    return "Write me a policy with return c (median, quartiles)"


def plot_predicted(axis, summary, rows):
    """What the evaluator predicts of the generated policies against the command -> title."""
    last = list(rows[0]["tests"]["generator"])[-1]
    points = np.array([row["tests"]["generator"][last] for row in rows])       # (seeds, 21, 3)
    x = np.median(points[..., 0], 0)
    plot_lines(axis, x, points[..., 2], PINK, "predicted by the evaluator, V(G(c))")
    axis.plot(x, np.median(points[..., 1], 0), color=BLUE, lw=2.2, label="achieved")
    axis.plot([x[0], x[-1]], [x[0], x[-1]], "k:", lw=1, label="as asked")
    axis.set(xlabel="commanded return", ylabel="return")
    axis.legend(loc="upper left")
    return "Whose error is it? Evaluator beside achieved"


def plot_bars(axis, summary, rows):
    """Tracking error of the method, its ablations and controls -> title."""
    bars = [(name, key) for name, key in (
        ("generator", "tracking_error"), ("no finger-\nprint", "no_fingerprint_tracking_error"),
        ("uniform\nreplay", "uniform_replay_tracking_error"),
        ("hindsight,\nno evaluator", "hindsight_tracking_error"),
        ("untrained", "untrained_tracking_error")) if key in rows[0]["headline"]]
    for place, (name, key) in enumerate(bars):
        values = [row["headline"][key] for row in rows]
        axis.bar(place, np.median(values), color=BLUE if place == 0 else GREY, alpha=0.7)
        axis.plot([place] * len(values), values, "_", color="black", ms=12)
    axis.set_xticks(range(len(bars)), [name for name, _ in bars])
    axis.set(ylabel="tracking error (bar: median)")
    return "Tracking error at equal episodes"


def plot_asked(axis, summary, rows):
    """Achieved against asked return -> title."""
    for row in rows:
        asked = [float(name[6:]) for name in row["headline"]]
        axis.plot(asked, list(row["headline"].values()), "o", color=BLUE)
    axis.axline((asked[0], asked[0]), slope=1, color="black", ls=":", label="as asked")
    axis.set(xlabel="asked return", ylabel="achieved return")
    axis.legend()
    return "Policies on request"


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
