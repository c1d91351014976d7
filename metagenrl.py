# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
r"""MetaGenRL: a learned neural loss trains new agents in new environments, in one file.

Kirsch, van Steenkiste, Schmidhuber, "Improving Generalization in Meta Reinforcement Learning using
Learned Objectives", arXiv 1910.04098. "[code]" marks what was read in the official release
(TensorFlow); equations are numbered here, in the order of the paper's algorithm.

IDEA
  A reinforcement-learning algorithm is at bottom a loss: from what an agent did and the rewards it
  got, its gradient says how to change the policy. People write that loss (REINFORCE, PPO, DDPG).
  Here it is learned: a small network L_alpha, shared by a population of agents in different
  environments. Each agent is an ordinary off-policy actor-critic, but its policy follows the
  gradient of L_alpha (at first mixed with DDPG's, see --anneal). The critic judges L_alpha: make
  one step of the policy with L_alpha, ask the critic how good the actions are now, and
  differentiate the answer through the step (a second derivative).
  L_alpha sees actions, rewards and values, never states, and no gradient of the critic passes
  through it: it can neither memorise environments nor become DDPG. Then alpha is frozen, and the
  policies of new agents, in environments never seen, learn from that loss alone.

ALGORITHM
  repeat
    for every agent i of N, in environment i mod (number of environments)
      act with pi_phi(s) + noise, store (s, a, r, d);  sample sequences tau of T steps
      (1) theta <- Adam(theta, gradient of (Q_theta(s, a) - y)^2),  TD3's target y, twin critics
      every second time, each on a new batch:
      (2) phi   <- Adam(phi, clipped gradient of mean L_alpha(tau, pi_phi(s), V)),  V = Q(s, pi(s))
      (3) phi'   = phi - lambda_3 grad_phi mean L_alpha(tau, pi_phi(s), V)         (thrown away)
      (4) g_i    = grad_alpha of -mean Q_theta(s, pi_phi'(s)), on the sequences of (3) and as many
                   others, so that a step has to be good where it was not made, too
    alpha <- Adam(alpha, mean over the agents whose policies learn of g_i, each clipped)
  L_alpha: an LSTM backwards in time over [r, V_t, V_(t+1), t/T, features of (a, pi) averaged over
  the directions of the action], r and V standardised in each minibatch, t counted from the start of
  the sequence -> a loss for each step.
  Meta-test: alpha frozen, new agents; their critics learn, too, but only to give V.

SYMBOLS
  symbol           in the code        shape           meaning
  S                leading axis                       seeds, trained at once in the same products
  N, n             agents                             agents a seed; rows of a stack of agents, S N
  E                copies                             copies of an agent's environment
  B, T             sequences, length                  sequences of a minibatch, and their steps
  O, A             Worlds.O, .A                       observations, actions, padded to the largest
  phi              phi                (n, P)          weights of the policies, one flat row each
  theta            theta              (n, 2, C)       twin critics; V and eq. 4 take the first
  alpha            alpha              (S | n, W)      weights of L; a copy for each agent in eq. 4
  a, pi            action, pi         (n, B, T, A)    replayed actions; the policy's at their states
  r, d             reward, terminated (n, B, T)       rewards, ends
  V                V                  (n, B, T + 1)   values, constants for L
  lambda_1 .. 4    *_rate                             of critic, policy, inner step, objective

RESULT
  Score: 0 as an untrained L, 1 as DDPG at the end of a meta-test, both measured in the same run.
  quick, 5 seeds (0-4), 4 fresh agents a test, means with 95 % t intervals; 9.2 minutes for all on
  one core (AMD EPYC):
                              score of L, frozen       REINFORCE    returns: L, DDPG, untrained L
    strongpend  seen          0.990 [0.954, 1.027]     1.016        -40.1   -38.4   -257.4
    kpoint      seen          1.055 [0.980, 1.130]     1.092        -2.68   -3.70   -18.28
    servo       never seen    1.029 [0.947, 1.111]     1.059        -1.38   -1.58   -12.02
    kreach      never seen    1.025 [0.853, 1.198]     1.066        -12.68  -12.81  -17.52
    L's sign flipped: -1.16 [-1.44, -0.88], worse than no learning
    L after 12, 25, 50 % of meta-training: seen -0.31, 0.51, 0.88; never seen -0.19, 0.78, 0.90
  As good as DDPG, and usually faster; REINFORCE, written by people, is as good or a little better:
  the tasks are easy. The claim is that a loss was learned and carries over.
  Classic control (command in results/README.md), meta-trained on swingup and pointmass, 3 seeds,
  16.1 minutes: never seen reacher 0.78 [0.45, 1.11], acrobot 0.96 [0.90, 1.01], cartpole 1.3
  [-0.1, 2.7], but pendulum -0.04 [-0.39, 0.31], where REINFORCE has 0.81.
  paper preset (one GPU): not run yet.

DIFFERS
  1. quick: tasks and networks for minutes on a CPU, discount 0.9, 8 copies of an environment an
     agent, smaller batches, larger rates of critics and objective (whose rate falls), output layers
     that start small, more noise, strongpend's rewards times 0.2; at first an agent acts at random
     and learns nothing, then its critics learn, then its policy. Two more changes are needed at
     this size: the inner gradient is clipped (without, scores of 0.73 to 0.83), and agents are
     replaced after every 440 iterations, to have young ones always (0.42 to 1.04). Of two others
     one would do: L is blind to the sign of (a, pi), else it may push all actions one way, and two
     of eight agents learn by DDPG for good (without both one seed of five failed). alpha is
     averaged. The paper preset has none of these.
  2. Mistakes of [code] that are not repeated: +1 reward at every end; time limits as ends; the
     LSTM eating padding first; padding in the statistics. V is detached in REINFORCE, too, and its
     advantages stop at ends and are standardised.
  3. [code] runs whole episodes, then updates as often as there were steps; here steps and updates
     alternate. It samples from all finished episodes; here from one copy's, chosen first. Its
     replay keeps a million steps; here a number of episodes.
  4. Environments are our own, in batched torch: pendulum and mountaincar are Gymnasium's, cartpole
     and acrobot its dynamics with continuous forces, lander an approximation. MuJoCo's, as in the
     paper, through --train gym:HalfCheetah-v5,... The option --repeat is ours.
  5. EPG, RL^2 and PPO, the paper's other baselines, are left out; so are random resets of policies
     and a differentiable Adam step, which [code] has but switches off.
  6. torchrun shares the population out; batches, critics and policies stay with their process.
  7. Long, for twelve environments and a bridge to gymnasium are in it.

RUN
  python metagenrl.py --num-seeds 5
  python metagenrl.py --objective runs/metagenrl/quick-seed0-4/objective.pt --num-seeds 5 \
      --test gym:Pendulum-v1 --repeat 4 --random-steps 50 --critic-start 50 --policy-start 100 \
      --test-iterations 1000
  torchrun --standalone --nproc_per_node=4 metagenrl.py --preset paper
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
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code]: as in the official
    release; [code: x]: the release has x."""
    train: str = "strongpend,kpoint"    # environments of meta-training; the agents take turns
    test: str = "strongpend,kpoint,servo,kreach"   # environments of meta-tests
    objective: str = ""              # meta-test only: a file objective.pt that a run has left
    agents: int = 8                  # population of a seed, N [code: 20]
    teachers: int = 2                # agents that always learn by DDPG [code: 0]
    copies: int = 8                  # environments of an agent, E, one step an iteration [code: 1]
    repeat: int = 1                  # steps of an environment for which an action is held
    slots: int = 20                  # episodes that the replay keeps of each copy [code: 1M steps]
    iterations: int = 16_000         # of meta-training [code: 700,000]
    random_steps: int = 40           # first iterations of a life, random actions [code: 10,000]
    critic_start: int = 40           # iterations of a life before its critics learn [code: 0]
    policy_start: int = 80           # iterations of a life before its policy learns [code: 0]
    anneal: int = 200                # first iterations, L takes over from DDPG [code: 10,000]
    life: int = 440                  # iterations until an agent starts anew; 0: never [code: 0]
    sequences: int = 16              # of an agent's minibatch, B [code: 100]
    length: int = 6                  # of a sequence, T [code: 20]
    gamma: float = 0.9               # discount [code: 0.99]
    lam: float = 0.97                # of generalised advantages, only in REINFORCE [code]
    noise: float = 0.5               # of exploration [code: 0.1]
    target_noise: float = 0.2        # on target actions, clipped at 0.5 [code]
    polyak: float = 0.05             # share of the new weights in the targets' [code: 0.005]
    delay: int = 2                   # iterations between updates of policies and objective [code]
    hidden: int = 32                 # units of the two hidden layers of policy, critics [code: 350]
    policy_scale: float = 0.1        # factor on the policy's first output weights [code: 1]
    critic_rate: float = 4e-3        # lambda_1, Adam [code: 1e-3]
    policy_rate: float = 1e-3        # lambda_2, Adam [code]
    inner_rate: float = 0.1          # lambda_3, of the inner step, SGD [code: 2, see inner_step]
    inner_bound: bool = True         # inner gradient clipped to norm 1, as the real one [code: no]
    inner_steps: int = 1             # K [code]
    objective_rate: float = 1e-2     # lambda_4, Adam [code: 1e-3]
    objective_decay: float = 0.1     # last objective_rate over the first [code: 1]
    average: float = 0.995           # decay of the mean of alpha that is used; 0: none [code: 0]
    clip: float = 1.0                # norm of a policy's gradient, an agent's meta-gradient [code]
    symmetric: bool = True           # L does not change when all actions change sign [code: no]
    width: int = 16                  # units in L [code: 32]
    features: int = 8                # of rewards, values and time in L [code]
    action_layers: int = 1           # hidden layers over actions in L [code: 3]
    layers: int = 1                  # hidden layers of L's other two networks [code: 2]
    objective_scale: float = 0.1     # of L's first output weights, Glorot's times this [code: 1]
    drop: str = ""                   # inputs that L does not get: reward, time, value
    test_agents: int = 4             # fresh agents a meta-test
    test_iterations: int = 440       # iterations of a meta-test
    test_every: int = 40             # iterations between evaluations in meta-tests
    test_episodes: int = 32          # of an evaluation, each agent, without noise
    extras: bool = True              # meta-tests of -L, and of L after 12, 25 and 50 %
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds trained side by side: seed, seed + 1, ...
    log_every: int = 100             # iterations between lines of the log
    save_every: int = 500            # iterations between checkpoints

    def __post_init__(self):
        zero = {"seed", "teachers", "random_steps", "critic_start", "policy_start", "anneal",
                "life", "noise", "target_noise", "average", "gamma", "lam", "inner_rate",
                "objective_rate"}
        high = dict.fromkeys(("gamma", "lam", "average", "polyak"), 1) | {"seed": 1 << 24}
        for name, value in asdict(self).items():
            above = value >= 0 if name in zero else type(value) is str or value > 0
            if type(value) in (int, float) and not (above and value <= high.get(name, 1e300)):
                raise ValueError(f"--{name.replace('_', '-')} must be "
                                 + ("at least 0" if name in zero else "above 0")
                                 + (f" and at most {high[name]}" if name in high else " and finite")
                                 + f", not {value}")
        for option in ("train", "test"):
            names = getattr(self, option).split(",")
            if len(set(names)) < len(names):
                raise ValueError(f"--{option} names an environment twice: {','.join(names)}")
            for name in names:
                if name not in ENVIRONMENTS and not name.startswith("gym:"):
                    raise ValueError(f"--{option}: no environment {name!r}: "
                                     f"{', '.join(ENVIRONMENTS)} or gym:ID")
        if self.agents < len(self.train.split(",")):
            raise ValueError(f"--agents {self.agents} is less than the number of --train "
                             f"environments, {len(self.train.split(','))}")
        for name in self.drop.split(","):
            if name not in ("", "reward", "time", "value"):
                raise ValueError(f"--drop is of reward, time, value, not {name!r}")
        if self.slots < 2:
            raise ValueError(f"--slots must be at least 2, one is being filled, not {self.slots}")
        if self.teachers > self.agents:
            raise ValueError(f"--teachers {self.teachers} of --agents {self.agents}: too many")
        if self.log_every % self.delay:
            raise ValueError(f"--log-every {self.log_every} must be a multiple of --delay "
                             f"{self.delay}")
        if self.width % 2:
            raise ValueError(f"--width must be even, not {self.width}")
        if self.life and self.life <= self.policy_start:
            raise ValueError(f"--life {self.life} is over before --policy-start "
                             f"{self.policy_start}")

    @property
    def suffix(self):
        """Of the run folder: meta-tests of a file stand beside the runs that make one."""
        return re.sub(r"[:/]", "_", f"-test-{self.test}")[:60] if self.objective else ""


PRESETS = {
    "smoke": dict(train="kpoint,servo", test="kpoint,servo", agents=2, teachers=0, copies=2,
                  slots=3, iterations=64, random_steps=20, critic_start=20, policy_start=24,
                  anneal=40, life=50, sequences=4, hidden=8, test_agents=2, test_iterations=40,
                  test_every=20, test_episodes=2, log_every=4, save_every=1),
    "quick": dict(),
    "paper": dict(train="lander,pendulum", test="lander,pendulum,reacher,cartpole,swingup,acrobot",
                  agents=20, teachers=0, copies=1, slots=1000, iterations=700_000,
                  random_steps=10_000, critic_start=0, policy_start=0, anneal=10_000, life=0,
                  sequences=100, length=20, gamma=0.99, noise=0.1, polyak=0.005, hidden=350,
                  policy_scale=1.0, critic_rate=1e-3, inner_rate=2.0, inner_bound=False,
                  objective_rate=1e-3, objective_decay=1.0, average=0.0, symmetric=False, width=32,
                  action_layers=3, layers=2, objective_scale=1.0, test_iterations=300_000,
                  test_every=10_000, test_episodes=10, extras=False, log_every=2000,
                  save_every=50_000),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# Environments on rows, each row an episode of its own: reset(n, or uniform numbers (n, draws)) ->
# state (n, Z), obs(state) -> (n, observations), step(state, action in [-1, 1]) -> state, reward,
# terminated. `horizon`: steps until an episode is cut off, which is not an end: its last state has
# a value. `reward_scale`: of the rewards that an agent sees; returns are reported without it.


def stream(seed, purpose, device):
    """Random generator of one seed for one purpose: 0 meta-training, 1 meta-tests (the same for
    all rules), 10 evaluations, 20 L's first weights. The numbers are small, because torch's CPU
    generator keeps only 32 bits."""
    return torch.Generator(device).manual_seed(32 * seed + purpose)


def per_seed(sampler, generators, *shape):
    """sampler(shape) of each generator -> (S, *shape): a seed alone equals its slice of all."""
    return torch.stack([sampler(shape, generator=g, device=g.device) for g in generators])


def draw(n, size):
    """What reset takes: uniform numbers (n, size), or a number of rows, for which it draws them."""
    return torch.rand(n, size) if isinstance(n, int) else n


def never(x):
    """`terminated` of an environment that has no end, shaped as x."""
    return torch.zeros_like(x, dtype=torch.bool)


class Pendulum:
    """Gymnasium's Pendulum-v1. State (n, 2): angle, 0 upright, and its rate."""
    observations, actions, horizon, draws, reward_scale = 3, 1, 200, 2, 1.0
    torque, rate_scale = 2.0, 1.0

    def reset(self, n):
        """n rows, or uniform numbers (n, 2) -> angle U(-pi, pi), rate U(-1, 1)."""
        u = 2 * draw(n, self.draws) - 1
        return torch.stack([math.pi * u[:, 0], u[:, 1]], 1)

    def obs(self, state):
        angle, rate = state.unbind(1)
        return torch.stack([angle.cos(), angle.sin(), self.rate_scale * rate], 1)

    def step(self, state, action):
        angle, rate = state.unbind(1)
        u = self.torque * action[:, 0].clamp(-1, 1)
        away = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = away.square() + 0.1 * rate.square() + 0.001 * u.square()
        rate = (rate + 0.05 * (15 * angle.sin() + 3 * u)).clamp(-8, 8)
        return torch.stack([angle + 0.05 * rate, rate], 1), -cost, never(cost)


class StrongPendulum(Pendulum):
    """A pendulum whose motor can lift it at once (ours): learned in a few hundred updates."""
    horizon, torque, rate_scale, reward_scale = 40, 8.0, 0.25, 0.2


class KinematicPoint:
    """A point that goes where it is told must reach the middle (ours). State (n, 2): place."""
    observations, actions, horizon, draws, reward_scale = 2, 2, 20, 2, 1.0

    def reset(self, n):
        """n rows, or uniform numbers (n, 2) -> place U(-1, 1)^2."""
        return 2 * draw(n, self.draws) - 1

    def obs(self, state):
        return state

    def step(self, state, action):
        state = (state + 0.15 * action.clamp(-1, 1)).clamp(-1.5, 1.5)
        distance = state.norm(dim=1)
        return state, -distance, never(distance)


class Servo:
    """A carriage on a rail must reach the middle (ours). State (n, 2): place, velocity."""
    observations, actions, horizon, draws, reward_scale = 2, 1, 20, 1, 1.0

    def reset(self, n):
        """n rows, or uniform numbers (n, 1) -> place U(-1, 1), at rest."""
        p = 2 * draw(n, self.draws) - 1
        return torch.cat([p, torch.zeros_like(p)], 1)

    def obs(self, state):
        return state

    def step(self, state, action):
        p, v = state[:, :1], state[:, 1:]
        v = v + 0.2 * (4 * action.clamp(-1, 1) - 3 * v)
        p = p + 0.2 * v
        v, p = torch.where(p.abs() > 1.5, 0, v), p.clamp(-1.5, 1.5)
        return torch.cat([p, v], 1), -p[:, 0].abs(), never(p[:, 0])


class Reacher:
    """A two-link arm must touch a goal (ours). State (n, 6): joint angles, rates, goal."""
    observations, actions, horizon, draws, reward_scale = 8, 2, 100, 4, 1.0
    nearest, farthest = 0.2, 0.95

    def reset(self, n):
        """n rows, or uniform numbers (n, 4) -> angles U(-pi, pi), at rest; the goal at any angle,
        at a distance U(nearest, farthest)."""
        u = draw(n, self.draws)
        q, angle = math.pi * (2 * u[:, :2] - 1), 2 * math.pi * u[:, 2:3]
        far = self.nearest + (self.farthest - self.nearest) * u[:, 3:]
        return torch.cat([q, torch.zeros_like(q), far * angle.cos(), far * angle.sin()], 1)

    def apart(self, state):
        """From the tip to the goal (n, 2); the arm has length 1."""
        q = state[:, :2].cumsum(1)
        return state[:, 4:] - torch.stack([q.cos().sum(1), q.sin().sum(1)], 1) / 2

    def obs(self, state):
        q, v = state[:, :2], state[:, 2:4]
        return torch.cat([q.cos(), q.sin(), v / 5, self.apart(state)], 1)

    def step(self, state, action):
        a, q, v, goal = action.clamp(-1, 1), *state.split(2, 1)
        v = (v + 0.05 * (20 * a - 2 * v)).clamp(-10, 10)
        state = torch.cat([q + 0.05 * v, v, goal], 1)
        reward = -self.apart(state).norm(dim=1) - 0.01 * a.square().sum(1)
        return state, reward, never(reward)


class KinematicReacher(Reacher):
    """The arm without inertia (ours): actions turn the joints by up to 0.3."""
    observations, horizon, nearest, farthest = 6, 20, 0.3, 0.9

    def obs(self, state):
        return torch.cat([state[:, :2].cos(), state[:, :2].sin(), self.apart(state)], 1)

    def step(self, state, action):
        state = torch.cat([state[:, :2] + 0.3 * action.clamp(-1, 1), state[:, 2:]], 1)
        reward = -self.apart(state).norm(dim=1)
        return state, reward, never(reward)


class Worlds:
    """An environment for each of n agents, names[i] for agent i, any number E of copies of each.

    One program for all: what the environments give is padded with zeros to the largest sizes,
    state (n, E, Z), observations (n, E, O), actions (n, E, A); reward and terminated (n, E).
    """

    def __init__(self, names, device, others=(), repeat=1):
        """others: names of further agents, whose environments count for the largest sizes;
        repeat: steps of an environment for which an action is held, one step for the agent."""
        self.repeat = repeat
        kinds = {name: GymEnvironment(name[4:], device) if name[:4] == "gym:" else
                 ENVIRONMENTS[name]() for name in dict.fromkeys([*names, *others])}
        for env in kinds.values():
            env.width = env.reset(1).shape[1]                # of its state
            env.limit = env.horizon // repeat                # the rest is cut off
        too_short = [name for name, env in kinds.items() if env.limit < 1]
        if too_short:
            raise ValueError(f"--repeat {repeat} is longer than an episode of {too_short[0]}")
        most = lambda size: max(getattr(env, size) for env in kinds.values())
        self.O, self.A, self.H = most("observations"), most("actions"), most("limit")
        self.draws, self.Z = most("draws"), most("width")
        self.groups = []                                     # (environment, its agents), a kind
        table = torch.zeros(4, len(names), device=device)
        for name in dict.fromkeys(names):
            own, env = [i for i, other in enumerate(names) if other == name], kinds[name]
            self.groups.append((env, torch.tensor(own, device=device)))
            sizes = env.observations, env.actions, env.limit, env.reward_scale
            table[:, own] = torch.tensor(sizes, device=device)[:, None]
        self.observations, self.actions, self.horizon, self.reward_scale = table[..., None]
        self.act_mask = (torch.arange(self.A, device=device) < self.actions).float()   # (n, A)

    def each(self, function, widths, *inputs):
        """function(environment, its rows of the inputs) of each kind -> padded outputs (n, E, w)
        for the widths w."""
        n, E = inputs[0].shape[:2]
        outputs = [inputs[0].new_zeros(n, E, width) for width in widths]
        for env, own in self.groups:
            results = function(env, *(part[own].flatten(0, 1) for part in inputs))
            for output, result in zip(outputs, results):
                result = result.view(len(own), E, -1).to(output.dtype)
                output[own, :, :result.shape[2]] = result
        return outputs

    def reset(self, u):
        """Uniform numbers (n, E, draws) -> first states."""
        return self.each(lambda env, u: [env.reset(u[:, :env.draws])], [self.Z], u)[0]

    def restart(self, state, end, u):
        """New first states where end (n, E) is true."""
        def one(env, state, end, u):
            state, end, u = state[:, :env.width], end > 0, u[:, :env.draws]
            if isinstance(env, GymEnvironment):
                return [env.restart(state, end[:, 0].nonzero()[:, 0].tolist(), u)]
            return [torch.where(end, env.reset(u), state)]
        return self.each(one, [self.Z], state, end[..., None], u)[0]

    def obs(self, state):
        return self.each(lambda env, state: [env.obs(state[:, :env.width])], [self.O], state)[0]

    def step(self, state, action):
        """-> state, reward, terminated; Worlds, as its environments, knows no time limit."""
        def one(env, state, action):
            action = action[:, :env.actions]
            state, total, over = env.step(state[:, :env.width], action)
            for _ in range(self.repeat - 1):
                after, reward, done = env.step(state, action)
                state = torch.where(over[:, None], state, after)
                total, over = total + torch.where(over, 0, reward), over | done
            return state, total, over
        state, reward, done = self.each(one, [self.Z, 1, 1], state, action)
        return state, reward[..., 0], done[..., 0] > 0


# The environments of quick are above. Those of classic control, a lander and a bridge to gymnasium
# follow, in the same form: at a first reading go on with section 3.


class MountainCar:
    """Gymnasium's MountainCarContinuous-v0: a car too weak for its hill. State (n, 2)."""
    observations, actions, horizon, draws, reward_scale = 2, 1, 999, 1, 1.0

    def reset(self, n):
        """n rows, or uniform numbers (n, 1) -> position U(-0.6, -0.4), velocity 0."""
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


class CartPole:
    """Gymnasium's CartPole with any force in [-10, 10]. State (n, 4): x, angle, and their rates.

    Reward 1 a step, the last included; ends beyond 2.4 or 12 degrees.
    """
    observations, actions, horizon, draws, reward_scale = 4, 1, 500, 4, 1.0

    def reset(self, n):
        """n rows, or uniform numbers (n, 4) -> all from U(-0.05, 0.05)."""
        return 0.1 * draw(n, self.draws) - 0.05

    def obs(self, state):
        x, angle, dx, rate = state.unbind(1)
        return torch.stack([x, dx, angle, rate], 1)

    def move(self, state, action):
        """Euler's step of 0.02 s: positions first, with the old velocities."""
        sin, cos, rate = state[:, 1].sin(), state[:, 1].cos(), state[:, 3]
        push = (10 * action[:, 0].clamp(-1, 1) + 0.05 * rate.square() * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        force = torch.stack([push - 0.05 * turn * cos / 1.1, turn], 1)
        return state + 0.02 * torch.cat([state[:, 2:], force], 1)

    def step(self, state, action):
        state = self.move(state, action)
        done = (state[:, 0].abs() > 2.4) | (state[:, 1].abs() > math.radians(12))
        return state, torch.ones_like(state[:, 0]), done


class SwingUp(CartPole):
    """The same cart and pole from below, with walls at 2.4 instead of an end (ours)."""
    observations = 5

    def reset(self, n):
        """As CartPole, the pole hanging down."""
        state = super().reset(n)
        state[:, 1] += math.pi
        return state

    def obs(self, state):
        x, angle, dx, rate = state.unbind(1)
        return torch.stack([x, dx, angle.cos(), angle.sin(), rate], 1)

    def step(self, state, action):
        x, angle, dx, rate = self.move(state, action).unbind(1)
        dx, x = torch.where(x.abs() > 2.4, 0, dx), x.clamp(-2.4, 2.4)
        reward = (1 + angle.cos()) / 2 - 0.1 * (x / 2.4).square() - 0.001 * action[:, 0].square()
        return torch.stack([x, angle, dx, rate], 1), reward, never(x)


class Acrobot:
    """Gymnasium's Acrobot, the dynamics "of the book", with any torque in [-1, 1] at the elbow.

    State (n, 4): two angles, 0 hanging down, and their rates. Reward: half the tip's height (ours;
    Gymnasium: -1 until it is above 1, then an end), so that exploring is no part of the problem.
    """
    observations, actions, horizon, draws, reward_scale = 6, 1, 500, 4, 1.0

    def reset(self, n):
        """n rows, or uniform numbers (n, 4) -> all from U(-0.1, 0.1)."""
        return 0.2 * draw(n, self.draws) - 0.1

    def obs(self, state):
        q, v = state[:, :2], state[:, 2:]
        return torch.cat([q.cos(), q.sin(), v], 1)[:, [0, 2, 1, 3, 4, 5]]

    def slope(self, state, torque):
        """Rates of the state; links of mass, length and inertia 1, centres at 1/2."""
        q1, q2, v1, v2 = state.unbind(1)
        sin, cos, g = q2.sin(), q2.cos(), 9.8
        d1, d2 = 3.5 + cos, 1.25 + 0.5 * cos
        phi2 = 0.5 * g * (q1 + q2).sin()
        phi1 = -0.5 * v2.square() * sin - v2 * v1 * sin + 1.5 * g * q1.sin() + phi2
        a2 = torque + d2 / d1 * phi1 - 0.5 * v1.square() * sin - phi2
        a2 = a2 / (1.25 - d2.square() / d1)
        return torch.stack([v1, v2, -(d2 * a2 + phi1) / d1, a2], 1)

    def step(self, state, action):
        torque, h = action[:, 0].clamp(-1, 1), 0.2
        k1 = self.slope(state, torque)                       # the classical Runge-Kutta rule
        k2 = self.slope(state + h / 2 * k1, torque)
        k3 = self.slope(state + h / 2 * k2, torque)
        k4 = self.slope(state + h * k3, torque)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        q = torch.remainder(state[:, :2] + math.pi, 2 * math.pi) - math.pi
        limit = math.pi * torch.tensor([4.0, 9.0], device=state.device, dtype=state.dtype)
        v = state[:, 2:].clamp(-limit, limit)
        height = -q[:, 0].cos() - q.sum(1).cos()
        return torch.cat([q, v], 1), height / 2, never(height)


class PointMass:
    """A mass in a box must reach the middle (ours). State (n, 4): place, velocity."""
    observations, actions, horizon, draws, reward_scale = 4, 2, 100, 2, 1.0

    def reset(self, n):
        """n rows, or uniform numbers (n, 2) -> place U(-1, 1)^2, at rest."""
        p = 2 * draw(n, self.draws) - 1
        return torch.cat([p, torch.zeros_like(p)], 1)

    def obs(self, state):
        return state

    def step(self, state, action):
        a = action.clamp(-1, 1)
        p, v = state[:, :2], state[:, 2:]
        v = v + 0.05 * (4 * a - v)
        p = p + 0.05 * v
        v, p = torch.where(p.abs() > 1.5, 0, v), p.clamp(-1.5, 1.5)
        reward = -p.norm(dim=1) - 0.01 * a.square().sum(1)
        return torch.cat([p, v], 1), reward, never(reward)


class Lander:
    """LunarLanderContinuous without legs and contact, an approximation of ours: never compare.

    State (n, 6): x, y, vx, vy, angle, its rate, in Box2D's units; engines, observations and rewards
    in flight as Gymnasium's. At the ground it has landed, +120, or crashed, -100, as it is near the
    middle, slow and upright, or not.
    """
    observations, actions, horizon, draws, reward_scale = 8, 2, 1000, 2, 1.0
    mass, inertia = 4.959, 0.90      # of body and legs, from their polygons

    def reset(self, n):
        """n rows, or uniform numbers (n, 2) -> above the middle, pushed by U(-1000, 1000) for a
        step, each axis."""
        kick = 1000 * (2 * draw(n, self.draws) - 1) * 0.02 / self.mass
        start = torch.tensor([0, 1.4 * 20 / 3], device=kick.device).expand(len(kick), 2)
        return torch.cat([start, kick, torch.zeros_like(kick)], 1)

    def obs(self, state):
        x, y, vx, vy, angle, rate = state.unbind(1)
        legs = torch.zeros_like(x)                           # no contact in flight
        return torch.stack([x / 10, 0.15 * y, vx / 5, 2 / 15 * vy, angle, 0.4 * rate, legs, legs],
                           1)

    def potential(self, obs):
        """Phi: reward comes from its increase."""
        return -100 * (obs[:, :2].norm(dim=1) + obs[:, 2:4].norm(dim=1) + obs[:, 4].abs())

    def step(self, state, action):
        x, y, vx, vy, angle, rate = state.unbind(1)
        main = torch.where(action[:, 0] > 0, (action[:, 0].clamp(0, 1) + 1) / 2, 0)
        side = action[:, 1].clamp(-1, 1)
        side = torch.where(side.abs() > 0.5, side, 0)
        up, along = 1.733 * main / self.mass, 0.24 * side / self.mass
        vx = vx - angle.sin() * up + angle.cos() * along
        vy = vy + angle.cos() * up + angle.sin() * along - 10 * 0.02
        rate = rate - 0.088 * side / self.inertia
        after = torch.stack([x + 0.02 * vx, y + 0.02 * vy, vx, vy, angle + 0.02 * rate, rate], 1)
        before, obs = self.obs(state), self.obs(after)
        reward = self.potential(obs) - self.potential(before) - 0.3 * main - 0.03 * side.abs()
        down, out = obs[:, 1] <= 0, obs[:, 0].abs() >= 1
        soft = (obs[:, 0].abs() < 0.2) & (obs[:, 2:4].norm(dim=1) < 0.3) & (obs[:, 4].abs() < 0.3)
        reward = reward + torch.where(down & soft & ~out, 120.0, torch.where(down | out, -100.0, 0))
        return after, reward, down | out


class GymEnvironment:
    """Any environment of gymnasium with continuous actions, a simulator a row, in a Python loop.

    Stateful: `state` is what the simulators show. A checkpoint does not hold their inside: after
    --resume running episodes start anew.
    """
    draws, reward_scale = 1, 1.0

    def __init__(self, name, device):
        try:
            import gymnasium
        except ImportError:
            raise ValueError(f"gym:{name} needs gymnasium: pip install 'gymnasium[mujoco,box2d]'"
                             ) from None
        self.make, self.device = lambda: gymnasium.make(name), device
        try:
            one = self.make()
        except Exception as error:                           # gymnasium raises kinds of its own
            raise ValueError(f"gym:{name}: {str(error).splitlines()[0]}") from None
        low, high = (np.array(getattr(one.action_space, side, np.inf), dtype=np.float64).flatten()
                     for side in ("low", "high"))
        finite = (np.isfinite(low) & np.isfinite(high)).all()
        if len(one.observation_space.shape or ()) != 1 or not finite:
            raise ValueError(f"gym:{name}: needs flat observations and continuous, finite actions")
        self.middle, self.half = (high + low) / 2, (high - low) / 2
        self.shape = one.action_space.shape
        self.observations, self.actions = one.observation_space.shape[0], len(high)
        self.horizon, self.simulators = one.spec.max_episode_steps or 1000, [one]
        self.last = {}                                       # last observation of ended rows

    def restart(self, state, rows, u):
        """New first states for the rows (a list of integers), by uniform numbers u (n, 1)."""
        while len(self.simulators) < len(u):
            self.simulators.append(self.make())
        state = state.clone()
        for i in rows:
            self.last.pop(i, None)
            first, _ = self.simulators[i].reset(seed=int(u[i, 0] * 2**31))
            state[i] = torch.as_tensor(first, dtype=torch.float32, device=self.device)
        return state

    def reset(self, n):
        """n rows, or uniform numbers (n, 1): seeds of the simulators."""
        u = draw(n, self.draws)
        return self.restart(torch.zeros(len(u), self.observations, device=self.device),
                            range(len(u)), u)

    def obs(self, state):
        return state

    def step(self, state, action):
        action = self.middle + self.half * action.clamp(-1, 1).cpu().double().numpy()
        seen = []
        for i, a in enumerate(action.astype(np.float32)):
            if i in self.last:
                seen.append((self.last[i], 0.0, True))
                continue
            seen.append(self.simulators[i].step(a.reshape(self.shape))[:3])
            if seen[-1][2]:
                self.last[i] = seen[-1][0]
        to = lambda part: torch.as_tensor(np.stack(part), dtype=torch.float32, device=self.device)
        state, reward, done = map(to, zip(*seen))
        return state, reward, done.bool()


ENVIRONMENTS = {"strongpend": StrongPendulum, "kpoint": KinematicPoint, "servo": Servo,
                "kreach": KinematicReacher, "pendulum": Pendulum, "mountaincar": MountainCar,
                "cartpole": CartPole, "swingup": SwingUp, "acrobot": Acrobot,
                "pointmass": PointMass, "reacher": Reacher, "lander": Lander}


# ---- 3. MODEL ----------------------------------------------------------------------------------
# Every network carries a leading axis n: one set of weights an agent, all trained in the same
# matrix products. The weights of a network are one flat row of numbers, so that an optimiser's
# step, a clip or an average is a handful of operations for the whole population.


def split(flat, shapes):
    """Flat weights (n, P) -> {name: (n, *shape)}, views."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()], -1)
    return {name: part.unflatten(-1, shape)
            for part, (name, shape) in zip(parts, shapes.items())}


def layer_shapes(name, n_in, n_out, norm=True):
    """Shapes of a linear layer, and of the layer norm after it."""
    shapes = {f"{name}.weight": (n_in, n_out), f"{name}.bias": (1, n_out)}
    return shapes | ({f"{name}.gain": (1, n_out), f"{name}.shift": (1, n_out)} if norm else {})


def network_shapes(n_in, hidden, n_out):
    """Shapes of a policy (O, hidden, A) or a critic (O + A, hidden, 1): two hidden layers."""
    return (layer_shapes("0", n_in, hidden) | layer_shapes("1", hidden, hidden)
            | layer_shapes("last", hidden, n_out, norm=False))


def objective_shapes(cfg):
    """Shapes of L: networks over actions and over the rest, the LSTM, the network that ends it."""
    w, shapes = cfg.width, {}
    for i in range(cfg.action_layers):
        shapes |= layer_shapes(f"action.{i}", w if i else 2, w)
    for i in range(cfg.layers):
        shapes |= layer_shapes(f"other.{i}", w if i else 4, w, norm=False)
    shapes |= layer_shapes("other.last", w, cfg.features, norm=False)
    shapes |= {"lstm.weight": (w + cfg.features, 4 * w), "lstm.recurrent": (w, 4 * w),
               "lstm.bias": (1, 4 * w)}
    for i in range(cfg.layers):
        shapes |= layer_shapes(f"out.{i}", w, w)
    return shapes | layer_shapes("out.last", w, 1, norm=False)


def first_weights(shapes, uniform, fan, scale):
    """Flat weights (rows, P): Glorot's uniform ones, biases and shifts 0, gains 1.

    uniform(k): random numbers (rows, k);  fan: {name of a weight: (fan in, fan out)}, each a number
    or (rows, 1), where not its shape: padded inputs and outputs do not count, and an LSTM's two
    matrices are parts of one;  scale: {name of a weight: a factor, where not 1}
    """
    flat, u = [], None
    for name, (n_in, n_out) in shapes.items():
        if name.endswith(("bias", "shift", "gain")):         # these come after their matrix
            flat.append(u.new_full((len(u), n_out), float(name.endswith("gain"))))
            continue
        u, (fan_in, fan_out) = uniform(n_in * n_out), fan.get(name, (n_in, n_out))
        flat.append((2 * u - 1) * (6 / (fan_in + fan_out))**0.5 * scale.get(name, 1.0))
    return torch.cat(flat, 1)


def linear(weights, name, x):
    """x (n, rows, n_in) -> (n, rows, n_out)."""
    return torch.baddbmm(weights[f"{name}.bias"], x, weights[f"{name}.weight"])


def normalise(weights, name, x):
    """Layer norm over the last axis, with each agent's own gain and shift."""
    return torch.addcmul(weights[f"{name}.shift"], F.layer_norm(x, x.shape[-1:]),
                         weights[f"{name}.gain"])


def network(weights, x):
    """Policy's or critic's layers, x (n, ..., n_in) -> (n, ..., n_out)."""
    y = x.flatten(1, -2)
    for name in ("0", "1"):
        y = normalise(weights, name, linear(weights, name, y).relu())
    return linear(weights, "last", y).view(*x.shape[:-1], -1)


def policy(phi, obs, shapes, act_mask):
    """pi_phi(s): weights phi (n, P), obs (n, ..., O) -> actions in [-1, 1] (n, ..., A); 0 in the
    directions that act_mask (n, A) says an environment does not have."""
    action = network(split(phi, shapes), obs).tanh()
    return action * act_mask.view(len(act_mask), *[1] * (obs.dim() - 2), -1)


def critics(theta, obs, action, shapes):
    """Q_theta(s, a): weights of k critics theta (n, k, P), obs (n, B, T, O), action (n, B, T, A)
    -> (n, k, B, T)."""
    n, k, _ = theta.shape
    x = torch.cat([obs, action], -1).repeat_interleave(k, 0)
    return network(split(theta.flatten(0, 1), shapes), x).view(n, k, *obs.shape[1:-1])


class Net(NamedTuple):
    """Shapes of a population's networks, and which action directions each agent has."""
    policy: dict
    critic: dict
    objective: dict
    act_mask: torch.Tensor           # (n, A)


def mixed(x):
    """Activation of L: ReLU on one half of the units, the square on the other, whose second
    derivative is not zero."""
    a, b = x.chunk(2, -1)
    return torch.cat([a.relu(), b.square()], -1)


def layers(alpha, name, x):
    """The hidden layers name.0, name.1, ... of L, then name.last, if it has one."""
    i = 0
    while f"{name}.{i}.weight" in alpha:
        x = mixed(linear(alpha, f"{name}.{i}", x))
        x = normalise(alpha, f"{name}.{i}", x) if f"{name}.{i}.gain" in alpha else x
        i += 1
    return linear(alpha, f"{name}.last", x) if f"{name}.last.weight" in alpha else x


def znorm(x, mask):
    """Standardise each agent's numbers x (n, B, T), of those with mask 1: what makes L blind to the
    scale of rewards."""
    count = mask.sum((1, 2), keepdim=True).clamp(min=1)
    mean = (x * mask).sum((1, 2), keepdim=True) / count
    var = ((x - mean).square() * mask).sum((1, 2), keepdim=True) / count
    return (x - mean) * (var + 1e-8).rsqrt()


def backward_lstm(alpha, x, mask):
    """x (n, B, T, D) -> h (n, B, T, H), from the last step to the first, so that what an action
    led to is known where it is judged. Padding comes first: there the state stays zero."""
    n, B, T, _ = x.shape
    gates = torch.baddbmm(alpha["lstm.bias"], x.flatten(1, 2), alpha["lstm.weight"])
    gates, recurrent, outputs = gates.view(n, B, T, -1).unbind(2), alpha["lstm.recurrent"], []
    h = c = x.new_zeros(n, B, recurrent.shape[1])
    for t in reversed(range(T)):
        i, f, o, g = (gates[t] + h @ recurrent).chunk(4, -1)
        c = ((f + 1).sigmoid() * c + i.sigmoid() * g.tanh()) * mask[:, :, t, None]
        h = o.sigmoid() * c.tanh() * mask[:, :, t, None]
        outputs.append(h)
    return torch.stack(outputs[::-1], 2)


def objective(alpha, pi, a, r, d, V, act_mask, mask, symmetric=False, drop=()):
    """The learned loss of every step, l (n, B, T), bounded by 1,000.

    alpha: L's weights {name: (n, ...)};  pi: the policy's actions at the replayed states, the only
    way to phi, and a: the actions that were taken, both (n, B, T, A);  r, d: rewards, terminals
    (n, B, T);  V: values of the T states and the one after (n, B, T + 1), detached here, else L
    would become DDPG;  act_mask (n, A), mask (n, B, T): 0 marks padding;  symmetric: l(-a, -pi) =
    l(a, pi);  drop: of "reward", "value", "time"
    """
    n, B, T, A = a.shape
    pairs = torch.stack([a, pi], -1).flatten(1, 3)           # (n, B T A, 2): one action direction
    acts = layers(alpha, "action", pairs)                    # at a time, so that L fits any A
    if symmetric:
        acts = (acts + layers(alpha, "action", -pairs)) / 2
    share = act_mask / act_mask.sum(1, keepdim=True)
    acts = (acts.view(n, B * T, A, -1) * share[:, None, :, None]).sum(2)       # (n, B T, H)
    V = znorm(V.detach(), torch.cat([mask[:, :, :1], mask], 2))
    time = (torch.arange(T, device=a.device).to(r) / T).expand(n, B, T)
    other = [znorm(r, mask), time, V[:, :, 1:] * (1 - d), V[:, :, :-1]]         # as in [code]
    kept = [name not in drop for name in ("reward", "time", "value", "value")]
    other = torch.stack([part * keep for part, keep in zip(other, kept)], -1).flatten(1, 2)
    x = torch.cat([acts, layers(alpha, "other", other)], -1).view(n, B, T, -1)
    h = backward_lstm(alpha, x, mask)
    l = layers(alpha, "out", h.flatten(1, 2)).view(n, B, T)
    return 1000 * (l / 1000).tanh()


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# Equations 1 to 4, as functions of flat weights and a batch of sequences; then one update of the
# critics and one of the policies. alpha's own step is in `train`.


class Batch(NamedTuple):
    """Sequences from the replay, of n agents."""
    obs: torch.Tensor                # (n, B, T + 1, O)
    action: torch.Tensor             # (n, B, T, A)
    reward: torch.Tensor             # (n, B, T)
    terminated: torch.Tensor         # (n, B, T), 0. or 1.; a time limit is no end
    mask: torch.Tensor               # (n, B, T), 0. beyond an episode's end, or without an episode


def mean(x, mask):
    """Mean over sequences and steps with mask 1, (n, B, T) -> (n,)."""
    return (x * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def clip(gradient, limit):
    """Rows of (n, P) scaled down to norm `limit`, differentiably."""
    norm = (gradient.square().sum(1, keepdim=True) + 1e-12).sqrt()
    return gradient * (limit / norm).clamp(max=1)


def adam(weights, first, second, count, gradient, rate):
    """Adam in place, for rows that have taken different numbers of steps, count (n, 1)."""
    first.lerp_(gradient, 0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    count = count.clamp(min=1)
    scale = (second / (1 - 0.999**count)).sqrt_().add_(1e-8)
    weights.sub_(rate * (first / (1 - 0.9**count)) / scale)


def td_target(phi, theta, batch, noise, net, cfg):
    """Eq. 1, TD3's form: r + gamma (1 - d) min over two target critics of Q(s', a'), a' the target
    policy's action with clipped noise (n, B, T, A) -> (n, B, T)."""
    after = batch.obs[:, :, 1:]
    action = policy(phi, after, net.policy, net.act_mask)
    action = (action + (cfg.target_noise * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
    action = action * net.act_mask[:, None, None]
    value = critics(theta, after, action, net.critic).amin(1)
    return batch.reward + cfg.gamma * (1 - batch.terminated) * value


def critic_gradient(theta, theta_target, phi_target, noise, batch, net, cfg):
    """Eq. 1, mean squared TD errors, both critics' summed -> losses (n,), gradient (n, 2, C)."""
    with torch.no_grad():
        y = td_target(phi_target, theta_target, batch, noise, net, cfg)
    theta = theta.detach().requires_grad_()
    with torch.enable_grad():
        Q = critics(theta, batch.obs[:, :, :-1], batch.action, net.critic)
        losses = sum(mean((q - y).square(), batch.mask) for q in Q.unbind(1))
        gradient, = torch.autograd.grad(losses.sum(), theta)
    return losses.detach(), gradient


def gae(r, d, V, gamma, lam, mask):
    """Generalised advantages, r, d, mask (..., T), V (..., T + 1) -> (..., T), 0 in padding:
    A_t = r_t + gamma (1 - d_t) V_(t+1) - V_t + gamma lam (1 - d_t) A_(t+1)."""
    advantage, out = torch.zeros_like(r[..., 0]), []
    for t in reversed(range(r.shape[-1])):
        go_on = gamma * (1 - d[..., t])
        advantage = r[..., t] + go_on * V[..., t + 1] - V[..., t] + go_on * lam * advantage
        advantage = advantage * mask[..., t]
        out.append(advantage)
    return torch.stack(out[::-1], -1)


def reinforce(pi, a, advantage, act_mask):
    """REINFORCE on replayed actions: l_t = mean over directions of (a - pi)^2 times A_t."""
    share = act_mask / act_mask.sum(1, keepdim=True)
    return ((a - pi).square() * share[:, None, None]).sum(-1) * advantage


def policy_loss(phi, theta, alpha, objective_share, batch, net, cfg, rule):
    """Losses (n,) of policies phi (n, P); theta (n, 1, C): the critic that gives V or judges.

    rule: "objective": L with weights alpha (n, W);  "annealed": L has objective_share (n,) of the
    loss, DDPG's the rest;  "ddpg": -Q(s, pi(s));  "reinforce": on standardised advantages
    """
    pi, ddpg = policy(phi, batch.obs, net.policy, net.act_mask), 0             # (n, B, T + 1, A)
    if rule in ("ddpg", "annealed"):
        Q = critics(theta, batch.obs[:, :, :-1], pi[:, :, :-1], net.critic)[:, 0]
        ddpg = -mean(Q, batch.mask)
    if rule == "ddpg":
        return ddpg
    with torch.no_grad():
        V = critics(theta, batch.obs, pi, net.critic)[:, 0]                    # (n, B, T + 1)
    pi, (_, a, r, d, mask) = pi[:, :, :-1], batch
    if rule == "reinforce":
        advantage = znorm(gae(r, d, V, cfg.gamma, cfg.lam, mask), mask)
        return mean(reinforce(pi, a, advantage, net.act_mask), mask)
    l = objective(split(alpha, net.objective), pi, a, r, d, V, net.act_mask, mask, cfg.symmetric,
                  cfg.drop.split(","))
    loss = mean(l, mask)
    return loss if rule == "objective" else objective_share * loss + (1 - objective_share) * ddpg


def policy_gradient(phi, theta, alpha, objective_share, batch, net, cfg, rule):
    """Eq. 2: gradient (n, P) of policy_loss, clipped; everything but phi is constant."""
    phi = phi.detach().requires_grad_()
    with torch.enable_grad():
        losses = policy_loss(phi, theta.detach(), alpha.detach(), objective_share, batch, net, cfg,
                             rule)
        gradient, = torch.autograd.grad(losses.sum(), phi)
    return clip(gradient, cfg.clip)


def inner_step(phi, gradient, cfg):
    """Eq. 3: phi' = phi - lambda_3 g. [code] sums 100 * 20 steps and takes 1e-3 of it: 2 of the
    mean. Bounded (DIFFERS 1): g is clipped, as in eq. 2."""
    return phi - cfg.inner_rate * (clip(gradient, cfg.clip) if cfg.inner_bound else gradient)


def meta_gradient(alpha, phi, theta, batch, net, cfg):
    """Eq. 4: gradient of -J by alpha, J = mean Q_theta(s, pi_phi'(s)), through the inner step phi'.
    Each agent's own: alpha (n, W) is a copy for each; theta (n, 1, C) is constant.

    batch: (K + 1) B sequences; inner step k learns from the k-th B, all of them judge
    -> gradient (n, W), and for the log (n,): J; cosine of -grad_phi L and grad_phi' J; |grad_phi L|
    """
    alpha, after = alpha.detach().requires_grad_(), phi.detach().requires_grad_()
    theta, B = theta.detach(), batch.mask.shape[1] // (cfg.inner_steps + 1)
    with torch.enable_grad():
        for k in range(cfg.inner_steps):
            part = Batch(*(x[:, k * B:(k + 1) * B] for x in batch))
            loss = policy_loss(after, theta, alpha, None, part, net, cfg, "objective")
            gradient, = torch.autograd.grad(loss.sum(), after, create_graph=True)
            after = inner_step(after, gradient, cfg)
        pi = policy(after, batch.obs[:, :, :-1], net.policy, net.act_mask)
        J = mean(critics(theta, batch.obs[:, :, :-1], pi, net.critic)[:, 0], batch.mask)
        by_alpha, by_phi = torch.autograd.grad(-J.sum(), (alpha, after))
    gradient = gradient.detach()
    return by_alpha, J.detach(), F.cosine_similarity(gradient, by_phi, dim=1), gradient.norm(dim=1)


def critic_update(agents, active):
    """An Adam step of the critics of agents with active (n, 1) 1, on a new batch -> losses (n,).
    The others have not learned yet, their moments are 0: without a gradient they stay."""
    cfg, batch = agents.cfg, agents.sample(agents.cfg.sequences)
    noise = agents.random(torch.randn, *batch.action.shape[1:])
    losses, gradient = agents.call(critic_gradient, agents.theta, agents.theta_target,
                                   agents.phi_target, noise, batch)
    agents.critic_updates += active
    adam(agents.theta, agents.theta_first, agents.theta_second, agents.critic_updates[..., None],
         gradient * active[..., None], cfg.critic_rate)
    return losses


def policy_update(agents, active, alpha, objective_share, rule="objective"):
    """One Adam step of the policies on a new batch, after which the targets follow; arguments as
    policy_loss."""
    cfg, batch = agents.cfg, agents.sample(agents.cfg.sequences)
    gradient = agents.call(policy_gradient, agents.phi, agents.theta[:, :1], alpha,
                           objective_share, batch, rule=rule)
    agents.policy_updates += active
    adam(agents.phi, agents.phi_first, agents.phi_second, agents.policy_updates, gradient * active,
         cfg.policy_rate)
    agents.phi_target.lerp_(agents.phi, cfg.polyak)
    agents.theta_target.lerp_(agents.theta, cfg.polyak)


# ---- 5. TRAINING -------------------------------------------------------------------------------
# `run` (class Run, section 8) stands for the machine: run.steps(stage, total, state) counts the
# steps, restores and saves `state`; run.share(batch), run.average(tensors) are for many processes.


class Agents:
    """A population of actor-critic learners, one for each of N environments and each of S seeds.

    Every tensor has the leading axis n = S N, seed after seed; of several processes each holds its
    share of every seed's agents. Each of the E copies of an agent's environment fills its own slots
    of the replay in turn, an episode a slot; running episodes are not replayed.
    """

    def __init__(self, names, cfg, seeds, device, purpose, run=None):
        self.cfg, self.run, self.S, self.N = cfg, run, len(seeds), len(names)
        self.streams = [stream(seed, purpose, device) for seed in seeds]
        self.seeds, self.programs = seeds, {}
        mine = self.share(torch.arange(self.N).expand(self.S, -1)).tolist()
        self.all_names, self.names = names, [names[i] for row in mine for i in row]
        self.worlds = worlds = self.new_worlds(device)
        self.net = Net(network_shapes(worlds.O, cfg.hidden, worlds.A),
                       network_shapes(worlds.O + worlds.A, cfg.hidden, 1), objective_shapes(cfg),
                       worlds.act_mask)
        n, E, slots, H = len(worlds.act_mask), cfg.copies, cfg.slots, worlds.H
        zeros = lambda *shape, dtype=torch.float32: torch.zeros(n, *shape, dtype=dtype,
                                                                device=device)
        size = lambda shapes: sum(math.prod(shape) for shape in shapes.values())
        P, C = size(self.net.policy), size(self.net.critic)
        self.phi, self.phi_target, self.phi_first, self.phi_second = (zeros(P) for _ in range(4))
        self.theta, self.theta_target = zeros(2, C), zeros(2, C)
        self.theta_first, self.theta_second = zeros(2, C), zeros(2, C)
        self.policy_updates, self.critic_updates = zeros(1), zeros(1)
        self.obs, self.action = zeros(E, slots, H + 1, worlds.O), zeros(E, slots, H, worlds.A)
        self.reward, self.terminated = zeros(E, slots, H), zeros(E, slots, H)
        integers = lambda *shape: zeros(*shape, dtype=torch.long)
        self.lengths = integers(E, slots)                    # of the episodes in the slots
        self.slot, self.time, self.episodes = integers(E), integers(E), integers(E)
        self.state = zeros(E, worlds.Z)
        self.place = (torch.arange(n, device=device)[:, None], torch.arange(E, device=device))
        self.birth(torch.ones(n, 1, dtype=torch.bool, device=device))

    def new_worlds(self, device):
        """The environments; again, for evaluations."""
        return Worlds(self.names, device, self.all_names, self.cfg.repeat)

    def call(self, function, *inputs, **static):
        """function(*inputs, net, cfg, **static), with --compile in one piece. torch.compile takes
        no second derivatives: make_fx first writes all operations down, derivatives included."""
        if not (self.run and self.run.compiled):
            return function(*inputs, self.net, self.cfg, **static)
        *tensors, batch = inputs
        key = function.__name__, *static.values()
        if key not in self.programs:
            k = len(tensors)
            whole = lambda *flat: function(*flat[:k], Batch(*flat[k:]), self.net, self.cfg,
                                           **static)
            self.programs[key] = self.run.compile(make_fx(whole)(*tensors, *batch))
        with torch.no_grad():
            return self.programs[key](*tensors, *batch)

    def share(self, x):
        """This process's part of x (S, N, ...), which every process has made alike."""
        return self.run.share(x) if self.run else x

    def gather(self, x):
        """x (S n, ...) of this process -> (S, N, ...) of all."""
        x = x.view(self.S, -1, *x.shape[1:])
        if not self.run or self.run.world == 1:
            return x
        whole = x.new_zeros(self.S, self.N, *x.shape[2:],
                            dtype=x.dtype if x.is_floating_point() else torch.float64)
        self.share(whole).copy_(x)
        self.run.average([whole])
        return (whole * self.run.world).to(x.dtype)

    def random(self, sampler, *shape):
        """Numbers for each agent (S n, *shape), the same for any number of processes."""
        return self.share(per_seed(sampler, self.streams, self.N, *shape)).flatten(0, 1)

    def state_dict(self):
        """All agents of all processes, for a checkpoint."""
        return {name: self.gather(part) for name, part in vars(self).items()
                if isinstance(part, torch.Tensor)} | {
                    "streams": [generator.get_state() for generator in self.streams]}

    def load_state_dict(self, saved):
        """Put back what state_dict gave; simulators of gymnasium begin a new episode."""
        for generator, state in zip(self.streams, saved["streams"]):
            generator.set_state(state)
        for name, part in saved.items():
            if name != "streams":
                getattr(self, name).copy_(self.share(part).flatten(0, 1))
        for env, own in self.worlds.groups:
            if isinstance(env, GymEnvironment):
                u = self.random(torch.rand, self.cfg.copies)[own]
                self.time[own], fresh = 0, env.reset(u.flatten()[:, None])
                self.state[own, :, :env.observations] = fresh.unflatten(0, (len(own), -1))
        self.obs[*self.place, self.slot, self.time] = self.worlds.obs(self.state)

    def birth(self, born):
        """New weights, an empty replay and new episodes where born (n, 1) is true."""
        cfg, worlds, uniform = self.cfg, self.worlds, lambda k: self.random(torch.rand, k)
        O, A, h = worlds.observations, worlds.actions, cfg.hidden
        phi = first_weights(self.net.policy, uniform, {"0.weight": (O, h), "last.weight": (h, A)},
                            {"last.weight": cfg.policy_scale})
        theta = torch.stack([first_weights(self.net.critic, uniform, {"0.weight": (O + A, h)}, {})
                             for _ in range(2)], 1)
        state = worlds.reset(self.random(torch.rand, cfg.copies, worlds.draws))
        fresh = {"phi": phi, "phi_target": phi, "theta": theta, "theta_target": theta,
                 "state": state}
        for name in ("phi", "phi_target", "phi_first", "phi_second", "theta", "theta_target",
                     "theta_first", "theta_second", "policy_updates", "critic_updates", "slot",
                     "time", "episodes", "state"):
            old = getattr(self, name)
            new = fresh.get(name, torch.zeros_like(old))
            old.copy_(torch.where(born.view(-1, *[1] * (old.dim() - 1)), new, old))
        self.obs[*self.place, self.slot, self.time] = self.worlds.obs(self.state)

    @torch.no_grad()
    def act(self, at_random):
        """One step in every copy, into the replay; uniform actions where at_random (n, 1)."""
        E, A, draws = self.cfg.copies, self.worlds.A, self.worlds.draws
        noise = self.random(torch.randn, E, A)
        u, starts = self.random(torch.rand, E, A + draws).split((A, draws), -1)
        here = (*self.place, self.slot, self.time)
        action = policy(self.phi, self.obs[here], self.net.policy, self.net.act_mask)
        action = (action + self.cfg.noise * noise).clamp(-1, 1)
        action = torch.where(at_random[..., None], 2 * u - 1, action) * self.net.act_mask[:, None]
        after, reward, terminated = self.worlds.step(self.state, action)
        self.action[here], self.terminated[here] = action, terminated.float()
        self.reward[here] = self.worlds.reward_scale * reward
        self.time += 1
        self.obs[*self.place, self.slot, self.time] = self.worlds.obs(after)
        self.lengths[*self.place, self.slot] = self.time
        end = terminated | (self.time >= self.worlds.horizon)
        self.slot.copy_(torch.where(end, (self.slot + 1) % self.cfg.slots, self.slot))
        self.time.copy_(torch.where(end, 0, self.time))
        self.episodes += end
        self.state.copy_(self.worlds.restart(after, end, starts))
        self.obs[*self.place, self.slot, self.time] = self.worlds.obs(self.state)

    def sample(self, count):
        """`count` sequences of each agent: a copy, one of its finished episodes and a place in it,
        uniformly; episodes shorter than T are padded -> Batch."""
        T, H, (E, slots) = self.cfg.length, self.worlds.H, self.lengths.shape[1:]
        u = self.random(torch.rand, 3, count)
        rows, copy = self.place[0], (u[:, 0] * E).long()
        finished = self.episodes[rows, copy].clamp(max=slots - 1)              # (n, B)
        slot = (self.slot[rows, copy] - 1 - (u[:, 1] * finished).long()) % slots
        length = self.lengths[rows, copy, slot]
        first = (u[:, 2] * ((length - T).clamp(min=0) + 1)).long()
        episode, t = (rows * E + copy) * slots + slot, torch.arange(T + 1, device=u.device)
        at = episode[..., None] * (H + 1) + (first[..., None] + t).clamp(max=H)
        obs = self.obs.flatten(0, 3)[at]
        at = episode[..., None] * H + (first[..., None] + t[:-1]).clamp(max=H - 1)
        action, reward, terminated = (x.flatten(0, 3)[at] for x in (
            self.action, self.reward, self.terminated))
        mask = (t[:-1] < length[..., None]) & (finished > 0)[..., None]
        return Batch(obs, action, reward, terminated, mask.float())


def learn(agents, age, iteration, alpha, objective_share, rule):
    """Steps and updates of one iteration, the same in meta-training and meta-tests, for agents of
    ages age (n, 1); other arguments as policy_loss -> critic losses (n,), and 1. where a policy
    learns (n, 1).
    """
    cfg = agents.cfg
    # COLLECT
    agents.act(age < cfg.random_steps)
    # INNER UPDATE
    ready = agents.episodes.any(1, keepdim=True)             # there is something to learn from
    losses = critic_update(agents, (ready & (age >= cfg.critic_start)).float())
    active = (ready & (age >= cfg.policy_start)).float()
    if (iteration + 1) % cfg.delay == 0:
        policy_update(agents, active, alpha, objective_share, rule)
    return losses, active


def ages(first, life, iteration):
    """Iterations since birth of agents whose first lives last first (n, 1), the others `life`."""
    old = torch.full_like(first, iteration)
    return torch.where(old < first, old, (old - first) % life) if life else old


def first_objective(cfg, seeds, device):
    """alpha (S, W) before meta-training."""
    w, streams = cfg.width, [stream(seed, 20, device) for seed in seeds]
    fan = 2 * w + cfg.features, 4 * w                        # of the LSTM: from x and h to 4 gates
    return first_weights(objective_shapes(cfg), lambda k: per_seed(torch.rand, streams, k),
                         {"lstm.weight": fan, "lstm.recurrent": fan},
                         {"out.last.weight": cfg.objective_scale})


def train(cfg, run):
    """Meta-train -> alpha as it is to be used, after 12, 25, 50 and 100 % of the time (4, S, W)."""
    S, N, names, device = len(run.seeds), cfg.agents, cfg.train.split(","), run.device
    agents = Agents([names[i % len(names)] for i in range(N)], cfg, run.seeds, device, 0, run)
    own, judge, start = len(agents.phi) // S, agents.new_worlds(device), cfg.policy_start
    mine = lambda x: agents.share(torch.tensor(x, device=device).expand(S, N)).flatten()[:, None]
    deaths = [start + (cfg.life - start) * (i + 1) // N for i in range(N)]     # the first, spread
    first_life, teacher = mine(deaths), mine([i < cfg.teachers for i in range(N)])     # (S own, 1)
    alpha = first_objective(cfg, run.seeds, device)
    used, moments = alpha.clone(), torch.zeros(2, *alpha.shape, device=device)
    kept, updates = torch.zeros(4, *alpha.shape, device=device), torch.zeros(S, 1, device=device)
    state = {"agents": agents, "alpha": alpha, "used": used, "moments": moments, "kept": kept,
             "updates": updates}
    points = [math.ceil(cfg.iterations * part) for part in (0.12, 0.25, 0.5, 1)]
    for iteration in run.steps("meta-training", cfg.iterations, state):
        age = ages(first_life, cfg.life, iteration)
        if cfg.life and iteration and any((iteration - t) % cfg.life == 0 for t in deaths):
            agents.birth(age == 0)
        # COLLECT, INNER UPDATE
        alphas, share = alpha.repeat_interleave(own, 0), min(1.0, iteration / (cfg.anneal or 1))
        rule = "annealed" if share < 1 or cfg.teachers else "objective"
        share = torch.where(teacher, 0.0, share)[:, 0]
        losses, active = learn(agents, age, iteration, alphas, share, rule)
        run.watch(agents.gather(losses))
        # META UPDATE
        if (iteration + 1) % cfg.delay == 0:
            batch = agents.sample(cfg.sequences * (cfg.inner_steps + 1))
            gradient, *numbers = agents.call(meta_gradient, alphas, agents.phi,
                                             agents.theta[:, :1], batch)
            gradient = clip(gradient, cfg.clip) * active
            total, count = (x.view(S, own, -1).sum(1) for x in (gradient, active))
            run.average([total, count])
            updates += count > 0
            rate = cfg.objective_rate * (
                1 - (1 - cfg.objective_decay) * iteration / cfg.iterations)
            # Both are averages over processes now: a count of one agent may be less than 1
            count = torch.where(count > 0, count, 1)
            adam(alpha, *moments, updates, total / count, rate)
            used.lerp_(alpha, 1 - cfg.average)
        # LOG
        for point, snapshot in zip(points, kept):
            if iteration + 1 == point:
                snapshot.copy_(used)
        if (iteration + 1) % cfg.log_every == 0:
            with run.clock("evaluation"):
                log_training(cfg, run, agents, judge, age, numbers, losses, teacher)
        if iteration + 1 == cfg.iterations:
            del state["agents"]                              # not for the checkpoint: they are done
    return kept


def log_training(cfg, run, agents, judge, age, numbers, losses, teacher):
    """A line a seed: alignment with the critic, and noise-free returns of agents past half of
    their lives that learn by L."""
    old = ((age >= cfg.life / 2) & ~teacher).float()[:, 0]
    returns = agents.gather(evaluate(agents, judge))
    old, cosine, norm, loss = map(agents.gather, (old, *numbers[1:], losses))
    rows = []
    for s, seed in enumerate(run.seeds):
        row = {"seed": seed, "critic_loss": loss[s].mean().item()}
        for name in cfg.train.split(","):
            own = old[s] * torch.tensor([float(n == name) for n in agents.all_names]).to(old)
            for key, x in {"return": returns, "cosine": cosine, "norm": norm}.items():
                if own.any():
                    row[f"{key}_{name}"] = ((x[s] * own).sum() / own.sum()).item()
        rows.append(row)
    run.log(rows)


# ---- 6. EVALUATION -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(agents, worlds):
    """Mean return of each agent's policy without noise over `test_episodes` episodes (S n,); the
    same first states at every call."""
    streams = [stream(seed, 10, agents.phi.device) for seed in agents.seeds]
    starts = agents.share(per_seed(torch.rand, streams, agents.N, agents.cfg.test_episodes,
                                   worlds.draws)).flatten(0, 1)
    state, returns = worlds.reset(starts), torch.zeros_like(starts[..., 0])
    alive = torch.ones_like(returns)
    for t in range(worlds.H):
        action = policy(agents.phi, worlds.obs(state), agents.net.policy, agents.net.act_mask)
        state, reward, terminated = worlds.step(state, action)
        returns += alive * reward
        alive = alive * (~terminated & (t + 1 < worlds.horizon))
    return returns.mean(1)


def meta_test(alpha, env, seed, cfg=Config(), run=None, stage="meta-test", rule="objective"):
    """Fresh agents, `test_agents` in each environment of env ("servo,kreach"); their policies learn
    from the frozen L alone: alpha (S, W), for seeds seed (a list, or a number for S = 1).

    rule: "objective", or "ddpg", "reinforce", for which alpha does not matter
    -> returns without noise (S, points, environments, test_agents), at 0, test_every, ... and
    test_iterations
    """
    seeds, names = seed if isinstance(seed, list) else [seed], env.split(",")
    total = cfg.test_iterations
    device = run.device if run else alpha.device
    agents = Agents([name for name in names for _ in range(cfg.test_agents)], cfg, seeds, device,
                    1, run)
    judge, points = agents.new_worlds(device), [*range(0, total, cfg.test_every), total]
    returns = torch.zeros(len(seeds), len(points), agents.N, device=device)
    age = torch.zeros_like(agents.policy_updates)            # the same for all
    alphas = alpha.repeat_interleave(len(age) // len(seeds), 0)
    state = {"agents": agents, "returns": returns}
    for iteration in run.steps(stage, total, state) if run else range(total):
        if iteration == 0:
            returns[:, 0] = agents.gather(evaluate(agents, judge))
        age.fill_(iteration)
        losses, _ = learn(agents, age, iteration, alphas, age[:, 0], rule)
        if run:
            run.watch(agents.gather(losses))
        if iteration + 1 in points:
            with run.clock("evaluation") if run else contextlib.nullcontext():
                now = agents.gather(evaluate(agents, judge))
            returns[:, points.index(iteration + 1)] = now
            means = now.unflatten(1, (len(names), -1)).mean(2).tolist()
            if run:
                run.log([{"seed": seed, **{f"return_{name}": x for name, x in zip(names, own)}}
                         for seed, own in zip(seeds, means)])
        if iteration + 1 == total:
            del state["agents"]                              # not for the checkpoint: they are done
    return returns.unflatten(2, (len(names), -1))


def negated(alpha, cfg):
    """Weights of -L: the last layer's change sign, and tanh is odd."""
    shapes = objective_shapes(cfg)
    flip = [torch.full((math.prod(shape),), -1.0 if name.startswith("out.last") else 1.0)
            for name, shape in shapes.items()]
    return alpha * torch.cat(flip).to(alpha)


def learned_gradient(alpha, cfg):
    """Where L, alpha (S, W), pushes an action -> the grid of a - pi (41,), and -dL/dpi there (S, 2,
    41), scaled to a maximum of 1 a seed: when values rise after the action, and when they fall.

    Made-up sequences: action `a` at step T // 2, all else 0, and values that step up or down there.
    """
    T, S, x = cfg.length, len(alpha), torch.linspace(-1, 1, 41, device=alpha.device)
    B, middle = 2 * len(x), cfg.length // 2
    a = torch.zeros(S, B, T, 1, device=alpha.device)
    a[:, :, middle, 0] = x.repeat(2)
    V = torch.zeros(S, B, T + 1, device=alpha.device)
    V[:, :len(x), middle + 1:], V[:, len(x):, middle + 1:] = 1, -1
    pi, nothing = torch.zeros_like(a).requires_grad_(), torch.zeros_like(a[..., 0])
    l = objective(split(alpha, objective_shapes(cfg)), pi, a, nothing, nothing, V,
                  torch.ones(S, 1, device=alpha.device), nothing + 1, cfg.symmetric,
                  cfg.drop.split(","))
    push = -torch.autograd.grad(l.sum(), pi)[0][:, :, middle, 0].view(S, 2, -1)
    return x, push / push.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)


SIZES = "width", "features", "action_layers", "layers", "symmetric", "drop"    # what L is


def save_objective(path, alpha, cfg, seeds):
    """A file for --objective: {"alpha": {name: (S, ...)}, "sizes": {field: value}, "train",
    "seeds"}; names and shapes as objective_shapes gives them."""
    content = {"alpha": split(alpha, objective_shapes(cfg)), "train": cfg.train, "seeds": seeds,
               "sizes": {name: getattr(cfg, name) for name in SIZES}}
    write(path, lambda part: torch.save(content, part))


def load_objective(cfg, run):
    """From a file -> alpha (S, W), each seed's own or the only one, and what it was trained on."""
    path, shapes = cfg.objective, objective_shapes(cfg)
    try:
        saved = torch.load(path, map_location=run.device, weights_only=True)
        sizes, weights = saved["sizes"], saved["alpha"]
        sizes, train = {name: sizes[name] for name in SIZES}, saved["train"]
        flat = torch.cat([weights[name].flatten(1) for name in shapes if name in weights], 1)
        seeds = saved["seeds"]
    except FileNotFoundError:
        raise ValueError(f"--objective {path} is missing") from None
    except Exception as error:                               # a damaged file raises almost anything
        raise ValueError(f"--objective {path} is not a valid objective "
                         f"({type(error).__name__})") from None
    for name, value in sizes.items():
        same = set(value.split(",")) == set(cfg.drop.split(",")) if name == "drop" else (
            value == getattr(cfg, name))
        if not same:
            raise ValueError(f"--objective {path} has --{name.replace('_', '-')} {value}, not "
                             f"{getattr(cfg, name)}: give its own")
    if flat.shape != (len(seeds), sum(map(math.prod, shapes.values()))) or not seeds or (
            not flat.isfinite().all()):
        raise ValueError(f"--objective {path} has not the weights that it says, all finite")
    missing = sorted(set(run.seeds) - set(seeds))
    if len(seeds) > 1 and missing:
        raise ValueError(f"--objective {path} has seeds {seeds}, not {missing[0]}")
    return flat[[seeds.index(seed) if len(seeds) > 1 else 0 for seed in run.seeds]], train


def plan(cfg, flops_per_second):
    """What a run of `cfg` does and how long it should take at this rate of matrix products."""
    passes = 120 * cfg.sequences * cfg.length * cfg.hidden * (cfg.hidden + 12)
    agent = passes / (0.3 * flops_per_second)                # seconds an iteration, roughly
    tests = cfg.num_seeds * cfg.test_agents * len(cfg.test.split(","))
    train = 0 if cfg.objective else cfg.iterations * (7e-3 + cfg.num_seeds * cfg.agents * agent)
    stages = 4 + cfg.extras * (1 if cfg.objective else 4)
    minutes = (train + stages * cfg.test_iterations * (4e-3 + tests * agent / 2)) / 60
    what = f"tests {cfg.objective}" if cfg.objective else (
        f"meta-trains on {cfg.train} for {cfg.iterations:,} iterations, tests")
    return f"{what} on {cfg.test}: {cfg.num_seeds} seed(s), about {minutes:.1f} min here"


def experiment(cfg, run):
    """Meta-train, meta-test, compare -> see `report`."""
    for names, agents in ((cfg.train, cfg.agents * (not cfg.objective)),
                          (cfg.test, cfg.test_agents * len(cfg.test.split(",")))):
        if agents:                                           # fail now, if ever
            Worlds(names.split(","), run.device, repeat=cfg.repeat)
            run.share(torch.zeros(1, agents))
    if cfg.objective:
        alpha, trained_on = load_objective(cfg, run)
        kept = []
    else:
        *kept, alpha = train(cfg, run)
        trained_on = cfg.train
        if run.rank == 0:
            save_objective(run.folder / "objective.pt", alpha, cfg, run.seeds)
    tests = {"L": (alpha, "objective"), "DDPG": (alpha, "ddpg"), "REINFORCE": (alpha, "reinforce"),
             "untrained L": (first_objective(cfg, run.seeds, run.device), "objective")}
    if cfg.extras:
        tests["-L"] = negated(alpha, cfg), "objective"
        tests |= {f"L at {part} %": (early, "objective") for part, early in zip((12, 25, 50), kept)}
    returns = {stage: meta_test(own, cfg.test, run.seeds, cfg, run, stage, rule).cpu()
               for stage, (own, rule) in tests.items()}      # (S, points, environments, agents)
    return report(cfg, run, returns, trained_on.split(","), *learned_gradient(alpha, cfg))


def short(x):
    """Numbers, in lists of any depth, to seven digits: for a summary."""
    return [short(part) for part in x] if isinstance(x, list) else float(f"{x:.7g}")


def report(cfg, run, returns, trained_on, grid, push):
    """Scores: 0 as untrained L, 1 as DDPG, each at the end of a meta-test, mean of its agents ->
    {"per_seed": a dictionary per seed with "headline" numbers, "beside": for the closing table,
    "points": iterations of the tests' curves, "trained_on", "grid": see learned_gradient}."""
    names, per_seed, notes = cfg.test.split(","), [], {}
    final = {stage: x[:, -1].mean(2) for stage, x in returns.items()}          # (S, environments)
    span = final["DDPG"] - final["untrained L"]              # where DDPG fails, scores mean nothing
    span = torch.where(span.abs() < 1e-9, 1e-9, span)
    score = {stage: (x - final["untrained L"]) / span for stage, x in final.items()}
    seen = torch.tensor([name in trained_on for name in names])
    for s, seed in enumerate(run.seeds):
        numbers = {f"{key}_{name}": score[stage][s, i].item()
                   for stage, key in (("L", "score"), ("REINFORCE", "reinforce_score"))
                   for i, name in enumerate(names)}
        if "-L" in score:
            numbers["negated_minus_untrained"] = score["-L"][s].mean().item()
        for part in (12, 25, 50, 100) if "L at 12 %" in score else ():
            at = score["L" if part == 100 else f"L at {part} %"][s]
            numbers |= {f"checkpoint_trend_{key}_{part}": at[which].mean().item()
                        for key, which in (("seen", seen), ("unseen", ~seen)) if which.any()}
        rows = [{key: value if type(value) is int else short(value) for key, value in row.items()
                 if key not in ("seed", "stage")} for row in run.rows
                if row["seed"] == seed and row["stage"] == "meta-training"]
        per_seed.append({"seed": seed, "headline": numbers, "meta_training": rows,
                         "returns": {stage: {name: short(x[s, :, i].tolist()) for i, name in
                                             enumerate(names)} for stage, x in returns.items()},
                         "push": short(push[s].tolist())})
    for i, name in enumerate(names):
        notes[f"score_{name}"] = f"{'seen' if seen[i] else 'UNSEEN'}; returns: " + ", ".join(
            f"{stage} {final[stage][:, i].mean():.4g}"
            for stage in ("L", "DDPG", "REINFORCE", "untrained L"))
        if span[:, i].mean() <= 0:
            notes[f"score_{name}"] += "; DDPG is not above untrained L: no score"
    points = [*range(0, cfg.test_iterations, cfg.test_every), cfg.test_iterations]
    return {"per_seed": per_seed, "beside": notes, "points": points, "trained_on": trained_on,
            "grid": grid.tolist()}


# ---- 7. FIGURE ---------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, GREY, PINK = (                                            # Okabe and Ito
    "#0072B2", "#E69F00", "#009E73", "#777777", "#CC79A7")
RULES = {"L": BLUE, "DDPG": ORANGE, "REINFORCE": GREEN, "untrained L": GREY}


def plot(summary, path):
    """Draw from a summary alone: meta-training above, below it a panel for each meta-test; thin
    lines: seeds, thick: means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "legend.fontsize": 8})
    cfg, rows = summary["config"], summary["per_seed"]
    train, test = cfg["train"].split(","), cfg["test"].split(",")
    top = [] if cfg["objective"] else [(plot_training, name) for name in train]
    top += [(plot_trend, "")] if "L at 12 %" in rows[0]["returns"] else []
    top += [(plot_push, "")]
    bottom = [(plot_test, name) for name in test]
    columns = max(len(top), min(len(bottom), 4))
    lines = 1 + math.ceil(len(bottom) / columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained",
                                figsize=(max(8.4, 4 * columns), 3.6 * lines))
    panels = top + [None] * (columns - len(top)) + bottom
    panels += [None] * (axes.size - len(panels))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    for axis, panel in zip(axes.flat, panels):
        if panel is None:
            axis.set_axis_off()
            continue
        axis.set_title(f"({next(letters, 'z')}) {panel[0](axis, summary, rows, panel[1])}")
    figure.suptitle("MetaGenRL: a learned loss L trains new agents. "
                    f"Thin: each of {len(rows)} seed(s); thick: mean")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): thin lines and their thick mean."""
    for curve in curves if len(curves) > 1 else []:
        axis.plot(x, curve, color=colour, ls=style, lw=0.7, alpha=0.5)
    return axis.plot(x, np.mean(curves, 0), color=colour, ls=style, lw=2.2, label=label)


def plot_training(axis, summary, rows, name):
    """Returns of agents in the second half of life; how L's gradient and the critic's agree ->
    title."""
    other = axis.twinx()
    lines = []
    for own, key, colour, label in ((axis, "return", BLUE, "return"),
                                    (other, "cosine", PINK, "cosine with the critic's gradient")):
        points = [[(row["step"], row[f"{key}_{name}"]) for row in seed["meta_training"]
                   if f"{key}_{name}" in row] for seed in rows]
        if not points[0]:                                    # too short for a line of the log
            continue
        points = np.array(points)                            # (seeds, logs, 2)
        width = max(1, points.shape[1] // 20)
        smooth = np.array([np.convolve(y, np.ones(width) / width, "valid")
                           for y in points[..., 1]])
        lines += plot_lines(own, points[0, width - 1:, 0] / 1000, smooth, colour, label)
    axis.set(xlabel="thousand iterations of meta-training", ylabel=f"return, {name}")
    other.set(ylim=(-1, 1))
    other.spines["right"].set_visible(True)
    other.tick_params(axis="y", colors=PINK)
    axis.legend(handles=lines, loc="lower right")
    return f"Meta-training on {name}"


def plot_trend(axis, summary, rows, _):
    """Scores of L as it was at four times of meta-training -> title."""
    parts = (12, 25, 50, 100)
    for key, colour in ("seen", BLUE), ("unseen", ORANGE):
        if f"checkpoint_trend_{key}_12" in rows[0]["headline"]:
            curves = [[row["headline"][f"checkpoint_trend_{key}_{part}"] for part in parts]
                      for row in rows]
            plot_lines(axis, parts, curves, colour, f"{key} environments")
    axis.axhline(1, color="black", ls=":", lw=1)
    axis.axhline(0, color=GREY, ls=":", lw=1)
    axis.text(12, 1.02, "DDPG", va="bottom")
    axis.text(100, 0.02, "untrained L", ha="right", va="bottom", color=GREY)
    axis.set(xlabel="% of meta-training", ylabel="score of L, frozen", xscale="log",
             xticks=parts, ylim=(-1, 1.4))
    axis.set_xticks(parts, [str(part) for part in parts])
    axis.minorticks_off()
    axis.legend(loc="lower right")
    return "The loss gets better with time"


def plot_push(axis, summary, rows, _):
    """Slices of the learned gradient -> title."""
    for i, (colour, label) in enumerate(((GREEN, "values rise after it"),
                                         (PINK, "values fall after it"))):
        plot_lines(axis, summary["grid"], [row["push"][i] for row in rows], colour, label)
    axis.axhline(0, color="black", lw=0.7)
    axis.axvline(0, color="black", lw=0.7)
    axis.set(xlabel="a - pi: the action taken, from the policy's",
             ylabel="push on the policy, -dL/dpi (scaled)")
    axis.legend(loc="lower left")
    return "What L has learned"


def plot_test(axis, summary, rows, name):
    """Returns of fresh agents while they learn -> title."""
    for stage, colour in RULES.items():
        curves = np.mean([row["returns"][stage][name] for row in rows], 2)     # over agents
        plot_lines(axis, summary["points"], curves, colour,
                   {"L": "L, frozen"}.get(stage, stage))
    axis.set(xlabel="iteration", ylabel=f"return without noise, {name}")
    axis.legend(loc="center right")
    kind = "seen" if name in summary["trained_on"] else "UNSEEN"
    return f"Fresh agents, {name}: {kind}"


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
