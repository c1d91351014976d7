# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
r"""Memory-based meta-learning is amortised Bayes: networks that match exact Bayes, in one file.

[O19] Ortega et al., "Meta-learning of Sequential Strategies", arXiv 1905.03030.
[M20] Mikulik et al., "Meta-trained agents implement Bayes-optimal agents", arXiv 2010.11223.
[G23] Genewein et al., "Memory-Based Meta-Learning on Non-Stationary Distributions",
      arXiv 2302.03067. "[G23 code]" marks what was read in its official repository.

IDEA
  Draw a hidden task theta, draw a sequence from it, and let a network with memory predict each next
  symbol; repeat with fresh tasks, millions of times. The weights are the same for all tasks, so
  whatever belongs to one task must be worked out in the activations while the sequence is read.
  Only one predictor has the least log loss: exact Bayes, the posterior predictive. So plain
  gradient descent compiles priors, posteriors, even beliefs on when a hidden change happened, into
  a forward pass. Here the exact answers are known: "close to Bayes" is a number of nats.

ALGORITHM (the three templates of [O19]; w: weights, h_t: the history before t)
  repeat
    theta ~ p(theta), one for each of B sequences
    1 prediction   x ~ p(x | theta);  J = -1/(BT) sum_{b,t} log p_w(x_t | x_<t)
    2 imitation    act by a_t ~ p_w(. | h_t);  J = -1/(BT) sum_{b,t} log p_w(best arm | h_t)
    3 decision     act by a_t ~ p_w(. | h_t);  J = actor-critic loss of the rewards
    w <- Adam(w, grad J)
  Least at:  1 the posterior predictive,  2 P(arm is best | h_t), so that acting is Thompson
  sampling,  3 the Bayes-optimal player, the dynamic programme over beliefs.
  Grouped by history, J = entropy + KL(Bayes || network), and its gradient by the logits at h is
  p(h) (p_w - p_Bayes) / T: Bayes is a fixed point of meta-training. The networks never see theta.

SYMBOLS
  symbol     in the code       shape        meaning
  S          leading axis                   networks trained at once: seeds (x sources), seeds first
  B, N, T    batch, length                  sequences a step, sequences of a test, symbols
  D, H       inputs, hidden                 width of a network's input and of its state
  x          x                 (S, B, T)    symbols; bits, classes or real numbers
  theta      theta             (S, B, T|2)  hidden bias at each step, or of each arm
  q          q                 (S, B, T)    predicted P(x_t = 1 | x_<t)
  m          switches          (S, B, T)    does a new segment begin at t?
  Q*         Q                 (T,T,T,T,2)  exact value of each arm at each belief
  phi        phi                            map from one machine's states to the other's
  D_s, D_o   ds_.., do_..                   what phi leaves unexplained: states, outputs
  KT, PTW, LIN                              exact mixtures (Krichevsky-Trofimov: one segment;
                                            Partition Tree Weighting; Willems' linear one)
  Yardsticks: stationary families, KL(Bayes || network) a symbol, 0 at Bayes. Coins that switch:
  regret, sum_t KL(theta_t || q_t) a sequence, above 0 even for Bayes. Bandits: return lost.

RESULT
  quick, means of 5 seeds (0-4) with 95 % t intervals, 2 CPU cores (AMD EPYC), 6.7 min for all:
    KL to Bayes a symbol, coin, T = 20     4.6e-5 [3.9e-5, 5.3e-5]   with a wrong prior 5.1e-3
      die 1.4e-4, Gaussian 2.6e-4, exponential 5.9e-4
    D_s network -> Bayes 9e-4 (untrained 0.055), Bayes -> network 0.092 (untrained 0.221)
    bandits: return below optimal  sampled 0.066 [0.061, 0.072]      myopic greedy 0.066
                                   arg max 0.030 [0.019, 0.042]
    Thompson sampler's return      11.91 [11.90, 11.92]              exact 11.93, optimal 12.43
    LIN network's regret, T = 64   1.002 times exact LIN's
    PTW network, way from KT to exact PTW  0.839 [0.832, 0.846]
    on `regular`, unseen: PTW network 0.227 [0.189, 0.265] nats below the best exact predictor
  No network is below exact Bayes on its own source (lowest: -0.9 standard errors, paired).
  Architectures (3 seeds): with sinusoidal positions a transformer counts, and is within 3.2 % of
    PTW at T = 64; at T = 256 its regret is 4.2 times PTW's, the LSTM's 1.34, ALiBi's 1.41.
  paper preset (one GPU): not run yet.

DIFFERS
  1. The papers' bodies could not be read again for this program. Tasks, networks and training
     follow the official code of [G23] where marked; the design of the structural comparison
     and of the bandits of [M20] is from memory, and no number of theirs is quoted.
  2. quick is small: T = 64 for the coins that switch (the paper: 256), a width of 64, one
     architecture; Adam at 5e-3 on a cosine ([G23 code]: 1e-4, constant).
  3. A start token (zeros) lets the networks predict x_1, too. [G23 code] never predicts it;
     regrets are therefore over t = 2 .. T.
  4. The LSTMs of the stationary families start with a forget bias of 0, all others with 1 [G23
     code]. With 1 (`--forget-bias 1`) the untrained D_s network -> Bayes is 0.003, not 0.055.
     Inputs go into the core, and its state into the read-out, through a linear layer each.
  5. The optimum of the bandits is the exact finite-horizon programme, not Gittins' index, and the
     players are trained by a synchronous actor-critic with TD(lambda) targets, not IMPALA.
  6. The transformer has no dropout (data are without end) and counts positions upwards; the
     code of [G23] counts them down, so that a position's code depends on the length.
  7. `uniform` draws whole lengths 1 .. 40: our choice. The official generator can stall on a 0.
  8. Not here: stack-LSTM, steps by length tokens, tests at twice the length (at four times: yes,
     on a fifth of the sequences).
  9. Long, for three papers, each with exact solutions, are in it.

RUN
  python bayes_meta.py                      # on a Mac: --device cpu, for its float64
  python bayes_meta.py --families "" --bandit-steps 0 --thompson-steps 0 --sources ptw,lin \
      --models rnn,lstm,stack_rnn,transformer_alibi --out runs/bayes_meta/switching
  torchrun --standalone --nproc_per_node=8 bayes_meta.py --preset paper
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

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


def chosen(names):
    """"a,b" -> ["a", "b"]."""
    return [name for name in names.split(",") if name]


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [G23 code]: its official code."""
    families: str = "bernoulli,dice,gaussian,exponential"   # stationary tasks to predict; "": none
    alpha: float = 1.0               # Beta(alpha, beta) prior of coins and arms; whole for bandits
    beta: float = 1.0                # second parameter of that prior; both multiples of 1/2
    length: int = 20                 # symbols of a stationary task, T [G23 code: 20]
    predict_steps: int = 2000        # meta-training steps of each family's predictor
    predict_batch: int = 128         # sequences a step, B [G23 code: 128]
    predict_hidden: int = 32         # width of the predictors, H
    forget_bias: float = 0.0         # first bias of the predictors' forget gates; others': 1
    bandit_steps: int = 1500         # actor-critic updates; 0: no bandits
    thompson_steps: int = 400        # imitation updates of the Thompson sampler
    bandit_length: int = 20          # pulls of an episode, T
    bandit_batch: int = 256          # episodes an update
    bandit_rate: float = 5e-3        # of Adam, for the players; falls to 0 along a cosine
    bandit_hidden: int = 48          # width of the players
    entropy: float = 0.03            # first weight of the entropy bonus; it falls linearly to 0
    gamma: float = 1.0               # discount in the players' training; tests have none
    gae_lambda: float = 0.9          # of generalised advantage estimation
    models: str = "lstm"             # for the switching sources: rnn,lstm,transformer_alibi,..
    sources: str = "ptw,lin,regular,uniform"    # to train on, a network each; "": none
    switch_length: int = 64          # symbols of a training sequence, T [G23: 256]
    switch_steps: int = 1500         # meta-training steps on the switching sources
    switch_batch: int = 64           # sequences a step
    switch_hidden: int = 64          # width of the recurrent networks
    transformer_width: int = 64      # width of the transformers [G23 code: 64]
    layers: int = 2                  # transformer blocks
    heads: int = 4                   # attention heads
    period: int = 20                 # steps between the switches of the source `regular`
    longest: int = 40                # longest segment of the source `uniform`
    learning_rate: float = 5e-3      # of Adam, for the predictors
    cosine: bool = True              # let learning_rate fall to 0 along a cosine
    clip: float = 1.0                # bound on the gradient norm of each run [G23 code]
    simulate_steps: int = 600        # fits of the maps between state machines
    eval_sequences: int = 1000       # test sequences a seed and task
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds trained side by side: seed, seed + 1, ...
    log_every: int = 50              # steps between lines of the log
    save_every: int = 200            # steps between checkpoints

    def __post_init__(self):
        low = {"forget_bias": -10, "bandit_steps": 0, "thompson_steps": 0, "entropy": 0, "seed": 0,
               "eval_sequences": 4}
        high = {"gamma": 1, "gae_lambda": 1, "seed": 1 << 24}
        for name, value in asdict(self).items():
            above = value >= low[name] if name in low else type(value) is str or value > 0
            if type(value) in (int, float) and not (above and value <= high.get(name, 1e300)):
                raise ValueError(f"--{name.replace('_', '-')} must be "
                                 + (f"at least {low[name]}" if name in low else "above 0")
                                 + (f" and at most {high[name]}" if name in high else " and finite")
                                 + f", not {value}")
        for option, known in (("families", FAMILIES), ("models", MODELS), ("sources", SOURCES)):
            names = chosen(getattr(self, option))
            for name in names:
                if name not in known:
                    raise ValueError(f"no {name!r} among the {option}: {', '.join(known)}")
            if len(set(names)) < len(names):
                raise ValueError(f"--{option} names one twice: {getattr(self, option)}")
        if self.transformer_width % self.heads:
            raise ValueError(f"--heads {self.heads} must divide --transformer-width")
        if (self.bandit_steps or self.thompson_steps) and self.alpha % 1:
            raise ValueError("--alpha must be whole: the bandits' exact Thompson sampler needs it")
        if 2 * self.alpha % 1 or 2 * self.beta % 1:
            raise ValueError("--alpha and --beta must be multiples of 1/2: that is what is sampled")
        if chosen(self.sources) and not chosen(self.models):
            raise ValueError("--models must name one, or --sources be empty")
        if not (chosen(self.families) or self.bandit_steps or self.thompson_steps
                or chosen(self.sources)):
            raise ValueError("nothing to do: no families, no bandits, no sources")


PRESETS = {
    "smoke": dict(families="bernoulli,gaussian", length=16, predict_steps=30, predict_batch=32,
                  predict_hidden=16, bandit_steps=20, thompson_steps=20, bandit_batch=32,
                  bandit_length=16, bandit_hidden=16, sources="ptw,lin", switch_length=16,
                  switch_steps=20, switch_batch=16, switch_hidden=16, simulate_steps=30,
                  eval_sequences=100, log_every=10, save_every=10),
    "quick": dict(),
    "paper": dict(predict_steps=100_000, bandit_steps=20_000, thompson_steps=20_000,
                  bandit_length=50, bandit_batch=1024, bandit_rate=1e-3,
                  models="rnn,lstm,stack_rnn,transformer_sincos,transformer_alibi,"
                  "transformer_relative", switch_length=256,
                  switch_steps=100_000, switch_batch=128, switch_hidden=128, layers=5, heads=8,
                  learning_rate=1e-4, cosine=False, eval_sequences=2048, log_every=1000,
                  save_every=5000),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# Stationary families, two-armed bandits, and coins whose bias changes unseen. Each stands beside
# its exact Bayesian solution, in float64. Everywhere, x_t may only be predicted from x_<t.


def stream(seed, purpose, device):
    """Random generator of one seed for one purpose: 0-29 training, 30-59 tests, 60-89 weights,
    90-92 the maps between machines, noise.

    The number is small, because torch's CPU generator keeps only 32 bits of it.
    """
    return torch.Generator(device).manual_seed(128 * seed + purpose)


def uniform(generators, *shape):
    """U(0, 1) of this shape; from a list of generators, a slice of each: (S, *shape)."""
    if isinstance(generators, list):
        return torch.stack([uniform(generator, *shape) for generator in generators])
    device = generators.device if generators is not None else None
    return torch.rand(shape, generator=generators, device=device)


def normal(generators, *shape):
    """N(0, 1), likewise."""
    u = uniform(generators, *shape).clamp(2**-24, 1 - 2**-24)
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def gamma_variate(generators, shape_parameter, *shape):
    """Gamma(shape_parameter, rate 1), likewise: sums of exponentials and half a squared normal."""
    if shape_parameter <= 0 or 2 * shape_parameter % 1:
        raise ValueError(f"prior parameters are positive multiples of 1/2, not {shape_parameter}")
    total = -(1 - uniform(generators, *shape, int(shape_parameter))).log().sum(-1)
    return total + normal(generators, *shape).square() / 2 if shape_parameter % 1 else total


def before(x, dim):
    """Sums over what came before: y_t = x_1 + .. + x_{t-1}, in float64. y_t never touches x_t."""
    if not x.shape or not x.shape[dim]:
        raise ValueError("a sequence needs at least one symbol, T >= 1")
    total = x.double().cumsum(dim)
    first, rest = torch.zeros_like(total.narrow(dim, 0, 1)), total.narrow(dim, 0, x.shape[dim] - 1)
    return torch.cat([first, rest], dim)


class Categorical:
    """A die or coin, theta ~ Dirichlet(alpha). A prediction is K log probabilities."""

    def __init__(self, alpha):
        if not all(0 < a < math.inf for a in alpha):
            raise ValueError(f"prior parameters must be positive, not {alpha}")
        self.alpha, self.inputs, self.outputs = alpha, len(alpha), len(alpha)

    def sample(self, generators, B, T):
        """-> classes x (S, B, T)."""
        theta = torch.stack([gamma_variate(generators, a, B, 1) for a in self.alpha], -1)
        edges = (theta / theta.sum(-1, keepdim=True)).cumsum(-1)[..., :-1]     # (S, B, 1, K - 1)
        return (uniform(generators, B, T)[..., None] > edges).sum(-1)

    def encode(self, x):
        """What a network reads of each symbol: one-hot (..., T, K)."""
        return F.one_hot(x, self.inputs).float()

    def statistics(self, x):
        """Sufficient statistics of x_<t: counts n_k, (..., T, K)."""
        return before(F.one_hot(x, self.inputs), -2)

    def predictive(self, counts):
        """log p(x_t = k | x_<t) = log (n_k + alpha_k) / (n + sum_k alpha_k)."""
        weight = counts + counts.new_tensor(self.alpha)
        return (weight / weight.sum(-1, keepdim=True)).log()

    def log_loss(self, p, x):
        """Logits p (.., T, K) and what came, x (.., T) -> nats (.., T)."""
        return F.cross_entropy(p.movedim(-1, 1), x, reduction="none")

    def divergence(self, p, q):
        """KL(p || q) in nats (..., T)."""
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)


class Gaussian:
    """mu ~ N(m0, 1/tau0), x ~ N(mu, 1/tau_x). A prediction is (mean, log precision)."""
    inputs, outputs = 2, 2

    def __init__(self, m0=0.0, tau0=1.0, tau_x=1.0):
        if min(tau0, tau_x) <= 0:
            raise ValueError(f"precisions must be positive, not {tau0} and {tau_x}")
        self.m0, self.tau0, self.tau_x = m0, tau0, tau_x

    def sample(self, generators, B, T):
        mu = self.m0 + normal(generators, B, 1) / math.sqrt(self.tau0)
        return mu + normal(generators, B, T) / math.sqrt(self.tau_x)

    def encode(self, x):
        return torch.stack([x, torch.ones_like(x)], -1)       # the one tells 0 from "nothing yet"

    def statistics(self, x):
        """Posterior mean (tau0 m0 + tau_x sum x) / tau_n, precision tau_n = tau0 + n tau_x."""
        tau = self.tau0 + self.tau_x * before(torch.ones_like(x), -1)
        return torch.stack([(self.tau0 * self.m0 + self.tau_x * before(x, -1)) / tau, tau], -1)

    def predictive(self, statistics):
        """N(m_n, 1/tau_n + 1/tau_x)."""
        mean, tau = statistics.unbind(-1)
        return torch.stack([mean, -(1 / tau + 1 / self.tau_x).log()], -1)

    def log_loss(self, p, x):
        mean, log_tau = p.unbind(-1)
        return (math.log(2 * math.pi) - log_tau + log_tau.exp() * (x - mean).square()) / 2

    def divergence(self, p, q):
        (mean_p, log_p), (mean_q, log_q) = p.unbind(-1), q.unbind(-1)
        ratio = (log_q - log_p).exp()
        return (log_p - log_q + ratio + log_q.exp() * (mean_p - mean_q).square() - 1) / 2


class Exponential:
    """lambda ~ Gamma(a, rate b), x ~ Exp(lambda). A prediction is Lomax: (log shape, log scale)."""
    inputs, outputs = 3, 2

    def __init__(self, a=2.0, b=1.0):
        if min(a, b) <= 0:
            raise ValueError(f"prior parameters must be positive, not {a} and {b}")
        self.a, self.b = a, b

    def sample(self, generators, B, T):
        rate = gamma_variate(generators, self.a, B, 1) / self.b
        return -(1 - uniform(generators, B, T)).log() / rate

    def encode(self, x):
        return torch.stack([x.clamp(max=10), x.log1p(), torch.ones_like(x)], -1)   # heavy tails

    def statistics(self, x):
        """Posterior Gamma's a + n and b + sum x."""
        return torch.stack([self.a + before(torch.ones_like(x), -1), self.b + before(x, -1)], -1)

    def predictive(self, statistics):
        """Density (a + n) (b + sum x)^(a + n) / (b + sum x + x_t)^(a + n + 1)."""
        return statistics.log()

    def log_loss(self, p, x):
        log_a, log_b = p.unbind(-1)
        return (log_a.exp() + 1) * (x * (-log_b).exp()).log1p() - log_a + log_b

    def divergence(self, p, q):
        """For p = (a, b), q = (c, d): x = b (exp(e / a) - 1) with e ~ Exp(1). So E log(1 + x/b) is
        1/a, and E log(1 + x/d) a smooth mean over e, by Gauss-Laguerre."""
        (log_a, log_b), (log_c, log_d) = p.double().unbind(-1), q.double().unbind(-1)
        node, weight = (torch.from_numpy(part).to(p.device)
                        for part in np.polynomial.laguerre.laggauss(32))
        y = node / log_a.exp()[..., None]
        log_x = y + (-(-y).expm1()).log() + (log_b - log_d)[..., None]         # log(x / d)
        return (log_a - log_b - 1 - (-log_a).exp() - log_c + log_d
                + (log_c.exp() + 1) * (F.softplus(log_x) @ weight))


def coin(alpha, beta):
    """A coin with P(heads) ~ Beta(alpha, beta); heads are class 1."""
    return Categorical((beta, alpha))


FAMILIES = {"bernoulli": lambda cfg: coin(cfg.alpha, cfg.beta),
            "dice": lambda cfg: Categorical((1.0, 1.0, 1.0)),
            "gaussian": lambda cfg: Gaussian(), "exponential": lambda cfg: Exponential()}


def bernoulli_predict(x, alpha=1.0, beta=1.0):
    """Bits x (..., T) -> P(x_t = 1 | x_<t) (..., T) under theta ~ Beta(alpha, beta)."""
    family = coin(alpha, beta)
    return family.predictive(family.statistics(check_symbols(x, 2)))[..., 1].exp()


def dice_predict(x, alpha=(1.0, 1.0, 1.0)):
    """Classes x (..., T) -> P(x_t = k | x_<t) (..., T, K) under theta ~ Dirichlet(alpha)."""
    family = Categorical(tuple(alpha))
    return family.predictive(family.statistics(check_symbols(x, len(alpha)))).exp()


def gaussian_predict(x, m0=0.0, tau0=1.0, tau_x=1.0):
    """x (..., T) -> mean and precision of x_t given x_<t, each (..., T)."""
    family = Gaussian(m0, tau0, tau_x)
    mean, log_precision = family.predictive(family.statistics(x)).unbind(-1)
    return mean, log_precision.exp()


def exponential_predict(x, a=2.0, b=1.0):
    """x >= 0 (..., T) -> shape and scale of the Lomax law of x_t given x_<t, each (..., T)."""
    if (x < 0).any():
        raise ValueError("exponential variables are at least 0")
    return Exponential(a, b).statistics(x).unbind(-1)


def check_symbols(x, K, rows=False):
    """x, tensor or array, as whole numbers (..., T) below K, (B, T) with `rows`; or ValueError."""
    x = torch.as_tensor(x)
    if not x.shape or not x.shape[-1]:
        raise ValueError("a sequence needs at least one symbol, T >= 1")
    if rows and x.dim() != 2:
        raise ValueError(f"a batch of sequences is (B, T), not {tuple(x.shape)}")
    if ((x < 0) | (x >= K) | (x != x.long())).any():
        raise ValueError(f"symbols must be whole numbers from 0 to {K - 1}")
    return x.long()


# Coins with switches [G23]: segments of flips, each with a bias of its own from Beta(1/2, 1/2).
# Only the bits are seen. What differs between the sources is the law of the switches.

SOURCES = ("static", "ptw", "lin", "regular", "uniform")


def tree_depth(T):
    """Depth of the smallest binary tree with T leaves."""
    return (T - 1).bit_length()


def sample_switches(source, B, T, generators=None, period=20, longest=40):
    """-> (B, T), or (S, B, T) from a list of generators: True where a new segment begins, t > 1.

    static   never
    ptw      a block of 2^d steps is one segment or, with probability 1/2, is cut in the middle and
             each half treated likewise, a tree of its own each sequence; the first T of 2^d steps
    lin      after n steps in a segment, a switch with probability 1 / (2 n)
    regular  every `period` steps
    uniform  segments of 1, .., `longest` steps, equally likely
    """
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}: {', '.join(SOURCES)}")
    if min(B, T, period, longest) < 1:
        raise ValueError(f"B, T, period, longest must be at least 1, not {B, T, period, longest}")
    if source == "ptw":
        cut = uniform(generators, B, 2 << tree_depth(T)) < 0.5                 # a coin a block
        switches = torch.zeros_like(cut[..., :1 << tree_depth(T)])
        alive = torch.ones_like(cut[..., :1])
        for level in range(tree_depth(T)):                   # all 2^level blocks at once
            alive = alive & cut[..., 1 << level:2 << level]
            block = switches.shape[-1] >> level
            switches[..., block // 2::block] |= alive
            alive = alive[..., None].expand(*alive.shape, 2).flatten(-2)
        return switches[..., :T]
    u = uniform(generators, B, T)
    if source == "lin":          # P(length > n) = prod_{k=1..n} 1 - 1/(2k): lengths by inversion
        survival = lin_survival(T).to(u)[2:].flip(0)
        lengths = 1 + len(survival) - torch.searchsorted(survival, u, right=True)
    else:
        lengths = {"static": torch.full_like(u, T), "regular": torch.full_like(u, period),
                   "uniform": 1 + (u * longest).floor()}[source].long()
    switches = torch.zeros(*u.shape[:-1], T + 1, dtype=torch.bool, device=u.device)
    return switches.scatter_(-1, lengths.cumsum(-1).clamp(max=T), True)[..., :T]


def sample_source(source, B, T, generators=None, period=20, longest=40):
    """-> bits x (long), theta = P(x_t = 1), switches, each (B, T), or (S, B, T) from a list."""
    switches = sample_switches(source, B, T, generators, period, longest)
    bias = (uniform(generators, B, T) * math.pi / 2).sin().square()            # Beta(1/2, 1/2)
    theta = bias.gather(-1, switches.long().cumsum(-1))
    return (uniform(generators, B, T) < theta).long(), theta, switches


def lin_survival(T):
    """P(a segment of LIN has at least n steps), n = 0 .. T + 1, float64."""
    k = torch.arange(1, T + 1, dtype=torch.float64)
    return F.pad((1 - 0.5 / k).cumprod(0), (2, 0), value=1.0)


def kt_table(T, device):
    """log of the KT evidence of k ones among n symbols, (T + 1, T + 1) at [n, k], float64.

    KT(n, k) = Gamma(k + 1/2) Gamma(n - k + 1/2) / (pi Gamma(n + 1)): theta ~ Beta(1/2, 1/2).
    """
    n = torch.arange(T + 1, dtype=torch.float64, device=device)
    half, zeros = torch.lgamma(n + 0.5), (n[:, None] - n).clamp(min=0).long()
    return half + half[zeros] - torch.lgamma(n + 1)[:, None] - math.log(math.pi)


def kt_predict(x):
    """Bits (..., T) -> P(x_t = 1 | x_<t) (..., T) when one bias rules all: Bayes for `static`."""
    return bernoulli_predict(x, 0.5, 0.5)


def oracle_predict(x, switches):
    """KT that is told where the segments begin: a bound that no predictor of bits can beat."""
    ones, steps = before(x, -1), torch.arange(x.shape[-1], device=x.device)
    start = torch.where(switches, steps, 0).cummax(-1).values
    return (ones - ones.gather(-1, start) + 0.5) / (steps - start + 1)


def ptw_scan(x, depth=None):
    """Bits x (B, T) -> log PTW evidence of x_1 .. x_t, and of x_1 .. x_{t-1} 1: (2, B, T).

    PTW_0 = KT;  PTW_k(x_1:n) = 1/2 KT(x_1:n) + 1/2 PTW_{k-1}(left half) PTW_{k-1}(right half).
    Level by level from the leaves up, for all prefixes at once. At each t the block that holds t
    began at `start`; its left half is a whole block of the level below, ended at `middle`.
    """
    x = check_symbols(x, 2, rows=True)
    T, device = x.shape[1], x.device
    depth = tree_depth(T) if depth is None else depth
    if not tree_depth(T) <= depth <= 62:
        raise ValueError(f"depth {depth} is too small for {T} symbols, or too large: "
                         f"{tree_depth(T)} to 62")
    table, t = kt_table(T, device).flatten(), torch.arange(1, T + 1, device=device)
    count = F.pad(x.long().cumsum(1), (1, 0))                                  # (B, T + 1)
    ones = torch.stack([count[:, 1:], count[:, :-1] + 1])                      # (2, B, T)
    kt = lambda n, k: table.index_select(0, (n * (T + 1) + k).flatten()).view(k.shape)
    evidence = kt(torch.ones_like(t), torch.stack([x.long(), torch.ones_like(x).long()]))
    for level in range(1, depth + 1):
        block = 1 << level
        start = (t - 1) // block * block
        middle = start + block // 2
        left = torch.where(t > middle, evidence[0, :, (middle - 1).clamp(max=T - 1)], 0)
        whole = kt(t - start, ones - count[:, start])
        evidence = torch.logaddexp(whole, evidence + left) - math.log(2)
    return evidence


def ptw_log_evidence(x, depth=None):
    """Bits (B, T) -> log PTW_depth(x_1 .. x_t) (B, T), float64; depth: ceil(log2 T) or more."""
    return ptw_scan(x, depth)[0]


def ptw_predict(x, depth=None):
    """Bits (B, T) -> P(x_t = 1 | x_<t) (B, T), float64: Bayes for the source `ptw`."""
    actual, heads = ptw_scan(x, depth)
    return (heads - F.pad(actual[:, :-1], (1, 0))).exp()


def lin_log_evidence(x, block=16):
    """Bits x (B, T) -> log LIN(x_1 .. x_t) (B, T), float64.

    With G[s, e] = KT(x_s .. x_e) S(e - s + 1), S the survival of a segment, and A(s) the joint
    evidence of x_<s and of a segment that begins at s:
      evidence(x_1 .. x_e) = sum_{s <= e} A(s) G[s, e]
      A(e + 1) = sum_{s <= e} A(s) G[s, e] / (2 (e - s + 1)),  A(1) = 1
    a triangular linear system. It is solved `block` ends at a time, relative to the evidence so
    far, so that no length over- or underflows; what is kept of A is its logarithm.
    """
    x = check_symbols(x, 2, rows=True)
    (B, T), device = x.shape, x.device
    steps = torch.arange(T + 1, device=device)
    table = (kt_table(T, device) + lin_survival(T).to(device)[:T + 1, None].log()).flatten()
    hazard = 0.5 / steps.double().clamp(min=1)
    count = F.pad(x.long().cumsum(1), (1, 0))                                  # (B, T + 1)
    log_a = torch.zeros(B, 1, dtype=torch.float64, device=device)              # of starts so far
    so_far, evidence = torch.zeros_like(log_a), []
    # The two large arrays live in the same memory in all blocks: fresh memory costs more than sums.
    index, values = count.new_empty(B * block * T), table.new_empty(B * block * T)
    for first in range(0, T, block):
        last = min(first + block, T)
        shape, size = (B, last - first, last), B * (last - first) * last       # (B, e, s)
        n = (steps[first + 1:last + 1, None] - steps[:last]).clamp(min=0)      # lengths, (e, s)
        ones = torch.sub(count[:, first + 1:last + 1, None], count[:, None, :last],
                         out=index[:size].view(shape))
        ones[:, :, first:].clamp_(min=0)                     # above the diagonal is no segment
        ones += n * (T + 1)
        G = torch.index_select(table, 0, index[:size], out=values[:size]).view(shape)
        G[:, :, :first + 1] += (log_a - so_far)[:, None]
        G.exp_()[:, :, first:].tril_()                       # A G for starts known, G for new ones
        known, new = G[:, :, :first + 1].sum(-1), G[:, :, first + 1:].clone()
        G *= hazard[n]
        entry = G[:, :, :first + 1].sum(-1, keepdim=True)
        # A(e + 1) = entry(e) + sum over starts s inside the block of A(s) G[s, e] hazard
        system = F.pad(-G[:, :, first + 1:], (0, 1)) + torch.eye(last - first).to(G)
        a = torch.linalg.solve_triangular(system, entry, upper=False)[..., 0]  # (B, e): A(e + 1)
        evidence.append(so_far + (known + (new @ a[:, :-1, None])[..., 0]).log())
        log_a = torch.cat([log_a, so_far + a.log()], 1)
        so_far = evidence[-1][:, -1:]
    return torch.cat(evidence, 1)


def lin_predict(x):
    """Bits (B, T) -> P(x_t = 1 | x_<t) (B, T), float64: Bayes for the source `lin`."""
    x = check_symbols(x, 2, rows=True)
    evidence = lin_log_evidence(x)
    actual = (evidence - F.pad(evidence[:, :-1], (1, 0))).exp()                # P(x_t | x_<t)
    return torch.where(x == 1, actual, 1 - actual)


def regret(theta, q):
    """KL(theta_t || q_t) (..., T) in nats, float64: theta the true bias, q the predicted one."""
    if not all(((0 <= p) & (p <= 1)).all() for p in (theta, q)):
        raise ValueError("theta and q are probabilities, from 0 to 1")
    theta, q = (p.double().clamp(1e-12, 1 - 1e-12) for p in (theta, q))
    return theta * (theta / q).log() + (1 - theta) * ((1 - theta) / (1 - q)).log()


# Bandits: two arms that pay 1 with probability theta_k ~ Beta(alpha, beta), T pulls an episode.


def bandit_values(T, alpha=1.0, beta=1.0, gamma=1.0, policy=None):
    """Exact finite-horizon dynamic programme over beliefs -> Q (T, T, T, T, 2), 16 T^4 bytes.

    Q[t, s1, f1, s2, action]: expected return of action 0 (arm 1) or 1 (arm 2) after t pulls, of
    which arm 1 succeeded s1 times and failed f1 times and arm 2 succeeded s2 times, and of acting
    optimally from then on, or as policy(s1, f1, s2, f2) -> P(arm 1) does. 0 where that cannot be.
    """
    if T < 1 or min(alpha, beta) <= 0 or not 0 <= gamma <= 1:
        raise ValueError(f"T >= 1, alpha, beta > 0, gamma in [0, 1], not {T, alpha, beta, gamma}")
    n = torch.arange(T, dtype=torch.float64)
    s1, f1, s2 = n[:, None, None], n[None, :, None], n[None, None, :]
    Q, V = torch.zeros(T, T, T, T, 2).double(), torch.zeros(T + 1, T + 1, T + 1).double()
    for t in reversed(range(T)):
        f2 = (t - s1 - f1 - s2).clamp(min=0)
        m1 = (s1 + alpha) / (s1 + f1 + alpha + beta)
        m2 = (s2 + alpha) / (s2 + f2 + alpha + beta)
        # Q(b, k) = m_k (1 + gamma V(b, success of k)) + (1 - m_k) gamma V(b, failure of k)
        Q[t] = torch.stack([
            m1 * (1 + gamma * V[1:, :-1, :-1]) + (1 - m1) * gamma * V[:-1, 1:, :-1],
            m2 * (1 + gamma * V[:-1, :-1, 1:]) + (1 - m2) * gamma * V[:-1, :-1, :-1]], -1)
        Q[t] *= (s1 + f1 + s2 <= t)[..., None]
        if policy is None:
            best = Q[t].amax(-1)
        else:
            first = policy(s1, f1, s2, f2)
            best = first * Q[t, ..., 0] + (1 - first) * Q[t, ..., 1]
        V = F.pad(best, (0, 1, 0, 1, 0, 1))
    return Q


def bandit_gap(actions, rewards, Q):
    """actions, rewards (..., T) -> sum_t V*(b_t) - Q*(b_t, a_t), (...): what was lost.

    Its mean is exactly V* minus the player's expected return (the performance difference lemma,
    gamma = 1), with a much smaller spread than returns have.
    """
    won = lambda arm, reward: before((actions == arm) & (rewards == reward), -1).long()
    t = torch.arange(actions.shape[-1], device=actions.device).expand_as(actions)
    values = Q.to(actions.device)[t, won(0, 1), won(0, 0), won(1, 1)]          # (..., T, 2)
    return (values.amax(-1) - values.gather(-1, actions[..., None])[..., 0]).sum(-1)


def thompson_probability(s1, f1, s2, f2, alpha=1.0, beta=1.0):
    """P(theta_1 > theta_2 | successes and failures of both arms), float64, for a whole alpha.

    sum_{i < a1} B(a2 + i, b1 + b2) / ((b1 + i) B(1 + i, b1) B(a2, b2)), (a, b) the posteriors'.
    """
    if alpha % 1 or min(alpha, beta) <= 0:
        raise ValueError(f"alpha must be a whole number, both positive, not {alpha, beta}")
    if any((torch.as_tensor(n) < 0).any() for n in (s1, f1, s2, f2)):
        raise ValueError("numbers of successes and failures are at least 0")
    a1, b1, a2, b2 = torch.broadcast_tensors(*(
        torch.as_tensor(n).double() + prior for n, prior in
        ((s1, alpha), (f1, beta), (s2, alpha), (f2, beta))))
    log_beta = lambda a, b: torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    i = torch.arange(int(a1.max()), dtype=torch.float64, device=a1.device)
    a1, b1, a2, b2 = (n[..., None] for n in (a1, b1, a2, b2))
    terms = (log_beta(a2 + i, b1 + b2) - (b1 + i).log() - log_beta(1 + i, b1)
             - log_beta(a2, b2)).exp()
    return (terms * (i < a1)).sum(-1)


def greedy_policy(s1, f1, s2, f2, alpha=1.0, beta=1.0):
    """P(arm 1) of the player that pulls the arm with the higher posterior mean."""
    m1, m2 = (s1 + alpha) / (s1 + f1 + alpha + beta), (s2 + alpha) / (s2 + f2 + alpha + beta)
    return (m1 > m2).double() + (m1 == m2).double() / 2


# ---- 3. MODEL ----------------------------------------------------------------------------------
# Every network carries a leading axis S: one set of weights a seed (times a source), all trained in
# the same matrix products. model(x (S, B, T, D)) -> (S, B, T, outputs); output t depends on x_<=t.


class Linear(nn.Module):
    """S linear layers side by side, (S, .., n_in) -> (S, .., n_out), one from each generator."""

    def __init__(self, n_in, n_out, generators, bias=True):
        super().__init__()
        draw = lambda *shape: (uniform(generators, *shape) * 2 - 1) / math.sqrt(n_in)
        self.weight = nn.Parameter(draw(n_in, n_out))                          # (S, n_in, n_out)
        self.bias = nn.Parameter(draw(1, n_out)) if bias else None

    def forward(self, x):
        rows = x.flatten(1, -2)
        rows = (rows @ self.weight if self.bias is None else
                torch.baddbmm(self.bias, rows, self.weight))
        return rows.unflatten(1, x.shape[1:-1])


class LSTMScan(torch.autograd.Function):
    """The LSTM's loop over time for a stack, with its gradient by hand: a matter of speed alone.

    x (S, T, B, D);  weight (S, H + D + 1, 4H): rows for h, x and 1, columns for the output, input
    and forget gates and the candidate;  h, c (S, B, H) the state before -> h, c (S, T, B, H)
    By hand, the weight's gradient is one product over all T. x, h and c get none.
    """

    @staticmethod
    def forward(ctx, x, weight, h, c):
        if any(ctx.needs_input_grad[i] for i in (0, 2, 3)):
            raise RuntimeError("LSTMScan has no gradient by its input or first state: detach them")
        (S, T, B, _), H = x.shape, h.shape[-1]
        gates, tanh, hs, cs = (x.new_empty(S, T, B, n * H) for n in (4, 1, 1, 1))
        seen, c0 = torch.cat([x.new_empty(S, T, B, H), x, torch.ones_like(x[..., :1])], -1), c
        for t in range(T):
            seen[:, t, :, :H] = h
            gate = torch.bmm(seen[:, t], weight, out=gates[:, t])
            gate[..., :3 * H].sigmoid_(), gate[..., 3 * H:].tanh_()
            o, i, f, g = gate.chunk(4, -1)
            c = torch.mul(f, c, out=cs[:, t]).addcmul_(i, g)
            h = torch.mul(o, torch.tanh(c, out=tanh[:, t]), out=hs[:, t])
        ctx.save_for_backward(gates, tanh, weight, seen, cs, c0)
        return hs, cs

    @staticmethod
    def backward(ctx, dhs, dcs, block=8):
        gates, tanh, weight, seen, cs, c0 = ctx.saved_tensors
        T, H, dgates = dhs.shape[1], dhs.shape[-1], torch.empty_like(gates)
        dh, dc, back = dhs[:, -1], dcs[:, -1], weight[:, :H].mT
        for first in reversed(range(0, T, block)):           # in blocks, which stay in the cache
            part = slice(first, min(first + block, T))
            c = torch.cat([cs[:, first - 1:first] if first else c0[:, None],
                           cs[:, first:part.stop - 1]], 1)   # c_{t-1}
            (o, i, f, g), tanh_c = gates[:, part].chunk(4, -1), tanh[:, part]
            # Gradient of each gate per unit of dh (output gate) or of dc (the other three)
            slope = torch.cat([tanh_c * o * (1 - o), g * i * (1 - i), c * f * (1 - f),
                               i * (1 - g * g)], -1).unflatten(-1, (4, H))
            through = o * (1 - tanh_c * tanh_c)              # of c_t per unit of dh
            for t in reversed(range(part.start, part.stop)):
                n, gate = t - first, dgates[:, t].unflatten(-1, (4, H))
                dc = torch.addcmul(dc, dh, through[:, n])
                torch.mul(slope[:, n, :, :1], dh[:, :, None], out=gate[:, :, :1])
                torch.mul(slope[:, n, :, 1:], dc[:, :, None], out=gate[:, :, 1:])
                if t:
                    dh = torch.baddbmm(dhs[:, t - 1], dgates[:, t], back)
                    dc = torch.addcmul(dcs[:, t - 1], dc, f[:, n])
        return None, seen.flatten(1, 2).mT @ dgates.flatten(1, 2), None, None


class Recurrent(nn.Module):
    """Linear input -> core -> linear head. Its state after x_<=t is all that it knows of x_<=t.

    The core is scan(x (S, T, B, D), state) -> a tuple of states (S, T, B, ..), h first.
    """
    gates = 1                      # width of what enters the core, in H

    def __init__(self, inputs, outputs, hidden, generators):
        super().__init__()
        self.hidden, gates = hidden, self.gates * hidden
        self.input = Linear(inputs, gates, generators)
        self.recurrent = Linear(hidden, gates, generators, bias=False)
        self.head = Linear(hidden, outputs, generators)

    def unroll(self, x, state=None):
        """x (S, B, T, D), the state before it (None: zeros) -> outputs (S, B, T, O), states.

        states: a tuple of tensors (S, B, T, ..), one state after each input; to go on where they
        end, pass [part[:, :, -1] for part in states]; gradients stop there.
        """
        state = self.start(x) if state is None else [part.detach() for part in state]
        states = self.scan(x.transpose(1, 2), state)                           # (S, T, B, ..)
        return self.head(states[0]).transpose(1, 2), tuple(s.transpose(1, 2) for s in states)

    def start(self, x):
        return [x.new_zeros(*x.shape[:2], self.hidden)]

    def forward(self, x):
        return self.unroll(x)[0]


class RNN(Recurrent):
    """h_t = relu(W h_{t-1} + U x_t)."""

    def scan(self, x, state):
        (h,), hs = state, []
        for now in self.input(x).unbind(1):
            h = torch.baddbmm(now, h, self.recurrent.weight).relu()
            hs.append(h)
        return (torch.stack(hs, 1),)


class LSTM(Recurrent):
    """Long short-term memory; forget_bias: the forget gates' initial bias."""
    gates = 4

    def __init__(self, inputs, outputs, hidden, generators, forget_bias=1.0):
        super().__init__(inputs, outputs, hidden, generators)
        with torch.no_grad():
            self.input.bias[..., 2 * hidden:3 * hidden] = forget_bias

    def start(self, x):
        zeros, = super().start(x)
        return [zeros, zeros]                                                  # h and c

    def scan(self, x, state):
        weight = torch.cat([self.recurrent.weight, self.input.weight, self.input.bias], 1)
        return LSTMScan.apply(x, weight, *state)

    def forward(self, x):
        if len(x) > 1:
            return self.unroll(x)[0]
        # A stack of one: torch's own kernel, with its order of gates (i, f, candidate, o).
        i_f_g_o = lambda w: w[0].unflatten(-1, (4, -1))[..., [1, 2, 3, 0], :].flatten(-2).mT
        weights = [i_f_g_o(w) for w in (self.input.weight, self.recurrent.weight, self.input.bias)]
        weights[2] = weights[2][:, 0]
        h = torch.lstm(x[0], self.start(x), [*weights, torch.zeros_like(weights[2])], True, 1, 0.0,
                       self.training, False, True)[0]
        return self.head(h[None])


def stack_update(stack, value, action):
    """stack (.., depth, cell), value (.., cell), action (.., 3): push, pop, no-op -> next stack.

    new[i] = push old[i - 1] + pop old[i + 1] + noop old[i]; a push puts `value` on top; zeros come
    in from below. Softly: each cell is the average of what the three would leave there.
    """
    push, pop, noop = action[..., None, None].unbind(-3)
    down = torch.cat([value[..., None, :], stack[..., :-1, :]], -2)
    return push * down + pop * F.pad(stack[..., 1:, :], (0, 0, 0, 1)) + noop * stack


class StackRNN(Recurrent):
    """An RNN that reads the top of a stack of its own and chooses, softly, to push, pop or wait."""
    depth, cell = 30, 8

    def __init__(self, inputs, outputs, hidden, generators):
        super().__init__(inputs, outputs, hidden, generators)
        self.top = Linear(self.cell, hidden, generators, bias=False)
        self.value = Linear(hidden, self.cell, generators)
        self.action = Linear(hidden, 3, generators)

    def start(self, x):
        return super().start(x) + [x.new_zeros(*x.shape[:2], self.depth, self.cell)]

    def scan(self, x, state):
        (h, stack), hs, stacks = state, [], []
        for now in self.input(x).unbind(1):
            h = (now + self.recurrent(h) + self.top(stack[..., 0, :])).relu()
            stack = stack_update(stack, self.value(h), self.action(h).softmax(-1))
            hs.append(h), stacks.append(stack)
        return torch.stack(hs, 1), torch.stack(stacks, 1)


def alibi(heads, T, device=None):
    """ALiBi biases (heads, T, T): 0 at lag 0, -slope (lag - 1/2) for the past [G23 code], -inf for
    the future."""
    slope = 2 ** (-8 * torch.arange(1, heads + 1, device=device) / heads)
    lag = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    bias = -slope[:, None, None] * (lag - 0.5 * (lag > 0))
    return bias.masked_fill(lag < 0, -math.inf)


def sinusoids(positions, width):
    """positions (T) -> (T, width): sines and cosines of wavelengths 2 pi .. 20,000 pi."""
    rate = torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(1e4) / width))
    angle = positions[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)[:, :width]


class Block(nn.Module):
    """Post-norm transformer block, without biases in the attention [G23 code]."""

    def __init__(self, width, heads, encoding, generators):
        super().__init__()
        self.heads, self.encoding = heads, encoding
        self.qkv = Linear(width, 3 * width, generators, bias=False)
        self.out = Linear(width, width, generators, bias=False)
        self.up = Linear(width, 4 * width, generators)
        self.down = Linear(4 * width, width, generators)
        self.scale = nn.Parameter(torch.ones(len(generators), 2, 1, 1, width))
        self.shift = nn.Parameter(torch.zeros(len(generators), 2, 1, 1, width))
        if encoding == "relative":
            self.lag = Linear(width, width, generators, bias=False)
            self.biases = nn.Parameter(torch.zeros(len(generators), 2, 1, heads, 1, width // heads))

    def attention(self, h, bias):
        """h (S, B, T, H), bias (heads, T, T) or None -> (S, B, T, H)."""
        S, B, T, H = h.shape
        q, k, v = self.qkv(h).view(S, B, T, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        if self.encoding == "relative":      # Transformer-XL: (q + u) k + (q + z) r(lag), per head
            u, z = self.biases.unbind(1)                                       # (S, 1, heads, 1, d)
            t = torch.arange(T, device=h.device)
            r = self.lag(sinusoids(t, H).expand(S, T, H)).view(S, 1, T, self.heads, -1)
            by_lag = (q + z) @ r.permute(0, 1, 3, 4, 2) / math.sqrt(H // self.heads)
            lag = (t[:, None] - t).clamp(min=0)                                # (T, T)
            q, bias = q + u, by_lag.gather(-1, lag.expand_as(by_lag)).flatten(0, 1) + bias
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))                   # (S B, heads, T, d)
        mixed = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)
        return self.out(mixed.transpose(1, 2).reshape(S, B, T, H))

    def forward(self, h, bias):
        norm = lambda h, n: F.layer_norm(h, h.shape[-1:]) * self.scale[:, n] + self.shift[:, n]
        h = norm(h + self.attention(h, bias), 0)
        return norm(h + self.down(self.up(h).relu()), 1)


class Transformer(nn.Module):
    """Causal transformer with one of four position encodings: none, sincos, alibi, relative."""

    def __init__(self, inputs, outputs, width, generators, layers=2, heads=4, encoding="alibi"):
        super().__init__()
        if encoding not in ENCODINGS:
            raise ValueError(f"no position encoding {encoding!r}: {', '.join(ENCODINGS)}")
        self.heads, self.encoding = heads, encoding
        self.embed = Linear(inputs, width, generators)
        self.blocks = nn.ModuleList(Block(width, heads, encoding, generators)
                                    for _ in range(layers))
        self.head = Linear(width, outputs, generators)

    def forward(self, x):
        h, T, bias = self.embed(x), x.shape[2], None                           # (S, B, T, H)
        if self.encoding == "sincos":
            h = h + sinusoids(torch.arange(T, device=x.device), h.shape[-1])
        elif self.encoding == "alibi":
            bias = alibi(self.heads, T, x.device)[None]
        elif self.encoding == "relative":
            bias = torch.full((T, T), -math.inf, device=x.device).triu(1)
        for block in self.blocks:
            h = block(h, bias)
        return self.head(h)


ENCODINGS = ("none", "sincos", "alibi", "relative")
MODELS = ("rnn", "lstm", "stack_rnn", *("transformer_" + encoding for encoding in ENCODINGS))


def build(name, inputs, outputs, hidden, generators, layers=2, heads=4):
    """One of MODELS, a slice a generator."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: {', '.join(MODELS)}")
    kind, _, encoding = name.partition("_")
    if kind == "transformer":
        return Transformer(inputs, outputs, hidden, generators, layers, heads, encoding)
    core = {"rnn": RNN, "lstm": LSTM, "stack_rnn": StackRNN}[name]
    return core(inputs, outputs, hidden, generators)


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# The three templates of [O19]. In each, plain gradients through the whole sequence teach the
# network to turn its history into what a Bayesian would: a prediction, a belief on which arm is
# best, a decision. None of the losses contains a posterior: only samples from the prior.


def shifted(encoded):
    """(.., T, D) -> the same one step later, zeros first: at t a network has read x_<t."""
    return F.pad(encoded, (0, 0, 1, 0))[..., :-1, :]


def prediction_loss(model, family, x):
    """Template 1: x (S, B, T) -> -1/(BT) sum log p_w(x_t | x_<t), (S,) nats.

    Grouped by history, its expectation is entropy + KL(Bayes || network): least at Bayes, and its
    gradient by the logits at a history h is p(h) (p_w(h) - p_Bayes(h)) / T, zero at Bayes.
    """
    return family.log_loss(model(shifted(family.encode(x))), x).mean((1, 2))


def outcomes(actions, rewards):
    """actions, rewards (S, B, T) -> what a player reads at t: one-hot of the pair before, with 4 D.

    One code for the pair: from separate codes, even "stay after a win, else leave" is an XOR.
    """
    return shifted(F.one_hot(2 * actions + rewards, 4).float())


@torch.no_grad()
def play(model, theta, act, pay, argmax=False):
    """Episodes of all players at once -> actions, rewards (S, B, T), whole numbers.

    theta (S, B, 2) arms' probabilities;  act, pay (S, B, T) uniform numbers that decide the
    actions and the rewards;  argmax: the likelier arm instead of a draw
    """
    pair, state, actions, rewards = theta.new_zeros(*theta.shape[:2], 1, 4), None, [], []
    for t in range(act.shape[-1]):
        output, states = model.unroll(pair, state)
        first = output[:, :, 0, :2].softmax(-1)[..., 0]                        # (S, B)
        action = (first < 0.5 if argmax else act[..., t] >= first).long()
        reward = (pay[..., t] < theta.gather(-1, action[..., None])[..., 0]).long()
        pair = F.one_hot(2 * action + reward, 4)[:, :, None].float()
        state = [part[:, :, -1] for part in states]
        actions.append(action), rewards.append(reward)
    return torch.stack(actions, -1), torch.stack(rewards, -1)


def imitation_loss(model, actions, rewards, best):
    """Template 2: -log p_w(best arm | history), best (S, B) -> (S,) nats.

    It learns P(arm k is best | history). To act by drawing from that is Thompson sampling. The
    network's own actions are interventions: chosen from the history alone, they say nothing more.
    """
    logits = model(outcomes(actions, rewards))[..., :2]
    target = best[..., None].expand_as(actions)
    return F.cross_entropy(logits.movedim(-1, 1), target, reduction="none").mean((1, 2))


def discounted(x, factor):
    """(.., T) -> sum_{k >= 0} factor^k x_{t+k}, as one product."""
    lag = torch.arange(x.shape[-1], device=x.device)
    lag = lag[:, None] - lag
    return x @ (factor ** lag.clamp(min=0) * (lag >= 0)).to(x)


def actor_critic_loss(model, actions, rewards, entropy_weight, gamma, gae_lambda, average):
    """Template 3: advantage actor-critic on episodes of the network's own -> (S,).

    -log pi(a_t) A_t + 1/2 (v_t - R_t)^2 - c H(pi), where v_t predicts a fifth of the return, which
    keeps its scale near one; average(tensors) averages over processes, in place.
    """
    output = model(outcomes(actions, rewards))                                 # (S, B, T, 3)
    log_pi, value = output[..., :2].log_softmax(-1), output[..., 2]
    v = 5 * value.detach()
    # A_t = sum_k (gamma lambda)^k delta_{t+k},  delta_t = r_t + gamma v_{t+1} - v_t
    delta = rewards + gamma * F.pad(v[..., 1:], (0, 1)) - v
    advantage = discounted(delta, gamma * gae_lambda)
    target = (advantage + v) / 5
    moments = torch.stack([advantage.mean((1, 2)), advantage.square().mean((1, 2))])
    average([moments])                                       # over the whole batch, on any machine
    mean, std = moments[0], (moments[1] - moments[0].square()).clamp(min=1e-8).sqrt()
    advantage = (advantage - mean[:, None, None]) / std[:, None, None]
    log_taken = log_pi.gather(-1, actions[..., None])[..., 0]
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    losses = -log_taken * advantage + 0.5 * (value - target).square() - entropy_weight * entropy
    return losses.mean((1, 2))


def clip_gradients(parameters, bound):
    """Scale each slice's gradient, over all its parameters, to a norm of at most `bound`."""
    grads = [p.grad for p in parameters]                                       # (S, ..) each
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads])
    scale = (bound / (norms.norm(dim=0) + 1e-12)).clamp(max=1)                 # (S,)
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))


def meta_step(losses, parameters, adam, clip, run):
    """w <- Adam(w, gradient of losses (S,)), each slice by its own loss alone."""
    adam.zero_grad()
    losses.sum().backward()
    run.average([p.grad for p in parameters])
    clip_gradients(parameters, clip)
    adam.step()


# ---- 5. TRAINING -------------------------------------------------------------------------------
# `run` (class Run, section 8) stands for the machine: run.steps(stage, total, state) counts the
# steps, restores and saves `state`; run.share(batch), run.average(tensors) are for many processes.


def train(cfg, run, stage, model, names, steps, loss_function, generators, probe, rate, cosine):
    """Meta-train the slices of one model, each on its own tasks.

    names: of the slices of a seed;  loss_function(progress in [0, 1)) -> losses (S,) of a fresh
    batch, drawn from `generators`;  probe() -> {metric: (S,)} on test tasks
    """
    parameters = list(model.parameters())
    adam = torch.optim.Adam(parameters, lr=rate, fused=True)
    running = torch.zeros(len(run.seeds) * len(names), device=run.device)      # since the last log
    state = {"model": model, "adam": adam, "generators": generators, "running": running}
    for step in run.steps(stage, steps, state):
        # COLLECT and META UPDATE
        if cosine:
            adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        losses = loss_function(step / steps)
        meta_step(losses, parameters, adam, cfg.clip, run)
        losses = losses.detach()
        run.average([losses])                                # each process has seen its share
        running += losses
        run.watch(losses)
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            with run.clock("evaluation"):
                metrics = {name: values.tolist() for name, values in probe().items()}
                training = (running / (step % cfg.log_every + 1)).tolist()
                running.zero_()
            run.log([{"seed": run.seeds[i // len(names)], "task": names[i % len(names)],
                      "training_loss": training[i], **{name: v[i] for name, v in metrics.items()}}
                     for i in range(len(training))])


def train_predictor(cfg, run, name):
    """Template 1 on one family -> family, untrained and trained model, test x (S, N, T)."""
    family, order = FAMILIES[name](cfg), list(FAMILIES).index(name)
    make = lambda: LSTM(family.inputs, family.outputs, cfg.predict_hidden,
                        [stream(seed, 60 + order, "cpu") for seed in run.seeds],
                        cfg.forget_bias).to(run.device)
    model, generators = make(), [stream(seed, order, run.device) for seed in run.seeds]
    x = family.sample([stream(seed, 30 + order, run.device) for seed in run.seeds],
                      cfg.eval_sequences, cfg.length)
    bayes = family.predictive(family.statistics(x))

    def loss(progress):
        batch = family.sample(generators, cfg.predict_batch, cfg.length)
        return prediction_loss(model, family, run.share(batch))

    @torch.no_grad()
    def probe():
        network = model(shifted(family.encode(x))).double()
        return {"kl": family.divergence(bayes, network).mean((1, 2))}
    train(cfg, run, f"predict {name}", model, [name], cfg.predict_steps, loss, generators, probe,
          cfg.learning_rate, cfg.cosine)
    return family, make(), model, x


def sample_arms(generators, B, cfg):
    """-> theta (S, B, 2), each arm from Beta(alpha, beta)."""
    heads, tails = (gamma_variate(generators, prior, B, 2) for prior in (cfg.alpha, cfg.beta))
    return heads / (heads + tails)


def train_player(cfg, run, kind, steps, Q):
    """Template 2 (kind "thompson") or 3 ("bandit") -> model, test episodes (theta, act, pay), and
    probe() -> {metric: (S,)} on them."""
    order = 10 if kind == "bandit" else 11
    model = LSTM(4, 3, cfg.bandit_hidden,
                 [stream(seed, 60 + order, "cpu") for seed in run.seeds]).to(run.device)
    generators = [stream(seed, order, run.device) for seed in run.seeds]
    tests = [stream(seed, 24 + order, run.device) for seed in run.seeds]       # 34 or 35
    episodes = lambda generators, B: (sample_arms(generators, B, cfg), uniform(
        generators, B, cfg.bandit_length), uniform(generators, B, cfg.bandit_length))
    test = episodes(tests, cfg.eval_sequences)

    def loss(progress):
        theta, act, pay = episodes(generators, cfg.bandit_batch)
        actions, rewards = play(model, theta, act, pay)
        own = [run.share(part) for part in (actions, rewards, theta)]
        if kind == "thompson":
            return imitation_loss(model, *own[:2], own[2].argmax(-1))
        return actor_critic_loss(model, *own[:2], cfg.entropy * (1 - progress), cfg.gamma,
                                 cfg.gae_lambda, run.average)

    def probe():
        return {f"gap_{how}": bandit_gap(*play(model, *test, argmax=how == "argmax"), Q).mean(-1)
                for how in ("sampled", "argmax")}
    train(cfg, run, kind, model, [kind], steps, loss, generators, probe, cfg.bandit_rate, True)
    return model, test, probe


COIN = coin(0.5, 0.5)


@torch.no_grad()
def network_predict(model, x, each=1):
    """Bits x (S', N, T) -> P(x_t = 1 | x_<t) (S, N, T), float64; `each` slices share a batch."""
    few = max(1, (1 << 17) // (len(x) * each * x.shape[-1]))                   # bounds the memory
    parts = [model(shifted(COIN.encode(part.repeat_interleave(each, 0))))
             for part in x.split(few, 1)]
    return torch.cat(parts, 1).double().softmax(-1)[..., 1]


def train_switching(cfg, run, name, tests):
    """Template 1 on coins with switches: one network for every seed and source, side by side."""
    sources, order = chosen(cfg.sources), 12 + MODELS.index(name)
    starts = [stream(seed, 60 + order, "cpu") for seed in run.seeds for _ in sources]
    width = cfg.transformer_width if name.startswith("transformer") else cfg.switch_hidden
    model = build(name, 2, 2, width, starts, cfg.layers, cfg.heads).to(run.device)
    generators = [stream(seed, order, run.device) for seed in run.seeds]
    # Loops over time are not worth compiling: they unroll into thousands of small steps.
    hot = run.compile(model) if isinstance(model, Transformer) else model

    def loss(progress):
        x = torch.stack([sample_source(source, cfg.switch_batch, cfg.switch_length, generators,
                                       cfg.period, cfg.longest)[0] for source in sources], 1)
        return prediction_loss(hot, COIN, run.share(x.flatten(0, 1)))

    own_x, own_theta = (                                     # each network's own source: (S, N, T)
        torch.stack([tests[source][part][:, :200] for source in sources], 1).flatten(0, 1)
        for part in (0, 1))

    def probe():
        q = network_predict(model, own_x)
        return {"regret": regret(own_theta, q)[..., 1:].sum(-1).mean(-1)}
    train(cfg, run, f"switch {name}", model, sources, cfg.switch_steps, loss, generators, probe,
          cfg.learning_rate, cfg.cosine)
    return model


# ---- 6. EVALUATION -----------------------------------------------------------------------------


class Map(nn.Module):
    """S multilayer perceptrons with three hidden ReLU layers, (S, N, d) -> (S, N, d')."""

    def __init__(self, n_in, n_out, generators, width=64):
        super().__init__()
        sizes = (n_in, width, width, width, n_out)
        self.layers = nn.ModuleList(Linear(*pair, generators) for pair in zip(sizes, sizes[1:]))

    def forward(self, z):
        for layer in self.layers[:-1]:
            z = layer(z).relu()
        return self.layers[-1](z)


def simulate(source, target, read_out, divergence, seeds=None, steps=600, batch=512, rate=3e-3):
    """Can one state machine simulate another? Fit phi: its states -> the other's; what is left?

    source (S, N, T, d), target (S, N, T, d'): states of both on the same N sequences; the first
    half is fitted, by least squares in standardised units, the second half tested
    read_out(states (S, N/2, T, d')) -> predictions;  divergence(p, q) -> (S, N/2, T)
    -> D_s (S,), the share of the target's variance that phi does not explain, and D_o (S,), the
    divergence of the target's predictions from those read out of phi(source). [M20], from memory
    """
    half, device = source.shape[1] // 2, source.device
    seeds = range(len(source)) if seeds is None else seeds
    fit, test = source[:, :half].flatten(1, 2).float(), source[:, half:].flatten(1, 2).float()
    goal, truth = target[:, :half].flatten(1, 2).float(), target[:, half:]
    moments = lambda z: (z.mean(1, keepdim=True), z.std(1, keepdim=True).clamp(min=1e-6))
    (mean, std), (goal_mean, goal_std) = moments(fit), moments(goal)
    fit, test, goal = (fit - mean) / std, (test - mean) / std, (goal - goal_mean) / goal_std
    phi = Map(fit.shape[-1], goal.shape[-1], [stream(seed, 90, "cpu") for seed in seeds]).to(device)
    adam = torch.optim.Adam(phi.parameters(), lr=rate)
    generators = [stream(seed, 91, device) for seed in seeds]
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = (uniform(generators, batch, 1) * fit.shape[1]).long()
        error = phi(fit.take_along_dim(rows, 1)) - goal.take_along_dim(rows, 1)
        adam.zero_grad()
        error.square().mean((1, 2)).sum().backward()
        adam.step()
    with torch.no_grad():
        guess = phi(test)
        d_s = (guess - (truth.flatten(1, 2) - goal_mean) / goal_std).square().mean((1, 2))
        guess = guess.clamp(goal.amin(1, True), goal.amax(1, True))            # counts below 0 ..
        guess = (guess * goal_std + goal_mean).unflatten(1, truth.shape[1:3]).to(target.dtype)
        return d_s.cpu(), divergence(read_out(truth), read_out(guess)).mean((1, 2)).cpu()


def fixed_point_gradient(T=8, noise=0.0, seed=0):
    """Largest gradient of the expected loss by the logits of all 2^T histories, at exact Bayes.

    `noise` is added to Bayes' logits first.
    """
    strings = torch.cartesian_prod(*[torch.arange(2)] * T).view(-1, T)
    q = bernoulli_predict(strings)
    evidence = torch.where(strings == 1, q, 1 - q).log().cumsum(1)
    # A history shared by many strings is one logit: rows that begin alike share an entry.
    history = torch.stack([strings[:, :t] @ (1 << torch.arange(t)) + (1 << t) for t in range(T)], 1)
    logits = noise * torch.randn(1 << T, generator=stream(seed, 92, "cpu")).double()
    logits = logits.index_put((history,), logits[history] + q.logit()).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(logits[history], strings.double(), reduction="none")
    gradient, = torch.autograd.grad((evidence[:, -1].exp() @ loss).mean(), logits)
    return gradient.abs().max().item()


def excess_z(difference):
    """difference (S, N) of two players, same sequences -> its mean in standard errors (S,)."""
    return difference.mean(1) / (difference.std(1) / math.sqrt(difference.shape[1]) + 1e-12)


@torch.no_grad()
def states_of(model, family, x):
    """All of a recurrent network's state when it predicts x_t: (S, N, T, d)."""
    return torch.cat([part.flatten(3) for part in model.unroll(shifted(family.encode(x)))[1]], -1)


def evaluate_family(cfg, run, name):
    """Train and test one predictor -> a dictionary per seed, and what panel (b) shows."""
    family, untrained, model, x = train_predictor(cfg, run, name)
    beliefs, rows = family.statistics(x), [{} for _ in run.seeds]
    bayes, points = family.predictive(beliefs), [[], []]
    put = lambda key, values: [row.update({key: float(v)}) for row, v in zip(rows, values)]
    with run.clock("evaluation"), torch.no_grad():
        network = model(shifted(family.encode(x))).double()
        loss = lambda p: family.log_loss(p, x)                                 # (S, N, T)
        put("kl", family.divergence(bayes, network).mean((1, 2)))
        blank = untrained(shifted(family.encode(x))).double()
        put("kl_untrained", family.divergence(bayes, blank).mean((1, 2)))
        put("excess_z", excess_z((loss(network) - loss(bayes)).mean(-1)))
        if name == "bernoulli":
            put("kl_half", family.divergence(bayes, torch.zeros_like(bayes)).mean((1, 2)))
            wrong = coin(0.5, 0.5).predictive(beliefs)
            put("kl_wrong_prior", family.divergence(bayes, wrong).mean((1, 2)))
            some = torch.stack([bayes, network.log_softmax(-1)])[:, 0, :20, :, 1]
            points = some.exp().flatten(1).tolist()                            # of the first seed
    for which, net in (("", model), ("_untrained", untrained)):
        state, head = states_of(net, family, x), lambda state: net.head(state[..., :net.hidden])
        for way, machines in {"rnn_to_bayes": (state, beliefs, family.predictive),
                              "bayes_to_rnn": (beliefs, state, head)}.items():
            with run.clock("evaluation"):
                d_s, d_o = simulate(*machines, family.divergence, run.seeds, cfg.simulate_steps)
            put(f"ds_{way}{which}", d_s), put(f"do_{way}{which}", d_o)
    return rows, points


def evaluate_bandits(cfg, run):
    """Train and test both players -> a dictionary per seed; the exact values of known policies."""
    prior = {"alpha": cfg.alpha, "beta": cfg.beta}
    Q = bandit_values(cfg.bandit_length, **prior)
    value = lambda policy: bandit_values(                    # both arms start alike: their mean
        cfg.bandit_length, **prior, policy=policy)[0, 0, 0, 0].mean().item()
    exact = {"optimal": Q[0, 0, 0, 0].max().item(),
             "greedy": value(lambda *belief: greedy_policy(*belief, **prior)),
             "Thompson": value(lambda *belief: thompson_probability(*belief, **prior)),
             "random": value(lambda *belief: torch.tensor(0.5).double())}
    rows = [{} for _ in run.seeds]
    put = lambda key, values: [row.update({key: float(v)}) for row, v in zip(rows, values)]
    if cfg.bandit_steps:
        model, test, probe = train_player(cfg, run, "bandit", cfg.bandit_steps, Q)
        for key, gap in probe().items():
            put(f"bandit_{key}", gap)
    if cfg.thompson_steps:
        model, test, probe = train_player(cfg, run, "thompson", cfg.thompson_steps, Q)
        actions, rewards = play(model, *test)
        put("thompson_return", exact["optimal"] - bandit_gap(actions, rewards, Q).mean(-1))
        counts = [before((actions == arm) & (rewards == r), -1) for arm in (0, 1) for r in (1, 0)]
        with torch.no_grad():
            network = model(outcomes(actions, rewards))[..., :2].softmax(-1)[..., 0]
        put("thompson_error", (network - thompson_probability(*counts, **prior)).abs().mean((1, 2)))
    return rows, exact


def exact_predictions(x, switches):
    """Bits (S, N, T) -> {predictor: P(x_t = 1 | x_<t) (S, N, T)} of the exact ones."""
    rows = x.flatten(0, 1)
    return {"KT": kt_predict(x), "PTW": ptw_predict(rows).view(x.shape),
            "LIN": torch.cat([lin_predict(part) for part in rows.split(256)]).view(x.shape),
            "oracle": oracle_predict(x, switches)}


def evaluate_switching(cfg, run):
    """Train on every source, test on every source and at four times the length -> a dict per seed.

    "matrix": {test source: {predictor: regret}}; a network is called MODEL<-SOURCE. "long": the
    same at 4 T. "excess_z": networks minus exact Bayes on their own source, paired, in
    standard errors. "curve", "example": regret by t and one sequence, of `ptw` at 4 T.
    """
    sources, rows = chosen(cfg.sources), [{} for _ in run.seeds]
    draw = lambda N, T, purpose: {source: sample_source(source, N, T, [
        stream(seed, purpose + i, run.device) for seed in run.seeds], cfg.period, cfg.longest)
        for i, source in enumerate(SOURCES)}
    tests = draw(cfg.eval_sequences, cfg.switch_length, 40)
    longer = draw(max(1, cfg.eval_sequences // 5), 4 * cfg.switch_length, 50)
    models = {name: train_switching(cfg, run, name, tests) for name in chosen(cfg.models)}
    rounded = lambda values: [round(v, 3) for v in values.tolist()]

    def test(batch):
        """-> predictions and regrets of everyone, {predictor: (seeds, N, T)}."""
        x, theta, switches = batch
        predictions = exact_predictions(x, switches)
        for name, model in models.items():
            q = network_predict(model, x, len(sources)).unflatten(0, (-1, len(sources)))
            predictions |= {f"{name}<-{source}": q[:, i] for i, source in enumerate(sources)}
        return predictions, {name: regret(theta, q) for name, q in predictions.items()}
    with run.clock("evaluation"):
        for key, batches in (("matrix", tests), ("long", longer)):
            for source, batch in batches.items():
                predictions, regrets = test(batch)
                totals = {name: r[..., 1:].sum(-1) for name, r in regrets.items()}     # t >= 2
                exact = totals.get({"static": "KT", "ptw": "PTW", "lin": "LIN"}.get(source))
                for i, row in enumerate(rows):
                    row.setdefault(key, {})[source] = {
                        name: total[i].mean().item() for name, total in totals.items()}
                    if exact is not None and source in sources and key == "matrix":
                        row.setdefault("excess_z", {}).update({
                            name: excess_z(total - exact)[i].item()
                            for name, total in totals.items() if name.endswith(f"<-{source}")})
                    if (key, source) == ("long", "ptw"):
                        row["curve"] = {name: rounded(r[i, :, 1:].cumsum(-1).mean(0))
                                        for name, r in regrets.items()}
                        often = batch[2][i].sum(-1) > 3      # to look at: the first that switches
                        row["example"] = {name: rounded(q[i, often.int().argmax()]) for name, q in (
                            *zip(("x", "theta", "switches"), (part.double() for part in batch)),
                            *predictions.items())}
    return rows


def plan(cfg, flops_per_second):
    """What a run of `cfg` does and how long it should take at this rate of matrix products."""
    def seconds(copies, steps, B, T, H):
        """Of LSTMs: 0.4 of the rate of products, or 0.1 ms a time step if small: measured."""
        flops = 6 * copies * cfg.num_seeds * B * T * 5 * H * H
        return steps * max(flops / (0.4 * flops_per_second), 1e-4 * T)
    families, models, sources = map(len, map(chosen, (cfg.families, cfg.models, cfg.sources)))
    minutes = 0.2 + 0.1 * cfg.num_seeds * families + (
        families * seconds(1, cfg.predict_steps, cfg.predict_batch, cfg.length, cfg.predict_hidden)
        + seconds(1, cfg.bandit_steps + cfg.thompson_steps, 2 * cfg.bandit_batch, cfg.bandit_length,
                  cfg.bandit_hidden)
        + models * seconds(sources, cfg.switch_steps, cfg.switch_batch, cfg.switch_length,
                           cfg.switch_hidden)) / 60
    return (f"trains, for {cfg.num_seeds} seed(s), predictors of {families} families, "
            f"{(cfg.bandit_steps > 0) + (cfg.thompson_steps > 0)} bandit players and {models} "
            f"model(s) on each of {sources} switching sources: about {minutes:.1f} min here")


def experiment(cfg, run):
    """Train and test all that the configuration names.

    -> {"per_seed": a dictionary per seed with "headline" numbers, "exact": values of known bandit
    players, "points": of the calibration panel, "fixed_point_gradient": at Bayes and near it,
    "beside": notes for the closing table}
    """
    if run.device.type == "mps":
        raise ValueError("the exact predictors need float64, which MPS has not: --device cpu")
    per_seed = [{"seed": seed, "headline": {}, "families": {}} for seed in run.seeds]
    points, exact = [[], []], {}
    for name in chosen(cfg.families):
        rows, shown = evaluate_family(cfg, run, name)
        points = shown if name == "bernoulli" else points
        for row, result in zip(per_seed, rows):
            row["families"][name] = result
    if cfg.bandit_steps or cfg.thompson_steps:
        rows, exact = evaluate_bandits(cfg, run)
        for row, result in zip(per_seed, rows):
            row["headline"] |= result
    if chosen(cfg.sources):
        for row, result in zip(per_seed, evaluate_switching(cfg, run)):
            row |= result
    for row in per_seed:
        row["headline"] = headline(cfg, row) | row["headline"]
        row["history"] = {f"{r['stage']}|{r['task']}": [] for r in run.rows}
    for r in run.rows:
        tested = [float(f"{r[name]:.4g}") for name in ("kl", "gap_sampled", "gap_argmax", "regret")
                  if name in r]
        history = per_seed[run.seeds.index(r["seed"])]["history"]
        history[f"{r['stage']}|{r['task']}"].append([r["step"], *tested])
    return {"per_seed": per_seed, "exact": exact, "points": points,
            "fixed_point_gradient": [fixed_point_gradient(), fixed_point_gradient(noise=0.1)],
            "beside": beside(cfg, per_seed, exact)}


def headline(cfg, row):
    """The numbers of one seed that the closing table and the README show."""
    numbers, errors = {}, []
    for name, family in row["families"].items():
        tail = "" if name == "bernoulli" else f"_{name}"
        numbers |= {f"predict_kl{tail}": family["kl"]}
        errors.append(family["excess_z"])
        if name == "bernoulli":
            numbers |= {key: value for key, value in family.items() if key[:3] in ("ds_", "do_")}
    if chosen(cfg.sources):
        matrix, model = row["matrix"], chosen(cfg.models)[0]
        errors += row.get("excess_z", {}).values()
        trained = lambda source, test: matrix[test].get(f"{model}<-{source}")
        if lin := trained("lin", "lin"):
            numbers |= {"lin_regret": lin, "lin_regret_over_exact": lin / matrix["lin"]["LIN"]}
        if ptw := trained("ptw", "ptw"):
            kt, exact = matrix["ptw"]["KT"], matrix["ptw"]["PTW"]
            numbers |= {"ptw_regret": ptw, "ptw_gap_closed": (kt - ptw) / (kt - exact)}
        # On `regular` all priors are wrong: the exact ones and those the networks learned.
        exact = min(matrix["regular"]["PTW"], matrix["regular"]["LIN"])
        for source, infix in (("ptw", ""), ("lin", "_lin")):
            if (network := trained(source, "regular")) is not None:
                numbers[f"regular{cfg.period}{infix}_network_below_exact"] = exact - network
    if errors:
        numbers["least_excess_z"] = min(errors)
    return numbers


def beside(cfg, per_seed, exact):
    """{headline metric: what the closing table says beside it}."""
    mean = lambda get: statistics.fmean(get(row) for row in per_seed)
    notes = {"least_excess_z": "network - exact Bayes on its own source, in s.e.: not below -3"}
    if "bernoulli" in per_seed[0]["families"]:
        coin = lambda key: mean(lambda row: row["families"]["bernoulli"][key])
        notes["predict_kl"] = (f"Bayes 0, with the prior Beta(1/2, 1/2) "
                               f"{coin('kl_wrong_prior'):.2e}, always 1/2 {coin('kl_half'):.3f}")
    if exact:
        gaps = ", ".join(f"{name} {exact['optimal'] - exact[name]:.3f}"
                         for name in ("greedy", "Thompson", "random"))
        notes |= {"bandit_gap_sampled": f"exact: {gaps}", "bandit_gap_argmax": f"exact: {gaps}",
                  "thompson_return": f"exact Thompson {exact['Thompson']:.4f}, "
                                     f"optimal {exact['optimal']:.4f}"}
    if chosen(cfg.sources):
        of = lambda test: ", ".join(f"{name} " + format(mean(
            lambda row: row["matrix"][test][name]), ".2f")
            for name in per_seed[0]["matrix"][test])
        notes |= {"lin_regret": of("lin"), "ptw_regret": of("ptw"),
                  f"regular{cfg.period}_network_below_exact": of("regular")}
    return notes


# ---- 7. FIGURE ---------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, RED, GREY, PINK, SKY = (                                  # Okabe and Ito
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777", "#CC79A7", "#56B4E9")


def plot(summary, path):
    """Draw the panels that were run, from a summary alone; thin lines: seeds, thick: means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "legend.fontsize": 8})
    rows, panels = summary["per_seed"], []
    if rows[0]["families"]:
        panels += [plot_learning] + [plot_calibration] * bool(summary["points"][0])
        panels += [plot_structure]
    panels += [plot_bandits] * bool(summary["exact"])
    if "matrix" in rows[0]:
        several = "," in summary["config"]["models"]
        panels += [plot_sequence, plot_models if several else plot_regret]
    width, height = min(3, len(panels)), math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(height, width, layout="constrained", squeeze=False,
                                figsize=(max(8.4, 4.6 * width), 3.9 * height))
    for letter, axis, panel in zip("abcdef", axes.flat, panels):
        axis.set_title(f"({letter}) {panel(axis, summary, rows)}")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    figure.suptitle("Memory-based meta-learning is amortised Bayes. "
                    f"Thin: each of {len(rows)} seed(s); thick: mean")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): thin lines and their thick mean."""
    for curve in curves if len(curves) > 1 else []:
        axis.plot(x, curve, color=colour, ls=style, lw=0.7, alpha=0.5)
    axis.plot(x, np.mean(curves, 0), color=colour, ls=style, lw=2.2, label=label)


def plot_learning(axis, summary, rows):
    """KL to exact Bayes against meta-training steps, for each family -> title."""
    for name, colour in zip(rows[0]["families"], (BLUE, ORANGE, GREEN, RED)):
        history = np.array([row["history"][f"predict {name}|{name}"] for row in rows])  # (S, n, 2)
        plot_lines(axis, history[0, :, 0], history[:, :, 1], colour, name)
    for key, text in (("kl_half", "coin: always 1/2"),
                      ("kl_wrong_prior", "coin: Bayes, but with the prior Beta(½, ½)")):
        value = np.mean([row["families"].get("bernoulli", {}).get(key, 0) for row in rows])
        if value > 0:                                        # T = 1: all predict 1/2
            axis.axhline(value, color=GREY, ls=":")
            axis.text(1, value * 1.1, text, transform=axis.get_yaxis_transform(), ha="right",
                      fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="meta-training step",
             ylabel="KL(exact Bayes || network) a symbol (nats)")
    axis.legend(loc="lower left")
    return "Log loss alone teaches Bayes"


def plot_calibration(axis, summary, rows):
    """The network's probability against the exact posterior mean, Bernoulli -> title."""
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    axis.plot(*summary["points"], "o", color=BLUE, ms=3, alpha=0.5)
    axis.set(xlabel="exact Bayes, P(heads | tosses before)", ylabel="network", xlim=(0, 1),
             ylim=(0, 1))
    return "Each prediction is the posterior mean"


def plot_structure(axis, summary, rows):
    """Bars of the state and output dissimilarities, trained and untrained -> title."""
    name, place = next(iter(rows[0]["families"])), 0
    for measure, text in (("ds", "state"), ("do", "output")):
        for way, arrow in (("rnn_to_bayes", "network\n→ Bayes"),
                           ("bayes_to_rnn", "Bayes\n→ network")):
            for tail, colour, shift in (("", BLUE, -0.2), ("_untrained", GREY, 0.2)):
                values = [row["families"][name][f"{measure}_{way}{tail}"] for row in rows]
                axis.bar(place + shift, np.mean(values), 0.38, color=colour, alpha=0.7)
                axis.plot([place + shift] * len(values), values, "_", color="black", ms=9)
            axis.text(place, -0.02, f"{text}\n{arrow}", transform=axis.get_xaxis_transform(),
                      ha="center", va="top", fontsize=8)
            place += 1
    for colour, label, key in ((BLUE, "trained", "kl"), (GREY, "untrained", "kl_untrained")):
        kl = np.mean([row["families"][name][key] for row in rows])
        axis.bar(0, 0, color=colour, alpha=0.7, label=f"{label} (KL to Bayes {kl:.1e})")
    axis.set(yscale="log", ylabel="left unexplained: share of variance | KL (nats)")
    axis.set_ylim(top=3)                                     # room for the legend
    axis.set_xticks([])
    axis.legend()
    return f"Can one machine simulate the other? ({name})"


def plot_bandits(axis, summary, rows):
    """Gap to the optimal player against training episodes -> title."""
    thousands, exact = summary["config"]["bandit_batch"] / 1000, summary["exact"]
    for stage, columns in (
            ("bandit", ((1, BLUE, "actor-critic, sampled"), (2, SKY, "actor-critic, arg max"))),
            ("thompson", ((1, ORANGE, "imitation, sampled"),))):
        if f"{stage}|{stage}" in rows[0]["history"]:
            history = np.array([row["history"][f"{stage}|{stage}"] for row in rows])
            for column, colour, label in columns:
                plot_lines(axis, history[0, :, 0] * thousands, history[:, :, column], colour, label)
    for name, style in (("greedy", "-."), ("Thompson", "--"), ("random", ":")):
        axis.axhline(exact["optimal"] - exact[name], color=GREY, ls=style, label=f"exact {name}")
    axis.set(yscale="log", xlabel="training episodes (thousands)",
             ylabel="return below the optimal player's")
    axis.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return "Bandits: decisions and Thompson sampling"


def plot_sequence(axis, summary, rows):
    """One sequence of the source `ptw`: bits, true bias, exact Bayes, network -> title."""
    example, cfg = rows[0]["example"], summary["config"]
    model = f"{cfg['models'].split(',')[0]}<-{cfg['sources'].split(',')[0]}"
    t = np.arange(1, len(example["x"]) + 1)
    for step in t[np.array(example["switches"], bool)]:
        axis.axvline(step, color=GREY, lw=0.6, alpha=0.6)
    axis.axvline(cfg["switch_length"], color="black", ls="--", lw=1, label="training length")
    axis.plot(t, np.array(example["x"]) * 1.06 - 0.03, ".", color=GREY, ms=3)
    axis.step(t, example["theta"], color="black", lw=1, where="mid", label="true bias")
    axis.plot(t, example["PTW"], color=GREEN, lw=1.4, label="exact Bayes (PTW)")
    axis.plot(t, example[model], color=BLUE, lw=1.4, label=model.replace("<-", " trained on "))
    axis.set(xlabel="symbol", ylabel="P(1)", ylim=(-0.08, 1.25))
    axis.legend(loc="upper right", ncol=2)
    return "A coin that changes unseen"


def plot_regret(axis, summary, rows):
    """Cumulative regret by position up to four times the training length, on `ptw` -> title."""
    cfg, curves = summary["config"], [row["curve"] for row in rows]
    x = np.arange(2, len(curves[0]["KT"]) + 2)
    colours = iter((BLUE, ORANGE, PINK, SKY, RED, "#F0E442", "#000000") * 3)
    for name, colour, style in (("KT", GREY, ":"), ("LIN", GREY, "--"), ("PTW", GREEN, "-"),
                                ("oracle", GREY, "-.")):
        axis.plot(x, np.mean([curve[name] for curve in curves], 0), color=colour, ls=style,
                  label=name + (" (told the switches)" if name == "oracle" else " (exact)"))
    for name in curves[0]:
        if name.endswith(("<-ptw", "<-lin")):
            plot_lines(axis, x, [curve[name] for curve in curves], next(colours),
                       name.replace("<-", " trained on "))
    axis.axvline(cfg["switch_length"], color="black", ls="--", lw=1)
    axis.set(xlabel="symbol (dashed: training length)", ylabel="cumulative regret (nats)")
    axis.set_ylim(0, 1.3 * np.mean([curve["KT"][-1] for curve in curves]) / 2)
    axis.legend(loc="upper left")
    return "Regret on `ptw`, up to four times the length"


def plot_models(axis, summary, rows):
    """Each architecture's regret over exact Bayes', at the training length and at 4 T -> title."""
    models, T = chosen(summary["config"]["models"]), summary["config"]["switch_length"]
    sources = [name for name in chosen(summary["config"]["sources"]) if name in ("ptw", "lin")]
    for source, colour in zip(sources, (BLUE, ORANGE)):
        for key, marker, shift, length in (("matrix", "o", -0.1, T), ("long", "^", 0.1, 4 * T)):
            ratio = np.array([[row[key][source][f"{model}<-{source}"]
                               / row[key][source][source.upper()]
                               for model in models] for row in rows])          # (seeds, models)
            place = np.arange(len(models)) + shift + 0.05 * sources.index(source)
            axis.plot(place, ratio.T, "_", color=colour, ms=7)
            axis.plot(place, ratio.mean(0), marker, color=colour, label=f"{source}, T = {length}")
    axis.axhline(1, color=GREEN, label="exact Bayes")
    axis.set_xticks(range(len(models)), [name.replace("_", "\n").replace("former", "f.")
                                         for name in models])
    axis.set(yscale="log", ylabel="regret / exact Bayes' regret")
    axis.set_yticks([1, 1.5, 2, 3, 4], "1 1.5 2 3 4".split())
    axis.minorticks_off()
    axis.legend(loc="upper left")
    return f"Trained at T = {T}, tested at {T} and {4 * T}"


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
