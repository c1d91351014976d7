# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""VSML: a grid of tiny LSTMs with shared weights learns to learn, in one file.

Kirsch, Schmidhuber, "Meta Learning Backpropagation And Improving It", NeurIPS 2021, arXiv
2012.14905. [code]: read in the official release, which does not have the cloning.

IDEA
  A network has weights, and a rule made by hand, backpropagation, that changes them. Here every
  weight becomes a tiny LSTM with a state of its own, and all share one set of parameters V_M. The
  LSTM between neurons i and o hears a message from i and, backwards, one from o, changes its state
  and answers. To run the grid forward *is* to learn, without backpropagation: V_M, 1,250 numbers,
  is the learning algorithm, states are what it learns. An ordinary recurrent network memorises what
  it was trained on; V_M carries over to other data. It can also imitate backpropagation.

ALGORITHM
  a tick of the LSTM between input i and output o of a layer                              (Eq. 7)
    in, g, f, out = [m_i, m_o, h_io] W + b
    c_io <- sigmoid(f + 5) c_io + sigmoid(in - 5) tanh(g);   h_io <- sigmoid(out) tanh(c_io)
  a visit of a layer: some ticks while it hears the same m_i, m_o; then messages to both sides
    up   m_o = mean_i (U_up h_io + u_up)         down   m_i = mean_o (U_down h_io + u_down)
  inner loop, a lifetime: h = 0, half of c ~ N(0, 1 / I); for each example (x, y)
    predict   m_i = x_i from below, 0 from above: visit layer by layer -> logits 100 tanh(m_o / 100)
    learn     e_o = softmax(logits)_o - [o = y] from above: visit from the top layer down, each with
              the m_i that it has just heard (mode A, the paper's: e_o enters with the next x)
  outer loop: L(V_M) = mean cross-entropy of all predictions in B lifetimes
    V_M <- Adam(V_M, dL/dV_M), through whole lifetimes; or by evolution strategies (Alg. 1):
      g = 1/P sum_p (L(V_M + sigma eps_p) - L(V_M - sigma eps_p)) / (2 sigma) eps_p
  cloning: V_M <- Adam so that two visits do to c_io[0], c_io[1] what gradient descent does to w, b

SYMBOLS, in the code, shape or meaning
  B, T, P      batch, length    lifetimes, examples of one; pairs of ES
  D, C; I, O   sizes; I, O      pixels, classes; inputs and outputs of a layer
  h, c         layers           state of each layer, a pair of (B, I, O, N); N = 16 numbers an LSTM
  m_i, m_o     below, above     messages from below (B, I) and above (B, O): one number each

RESULT (quick: seeds 0-4, mean [95 % t interval], 2.9 minutes a seed on one core; `paper`: not run)
  New data sets, 200 examples each: 5 classes 0.937 [0.931, 0.942], 10 classes 0.923 [0.914, 0.932].
  10 classes, minus SGD of the best rate: first 20 0.104 [0.090, 0.118], last 50 -0.031 [-0.046,
  -0.016]; class means, 7 lines, minus VSML 0.031 [0.022, 0.040], first 20 0.013 [0.004, 0.023].
  Meta RNN: seen 0.997, new 0.202; chance 0.2. Clone minus backpropagation, last 50: 0.000, two
  layers -0.002 [-0.011, 0.006]; same predictions 0.997, 0.981.

DIFFERS
  1. quick: made-up images, lifetimes of 50, mode B, BPTT; `paper`: the paper's sizes, ES, A. Ours:
     falling rates, first weights not truncated, half of lifetimes projected anew (code: 64 fixed
     projections), a Meta RNN of 64 units, how to train the clone, class means.
  2. A message is one number (paper: 8; in one layer the other seven are never heard). Means for the
     paper's sums, as in its code; sums in cloning. SGD, Adam: rates chosen on the test itself.
  3. Left out: LayerNorm, convolution, meta-learned grids of several layers, other baselines.

RUN
  python vsml.py --test mnist --data-dir data    # without --test, it needs no files
"""
import argparse
import datetime
import gzip
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
    data: str = "fields"           # to meta-train on: fields, made up, or image files: mnist, ...
    test: str = ""                 # image files to meta-test on, too: mnist,fashion_mnist
    data_dir: str = "data"         # folder with mnist/ and so on, IDX files
    side: int = 6                  # pixels a side in meta-training
    classes: int = 5               # of the data set to meta-train on, C
    length: int = 50               # examples of a lifetime, T [code: 500]
    batch: int = 16                # lifetimes a step, B; with ES pairs, P [code: 1024]
    projected: float = 0.5         # share of lifetimes with a random projection of its own
    mode: str = "B"                # A: errors come with the next example [code]; B: a reverse sweep
    ticks: int = 1                 # of the LSTMs at each visit [code: 2]
    optimizer: str = "bptt"        # of V_M: bptt or es [code: es]
    chunk: int = 0                 # members of ES at once, to bound the memory; 0: all
    steps: int = 300               # meta-training steps of VSML and of the Meta RNN
    learning_rate: float = 0.03    # of V_M [code: 0.025 with ES]
    clone_steps: int = 3000        # of cloning single synapses, then as many of whole grids
    lifetimes: int = 64            # of each meta-test
    test_length: int = 200         # examples of such a lifetime
    seed: int = 0                  # first seed
    num_seeds: int = 1             # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 20            # steps between logs
    save_every: int = 100          # steps between checkpoints

    def __post_init__(self):
        if min(self.side, self.classes, self.length, self.batch, self.ticks, self.steps,
               self.lifetimes, self.test_length, self.chunk + 1, self.clone_steps) < 1:
            raise ValueError("sizes and steps must be at least 1")
        if self.mode not in ("A", "B") or self.optimizer not in ("bptt", "es"):
            raise ValueError("--mode must be A or B, --optimizer bptt or es")
        if not 0 <= self.projected <= 1:
            raise ValueError(f"--projected must be between 0 and 1, not {self.projected}")


PRESETS = {
    "smoke": dict(side=3, classes=3, length=10, batch=4, steps=6, clone_steps=6, lifetimes=4,
                  test_length=20, log_every=2, save_every=4),
    "quick": {},
    "paper": dict(data="mnist", test="mnist,fashion_mnist", side=28, classes=10, length=500,
                  batch=1024, mode="A", ticks=2, optimizer="es", chunk=256, steps=10_000,
                  learning_rate=0.025, lifetimes=32, test_length=2000, save_every=20),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# A lifetime: T labelled examples of one data set, x (B, T, D) and y (B, T).


def make_fields(sets, classes, side, device):
    """Prototypes of made-up image data sets, smooth random fields -> (sets, classes, side^2)."""
    frequency = torch.fft.fftfreq(side, device=device)       # cycles a pixel
    low_pass = torch.exp(-(frequency[:, None] ** 2 + frequency**2) / 0.18**2)
    white = torch.randn(sets, classes, side, side, device=device)
    smooth = torch.fft.ifft2(torch.fft.fft2(white) * low_pass).real
    return F.layer_norm(smooth.flatten(-2), [side * side], eps=1e-12)          # mean 0, variance 1


def sample_fields(prototypes, batch, length):
    """Noisy prototypes of one data set (1, C, D), or of one a lifetime (B, C, D) -> x, y."""
    y = torch.randint(prototypes.shape[1], (batch, length), device=prototypes.device)
    clean = prototypes.expand(batch, -1, -1)[torch.arange(batch)[:, None], y]  # (B, T, D)
    return (clean + torch.randn_like(clean)) / math.sqrt(2), y


def load_sampler(cfg, name, split, side, classes, device):
    """Official IDX files of MNIST or a relative -> sample(batch, length) -> x, y of images resized
    to side^2 pixels; no image comes twice in a lifetime."""
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        path = pathlib.Path(cfg.data_dir, name, f"{split}-{kind}-ubyte.gz")
        try:                         # bytes 0, 0, type, dimensions; sizes of 32 bits each; data
            raw = bytearray(gzip.decompress(path.read_bytes()))
            sizes = [int.from_bytes(raw[n:n + 4]) for n in range(4, 4 + 4 * raw[3], 4)]
            arrays.append(torch.frombuffer(raw[4 + 4 * raw[3]:], dtype=torch.uint8).view(sizes))
        except Exception as error:                           # a broken file raises almost any
            raise ValueError(f"{path} is missing or broken: {error}") from None
    images, labels, n = arrays[0] / 255, arrays[1].long().to(device), len(arrays[1])
    longest = max(cfg.length, cfg.test_length)
    if images.dim() != 3 or len(images) != n or labels.max() >= classes or n < longest:
        raise ValueError(f"{name}: {n} {split} labels do not fit images, --classes or lifetimes")
    images = F.interpolate(images[:, None], (side, side), mode="area").flatten(1)
    images = ((images - 0.1307) / 0.3081).to(device)         # mean and deviation of MNIST [code]

    def sample(batch, length):
        index = torch.rand(batch, n, device=device).argsort(1)[:, :length]
        return images[index], labels[index]
    return sample


def project(x, share):
    """x R for the first `share` of lifetimes (B, T, D): R of each its own, lengths kept."""
    few, D = math.ceil(share * len(x)), x.shape[-1]
    R = (2 * torch.rand(few, D, D, device=x.device) - 1) * math.sqrt(3 / D)
    return torch.cat([x[:few] @ R, x[few:]])


# ---- 3. MODEL ----------------------------------------------------------------------------------


class VSML(nn.Module):
    """V_M, the learning algorithm: one tiny LSTM and two message heads, shared by all synapses. The
    messages that arrive at a neuron are pooled by torch.mean or torch.sum."""

    def __init__(self, ticks=1, mode="B", pool=torch.mean, N=16):
        super().__init__()
        self.N, self.ticks, self.mode, self.pool = N, ticks, mode, pool
        self.W = nn.Parameter(torch.randn(2 + N, 4 * N) / math.sqrt(2 * N))
        self.b = nn.Parameter(torch.zeros(4 * N))
        self.up, self.down = nn.Linear(N, 1), nn.Linear(N, 1)

    def first_state(self, batch, *sizes):
        """State of layers between `sizes` = D, .., C neurons: h = 0, half of c random."""
        layers = []
        for I, O in zip(sizes, sizes[1:]):
            c = torch.randn(batch, I, O, self.N, device=self.b.device) / math.sqrt(I)
            layers.append((torch.zeros_like(c), c * (torch.arange(self.N) < self.N // 2).to(c)))
        return layers

    def visit(self, h, c, below, above):
        """Ticks of a layer, h and c (B, I, O, N), that hears below (B, I) and above (B, O)."""
        # Eq. 7, [m_i, m_o, h] W + b, in three parts: only the last needs a product for each synapse
        drive = below[:, :, None, None] * self.W[0] + above[:, None, :, None] * self.W[1] + self.b
        for _ in range(self.ticks):
            entry, g, forget, out = (drive + h @ self.W[2:]).chunk(4, -1)
            # The offsets [code] make the state slow: it forgets 0.7 % a tick
            c = torch.sigmoid(forget + 5) * c + torch.sigmoid(entry - 5) * torch.tanh(g)
            h = torch.sigmoid(out) * torch.tanh(c)
        return h, c

    def forward(self, x, targets, layers=None):
        """A lifetime: learn online from x (B, T, D), targets (B, T, C) one-hot -> logits (B, T, C),
        each before its label was seen. layers: list of states, else one first_state."""
        layers = list(layers or self.first_state(len(x), x.shape[2], targets.shape[2]))
        if self.mode == "A" and len(layers) > 1:
            raise ValueError("mode A is written for one layer; use mode B")
        error, logits = torch.zeros_like(targets[:, 0]), []
        for t in range(x.shape[1]):
            m, heard = x[:, t], []
            for k, (h, c) in enumerate(layers):              # predict, from the bottom up
                heard.append(m)
                # Mode A: the error of t - 1 meets x_t, so h and c must remember x_{t-1}
                above = error if self.mode == "A" else torch.zeros_like(h[:, 0, :, 0])
                layers[k] = self.visit(h, c, m, above)
                m = self.pool(self.up(layers[k][0]), 1)[..., 0]                # (B, O)
            logits.append(100 * torch.tanh(m / 100))         # softly bounded [code]
            error = m = logits[-1].softmax(-1) - targets[:, t]
            if self.mode == "B":
                for k in reversed(range(len(layers))):       # learn, from the top down
                    layers[k] = self.visit(*layers[k], heard[k], m)
                    m = self.pool(self.down(layers[k][0]), 2)[..., 0]          # (B, I)
        return torch.stack(logits, 1)


class MetaRNN(nn.Module):
    """An ordinary LSTM that reads its own errors (Hochreiter et al. 2001): D and C are fixed."""

    def __init__(self, D, C, hidden=64):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(D + 2 * C, hidden), nn.Linear(hidden, C)

    def forward(self, x, targets):
        """A lifetime, as of VSML -> logits (B, T, C)."""
        state, feedback, logits = None, torch.zeros_like(targets[:, 0]).repeat(1, 2), []
        for t in range(x.shape[1]):
            state = self.cell(torch.cat([x[:, t], feedback], -1), state)
            logits.append(self.head(state[0]))
            feedback = torch.cat([logits[-1].softmax(-1) - targets[:, t], targets[:, t]], -1)
        return torch.stack(logits, 1)


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# The outer loops; VSML.forward is the inner one.


def cross_entropy(logits, targets):
    """Mean over all predictions (.., C) in nats: of whole lifetimes, this is L(V_M)."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def es_gradient(rule, x, targets, chunk=0, sigma=0.05):
    """Algorithm 1, antithetic evolution strategies: leaves its estimate in .grad -> mean loss. Each
    of P = len(x) pairs lives through a lifetime of its own, its two members through the same."""
    def loss(parameters, x, targets, h, c):                  # of one member
        batch = x[None], targets[None], [(h[None], c[None])]
        return cross_entropy(torch.func.functional_call(rule, parameters, batch), targets)
    losses = torch.vmap(loss, chunk_size=chunk or None)
    (h, c), = rule.first_state(len(x), x.shape[2], targets.shape[2])
    parameters = dict(rule.named_parameters())
    eps = {name: torch.randn_like(p.expand(len(x), *p.shape)) for name, p in parameters.items()}
    plus, minus = (losses({name: p + side * eps[name] for name, p in parameters.items()},
                          x, targets, h, c) for side in (sigma, -sigma))       # (P,) each
    weight = (plus - minus) / (2 * sigma * len(x))
    for name, p in parameters.items():
        # g = 1/P sum_p (L(V_M + sigma eps_p) - L(V_M - sigma eps_p)) / (2 sigma) eps_p
        p.grad = torch.einsum("p,p...->...", weight, eps[name])
    return (plus + minus).mean() / 2


def clone_loss(rule, state, x, error_of, alpha=0.05):
    """How far two visits of a layer, state (h, c), are from backpropagation -> loss, state after
    them. w, b = c[0], c[1] now give the targets. A bias for each synapse: that of neuron o moves by
    I alpha e_o. x (B, I); error_of(logits (B, O)) -> errors from above (B, O)"""
    w, b = state[1][..., :2].detach().unbind(-1)             # (B, I, O)
    before = rule.visit(*state, x, torch.zeros_like(w[:, 0]))
    y = rule.up(before[0])[..., 0]
    error = error_of(y.detach().sum(1))
    after = rule.visit(*before, x, error)
    a, e = x.tanh()[:, :, None], error[:, None]
    # y_io = tanh(x_i) w_io + b_io, summed over i: what enters neuron o
    y_gap = y - (a * w + b)
    # e'_io = e_o w_io (1 - tanh(x_i)^2), summed over o: the error at input i
    e_gap = rule.down(after[0])[..., 0] - e * w * (1 - a**2)
    # The visit that predicts changes nothing. In units of alpha: else to never learn is as good
    keep_gap = (before[1][..., :2] - torch.stack([w, b], -1)) / alpha
    # w_io <- w_io - alpha e_o tanh(x_i),   b_io <- b_io - alpha e_o
    learned = torch.stack([w - alpha * e * a, b - alpha * e], -1)
    # Late in a lifetime errors are small: down to e^2 = 0.001 they weigh nearly like large ones
    weight = (0.5 + 0.125 / (error.square().mean(1) + 1e-3)).sqrt()[:, None, None, None]
    learn_gap = weight * (after[1][..., :2] - learned) / alpha
    return sum(gap.square().mean() for gap in (y_gap, e_gap, keep_gap, learn_gap)), after


# ---- 5. TRAINING -------------------------------------------------------------------------------


def train(cfg, run, stage, model, steps, loss_of, rate, clip=1.0, beta2=0.999, **state):
    """Adam, its rate constant at first, then falling to a twentieth. loss_of(step) -> loss, or it
    leaves a gradient in .grad itself; state: tensors that it changes in place."""
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, beta2), fused=True)
    for step in run.steps(stage, steps, model=model, adam=adam, **state):
        # META UPDATE
        adam.param_groups[0]["lr"] = rate * min(1, 2 * (1 - step / steps) + 0.05)
        adam.zero_grad()
        loss = loss_of(step)
        if loss.requires_grad:
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        adam.step()
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            run.log(loss=loss.item())


def meta_train(cfg, run, stage, model, sample, optimizer, rate):
    """Train a learning algorithm, VSML or MetaRNN, on lifetimes of one data set and projections."""
    def loss_of(step):
        # COLLECT
        x, y = sample(cfg.batch, cfg.length)
        x, targets = project(x, cfg.projected), F.one_hot(y, cfg.classes).float()
        if optimizer == "es":
            return es_gradient(model, x, targets, cfg.chunk)
        return cross_entropy(model(x, targets), targets)
    train(cfg, run, stage, model, cfg.steps, loss_of, rate, 1.0 if optimizer == "bptt" else 1e9)


def clone_synapses(cfg, run, rule, batch=256):
    """Cloning, first stage: single synapses in random states, with made-up inputs and errors."""
    def loss_of(step):
        # All numbers but w and b start at zero and become random slowly: an easier problem first
        amount = min(1, max(0, 2 * step / cfg.clone_steps - 0.5))
        h, c = 0.25 * amount * torch.randn(2, batch, 1, 1, rule.N, device=run.device)
        x = torch.randn(batch, 1, device=run.device)
        size, sign = torch.rand(2, batch, 1, device=run.device)
        spread = 0.04 * 20 ** torch.rand(batch, 1, 1, 1, device=run.device)    # 0.04 to 0.8
        c[..., :2] = spread * torch.randn(batch, 1, 1, 2, device=run.device)
        error = torch.exp(-3 * size) * (2 * sign - 1)
        return clone_loss(rule, (h, c), x, lambda logits: error)[0]
    train(cfg, run, "clone-synapses", rule, cfg.clone_steps, loss_of, 0.01, clip=5.0, beta2=0.99)


def clone_grids(cfg, run, rule, grids=6, I=20, O=4, window=6):
    """Cloning, second stage: grids that learn to classify white prototypes, with the errors that
    they themselves make, where small gaps add up. A grid lives for 25 windows on average."""
    h, c = torch.zeros(2, grids, I, O, rule.N, device=run.device)
    prototypes = torch.zeros(grids, O, I, device=run.device)

    def loss_of(step):
        restart = (torch.rand(grids, device=run.device) < 1 / 25) | (step == 0)
        first, size = torch.zeros_like(c), 0.2 * torch.rand(grids, 1, 1, device=run.device)
        first[..., 0] = size * torch.randn(grids, I, O, device=run.device)     # first weights
        for old, new in ((h, 0 * h), (c, first), (prototypes, torch.randn_like(prototypes))):
            old[restart] = new[restart]
        x, y = sample_fields(prototypes, grids, window)
        targets, state, loss = F.one_hot(y, O).float(), (h.clone(), c.clone()), 0
        for t in range(window):
            part, state = clone_loss(rule, state, x[:, t],
                                     lambda logits: logits.softmax(-1) - targets[:, t])
            loss = loss + part / window
        h.copy_(state[0].detach())
        c.copy_(state[1].detach())
        return loss
    train(cfg, run, "clone-grids", rule, cfg.clone_steps, loss_of, 5e-3, beta2=0.99,
          h=h, c=c, prototypes=prototypes)


# ---- 6. EVALUATION -----------------------------------------------------------------------------
# First the rivals: x (B, T, D), targets (B, T, C) -> logits, each before its label was seen.


def class_means(x, targets):
    """Running means of the classes: exact Bayes if prototypes and noise were white and normal, of
    variance 1/2 each. On smooth prototypes it is a rival, not the best there is."""
    n = targets.cumsum(1) - targets                          # seen before t
    sums = torch.einsum("btc,btd->btcd", targets, x).cumsum(1)                 # (B, T, C, D)
    sums = F.pad(sums, (0, 0, 0, 0, 1, 0))[:, :-1]
    variance = 0.5 + 0.5 / (n + 1)                           # of x, given what was seen
    distance = (x[:, :, None] - sums / (n + 1)[..., None]).square().sum(-1)
    return -distance / (2 * variance) - x.shape[-1] / 2 * variance.log()


def tanh_network(m, weights):
    """The network that is cloned: weights [w, b, ..] (B, I, O) of layers of synapses."""
    for w, b in zip(weights[::2], weights[1::2]):
        m = (m.tanh()[:, :, None] * w + b).sum(1)            # (B, O)
    return m


def gradient_descent(x, targets, weights, network, optimizer, rate):
    """The rule made by hand, one example a step, by autograd and an optimiser of torch."""
    weights, logits = [w.clone().requires_grad_() for w in weights], []
    learner = optimizer(weights, lr=rate)
    for t in range(x.shape[1]):
        with torch.enable_grad():
            out = network(x[:, t], weights)                  # (B, C)
            (len(x) * cross_entropy(out, targets[:, t])).backward()            # a sum: none mix
        logits.append(out.detach())
        learner.step()
        learner.zero_grad()
    return torch.stack(logits, 1)


def score(logits, y):
    """-> accuracy: all, first 20, last quarter, in tens; p(right class) after k examples of it."""
    right, p = (logits.argmax(-1) == y).float(), logits.softmax(-1).gather(-1, y[..., None])[..., 0]
    earlier = F.one_hot(y, logits.shape[-1]).cumsum(1).gather(-1, y[..., None])[..., 0] - 1
    by_count = [p[earlier == k] for k in range(10)]
    first = {"first20": right[:, :20].mean().item()} if y.shape[1] >= 20 else {}
    return {"all": right.mean().item(), "late": right[:, -max(1, y.shape[1] // 4):].mean().item(),
            "curve": [part.mean().item() for part in right.mean(0).split(10)],
            "p": [part.sum().item() / max(1, len(part)) for part in by_count]} | first


@torch.no_grad()
def evaluate(rule, rnn, tests):
    """All learners on all tests {name: (x, y, C)} -> {test: {learner: score}}. SGD, Adam: softmax
    regression from zero, the best of seven rates on these lifetimes, for each number anew."""
    results, linear = {}, lambda m, weights: (m[:, None] @ weights[0])[:, 0]
    for test, (x, y, C) in tests.items():
        (B, _, D), targets = x.shape, F.one_hot(y, C).float()
        row = results[test] = {"class means": score(class_means(x, targets), y),
                               "VSML": score(rule(x, targets), y)}
        if (rnn.cell.input_size, rnn.head.out_features) == (D + 2 * C, C):
            row["Meta RNN"] = score(rnn(x, targets), y)
        x, zero = F.pad(x, (0, 1), value=1.0), [x.new_zeros(B, D + 1, C)]      # a one: the bias
        for kind in (torch.optim.SGD, torch.optim.Adam):
            tried = [score(gradient_descent(x, targets, zero, linear, kind, rate), y)
                     | {"rate": rate} for rate in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]
            best = dict(max(tried, key=lambda numbers: numbers["all"]))
            for key in best.keys() & {"first20", "late"}:
                chosen = max(tried, key=lambda numbers: numbers[key])
                best |= {key: chosen[key], f"{key}_rate": chosen["rate"]}
            row[kind.__name__] = best
    return results


@torch.no_grad()
def evaluate_clone(cfg, rule, device):
    """The clone beside true backpropagation, same lifetimes and first weights -> {layers: ..}."""
    results = {}
    for layers, sizes in (("1layer", (36, 5)), ("2layers", (36, 32, 5))):
        fields = make_fields(cfg.lifetimes, 5, 6, device)
        x, y = sample_fields(fields, cfg.lifetimes, cfg.test_length)
        states, targets = rule.first_state(cfg.lifetimes, *sizes), F.one_hot(y, 5).float()
        for _, c in states:
            c[..., 1:] = 0                                   # random weights, all else zero
        weights = [c[..., k] for _, c in states for k in (0, 1)]
        true = gradient_descent(x, targets, weights, tanh_network, torch.optim.SGD, 0.05)  # alpha
        cloned = rule(x, targets, states)
        same = (cloned.argmax(-1) == true.argmax(-1))[:, -max(1, cfg.test_length // 4):]
        results[layers] = {"clone": score(cloned, y), "true": score(true, y),
                           "agreement": same.float().mean().item()}
    return results


def experiment(cfg, run):
    """Meta-train, clone, meta-test with one seed -> {"headline": {name: number}, ..}."""
    device, shape = run.device, (cfg.lifetimes, cfg.test_length)
    torch.manual_seed(run.seed)
    sample = partial(sample_fields, make_fields(1, cfg.classes, cfg.side, device))
    if cfg.data != "fields":
        sample = load_sampler(cfg, cfg.data, "train", cfg.side, cfg.classes, device)
    samplers = {name: load_sampler(cfg, name, "t10k", 28, 10, device)
                for name in cfg.test.split(",") if name}
    rule, rnn = VSML(cfg.ticks, cfg.mode).to(device), MetaRNN(cfg.side**2, cfg.classes).to(device)
    clone = VSML(ticks=2, pool=torch.sum).to(device)
    rule.visit, clone.visit = run.compile(rule.visit), run.compile(clone.visit)
    meta_train(cfg, run, "vsml", rule, sample, cfg.optimizer, cfg.learning_rate)
    meta_train(cfg, run, "meta-rnn", rnn, sample, "bptt", 0.01)     # best of four, seeds 10-12
    clone_synapses(cfg, run, clone)
    clone_grids(cfg, run, clone)
    def new(side, C, projected=0):                           # a data set of its own a lifetime
        x, y = sample_fields(make_fields(cfg.lifetimes, C, side, device), *shape)
        return project(x, projected), y, C
    del rule.visit, clone.visit                              # tests have too many shapes to compile
    torch.manual_seed(10_000 + run.seed)                     # whatever was trained before
    tests = {"seen": (*sample(*shape), cfg.classes), "new": new(6, 5), "projected": new(6, 5, 1),
             "12 x 12": new(12, 5), "10 classes": new(8, 10)}
    tests |= {name: (*sampler(*shape), 10) for name, sampler in samplers.items()}
    scores = evaluate(rule, rnn, tests)
    clones = evaluate_clone(cfg, clone, device)
    return {"headline": headline(scores, clones), "tests": scores, "clones": clones}


def headline(scores, clones):
    """-> {name: number}; of the first twenty only where lifetimes have as many."""
    vsml, means, sgd = (scores["10 classes"][name] for name in ("VSML", "class means", "SGD"))
    head = {"new_5class_accuracy": scores["new"]["VSML"]["all"],
               "new_10class_accuracy": vsml["all"]}
    for key, part in (("all", ""), ("first20", "_first20"), ("late", "_late")):
        if key in vsml:
            head[f"new_10class{part}_minus_best_sgd"] = vsml[key] - sgd[key]
            head[f"new_10class{part}_class_means_minus_vsml"] = means[key] - vsml[key]
    head |= {f"meta_rnn_{test}": scores[test]["Meta RNN"]["all"]
                for test in ("seen", "new") if "Meta RNN" in scores[test]}
    for layers, row in clones.items():
        head[f"clone_minus_backprop_{layers}"] = row["clone"]["late"] - row["true"]["late"]
        head[f"clone_agreement_{layers}"] = row["agreement"]
    return head


BESIDE = {"new_5class_accuracy": "chance 0.2", "clone_agreement_1layer": "backpropagation 1"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"VSML": "#0072B2", "class means": "#009E73", "SGD": "#E69F00", "Adam": "#56B4E9",
           "Meta RNN": "#D55E00"}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Four panels from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    figure = Figure((12, 8.4), layout="constrained")
    a, b, c, d = figure.subplots(2, 2).flat
    seeds, tests = summary["per_seed"], summary["per_seed"][0]["tests"]
    tens = [10 * n + 5 for n in range(len(tests["new"]["VSML"]["curve"]))]
    for n, (name, colour) in enumerate(COLOURS.items()):
        bars = [(place + 0.16 * n, [seed["tests"][test][name]["all"] for seed in seeds])
                for place, test in enumerate(tests) if name in tests[test]]
        places, values = zip(*bars)
        b.bar(places, [statistics.fmean(v) for v in values], 0.16, color=colour, label=name)
        if name in tests["10 classes"]:
            rows = [seed["tests"]["10 classes"][name] for seed in seeds]
            lines(a, tens, [row["curve"] for row in rows], colour, name)
            lines(c, range(10), [row["p"] for row in rows], colour, name)
    b.set_xticks([place + 0.32 for place in range(len(tests))], list(tests), rotation=20)
    for layers, colour in (("1layer", "#8B5A2B"), ("2layers", "#CC79A7")):
        rows = [seed["clones"][layers] for seed in seeds]
        same = statistics.fmean(row["agreement"] for row in rows)
        true, clone = ([row[key]["curve"] for row in rows] for key in ("true", "clone"))
        lines(d, tens, true, colour, f"backpropagation, {layers}", "--")
        lines(d, tens, clone, colour, f"its clone, {same:.1%} alike")
    for axis, x, y, title in (
            (a, "examples seen", "accuracy", "(a) 10 new classes: fast at first, overtaken late"),
            (b, "", "accuracy", "(b) One rule, many data sets; the Meta RNN knows one"),
            (c, "examples of the class", "p(right class)", "(c) 10 classes: sure after a few"),
            (d, "examples seen", "accuracy", "(d) Forward passes that imitate backpropagation")):
        axis.set(xlabel=x, ylabel=y, title=title, ylim=(0, 1.02))
        axis.legend(fontsize=8, loc="lower right")
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
