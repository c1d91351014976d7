# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""Meta-learning on non-stationary distributions: exact Bayes over hidden switches, in one file.

Genewein, Deletang, Ruoss, Wenliang, Catt, Dutordoir, Grau-Moya, Orseau, Hutter, Veness,
"Memory-Based Meta-Learning on Non-Stationary Distributions", arXiv 2302.03067. [code]: the official
release. Why log loss over fresh tasks teaches Bayes is told in bayes_meta.py.

IDEA
  The bias of a coin changes at times that nobody sees. To predict the next toss, exact Bayes weighs
  all the ways in which the past may fall into segments, 2^(T-1) of them. For two laws of the
  switching times an algorithm does this in polynomial time: PTW and LIN. Here networks with a
  memory learn to predict from samples alone, by log loss, and are measured against these in nats.
  They come close; and where the switches follow neither law but come at fixed times, a network
  trained on samples finds that out and is better than both.

ALGORITHM (meta-training)
  repeat
    for each of B sequences: draw the switches from the source, a bias theta ~ Beta(1/2, 1/2) for
    each segment, and bits x_t ~ Bernoulli(theta_t)
    w <- Adam(w, grad of -1/(BT) sum_{b,t} log p_w(x_t | x_{<t}))
  The loss is least where p_w(x_t | x_{<t}) is the exact mixture over all switches and biases.

SYMBOLS, in the code, shape or meaning
  B, T, N     batch, length, sequences   sequences a step, symbols of one, sequences of a test
  x           x                 (B, T)   bits
  theta       theta             (B, T)   hidden P(x_t = 1)
  p_w, q      q                 (B, T)   predicted P(x_t = 1 | x_{<t})
  regret      step_regret       (B, T-1) KL(theta_t || q_t), t >= 2, and its sum; Bayes has one, too
  KT          kt_predict                 exact for one segment (Krichevsky, Trofimov)
  PTW         ptw_predict                exact for a binary tree of segments (Veness et al. 2013)
  LIN         lin_predict                exact if n symbols end a segment with prob. 1 / (2 n)
  oracle      oracle_predict             KT told where the segments begin; for `regular` exact Bayes

RESULT (quick: seeds 0-4, mean [95 % t interval], 2.3 minutes a seed on one core; `paper`: not run)
  Ratios of regrets: LSTM on lin to exact LIN 1.001 [1.001, 1.002]; on ptw, 0.822 [0.818, 0.826] of
  the way from KT to PTW; on regular to exact Bayes 1.004 [1.003, 1.005], to the better of PTW and
  LIN 0.558. At four times the length, to exact LIN: LSTM 1.028 [1.023, 1.033], ALiBi 1.065 [1.061,
  1.070], sinusoidal 2.046 [1.944, 2.148] (at the training length 1.012). All seeds share the tests.

DIFFERS
  1. quick is small: T = 64 instead of 256, LSTMs of width 64, 1,500 steps.
  2. The first symbol is predicted, too, from a start token; regret begins at the second, as the
     official evaluation does: the first costs every exact predictor the same 1 - ln 2.
  3. Official, not here: a ReLU before the read-out, embeddings from a truncated normal times the
     root of the width, attention without biases, ALiBi's lag less 1/2, falling positions, dropout.
  4. Left out: plain and stack RNNs, relative positions, sources static and uniform.
  5. Ours: rates, falling along a cosine; one width for all; equal first weights of all blocks.

RUN
  python nonstationary.py                                  # all networks of the figure
  python nonstationary.py --networks lstm:ptw,alibi:ptw    # model:source
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

MODELS, SOURCES = ("lstm", "sincos", "alibi"), ("ptw", "lin", "regular")


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code: x]: the release has x."""
    networks: str = "lstm:ptw,lstm:lin,lstm:regular,sincos:lin,alibi:lin"  # model:source, ...
    length: int = 64                     # symbols of a training sequence, T
    batch: int = 64                      # sequences a step, B [code: 128]
    width: int = 64                      # of the networks
    layers: int = 2                      # transformer blocks [code: 5]
    heads: int = 4                       # attention heads [code: 8]
    lstm_steps: int = 1500               # meta-training steps of an LSTM
    lstm_rate: float = 5e-3              # first learning rate of an LSTM
    transformer_steps: int = 700         # meta-training steps of a transformer
    transformer_rate: float = 2e-3       # first learning rate of a transformer
    sequences: int = 1000                # of a test, N; a fifth at four times the length
    seed: int = 0                        # first seed
    num_seeds: int = 1                   # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 50                  # steps between tests
    save_every: int = 250                # steps between checkpoints

    def __post_init__(self):
        if min(self.length - 1, self.batch, self.width, self.layers, self.heads, self.lstm_steps,
               self.transformer_steps, self.sequences - 4) < 1:
            raise ValueError("sizes must be at least 1, --length at least 2, --sequences 5")
        if self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} is no multiple of twice --heads {self.heads}")
        for name in self.networks.split(","):
            model, _, source = name.partition(":")
            if model not in MODELS or source not in SOURCES:
                raise ValueError(f"--networks: {name!r} is not one of {', '.join(MODELS)}, then a "
                                 f"colon, then one of {', '.join(SOURCES)}")


PRESETS = {
    "smoke": dict(length=16, width=16, lstm_steps=10, transformer_steps=10, sequences=50,
                  log_every=5, save_every=4),
    "quick": {},
    "paper": dict(length=256, batch=128, width=128, layers=5, heads=8, lstm_steps=100_000,
                  lstm_rate=1e-4, transformer_steps=100_000, transformer_rate=1e-4, sequences=2000,
                  log_every=1000, save_every=5000),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# First the sources, which differ in the law of the switches; then the exact predictors, in float64.

PERIOD = 20


def sample_switches(source, batch, length, device):
    """-> (B, T) bool: True where a new segment begins, never at the first symbol.

    ptw      a block of 2^d symbols is one segment or, with probability 1/2, is cut in the middle,
             and each half is treated likewise; a tree of its own for each sequence
    lin      a segment that has n symbols ends there with probability 1 / (2 n)
    regular  a new segment every PERIOD symbols
    """
    switches = torch.zeros(batch, length, dtype=torch.bool, device=device)
    if source == "regular":
        switches[:, PERIOD::PERIOD] = True
        return switches
    if source == "lin":
        n = torch.ones(batch, device=device)                 # symbols of the current segment
        for t in range(1, length):
            switches[:, t] = torch.rand(batch, device=device) < 0.5 / n
            n = torch.where(switches[:, t], 1, n + 1)        # (B,)
        return switches
    depth = (length - 1).bit_length()
    switches = torch.zeros(batch, 2**depth, dtype=torch.bool, device=device)
    node = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for level in range(depth):                               # all 2^level blocks of a level at once
        cut = node & (torch.rand(node.shape, device=device) < 0.5)             # (B, 2^level)
        block = 2 ** (depth - level)
        switches[:, block // 2::block] |= cut
        node = cut.repeat_interleave(2, 1)                   # the halves of what was cut
    return switches[:, :length]


def sample_source(source, batch, length, device):
    """-> bits x, theta = P(x_t = 1), switches, each (B, T)."""
    switches = sample_switches(source, batch, length, device)
    bias = (torch.rand(batch, length, device=device) * math.pi / 2).sin().square()
    theta = bias.gather(1, switches.long().cumsum(1))        # ~ Beta(1/2, 1/2), by segment number
    return (torch.rand(batch, length, device=device) < theta).long(), theta, switches


def before(x):
    """(B, T, ..) -> x_1 + .. + x_{t-1} at each t, in float64: never x_t."""
    return x.double().cumsum(1) - x.double()


def kt_predict(x):
    """Bits (B, T) -> P(x_t = 1 | x_{<t}), float64: Bayes where one bias rules all."""
    return (before(x) + 0.5) / (before(torch.ones_like(x)) + 1)


def oracle_predict(x, switches):
    """KT that is told where the segments begin: on average, no predictor of bits is better."""
    ones, steps = before(x), torch.arange(x.shape[1], device=x.device)
    start = torch.where(switches, steps, 0).cummax(1).values                   # of x_t's segment
    return (ones - ones.gather(1, start) + 0.5) / ((steps - start).double() + 1)


def log_kt(n, ones):
    """Log evidence of n bits, `ones` of them 1, under one bias ~ Beta(1/2, 1/2); float64."""
    return (torch.lgamma(ones + 0.5) + torch.lgamma(n - ones + 0.5) - torch.lgamma(n + 1)
            - math.log(math.pi))


def ptw_predict(x):
    """Bits (B, T) -> P(x_t = 1 | x_{<t}), float64: Bayes for the source `ptw`.
    Two log evidences (B, T) of the part of x_1 .. x_t in the block of t: `seen`, of the bits as
    they are, and `with_one`, where x_t is 1. Blocks grow level by level from single symbols up."""
    t = torch.arange(1, x.shape[1] + 1, device=x.device)
    count = F.pad(x.double().cumsum(1), (1, 0))              # (B, T + 1)
    seen = torch.full_like(count[:, 1:], -math.log(2))
    with_one = seen.clone()
    for level in range(1, (x.shape[1] - 1).bit_length() + 1):
        start = ((t - 1) >> level) << level                  # symbols before the block of t
        middle = start + (1 << (level - 1))
        # Evidence of the block's whole left half, for the t that lie in its right half
        left = torch.where(t > middle, seen[:, (middle - 1).clamp(max=len(t) - 1)], 0)
        n = (t - start).double()                             # lgamma of an integer is float32
        # PTW_k(x_{1:n}) = 1/2 KT(x_{1:n}) + 1/2 PTW_{k-1}(left half) PTW_{k-1}(right half)
        one_segment = log_kt(n, count[:, :-1] + 1 - count[:, start])
        with_one = torch.logaddexp(one_segment, left + with_one) - math.log(2)
        one_segment = log_kt(n, count[:, 1:] - count[:, start])
        seen = torch.logaddexp(one_segment, left + seen) - math.log(2)
    return (with_one - F.pad(seen[:, :-1], (1, 0))).exp()


def lin_predict(x):
    """Bits (B, T) -> P(x_t = 1 | x_{<t}), float64: Bayes for the source `lin`: a
    filter over the hidden start of the current segment, one more candidate at each symbol."""
    x, q = x.double(), []
    weight, ones = x.new_ones(len(x), 1), x.new_zeros(len(x), 1)               # (B, starts)
    for t in range(x.shape[1]):
        n = torch.arange(t, -1, -1, device=x.device).double()                  # symbols, by start
        bit, p = x[:, t:t + 1], (ones + 0.5) / (n + 1)
        q.append((weight * p).sum(1))
        weight = weight * torch.where(bit == 1, p, 1 - p)    # what x_t says of each start
        weight = weight / weight.sum(1, keepdim=True)
        hazard = 0.5 / (n + 1)
        new = (weight * hazard).sum(1, keepdim=True)         # a switch right after x_t
        weight = torch.cat([weight * (1 - hazard), new], 1)
        ones = F.pad(ones + bit, (0, 1))
    return torch.stack(q, 1)


def step_regret(theta, q):
    """KL(theta_t || q_t) in nats: true bias and prediction (B, T) -> (B, T - 1), from t = 2 on."""
    theta, q = (p[:, 1:].double().clamp(1e-12, 1 - 1e-12) for p in (theta, q))
    return theta * (theta / q).log() + (1 - theta) * ((1 - theta) / (1 - q)).log()


# ---- 3. MODEL ----------------------------------------------------------------------------------


def shifted(x):
    """Bits (B, T) -> one-hot (B, T, 2), one step later, zeros first: at t, x_{<t} has been read."""
    return F.pad(F.one_hot(x, 2).float(), (0, 0, 1, 0))[:, :-1]


class Lstm(nn.Module):
    """Bits x (B, T) -> logits of x_t = 1 given x_{<t}, (B, T)."""

    def __init__(self, cfg):
        super().__init__()
        self.core, self.head = nn.LSTM(2, cfg.width, batch_first=True), nn.Linear(cfg.width, 1)
        with torch.no_grad():                                # remember first: a forget bias of 1
            self.core.bias_ih_l0[cfg.width:2 * cfg.width] = 1.0
            self.core.bias_hh_l0[cfg.width:2 * cfg.width] = 0.0
            self.core.weight_ih_l0 *= math.sqrt(cfg.width / 2)                 # it has 2 inputs

    def forward(self, x):
        return self.head(self.core(shifted(x))[0])[..., 0]


class Transformer(nn.Module):
    """Causal transformer, bits (B, T) -> logits (B, T): with sinusoidal positions, which let it
    count, or with ALiBi, a bias against attention that grows with the lag, at any length alike."""

    def __init__(self, cfg, alibi):
        super().__init__()
        self.heads, self.alibi = cfg.heads, alibi
        self.embed, self.head = nn.Linear(2, cfg.width), nn.Linear(cfg.width, 1)
        block = nn.TransformerEncoderLayer(cfg.width, cfg.heads, 4 * cfg.width, dropout=0,
                                           batch_first=True)
        self.blocks = nn.TransformerEncoder(block, cfg.layers)

    def forward(self, x):
        h = self.embed(shifted(x))                           # (B, T, width)
        t = torch.arange(x.shape[1], device=x.device)
        lag = t[:, None] - t
        mask = torch.zeros_like(lag, dtype=h.dtype).masked_fill(lag < 0, -math.inf)
        if self.alibi:
            slope = 2 ** (-8 * torch.arange(1, self.heads + 1, device=x.device) / self.heads)
            mask = (mask - slope[:, None, None] * lag).repeat(len(x), 1, 1)    # (B heads, T, T)
        else:
            rate = 1e4 ** (-torch.arange(0, h.shape[2], 2, device=x.device) / h.shape[2])
            h = h + torch.cat([(t[:, None] * rate).sin(), (t[:, None] * rate).cos()], -1)
        return self.head(self.blocks(h, mask, is_causal=not self.alibi))[..., 0]


@torch.no_grad()
def predict(model, x):
    """Bits (N, T) -> P(x_t = 1 | x_{<t}) of a network, float64, in parts of 100 sequences."""
    return torch.cat([model(part) for part in x.split(100)]).double().sigmoid()


# ---- 4. LEARNING RULE --------------------------------------------------------------------------


def log_loss(model, x):
    """-1/(BT) sum_{b,t} log p_w(x_t | x_{<t}) in nats: of the bits, never of the hidden theta."""
    return F.binary_cross_entropy_with_logits(model(x), x.float())


# ---- 5. TRAINING -------------------------------------------------------------------------------


def train(cfg, run, name, test_x, test_theta):
    """Meta-train the network `name`, model:source, on fresh sequences, and log its regret on the
    test, in nats a sequence -> model."""
    kind, source = name.split(":")
    model = (Lstm(cfg) if kind == "lstm" else Transformer(cfg, kind == "alibi")).to(run.device)
    rate, steps = cfg.transformer_rate, cfg.transformer_steps
    if kind == "lstm":
        rate, steps = cfg.lstm_rate, cfg.lstm_steps
    adam = torch.optim.Adam(model.parameters(), fused=True)
    loss_function = run.compile(lambda x: log_loss(model, x))
    for step in run.steps(name.replace(":", "-"), steps, model=model, adam=adam):
        # COLLECT
        x, _, _ = sample_source(source, cfg.batch, cfg.length, run.device)
        # META UPDATE
        adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.zero_grad()
        loss_function(x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            regret = step_regret(test_theta, predict(model, test_x)).sum(1)
            run.log(regret=regret.mean().item())
    return model


# ---- 6. EVALUATION -----------------------------------------------------------------------------


def experiment(cfg, run):
    """The networks of one seed, each on each source -> {"headline": {name: number}, ..}."""
    if run.device.type == "mps":
        raise ValueError("--device mps has no float64 for the exact solutions; use --device cpu")
    torch.manual_seed(12345)                                 # the same tests for all seeds
    tests = {source: sample_source(source, cfg.sequences, cfg.length, run.device)
             for source in SOURCES}
    tests["long"] = sample_source("lin", cfg.sequences // 5, 4 * cfg.length, run.device)
    torch.manual_seed(run.seed)
    names = cfg.networks.split(",")
    models = {name: train(cfg, run, name, *tests[name.split(":")[1]][:2]) for name in names}

    matrix, curves, example = {}, {}, {}
    for test, (x, theta, switches) in tests.items():
        q = {"KT": kt_predict(x), "PTW": ptw_predict(x), "LIN": lin_predict(x),
             "oracle": oracle_predict(x, switches)}
        q |= {name: predict(model, x) for name, model in models.items()}
        regrets = {name: step_regret(theta, p) for name, p in q.items()}
        matrix[test] = {name: r.sum(1).mean().item() for name, r in regrets.items()}
        if test == "long":
            curves = {name: r.cumsum(1).mean(0).tolist() for name, r in regrets.items()}
        if test == "ptw":                                    # the first with over 3 switches
            one = (switches.sum(1) > 3).int().argmax()
            shown = {"x": x, "theta": theta, "switches": switches, "PTW": q["PTW"]}
            shown |= {name: q[name] for name in names if name == "lstm:ptw"}
            example = {name: p[one].double().tolist() for name, p in shown.items()}
    history = {name: [(row["step"], row["regret"]) for row in run.rows
                      if row["stage"] == name.replace(":", "-")] for name in names}
    return {"headline": headline(cfg, matrix), "matrix": matrix, "curves": curves,
            "example": example, "history": history}


def headline(cfg, matrix):
    """Ratios of regrets, of the networks that were trained -> {name: number}."""
    names = cfg.networks.split(",")
    head = {f"{name}_regret": matrix[name.split(":")[1]][name] for name in names}
    if "lstm:ptw" in names:          # from KT, which knows no switches, to exact PTW
        row = matrix["ptw"]
        head["ptw_gap_closed"] = (row["KT"] - row["lstm:ptw"]) / (row["KT"] - row["PTW"])
    if "lstm:regular" in names:
        row = matrix["regular"]
        head["regular_ratio_to_oracle"] = row["lstm:regular"] / row["oracle"]
        head["regular_ratio_to_best_mixture"] = row["lstm:regular"] / min(row["PTW"], row["LIN"])
    for model in MODELS:
        for test, at in (("lin", ""), ("long", "_at_4_T")):
            if f"{model}:lin" in names:
                ratio = matrix[test][f"{model}:lin"] / matrix[test]["LIN"]
                head[f"{model}_lin_ratio{at}"] = ratio
    return head


BESIDE = {"ptw_gap_closed": "exact PTW 1, KT 0", "lstm_lin_ratio": "exact LIN 1",
          "regular_ratio_to_oracle": "exact 1", "regular_ratio_to_best_mixture": "PTW or LIN 1"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"KT": "#D55E00", "PTW": "#000000", "LIN": "#000000", "oracle": "#E69F00",
           "lstm:ptw": "#0072B2", "lstm:lin": "#009E73", "lstm:regular": "#CC79A7",
           "sincos:lin": "#56B4E9", "alibi:lin": "#8B5A2B"}
OTHER = "#F0E442"                    # a network that `quick` does not train


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Four panels from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    figure = Figure((12, 8.4), layout="constrained")
    a, b, c, d = figure.subplots(2, 2).flat
    cfg, seeds = summary["config"], summary["per_seed"]
    for name in seeds[0]["history"]:
        exact = {"ptw": "PTW", "lin": "LIN", "regular": "oracle"}[name.split(":")[1]]
        best = [seed["matrix"][name.split(":")[1]][exact] for seed in seeds]
        steps = [step for step, _ in seeds[0]["history"][name]]
        curves = [[regret / least for _, regret in seed["history"][name]]
                  for seed, least in zip(seeds, best)]
        lines(a, steps, curves, COLOURS.get(name, OTHER), name)
    a.axhline(1, color="k", lw=0.8, label="exact (regular: the oracle)")
    a.set(xscale="log", ylim=(0.95, 2), xlabel="meta-training step", ylabel="regret / exact one's",
          title="(a) Log loss leads towards exact Bayes")

    plot_matrix(b, [seed["matrix"] for seed in seeds])
    plot_example(c, seeds[0]["example"])
    for name in ("KT", "LIN", "oracle", "lstm:lin", "sincos:lin", "alibi:lin"):
        if name in seeds[0]["curves"]:
            curves = [seed["curves"][name] for seed in seeds]
            t, style = range(2, len(curves[0]) + 2), "-" if ":" in name else "--"
            lines(d, t, curves, COLOURS[name], name, style)
    d.axvline(cfg["length"], color="#777777", lw=1, ls=":", label="training length")
    d.set(xlabel="symbol", ylabel="regret so far", ylim=(0, 2.5 * seeds[0]["curves"]["LIN"][-1]),
          title="(d) Longer than trained, source lin")
    for axis in (a, c, d):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_matrix(axis, matrices):
    """(b) Mean regret of each predictor on each source; bold: a row's least but for the oracle."""
    names = list(matrices[0]["ptw"])
    values = torch.tensor([[[m[source][name] for name in names] for source in SOURCES]
                           for m in matrices]).mean(0)       # (sources, names)
    least = values[:, [name != "oracle" for name in names]].amin(1, keepdim=True)
    axis.imshow((values / least).log().tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            weight = "bold" if value == least[i].item() else "normal"
            colour = "w" if value > 1.8 * least[i].item() else "k"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", weight=weight, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=30)
    axis.set_yticks(range(len(SOURCES)), SOURCES)
    axis.set(ylabel="source of the test", title="(b) Regret: at home, each LSTM is the best LSTM")


def plot_example(axis, example):
    """(c) One sequence of the source ptw: bits, hidden bias, exact and learned prediction."""
    t = range(1, len(example["x"]) + 1)
    for step, switch in zip(t, example["switches"]):
        if switch:
            axis.axvline(step, color="#777777", lw=0.5)
    axis.plot(t, example["x"], ".", color="#777777", ms=4, label="bits")
    axis.step(t, example["theta"], color="#E69F00", where="mid", lw=1.5, label="hidden bias")
    for name in ("PTW", "lstm:ptw"):
        if name in example:
            axis.plot(t, example[name], color=COLOURS[name], lw=2, label=name)
    axis.set(xlabel="symbol", ylabel="P(1)", title="(c) A coin that changes unseen")


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
