# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""VSML: a grid of tiny shared LSTMs that learns to learn, and clones backpropagation, in one file.

Kirsch, Schmidhuber, "Meta Learning Backpropagation And Improving It", NeurIPS 2021,
arXiv 2012.14905. "[code]" marks what was read in the official release (JAX), which has the
meta-learning from scratch, but nothing of the cloning.

IDEA
  A network has weights, and a rule made by hand, backpropagation, that changes them. Here every
  weight w_io becomes a tiny LSTM, with a state of its own and with the same parameters as all the
  others. It hears from its input neuron i and, backwards, from its output neuron o; it changes its
  state and answers. Running this grid forward *is* learning: there is no gradient and no update
  inside a lifetime. Some 2,000 shared numbers are the learning algorithm; the states, a quarter of
  a million for an image of 28 x 28 pixels and ten classes, are what it learns. A plain meta-RNN has
  it the other way round, of the order of N^2 parameters for N state numbers, and memorises its data
  set; shared parameters have little room for that, and carry over to other data sets, image sizes
  and numbers of classes. They can also be trained to imitate backpropagation, nearly exactly.

ALGORITHM
  one tick of the LSTM between input i and output o of a layer              (Eq. 7 of the paper)
    in, g, f, out = [m_i, m_o, h_io] W_g + b_g
    c_io <- sigmoid(f + 5) c_io + sigmoid(in - 5) tanh(g)
    h_io <- sigmoid(out) tanh(c_io)
    up   m'_o = mean_i (h_io U_up + u_up)       down   m'_i = mean_o (h_io U_down + u_down)
  a lifetime: for each example (x, y)                                       the inner loop
    m_i = (x_i, 0, ..) at the bottom;  logit_o = first number of m'_o at the top
    e = softmax(logits) - onehot(y);   m_o = (e_o, 0, ..) at the top
      mode A   together with the next example, on its way up
      mode B   in a sweep of its own, from top to bottom, before the next example
  meta-training, repeat                                                     the outer loop
    live B lifetimes; L(V_M) = mean cross-entropy of all predictions
    V_M <- Adam(V_M, gradient of L), through the whole lifetimes or by evolution strategies:
      g = 1/P sum_p (L(V_M + sigma eps_p) - L(V_M - sigma eps_p)) / (2 sigma) eps_p
  cloning: V_M <- Adam so that a visit of a synapse does what backpropagation does, see section 4
  With one layer, as in quick, a message is a single number, x_i or e_o, and nothing is sent down:
  only 1,233 of the 2,384 parameters matter. A hidden layer (--hidden, and in the clone) uses all.

SYMBOLS
  symbol     in the code      shape              meaning
  S          leading axis                        seeds (with ES times 2 P members) run at once
  B, T, C    batch, length    x (S, B, T, D)     lifetimes, examples of each, classes
  D          side^2                              inputs of an example
  I, O       (the paper's A, B)                  inputs and outputs of one layer of the grid
  N, M       state_size, message_size            size of the tiny LSTM, of a message
  V_M        params           {name: (S, ..)}    shared parameters: the learning algorithm,
             W_below, W_above, W_state           rows of W_g (2 M + N, 4 N) for m_i, m_o and h
             bias, U_up, u_up, U_down, u_down    b_g (4 N), and the two heads, (N, M) and (M)
  V_L        Layer.h, .c      (S, N, B, O, I)    states: what is learned in a lifetime
  m_i, m_o   below, above     (S, M, B, I|O)     messages that enter a layer from below, from above
  e, l       error, label     (S, B, C)          softmax(logits) - onehot, onehot
  P, sigma   batch, sigma                        pairs of ES, deviation of their perturbations eps
  E          eval_lifetimes   x (S, E, T, D)     lifetimes of a meta-test
  alpha      alpha                               learning rate of the cloned backpropagation
  A visit is a number of ticks of one layer with its incoming messages held fixed. "Cumulative"
  accuracy is the mean over all predictions of a lifetime, from the first on.

RESULT
  quick, means of 5 seeds (0-4) with 95 % t intervals, 2 CPU cores (AMD EPYC), 12.4 min for all:
    unseen 5 classes, accuracy over 200 examples    0.945 [0.940, 0.949]   best SGD 0.938
    unseen 10 classes, 8 x 8                        0.931 [0.925, 0.936]   best SGD 0.910
      first 20 examples minus best SGD or Adam      0.084 [0.071, 0.097]
      last 50 examples minus best SGD or Adam       -0.017 [-0.028, -0.007]
    Meta RNN, seen and unseen                       0.995, 0.203 (chance 0.20)
    clone minus backpropagation, same predictions   0.000 [-0.002, 0.002], 0.997
      with a hidden layer                           -0.006 [-0.017, 0.005], 0.976
  Meta-trained on MNIST at 14 x 14 (3 seeds, 15.8 min), tested at 28 x 28 over 500 examples:
    MNIST 0.736 [0.722, 0.750], best SGD 0.714; Fashion-MNIST 0.645 [0.634, 0.656],
    best Adam 0.625; the Meta RNN has 0.934 and 0.071 at 14 x 14 (chance 0.10).
  paper preset (one GPU): not run yet.

DIFFERS
  1. quick is small: "fields", made-up images of 6 x 6, instead of MNIST, lifetimes of 50 examples,
     mode B with one tick and back-propagation through time. The paper's own setting, mode A with
     two ticks, is trained beside it, and by evolution strategies at 4 x 4, as the paper does.
  2. The paper writes sums over a neuron's synapses, its code takes means. Means here, which do not
     depend on the size of the image; sums for the clone, as backpropagation has sums. What is
     cloned has tanh units, on the pixels too, and a bias at every synapse.
  3. The output is the first number of the message ([code]: the second), so that in the clone, whose
     messages are one number, layers connect. In mode B, messages from above are forgotten before a
     forward sweep ([code] keeps those of hidden layers).
  4. Cloning has no published code: the two-phase recipe is ours, the four targets are the paper's.
     Single layers are deployed from zero weights, the hidden layer from random ones.
  5. Every projected lifetime has a random projection of its own ([code]: a pool of 64), every
     lifetime of `random` its own 20 images ([code]: fixed), and none from files repeats an image.
  6. SGD and Adam start from zero weights ([code]: random), and stand for the best of several rates,
     chosen on the lifetimes that they are compared on: in their favour. Meta RNN (64 units; [code]:
     128) and Hebbian weights always train through whole lifetimes, at a rate of 3e-3.
  7. Left out: LayerNorm ([code] has it in its BPTT setting, with a rate of 1e-3 and a clip of 25),
     convolutions, Omniglot, CIFAR, SVHN, EMNIST, the external-memory baseline, SGD with a hidden
     layer, meta-training on several data sets (the paper's matrix) or on mixed sizes.
  8. Long, for two modes, two outer loops and cloning are in it.

RUN
  python vsml.py                            # made-up images: no files, no network
  python vsml.py --test mnist,fashion_mnist --download --out runs/vsml/real
  python vsml.py --dataset mnist --side 14 --classes 10 --download --out runs/vsml/mnist
  torchrun --standalone --nproc_per_node=8 vsml.py --preset paper
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import gzip
import hashlib
import http.client
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
import struct
import sys
import time
import urllib.request
import zlib
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [code]: as in the official
    release; [code: x]: the release has x."""
    dataset: str = "fields"          # to meta-train on: fields, random, sum, [fashion_|k]mnist
    test: str = ""                   # real data to meta-test on as well: mnist,fashion_mnist,kmnist
    data_dir: str = "data"           # folder with NAME/train-images-idx3-ubyte.gz and so on
    download: bool = False           # fetch missing official files into --data-dir
    side: int = 6                    # pixels a side in meta-training; images are resized
    classes: int = 5                 # classes in meta-training, C
    noise: float = 1.0               # of the fields, beside a signal of 1
    length: int = 50                 # examples of a lifetime in meta-training, T [code: 500]
    batch: int = 16                  # lifetimes a meta-step, B; with ES, pairs [code: 128 and 1024]
    projected: float = 0.5           # share of lifetimes with a random projection of its own [code]
    mode: str = "B"                  # A: errors come one example late [code: A]; B: a reverse sweep
    ticks: int = 1                   # of the LSTMs at each visit [code: 2]
    state_size: int = 16             # size of the tiny LSTM, N [code]
    message_size: int = 8            # numbers in a message, M [code]; one layer uses only the first
    hidden: int = 0                  # neurons of a hidden layer; 0: one layer
    feed_label: bool = False         # send the label back beside the error
    reduce: str = "mean"             # of the messages at a neuron: mean [code] or sum [paper]
    optimizer: str = "bptt"          # of the meta variables: bptt or es [code: es]
    steps: int = 400                 # meta-steps
    learning_rate: float = 0.03      # of Adam [code: 0.025 with ES, 1e-3 with BPTT]
    decay: bool = True               # let all rates fall linearly in the second half, to 1/20
    clip: float = 1.0                # bound on the gradient norm of BPTT [code: 25]
    sigma: float = 0.05              # deviation of the perturbations of ES [code]
    chunk: int = 0                   # ES: pairs at once, to bound the memory; 0: all
    segment: int = 0                 # BPTT: checkpoint the gradient every so many examples; 0: no
    other_mode: bool = True          # meta-train in the other mode, too
    es_steps: int = 1500             # meta-steps of a small demonstration of ES in Mode A; 0: none
    baseline_steps: int = 400        # meta-steps of Meta RNN and Hebbian fast weights; 0: none
    synapse_steps: int = 5000        # of cloning backpropagation, single synapses; 0: no cloning
    grid_steps: int = 3000           # of cloning backpropagation, whole grids
    alpha: float = 0.05              # learning rate of the cloned backpropagation
    eval_lifetimes: int = 64         # of each meta-test and seed
    eval_length: int = 200           # examples of such a lifetime
    real_lifetimes: int = 16         # lifetimes of each test on real data
    real_length: int = 500           # examples of a lifetime on real data [code: 2000]
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds trained side by side: seed, seed + 1, ...
    log_every: int = 10              # steps between lines of the log, at most 100 lines a stage
    save_every: int = 200            # steps between checkpoints

    def __post_init__(self):
        zero = {"hidden", "chunk", "segment", "seed", "es_steps", "baseline_steps", "noise",
                "synapse_steps", "projected"}
        low = {"classes": 2, "side": 2, "length": 2, "state_size": 4} | dict.fromkeys(zero, 0)
        high = {"projected": 1, "noise": 1000, "seed": 1 << 24}
        for name, value in asdict(self).items():
            above = value >= low[name] if name in low else type(value) is str or value > 0
            if type(value) in (int, float) and not (above and value <= high.get(name, 1e300)):
                raise ValueError(f"--{name.replace('_', '-')} must be "
                                 + (f"at least {low[name]}" if name in low else "above 0")
                                 + (f" and at most {high[name]}" if name in high else " and finite")
                                 + f", not {value}")
        for option, known in (("mode", "AB"), ("optimizer", ("bptt", "es")),
                              ("reduce", ("mean", "sum")), ("dataset", (*MADE, *OFFICIAL))):
            if getattr(self, option) not in known:
                raise ValueError(f"--{option} is {' or '.join(known)}, "
                                 f"not {getattr(self, option)!r}")
        if self.dataset == "sum" and self.classes != 2:
            raise ValueError(f"--dataset sum has two classes: --classes 2, not {self.classes}")
        if self.feed_label and self.message_size < 2:
            raise ValueError("--feed-label needs a --message-size of at least 2")
        names = [name for name in self.test.split(",") if name]
        for name in names:
            if name not in OFFICIAL:
                raise ValueError(f"no data set {name!r} to test on: {', '.join(OFFICIAL)}")
        if len(set(names)) < len(names):
            raise ValueError(f"--test names one twice: {self.test}")


PRESETS = {
    "smoke": dict(side=3, classes=3, length=10, batch=4, steps=6, es_steps=3, baseline_steps=4,
                  synapse_steps=4, grid_steps=4, eval_lifetimes=4, eval_length=20,
                  log_every=2, save_every=2),
    "quick": dict(),
    "paper": dict(dataset="mnist", test="mnist,fashion_mnist", side=28, classes=10, length=500,
                  batch=1024, mode="A", ticks=2, optimizer="es", steps=10_001, learning_rate=0.025,
                  decay=False, chunk=256, other_mode=False, es_steps=0, baseline_steps=2000,
                  real_lifetimes=32, real_length=2000, log_every=20, save_every=100),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# A lifetime is a stream of T labelled examples of one data set, x (S, B, T, D) and y (S, B, T).
# Each must be predicted before its label is shown.


def stream(seed, purpose, device):
    """Random generator of one seed for one purpose.

    0-6 training of each stage, 9 its prototypes, 10-21 tests, 22-24 tests of the clone, 30-32 first
    states in tests, 40-46 weights of each stage. The numbers are small, because torch's CPU
    generator keeps only 32 bits.
    """
    return torch.Generator(device).manual_seed(64 * seed + purpose)


def per_seed(sampler, generators, *shape):
    """sampler(shape) of each generator -> (S, *shape): a seed alone equals its slice of all."""
    return torch.stack([sampler(shape, generator=g, device=g.device) for g in generators])


def truncated_normal(generators, *shape):
    """Normal numbers cut off at two deviations (their own deviation is 0.88), (S, *shape)."""
    u = per_seed(torch.rand, generators, *shape)
    return math.sqrt(2) * torch.erfinv((2 * u - 1) * math.erf(math.sqrt(2)))


def fields_dataset(generators, sets, classes, side, cutoff=0.18):
    """Prototypes of made-up image data sets: smooth random fields -> (S, sets, classes, side^2).

    White noise through a Gaussian low pass, exp(-(frequency / cutoff)^2) in cycles a pixel, then
    standardised. An example of a class is its prototype with noise, see sample_fields.
    """
    white = per_seed(torch.randn, generators, sets, classes, side, side)
    frequency = torch.fft.fftfreq(side, device=white.device)
    low_pass = (-(frequency[:, None].square() + frequency.square()) / cutoff**2).exp()
    smooth = torch.fft.ifft2(torch.fft.fft2(white) * low_pass).real.flatten(-2)
    smooth = smooth - smooth.mean(-1, keepdim=True)
    return smooth / smooth.square().mean(-1, keepdim=True).sqrt()


def sample_fields(prototypes, generators, B, T, noise=1.0):
    """prototypes (S, 1 or B, C, D): of one data set, or of one a lifetime -> x (S, B, T, D), y."""
    S, _, C, D = prototypes.shape
    y = (per_seed(torch.rand, generators, B, T) * C).long()
    clean = prototypes.expand(S, B, C, D).gather(2, y[..., None].expand(S, B, T, D))
    x = clean + noise * per_seed(torch.randn, generators, B, T, D)
    return x / math.sqrt(1 + noise**2), y


def sample_random(generators, B, T, D, C):
    """`random` [code]: 20 images of normal noise with random labels, drawn again and again."""
    images = per_seed(torch.randn, generators, B, 20, D)
    labels = (per_seed(torch.rand, generators, B, 20) * C).long()
    which = (per_seed(torch.rand, generators, B, T) * 20).long()               # (S, B, T)
    return images.gather(2, which[..., None].expand(-1, -1, -1, D)), labels.gather(2, which)


def sample_sum(generators, B, T, D):
    """`sum` [code]: noise around a mean from U(-1, 1); the class: is the sum of all pixels >= 0?"""
    mean = 2 * per_seed(torch.rand, generators, B, T, 1) - 1
    x = mean + truncated_normal(generators, B, T, D)
    return x, (x.sum(-1) >= 0).long()


def sample_images(data, generators, B, T):
    """data: images (N, D), labels (N,) -> x (S, B, T, D), y, no image twice in a lifetime."""
    images, labels = data
    index = per_seed(torch.rand, generators, B, len(labels)).topk(T).indices
    return images[index], labels[index]


def project(x, generators, share=1.0):
    """Random projections R of the first `share` of the lifetimes, each its own: x R, entries
    U(-sqrt(3 / D), sqrt(3 / D)) [code], so that lengths are kept on average."""
    few, D = math.ceil(share * x.shape[1]), x.shape[-1]
    R = (2 * per_seed(torch.rand, generators, few, D, D) - 1) * math.sqrt(3 / D)
    return torch.cat([x[:, :few] @ R, x[:, few:]], 1)


# Official image files: IDX, gzipped or not.

MADE = ("fields", "random", "sum")
OFFICIAL = {  # data set: mean, deviation [code], host, MD5 of each of FILES
    "mnist": (0.13066047, 0.30810788, "https://ossci-datasets.s3.amazonaws.com/mnist/",
              "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
              "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    "fashion_mnist": (0.13066047, 0.30810788,                # MNIST's numbers, a quirk of [code]
                      "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                      "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
    "kmnist": (0.19176216, 0.34834328, "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
               "bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344",
               "5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134")}
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
         "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def load_idx(path):
    """IDX file of bytes, gzipped or not -> uint8 tensor, shaped as its header says.

    Raises ValueError for a damaged file or another format, OSError for one that cannot be read.
    """
    raw = pathlib.Path(path).read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from None
    start = 4 + 4 * raw[3] if len(raw) > 3 else 4
    if raw[:3] != b"\0\0\x08" or len(raw) < start:
        raise ValueError(f"{path} is not an IDX file of bytes: it should begin with 00 00 08")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path} has {len(raw) - start} values, its header says "
                         f"{' x '.join(map(str, shape))}: fetch it again")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[start:].view(shape)


def fetch(name, file, path):
    """Download one official file; it gets its name only after its MD5 has been checked."""
    _, _, host, *sums = OFFICIAL[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    part, md5 = path.with_suffix(f".{os.getpid()}.part"), hashlib.md5()
    try:
        with urllib.request.urlopen(host + file, timeout=60) as source, open(part, "wb") as target:
            size = int(source.headers.get("Content-Length", 0))
            with tqdm(total=size, unit="B", unit_scale=True, desc=file) as bar:
                while chunk := source.read(1 << 16):
                    target.write(chunk), md5.update(chunk), bar.update(len(chunk))
        if md5.hexdigest() != sums[FILES.index(file)]:
            raise OSError(f"its MD5 is {md5.hexdigest()}, not {sums[FILES.index(file)]}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"could not download {host}{file}: {error}") from None


def load_images(name, split, cfg, side):
    """One split, "train" or "t10k", of official files -> images (N, side^2), labels (N,).

    Normalised as in [code]; resized by bilinear interpolation.
    """
    mean, deviation = OFFICIAL[name][:2]
    paths = [pathlib.Path(cfg.data_dir) / name / file for file in FILES if file.startswith(split)]
    for path in paths:
        if cfg.download and not path.exists():
            fetch(name, path.name, path)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: put it there, or add --download")
    images, labels = load_idx(paths[0]), load_idx(paths[1]).long()
    if images.dim() != 3 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(f"{paths[1]}: labels {tuple(labels.shape)} do not fit the images "
                         f"{tuple(images.shape)}")
    if not images.numel() or images.min() == images.max() or labels.max() > 9:
        raise ValueError(f"{paths[0]}: empty or constant images, or labels not from 0 to 9")
    images = (images.float() / 255 - mean) / deviation
    if images.shape[1:] != (side, side):
        images = F.interpolate(images[:, None], (side, side), mode="bilinear")
    return images.flatten(1), labels


# ---- 3. MODEL ----------------------------------------------------------------------------------
# A grid of tiny LSTMs, one at every synapse (input i, output o), all with the same parameters. The
# cells are the last axes of every tensor, (S, N, B, O, I): then the four gates are contiguous
# blocks, and the cells of a seed are the columns of one matrix product.


class Layer(NamedTuple):
    """State of one layer of the grid: what is learned in a lifetime, the paper's V_L."""
    h: torch.Tensor                  # (S, N, B, O, I) of the tiny LSTMs
    c: torch.Tensor                  # (S, N, B, O, I)
    below: torch.Tensor = None       # (S, M, B, I) last messages from below; None: not visited yet
    above: torch.Tensor = None       # (S, M, B, O) last messages from the layer above


def init_params(cfg, generators):
    """The shared parameters, the paper's V_M, {name: (S, ...)}: all that meta-learning changes."""
    N, M = cfg.state_size, cfg.message_size
    draw = lambda n_in, *shape: truncated_normal(generators, *shape) / math.sqrt(n_in)
    zeros = lambda *shape: torch.zeros(len(generators), *shape, device=generators[0].device)
    gates = draw(2 * M + N, 2 * M + N, 4 * N)            # the concatenated weight W_g of [code]
    params = dict(zip(("W_below", "W_above", "W_state"), gates.split((M, M, N), 1)))
    params |= {"bias": zeros(4 * N), "U_up": draw(N, N, M), "u_up": zeros(M),
               "U_down": draw(N, N, M), "u_down": zeros(M)}
    return {name: p.contiguous().requires_grad_() for name, p in params.items()}


def state_noise(cfg, sizes, B, generators):
    """The random part of a first state: a list of (S, N/2, B, O, I), one a layer, for `sizes` =
    (D, .., C). It breaks the symmetry between cells that share their parameters."""
    return [truncated_normal(generators, cfg.state_size // 2, B, O, I) / math.sqrt(I)
            for I, O in zip(sizes, sizes[1:])]


def init_state(cfg, noise):
    """Noise as state_noise gives it -> list of `Layer`: half of c random, all else zero."""
    c = [F.pad(n, (0, 0) * 3 + (0, cfg.state_size - n.shape[1])) for n in noise]
    return [Layer(torch.zeros_like(part), part) for part in c]


def grid_sizes(cfg, D, C):
    """Neurons of each level: inputs, the hidden layer if there is one, classes."""
    return (D, cfg.hidden, C) if cfg.hidden else (D, C)


def naive_tick(params, h, c, below, above):
    """One tick as it stands in the paper, synapse by synapse. Not used in runs: `visit` and
    `message` below do the same with half the arithmetic and several times faster.

    h, c (S, B, I, O, N), below (S, B, I, M), above (S, B, O, M) -> h, c, up (S, B, O, M), down
    """
    W = torch.cat([params["W_below"], params["W_above"], params["W_state"]], 1)
    rows = lambda v, weight, bias: (v.flatten(1, 3) @ weight + bias[:, None]).unflatten(
        1, h.shape[1:4])                                     # a linear layer at every synapse
    grid = lambda m: m.expand(*h.shape[:4], -1)
    z = torch.cat([grid(below[:, :, :, None]), grid(above[:, :, None]), h], -1)
    i, g, f, o = rows(z, W, params["bias"]).chunk(4, -1)
    c = torch.sigmoid(f + 5) * c + torch.sigmoid(i - 5) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    head = lambda which: rows(h, params["U_" + which], params["u_" + which])
    return h, c, head("up").mean(2), head("down").mean(3)


@functools.cache
def gate_constants(N, device):
    """-> factors and offsets (4N,) of the gates i, g, f, o. The offsets of [code], f + 5 and i - 5,
    make the state slow by construction. Why g has a factor of 2: see `visit`."""
    each = lambda *values: torch.tensor(values, device=device).repeat_interleave(N)
    return each(1.0, 2.0, 1.0, 1.0), each(-5.0, 0.0, 5.0, 0.0)


def visit(params, layer, below, above, cfg):
    """Some ticks of a layer's LSTMs with the messages held fixed -> `Layer`.

    below (S, m, B, I), above (S, m, B, O) or None: the first m of the M message numbers; those left
    out are zero.   [m_i, m_o, h_io] W_g = m_i W_below + m_o W_above + h_io W_state: only the last
    product is needed for every synapse. tanh(z) is computed as 2 sigmoid(2 z) - 1: one call of
    sigmoid, several times faster than tanh on CPU, then serves all four gates.
    """
    with torch.autocast(layer.c.device.type, enabled=False):     # bfloat16 loses c's small steps
        (S, N, B, O, I), (h, c) = layer.h.shape, layer[:2]
        factor, offset = gate_constants(N, h.device)
        weight = lambda name, rows: (params[name][:, :rows] * factor).mT       # (S, 4N, rows)
        send = lambda name, m: weight(name, m.shape[1]) @ m.flatten(2).to(h.dtype)
        W_state, bias = weight("W_state", N), (params["bias"] * factor + offset)[..., None]
        from_below = (send("W_below", below) + bias).view(S, 4 * N, B, 1, I)
        if above is not None:
            from_above = send("W_above", above).view(S, 4 * N, B, O, 1)
        for _ in range(cfg.ticks):
            z = (W_state @ h.flatten(2)).view(S, 4 * N, B, O, I).add_(from_below)
            z = z.sigmoid_() if above is None else z.add_(from_above).sigmoid_()
            i, g, f, o = z.chunk(4, 1)
            c = f * c + i * (2 * g - 1)
            h = o * (2 * (2 * c).sigmoid_() - 1)
        return Layer(h, c, below, layer.above)


def message(params, which, h, cfg):
    """Messages of a layer, h (S, N, B, O, I): "up", over its inputs, (S, M, B, O); "down", over its
    outputs, (S, M, B, I). mean_i(h U + u) = mean_i(h) U + u: one product a neuron, not a synapse.
    """
    dim = -1 if which == "up" else -2
    pooled = h.mean(dim) if cfg.reduce == "mean" else h.sum(dim)
    copies = 1 if cfg.reduce == "mean" else h.shape[dim]
    out = params["U_" + which].mT @ pooled.flatten(2) + copies * params["u_" + which][..., None]
    return out.unflatten(2, pooled.shape[2:])


def bounded(logits):
    """Logits, softly kept within +-100 [code]."""
    return 100 * torch.tanh(logits / 100)


class MetaRNN(nn.Module):
    """An LSTM that reads its own errors [Hochreiter 2001]: N^2 parameters, N state numbers.

    model(x (S, B, T, D), y (S, B, T)) -> logits (S, B, T, C). D and C are fixed; smaller ones are
    padded with zeros.
    """

    def __init__(self, D, C, hidden, generators, ticks=2):
        super().__init__()
        S, self.D, self.C, self.ticks = len(generators), D, C, ticks
        draw = lambda n_in, n_out: nn.Parameter(
            truncated_normal(generators, n_in, n_out) / math.sqrt(n_in))
        self.input, self.recurrent = draw(D + 2 * C, 4 * hidden), draw(hidden, 4 * hidden)
        self.bias = nn.Parameter(self.input.new_zeros(S, 1, 4 * hidden))
        self.head, self.head_bias = draw(hidden, C), nn.Parameter(self.input.new_zeros(S, 1, C))

    def forward(self, x, y):
        x, targets = F.pad(x, (0, self.D - x.shape[-1])), one_hot(y, self.C).to(x)
        feedback = torch.zeros_like(targets[:, :, 0]).repeat(1, 1, 2)          # error and label
        h = c = x.new_zeros(*x.shape[:2], self.recurrent.shape[1])
        drive, outputs = (x.flatten(1, 2) @ self.input[:, :self.D]).unflatten(1, x.shape[1:3]), []
        for t in range(x.shape[2]):
            now = drive[:, :, t] + feedback @ self.input[:, self.D:] + self.bias
            for _ in range(self.ticks):
                i, g, f, o = (now + h @ self.recurrent).chunk(4, -1)
                c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            outputs.append(bounded(h @ self.head + self.head_bias))
            feedback = torch.cat([outputs[-1].softmax(-1) - targets[:, :, t], targets[:, :, t]], -1)
        return torch.stack(outputs, 2)


class HebbianFastWeights(nn.Module):
    """A layer whose weights w + coefficient F have a fast part F, written by Oja's rule.

    With u = [x, e, l] and p = softmax(u (w + coefficient F) + b): predict with e = l = 0, then,
    with the true error and label, F <- F + eta p (u - p F). Slow parts and eta are meta-learned.
    """

    def __init__(self, D, C, generators):
        super().__init__()
        S, U, self.D, self.C = len(generators), D + 2 * C, D, C
        self.slow = nn.Parameter(truncated_normal(generators, U, C) / math.sqrt(U))
        self.coefficient = nn.Parameter(torch.full_like(self.slow, 0.01))
        self.bias = nn.Parameter(self.slow.new_zeros(S, 1, C))
        self.rate = nn.Parameter(self.slow.new_full((S, 1, 1, 1), -4.5))       # eta = sigmoid(rate)

    def forward(self, x, y):
        x, targets = F.pad(x, (0, self.D - x.shape[-1])), one_hot(y, self.C).to(x)
        fast, outputs = x.new_zeros(*x.shape[:2], *self.slow.shape[1:]), []    # (S, B, U, C)
        read = lambda u: (u[:, :, None] @ (self.slow[:, None] + self.coefficient[:, None] * fast)
                          )[:, :, 0] + self.bias
        for now, target in zip(x.unbind(2), targets.unbind(2)):
            outputs.append(bounded(read(F.pad(now, (0, 2 * self.C)))))
            u = torch.cat([now, outputs[-1].softmax(-1) - target, target], -1)
            p = read(u).softmax(-1)[:, :, None]                                # (S, B, 1, C)
            fast = fast + self.rate.sigmoid() * p * (u[..., None] - p * fast)
        return torch.stack(outputs, 2)


def one_hot(y, C):
    """Classes (...) -> (..., C) float."""
    return F.one_hot(y, C).float()


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# Running the grid forward is learning. vsml_step and vsml_lifetime are the inner loop: no gradient,
# no update, no optimiser in it. es_gradient and bptt_gradient are two outer loops for the shared
# parameters; clone_loss is a third way to them, imitation of backpropagation.


def vsml_step(params, state, x, error, label, cfg):
    """One example of a lifetime: learn from the one before, then predict.

    params {name: (S, ...)}, state: list of `Layer`;  x (S, B, D) the example;  error, label
    (S, B, C): softmax(logits) - onehot and onehot of the example *before*, zeros at first
    -> logits (S, B, C), next state

    Mode A  the error enters at the top while x enters below: each cell must remember the input
            that the error belongs to. Downwards, an error takes one more example for each layer.
    Mode B  first the reverse sweep of the example before, top to bottom, with its inputs, each
            layer hearing the layer above at once; then a forward sweep without any error.
    """
    state, last = list(state), len(state) - 1
    top = torch.stack([error, label], 1) if cfg.feed_label else error[:, None]  # (S, 1|2, B, C)
    if cfg.mode == "B" and state[0].below is not None:
        down = top
        for k in reversed(range(len(state))):
            state[k] = visit(params, state[k], state[k].below, down, cfg)
            down = message(params, "down", state[k].h, cfg) if k else None
    up = x[:, None]                                          # (S, 1, B, D): m_i = (x_i, 0, ..)
    for k in range(len(state)):
        above = None if cfg.mode == "B" else top if k == last else state[k].above
        state[k] = visit(params, state[k], up, above, cfg)
        if cfg.mode == "A" and k:
            down = message(params, "down", state[k].h, cfg)
            state[k - 1] = state[k - 1]._replace(above=down)
        up = message(params, "up", state[k].h, cfg)
    return bounded(up[:, 0]), state                          # the first number is the logit


def vsml_lifetime(params, x, y, state, cfg, step=vsml_step):
    """Learn online, from one example after the other -> logits (S, B, T, C), of each before its
    label was seen. x (S, B, T, D), y (S, B, T), state: list of `Layer` (from init_state).

    With cfg.segment, only the states between segments are kept for the gradient; what is inside is
    computed again: T = 500 at paper size would not fit otherwise.
    """
    targets = one_hot(y, state[-1].h.shape[3]).to(x)                           # (S, B, T, C)

    def live(params, state, error, label, x, targets):
        outputs = []
        for t in range(x.shape[2]):
            logits, state = step(params, state, x[:, :, t], error, label, cfg)
            error, label = logits.softmax(-1) - targets[:, :, t], targets[:, :, t]
            outputs.append(logits)
        return torch.stack(outputs, 2), state, error, label
    error = label = torch.zeros_like(targets[:, :, 0])
    if not (cfg.segment and torch.is_grad_enabled()):
        return live(params, state, error, label, x, targets)[0]
    outputs = []
    for part in zip(x.split(cfg.segment, 2), targets.split(cfg.segment, 2)):
        logits, state, error, label = checkpoint(live, params, state, error, label, *part,
                                                 use_reentrant=False)
        outputs.append(logits)
    return torch.cat(outputs, 2)


def lifetime_loss(logits, y):
    """L(V_M): mean cross-entropy of all predictions, (S, B, T, C), (S, B, T) -> (S,) nats."""
    return F.cross_entropy(logits.movedim(-1, 1), y, reduction="none").mean((1, 2))


def bptt_gradient(loss_function, params):
    """-> gradient {name: (S, ...)} through the whole lifetime, losses (S,)."""
    losses = loss_function(params)
    grads = torch.autograd.grad(losses.sum(), params.values(), materialize_grads=True)
    gradient = {name: g.detach() for name, g in zip(params, grads)}            # zeros for what one
    return gradient, losses.detach()                         # layer cannot use


@torch.no_grad()
def es_gradient(loss_function, params, noise, sigma=0.05):
    """Antithetic evolution strategies, Algorithm 1 -> gradient {name: (S, ...)}, losses (S,).

    noise {name: (S, P, ...)}: eps of P pairs;  loss_function({name: (S*2*P, ...)}) -> losses
    (S*2*P,) of members, all + sigma eps of a seed before all - sigma eps. Raw losses: no ranks, no
    normalisation. The losses returned are means over members, not those of `params` itself.
    """
    members = {name: (p[:, None, None] + sigma * torch.stack([noise[name], -noise[name]], 1)
                      ).flatten(0, 2) for name, p in params.items()}
    pairs = next(iter(noise.values())).shape[1]
    losses = loss_function(members).view(-1, 2, pairs)
    # g = 1/P sum_p (L(V_M + sigma eps_p) - L(V_M - sigma eps_p)) / (2 sigma) eps_p
    weight = (losses[:, 0] - losses[:, 1]) / (2 * sigma * pairs)               # (S, P)
    return {name: torch.einsum("sp,sp...->s...", weight, n) for name, n in noise.items()}, \
        losses.mean((1, 2))


# Cloning backpropagation: a synapse's weight and bias are the first two numbers of its c, and a
# visit must do what one synapse of a network of tanh units does under gradient descent:
#   forward    y_io = tanh(x_i) w_io + b_io                    summed over i: what enters neuron o
#   backward   e'_io = e_o w_io (1 - tanh(x_i)^2)              summed over o: the error at input i
#              w_io <- w_io - alpha e_o tanh(x_i),  b_io <- b_io - alpha e_o


def clone_loss(params, layer, x, error_of, cfg):
    """How far one forward and one reverse visit are from backpropagation -> losses (S,), `Layer`.

    layer: `Layer`, from any state; the targets follow from the weights that it now holds
    x (S, B, I);  error_of(logits (S, B, O)) -> errors (S, B, O), their mean square (S, B or 1)
    """
    w, b = layer.c[:, :2].detach().unbind(1)                                   # (S, B, O, I)
    head = lambda which, h: (torch.einsum("snboi,sn->sboi", h, params["U_" + which][..., 0])
                             + params["u_" + which][:, 0, None, None, None])
    before = visit(params, layer, x[:, None], None, cfg)
    y = head("up", before.h)
    error, power = error_of(y.detach().sum(-1))
    after = visit(params, before, x[:, None], error[:, None], cfg)
    a, e = x.tanh()[:, :, None], error[..., None]                   # (S, B, 1, I), (S, B, O, 1)
    # The gaps to the four targets, those of the state in units of alpha: else "never change" would
    # be nearly as good as learning.
    y_gap = y - (a * w + b)
    e_gap = head("down", after.h) - e * w * (1 - a.square())
    keep_gap = (before.c[:, :2] - torch.stack([w, b], 1)) / cfg.alpha          # (S, 2, B, O, I)
    learn_gap = (after.c[:, 0] - w) / cfg.alpha + e * a, (after.c[:, 1] - b) / cfg.alpha + e
    mean_square = lambda gap: gap.square().flatten(1).mean(1)
    # How much each matters was tuned on deployed clones. Small errors must count, at the end of a
    # lifetime all are small. Gaps of single synapses add up over a neuron's inputs (what all
    # neurons share does not matter), and over visits, if their mean is not zero.
    weight = (0.5 + 0.125 / (power + 1e-4)).sqrt()[..., None, None]
    total = y_gap.sum(-1) - y_gap.sum(-1).mean(-1, keepdim=True)               # 0 if O = 1
    drift = keep_gap.mean((2, 3, 4))                                           # (S, 2)
    return (mean_square(y_gap) + mean_square(e_gap) + mean_square(keep_gap)
            + mean_square(weight * learn_gap[0]) / 2 + mean_square(weight * learn_gap[1]) / 2
            + 0.2 * mean_square(total) + 10 * mean_square(drift)), after


def clone_config(cfg):
    """The grid that is to be backpropagation: Mode B, two ticks, sums, one number a message."""
    return replace(cfg, mode="B", ticks=2, reduce="sum", message_size=1, feed_label=False)


def deploy_clone(params, x, y, weights, cfg):
    """The clone learns online -> logits (S, B, T, C). weights: a list of (w, b), (S, B, O, I)."""
    noise = [torch.stack(pair, 1) for pair in weights]
    return vsml_lifetime(params, x, y, init_state(cfg, noise), clone_config(cfg))


def backpropagation(x, y, weights, alpha):
    """What is cloned: online gradient descent on layers of synapses -> logits (S, B, T, C)."""
    weights, C, outputs = list(weights), weights[-1][0].shape[2], []
    for now, target in zip(x.unbind(2), one_hot(y, C).to(x).unbind(2)):
        levels = [now]
        for w, b in weights:
            levels.append((levels[-1].tanh()[:, :, None] * w + b).sum(-1))     # (S, B, O)
        outputs.append(bounded(levels.pop()))
        e = (outputs[-1].softmax(-1) - target)[..., None]                      # (S, B, O, 1)
        for k in reversed(range(len(weights))):
            (w, b), a = weights[k], levels[k].tanh()[:, :, None]               # (S, B, 1, I)
            weights[k] = w - alpha * e * a, b - alpha * e
            e = ((e * w).sum(2) * (1 - a[:, :, 0].square()))[..., None]
    return torch.stack(outputs, 2)


# ---- 5. TRAINING -------------------------------------------------------------------------------
# `run` (class Run, section 8) stands for the machine: run.steps(stage, total, state) counts the
# steps, restores and saves `state`; run.share(batch), run.average(tensors) are for many processes.


def train(cfg, run, stage, params, gradient, steps, rate, state, clip=math.inf, beta2=0.999):
    """Adam on shared parameters {name: (S, ...)}, every seed on its own lifetimes.

    gradient(step) -> {name: (S, ...)}, losses (S,);  state: what else `gradient` changes
    """
    adam = torch.optim.Adam(params.values(), lr=rate, betas=(0.9, beta2))
    recent = torch.zeros(2, len(run.seeds), device=run.device)     # losses, norms since a log
    state, every = {"params": params, "adam": adam, "recent": recent, **state}, max(
        cfg.log_every, steps // 100)
    for step in run.steps(stage, steps, state):
        # COLLECT and INNER UPDATE: lifetimes are lived forward inside `gradient`
        gradients, losses = gradient(step)
        run.average([*gradients.values(), losses])
        # META UPDATE
        if cfg.decay:
            adam.param_groups[0]["lr"] = rate * min(1, 2 * (1 - step / steps) + 0.05)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        scale = (clip / (norms + 1e-12)).clamp(max=1)                          # (S,)
        for name, p in params.items():
            p.grad = gradients[name] * scale.view(-1, *[1] * (p.dim() - 1))
        adam.step()
        recent += torch.stack([losses, norms])
        run.watch(losses)
        # LOG
        if (step + 1) % every == 0 or step + 1 == steps:
            mean = (recent / (step % every + 1)).T.tolist()
            recent.zero_()
            run.log([{"seed": seed, "loss": loss, "gradient_norm": norm}
                     for seed, (loss, norm) in zip(run.seeds, mean)])


def training_data(cfg, run):
    """What lifetimes of meta-training are drawn from: one fixed set of prototypes a seed, or files.
    """
    if cfg.dataset == "fields":
        starts = [stream(seed, 9, run.device) for seed in run.seeds]
        return fields_dataset(starts, 1, cfg.classes, cfg.side)
    if cfg.dataset in OFFICIAL:
        images, labels = load_images(cfg.dataset, "train", cfg, cfg.side)
        kept, longest = labels < cfg.classes, max(cfg.length, cfg.eval_length)
        if set(labels[kept].tolist()) != set(range(cfg.classes)):
            raise ValueError(f"{cfg.dataset} has not the classes 0 to {cfg.classes - 1} that "
                             f"--classes {cfg.classes} asks for")
        if longest > kept.sum():
            raise ValueError(f"{cfg.dataset} has {kept.sum()} training images of these classes: "
                             f"--length and --eval-length {longest} are too long")
        return images[kept].to(run.device), labels[kept].to(run.device)


def sample_lifetimes(cfg, data, generators, B, T):
    """Lifetimes of the data set to meta-train on -> x (S, B, T, D), y (S, B, T)."""
    if cfg.dataset == "fields":
        return sample_fields(data, generators, B, T, cfg.noise)
    if cfg.dataset == "random":
        return sample_random(generators, B, T, cfg.side**2, cfg.classes)
    if cfg.dataset == "sum":
        return sample_sum(generators, B, T, cfg.side**2)
    return sample_images(data, generators, B, T)


def meta_train(cfg, run, stage, order, steps):
    """Meta-train V_M by cfg.optimizer in cfg.mode -> params {name: (S, ...)}."""
    data, hot = training_data(cfg, run), run.compile(vsml_step)
    if run.compiled:             # modes, first steps, gradients: more variants than the default 8
        torch._dynamo.config.recompile_limit = 32
    generators = [stream(seed, order, run.device) for seed in run.seeds]
    params = init_params(cfg, [stream(seed, 40 + order, run.device) for seed in run.seeds])
    sizes, S = grid_sizes(cfg, cfg.side**2, cfg.classes), len(run.seeds)

    def lifetimes():
        """This process's share of fresh lifetimes: x, y and the noise of their first states."""
        x, y = sample_lifetimes(cfg, data, generators, cfg.batch, cfg.length)
        noise = state_noise(cfg, sizes, cfg.batch, generators)
        return (run.share(project(x, generators, cfg.projected)), run.share(y),
                [run.share(n, 2) for n in noise])

    def loss_on(x, y, noise):
        state = init_state(cfg, noise)
        return lambda params: lifetime_loss(vsml_lifetime(params, x, y, state, cfg, hot), y)

    def es(step):
        """A lifetime for each pair; both members of a pair live through the same one."""
        x, y, noise = lifetimes()                                              # (S, P, T, D) ..
        epsilon = {name: run.share(per_seed(torch.randn, generators, cfg.batch, *p.shape[1:]))
                   for name, p in params.items()}                              # (S, P, ..)
        members = lambda part: part[:, None].expand(S, 2, *part.shape[1:]).flatten(0, 2)[:, None]
        results, chunk = [], cfg.chunk or x.shape[1]
        for first in range(0, x.shape[1], chunk):
            some = slice(first, first + chunk)
            states = [members(n.transpose(1, 2)[:, some]).transpose(1, 2) for n in noise]
            loss = loss_on(members(x[:, some]), members(y[:, some]), states)   # (S*2*P, 1, T, D) ..
            gradient, losses = es_gradient(loss, params, {
                name: n[:, some] for name, n in epsilon.items()}, cfg.sigma)
            share = x[:, some].shape[1] / x.shape[1]         # the last chunk may be shorter
            results.append([share * part for part in (*gradient.values(), losses)])
        *gradient, losses = map(sum, zip(*results))
        return dict(zip(params, gradient)), losses

    bptt = lambda step: bptt_gradient(loss_on(*lifetimes()), params)
    gradient, clip = (es, math.inf) if cfg.optimizer == "es" else (bptt, cfg.clip)
    train(cfg, run, stage, params, gradient, steps, cfg.learning_rate, {"generators": generators},
          clip)
    return params


def train_baseline(cfg, run, stage, order, model, rate):
    """Meta-train a baseline on the same data, through whole lifetimes -> the model."""
    data, generators = training_data(cfg, run), [stream(s, order, run.device) for s in run.seeds]
    params, batch = dict(model.named_parameters()), min(cfg.batch, 64)         # memory

    def gradient(step):
        x, y = sample_lifetimes(cfg, data, generators, batch, cfg.length)
        x, y = run.share(project(x, generators, cfg.projected)), run.share(y)
        return bptt_gradient(lambda params: lifetime_loss(model(x, y), y), params)
    train(cfg, run, stage, params, gradient, cfg.baseline_steps, rate, {"generators": generators},
          cfg.clip)
    return model


def clone(cfg, run):
    """Clone backpropagation in two phases -> params {name: (S, ...)}.

    First single synapses with made-up weights, inputs and errors: 1, then 3 examples in a row. Then
    whole grids that learn a classification, with the errors that they themselves make: only there
    do the small errors show that add up over inputs and steps.
    """
    cfg = clone_config(cfg)
    params = init_params(cfg, [stream(seed, 46, run.device) for seed in run.seeds])
    generators, S, B = [stream(seed, 6, run.device) for seed in run.seeds], len(run.seeds), 256
    normal = lambda *shape: per_seed(torch.randn, generators, *shape)
    uniform = lambda *shape: per_seed(torch.rand, generators, *shape)

    def synapses(step):
        spread = (0.04 * (0.8 / 0.04) ** uniform(1, B, 1, 1))
        layer, = init_state(cfg, [spread * normal(2, B, 1, 1)])
        scale, T = (-3 * uniform(B, 1)).exp(), 1 if step < cfg.synapse_steps // 2 else 3
        x, errors = normal(T, B, 1), scale[:, None] * (2 * uniform(T, B, 1) - 1)
        power = scale[..., 0].square() / 3

        def loss_function(params, layer=layer):
            losses = 0
            for t in range(T):
                loss, layer = clone_loss(params, layer, x[:, t],
                                         lambda logits: (errors[:, t], power), cfg)
                losses = losses + loss / T
            return losses
        return bptt_gradient(loss_function, params)
    train(cfg, run, "clone synapses", params, synapses, cfg.synapse_steps, 1e-2,
          {"generators": generators}, 5.0, 0.99)

    G, I, O, T = 6, 20, 4, 6                                 # grids, their size, examples a window
    new_grids = lambda: (F.pad(0.1 * (uniform(1, G, 1, 1) < 0.5) * normal(1, G, O, I),
                               (0, 0) * 3 + (0, cfg.state_size - 1)), normal(G, O, I))
    grids = {"h": torch.zeros(S, cfg.state_size, G, O, I, device=run.device)}
    grids["c"], grids["prototypes"] = new_grids()

    def whole_grids(step):
        fresh = uniform(G) < 1 / 25
        c, prototypes = new_grids()
        cells = fresh[:, None, :, None, None]
        grids["h"].masked_fill_(cells, 0)
        grids["c"].copy_(torch.where(cells, c, grids["c"]))
        grids["prototypes"].copy_(torch.where(fresh[..., None, None], prototypes,
                                              grids["prototypes"]))
        x, y = sample_fields(grids["prototypes"], generators, G, T, cfg.noise)
        targets = one_hot(y, O)

        def loss_function(params):
            layer, losses = Layer(grids["h"].clone(), grids["c"].clone()), 0
            for t in range(T):
                def error_of(logits):
                    error = bounded(logits).softmax(-1) - targets[:, :, t]
                    return error, error.square().mean((1, 2))[:, None]
                loss, layer = clone_loss(params, layer, x[:, :, t], error_of, cfg)
                losses = losses + loss / T
            grids["h"].copy_(layer.h.detach()), grids["c"].copy_(layer.c.detach())
            return losses
        return bptt_gradient(loss_function, params)
    train(cfg, run, "clone grids", params, whole_grids, cfg.grid_steps, 5e-3,
          {"generators": generators, "grids": grids}, 1.0, 0.99)
    return params


# ---- 6. EVALUATION -----------------------------------------------------------------------------

SGD_RATES, ADAM_RATES = (0.003, 0.01, 0.03, 0.1, 0.3), (0.001, 0.003, 0.01, 0.03)
PAPER_RATES = {"SGD": 0.01, "Adam": 0.001}                   # [code]
CLONES = {"36-5": "", "25-4": "_25_4", "36-32-5": "_deep"}   # networks cloned, and their metrics
MADE_TESTS = ("seen", "new", "shuffled", "projected", "12 x 12", "3 classes", "10 classes",
              "random", "sum")


def real_tests(row):
    """Names of the meta-tests on image files."""
    return [test for test in row["tests"] if test not in MADE_TESTS]


def online_sgd(x, y, C, lr=0.01):
    """Softmax regression by gradient descent, one example a step, from zero weights.

    x (..., T, D), y (..., T) of C classes -> logits (..., T, C) before each example's label is seen
    """
    w, outputs = x.new_zeros(*x.shape[:-2], C, x.shape[-1] + 1), []
    for now, target in zip(F.pad(x, (0, 1), value=1.0).unbind(-2), one_hot(y, C).to(x).unbind(-2)):
        outputs.append(bounded((w @ now[..., None])[..., 0]))
        w.sub_(lr * (outputs[-1].softmax(-1) - target)[..., None] * now[..., None, :])
    return torch.stack(outputs, -2)


def online_adam(x, y, C, lr=0.001):
    """The same with Adam."""
    w, outputs = x.new_zeros(*x.shape[:-2], C, x.shape[-1] + 1), []
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for now, target in zip(F.pad(x, (0, 1), value=1.0).unbind(-2), one_hot(y, C).to(x).unbind(-2)):
        outputs.append(bounded((w @ now[..., None])[..., 0]))
        gradient = (outputs[-1].softmax(-1) - target)[..., None] * now[..., None, :]
        m.lerp_(gradient, 0.1), v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        t = len(outputs)
        w.addcdiv_(m, (v / (1 - 0.999**t)).sqrt_().add_(1e-8), value=-lr / (1 - 0.9**t))
    return torch.stack(outputs, -2)


def meta_tests(cfg, run, data):
    """Lifetimes to meta-test on -> {name: (x (S, E, T, D), y (S, E, T), number of classes)}.

    "seen" is the data set of meta-training, unprojected. Every lifetime of all other fields has
    prototypes of its own, which no rule has seen. The one pixel permutation of "shuffled" is fixed.
    """
    E, T = cfg.eval_lifetimes, cfg.eval_length
    made = cfg.dataset == "fields"
    side, C = (cfg.side, cfg.classes) if made else (6, 5)

    def fresh(purpose, side, C):
        generators = [stream(seed, purpose, run.device) for seed in run.seeds]
        prototypes = fields_dataset(generators, E, C, side)
        return *sample_fields(prototypes, generators, E, T, cfg.noise), C
    streams = lambda purpose: [stream(seed, purpose, run.device) for seed in run.seeds]
    x, y, _ = fresh(11, side, C)
    shuffle = torch.randperm(side**2, generator=stream(0, 12, "cpu")).to(run.device)
    tests = {"seen": (*sample_lifetimes(cfg, data, streams(10), E, T), cfg.classes),
             "new": (x, y, C), "shuffled": (x[..., shuffle], y, C),
             "projected": (project(x, streams(13)), y, C),
             "12 x 12": fresh(15, 12, C), "3 classes": fresh(18, side, 3),
             "10 classes": fresh(14, 8, 10),
             "random": (*sample_random(streams(16), E, T, 64, 10), 10),
             "sum": (*sample_sum(streams(17), E, T, 64), 2)}
    sides = [28] if made or cfg.side == 28 else [28, cfg.side]     # fixed-size models know one size
    for i, name in enumerate(filter(None, cfg.test.split(","))):
        for side in sides:
            data = [t.to(run.device) for t in load_images(name, "t10k", cfg, side)]
            if len(data[1]) < cfg.real_length:
                raise ValueError(f"{name} has {len(data[1])} test images: lower --real-length "
                                 f"{cfg.real_length}")
            tests[name if side == 28 else f"{name} {side}x{side}"] = (*sample_images(
                data, streams(19 + i), cfg.real_lifetimes, cfg.real_length), 10)
    return tests


def summarise(logits, y, bins=40):
    """logits (S, E, T, C), y (S, E, T) -> a dictionary per seed: accuracy over all examples, the
    first 20 and the last quarter; by position, in bins; p(correct) by earlier examples of a class.
    """
    right, T = (logits.argmax(-1) == y).float(), y.shape[-1]
    p = logits.softmax(-1).gather(-1, y[..., None])[..., 0]
    seen = one_hot(y, logits.shape[-1]).cumsum(-2).gather(-1, y[..., None])[..., 0] - 1
    width, rounded = max(1, T // bins), lambda values: [
        round(v, 4) if v == v else None for v in values.tolist()]              # NaN: never so many
    whole = right[..., :T // width * width].unflatten(-1, (-1, width)).mean((1, 3))     # (S, bins)
    return [{"cumulative": right[s].mean().item(), "first20": right[s, :, :20].mean().item(),
             "late": right[s, :, -T // 4:].mean().item(), "curve": rounded(whole[s]),
             "p_correct": rounded(torch.stack([p[s][seen[s] == k].mean() for k in range(12)]))}
            for s in range(len(y))]


def best_of(rows, key):
    """rows {learner: a dictionary per seed} -> (learner, value) of the best, for each seed."""
    seeds = range(len(next(iter(rows.values()))))
    return [max(((name, row[s][key]) for name, row in rows.items()), key=lambda pair: pair[1])
            for s in seeds]


@torch.no_grad()
def evaluate(run, tests, rules, models):
    """All learners on all tests -> {test: {learner: a dictionary per seed, see summarise}}.

    rules {name: (params, Config)} of VSML;  models {name: fixed-size baseline}. SGD and Adam stand
    for their best rates, chosen on the very same lifetimes, for each number: in their favour.
    """
    results = {}
    for name, (x, y, C) in tests.items():
        table = results[name] = {}
        for order, (rule, (params, own)) in enumerate(rules.items()):
            generators = [stream(seed, 30 + order, run.device) for seed in run.seeds]
            noise = state_noise(own, grid_sizes(own, x.shape[-1], C), x.shape[1], generators)
            logits = vsml_lifetime(params, x, y, init_state(own, noise), own)
            table[rule] = summarise(logits, y)
        for rule, model in models.items():
            if x.shape[-1] <= model.D and C <= model.C:
                table[rule] = summarise(model(x, y), y)
        hand = {f"{kind} {lr}": summarise(learn(x, y, C, lr), y) for kind, learn, rates in (
            ("SGD", online_sgd, SGD_RATES), ("Adam", online_adam, ADAM_RATES)) for lr in rates}
        for kind, rate in PAPER_RATES.items():
            own = {rule: rows for rule, rows in hand.items() if rule.startswith(kind)}
            table[kind] = [{**hand[best][s], "best": best,
                            "first20": best_of(own, "first20")[s][1],
                            "late": best_of(own, "late")[s][1],
                            "paper_rate": hand[f"{kind} {rate}"][s]["cumulative"]}
                           for s, (best, _) in enumerate(best_of(own, "cumulative"))]
    return results


@torch.no_grad()
def evaluate_clone(cfg, run, params):
    """The clone beside true backpropagation, same fresh lifetimes and first weights.

    -> {network: a dictionary per seed}: 36 inputs and 5 classes from zero weights, 25 and 4, and 36
    inputs, 32 hidden tanh units, 5 classes
    """
    results = {}
    for order, (name, side, C, hidden) in enumerate((
            ("36-5", 6, 5, 0), ("25-4", 5, 4, 0), ("36-32-5", 6, 5, 32))):
        generators = [stream(seed, 22 + order, run.device) for seed in run.seeds]
        E, sizes = cfg.eval_lifetimes, grid_sizes(replace(cfg, hidden=hidden), side**2, C)
        prototypes = fields_dataset(generators, E, C, side)
        x, y = sample_fields(prototypes, generators, E, cfg.eval_length, cfg.noise)
        first = [n[:, 0] for n in state_noise(cfg, sizes, E, generators)]     # (S, E, O, I) each
        weights = [(w if hidden else 0 * w, 0 * w) for w in first]
        cloned, true = deploy_clone(params, x, y, weights, cfg), backpropagation(
            x, y, weights, cfg.alpha)
        half = cfg.eval_length // 2
        same = (cloned.argmax(-1) == true.argmax(-1))[:, :, half:].float().mean((1, 2)).tolist()
        second = lambda logits: (logits.argmax(-1) == y)[:, :, half:].float().mean((1, 2)).tolist()
        results[name] = [{"clone": a, "true": b, "clone_half": c, "true_half": d, "agreement": e}
                         for a, b, c, d, e in zip(summarise(cloned, y), summarise(true, y),
                                                  second(cloned), second(true), same)]
    return results


def plan(cfg, flops_per_second):
    """What a run of `cfg` does and how long it should take at this rate of matrix products."""
    rate = flops_per_second / 4.7e4              # cell ticks a second, with gradient: measured
    visits = lambda mode, ticks: 2 * ticks if mode == "B" else ticks
    cells = cfg.batch * cfg.length * cfg.side**2 * cfg.classes
    ticks = cfg.steps * cells * visits(cfg.mode, cfg.ticks) * (1 + cfg.other_mode)
    ticks += cfg.es_steps * 64 * 40 * 48 * 2 * 0.4           # forward only
    ticks += bool(cfg.synapse_steps) * cfg.grid_steps * 6 * 6 * 80 * 4
    ticks += 0.4 * 4 * cfg.eval_lifetimes * cfg.eval_length * 1600
    real = len(list(filter(None, cfg.test.split(","))))
    ticks += 0.4 * 6 * real * cfg.real_lifetimes * cfg.real_length * 7840
    small = 0.02 * (cfg.synapse_steps + cfg.grid_steps) + 0.05 * cfg.baseline_steps    # seconds
    minutes = (cfg.num_seeds * ticks / rate + small) / 60
    return (f"meta-trains VSML on {cfg.dataset}, for {cfg.num_seeds} seed(s), in "
            f"{1 + cfg.other_mode} mode(s){', by ES at small size' * bool(cfg.es_steps)}"
            f"{', clones backpropagation' * bool(cfg.synapse_steps)}: about {minutes:.1f} min here")


def check_memory(cfg, run):
    """ValueError where meta-training or the tests cannot fit in this machine's memory."""
    sizes, es = grid_sizes(cfg, cfg.side**2, cfg.classes), cfg.optimizer == "es"
    cells = len(run.seeds) * sum(i * o for i, o in zip(sizes, sizes[1:]))
    cells *= 2 * (cfg.chunk or cfg.batch // run.world) if es else cfg.batch // run.world
    kept = 1 if es else (cfg.segment or cfg.length) * cfg.ticks * (2 if cfg.mode == "B" else 1)
    D, E = max(cfg.side**2, 144), len(run.seeds) * cfg.eval_lifetimes
    tests = E * (9 * cfg.eval_length * D + D * D + 14 * cfg.state_size * max(640, D * cfg.classes))
    need = max(cells * kept * 14 * cfg.state_size, tests) * 4 / 2**30          # 14 N: measured
    have = math.inf
    if run.device.type == "cuda":
        have = torch.cuda.mem_get_info()[0] / 2**30
    elif hasattr(os, "sysconf"):                             # there is none on Windows
        have = math.prod(os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES")) / 2**30
    if need > have:
        raise ValueError(f"{cells:,} cells at once, {kept} tick(s) kept, and {E:,} test lifetimes "
                         f"need about {need:.0f} GB; there are {have:.0f}: lower --side, --batch, "
                         f"--length or --eval-lifetimes, or set "
                         + ("--chunk 16" if es else "--segment 10"))


def experiment(cfg, run):
    """Meta-train, clone, meta-test -> {"per_seed": a dictionary per seed with "headline" numbers,
    "beside": notes for the closing table, "classes": of each meta-test}."""
    for batch in [cfg.batch] + [32] * bool(cfg.es_steps) + [min(cfg.batch, 64)] * bool(
            cfg.baseline_steps):
        if batch % run.world:
            raise ValueError(f"{run.world} processes cannot share a batch of {batch}")
    check_memory(cfg, run)
    data = training_data(cfg, run)
    with run.clock("evaluation"):
        tests = meta_tests(cfg, run, data)
    D, C, weights = cfg.side**2, cfg.classes, lambda order: [
        stream(seed, 40 + order, run.device) for seed in run.seeds]
    own = f"VSML {cfg.mode}"
    rules, models, cloned = {own: (meta_train(cfg, run, own, 0, cfg.steps), cfg)}, {}, {}
    if cfg.other_mode:
        mode, ticks = ("A", 2) if cfg.mode == "B" else ("B", 1)
        other = replace(cfg, mode=mode, ticks=ticks)
        rules[f"VSML {mode}"] = meta_train(other, run, f"VSML {mode}", 1, cfg.steps), other
    if cfg.es_steps:
        small = replace(cfg, dataset="fields", side=4, classes=3, length=40, batch=32, mode="A",
                        ticks=2, optimizer="es", learning_rate=0.025, chunk=0, hidden=0)
        rules["VSML A, ES"] = meta_train(small, run, "VSML A, ES", 2, cfg.es_steps), small
    if cfg.baseline_steps:
        models = {"Meta RNN": MetaRNN(D, C, 64, weights(3)),
                  "Hebbian": HebbianFastWeights(D, C, weights(4))}
        for order, (name, model) in enumerate(models.items(), 3):
            train_baseline(cfg, run, name, order, model, 3e-3)
    with run.clock("evaluation"):
        results = evaluate(run, tests, rules, models)
    if cfg.synapse_steps:
        params = clone(cfg, run)
        with run.clock("evaluation"):
            cloned = evaluate_clone(cfg, run, params)
    per_seed = []
    for s, seed in enumerate(run.seeds):
        row = {"seed": seed, "history": {},
               "tests": {test: {rule: rows[s] for rule, rows in table.items()}
                         for test, table in results.items()},
               "clone": {network: rows[s] for network, rows in cloned.items()}}
        for r in run.rows:
            if r["seed"] == seed:
                row["history"].setdefault(r["stage"], []).append(
                    [r["step"], float(f"{r['loss']:.4g}"), float(f"{r['gradient_norm']:.3g}")])
        per_seed.append({**row, "headline": headline(cfg, row)})
    classes = {test: C for test, (_, _, C) in tests.items()}
    return {"per_seed": per_seed, "beside": beside(cfg, per_seed, classes), "classes": classes}


def table_cells(cfg, row):
    """{headline metric: (meta-test, learner, number) that it is}, as far as they were run."""
    own, other = f"VSML {cfg.mode}", f"VSML {'A' if cfg.mode == 'B' else 'B'}"
    table = {"unseen_5class_cumulative": ("new", own, "cumulative"),
             "unseen_10class_cumulative": ("10 classes", own, "cumulative")}
    for test in ("seen", "shuffled", "projected", "12 x 12", "3 classes", "random", "sum"):
        table[f"{test}_cumulative"] = test, own, "cumulative"
    for test in real_tests(row):
        table |= {f"{test}_{key}": (test, own, key) for key in ("cumulative", "first20", "late")}
    for rule, name in (("Meta RNN", "meta_rnn"), ("Hebbian", "hebbian")):
        table |= {f"{name}_seen": ("seen", rule, "cumulative"),
                  f"{name}_unseen": ("new", rule, "cumulative")}
    for rule, name in ((other, "other_mode"), ("VSML A, ES", "es")):
        table |= {f"{name}_unseen_5class_cumulative": ("new", rule, "cumulative"),
                  f"{name}_unseen_10class_cumulative": ("10 classes", rule, "cumulative")}
    return {metric.replace(" ", "_"): cell for metric, cell in table.items()
            if cell[1] in row["tests"][cell[0]]}


def headline(cfg, row):
    """The numbers of one seed that the closing table and the README show."""
    own, tests, history = f"VSML {cfg.mode}", row["tests"], row["history"]
    numbers = {}
    for stage, key in ((own, ""), ("VSML A" if cfg.mode == "B" else "VSML B", "other_mode_"),
                       ("VSML A, ES", "es_")):
        if stage in history:
            numbers[f"{key}meta_loss_final"] = statistics.fmean(
                loss for step, loss, _ in history[stage] if step > history[stage][-1][0] - 20)
    numbers |= {metric: tests[test][rule][key]
                for metric, (test, rule, key) in table_cells(cfg, row).items()}
    for key in ("first20", "late", "cumulative"):
        numbers[f"{key}_minus_best_sgd"] = tests["10 classes"][own][key] - max(
            tests["10 classes"][rule][key] for rule in ("SGD", "Adam"))
    numbers["pixel_shuffle_change"] = abs(
        tests["shuffled"][own]["cumulative"] - tests["new"][own]["cumulative"])
    for network, clone in row["clone"].items():
        tail = CLONES[network]
        numbers[f"clone{tail}_minus_backprop"] = clone["clone_half"] - clone["true_half"]
        numbers[f"clone{tail}_agreement"] = clone["agreement"]
    return numbers


def beside(cfg, per_seed, classes):
    """{headline metric: what the closing table says beside it}; classes {test: number}."""
    notes = {"meta_loss_final": f"ln {cfg.classes} = {math.log(cfg.classes):.3f} at first",
             "es_meta_loss_final": "of its perturbed members; ln 3 = 1.099 at first",
             "first20_minus_best_sgd": "10 classes; the best rate of SGD and Adam, chosen here",
             "late_minus_best_sgd": "the same, last quarter"}
    for metric, (test, own, key) in table_cells(cfg, per_seed[0]).items():
        mean = lambda rule: statistics.fmean(row["tests"][test][rule][key] for row in per_seed)
        notes[metric] = ", ".join([f"chance {1 / classes[test]:.2f}"] + [
            f"{rule} {mean(rule):.3f}" for rule in per_seed[0]["tests"][test] if rule != own])
    for network in per_seed[0]["clone"]:
        true = statistics.fmean(row["clone"][network]["true_half"] for row in per_seed)
        notes[f"clone{CLONES[network]}_minus_backprop"] = f"true backpropagation {true:.3f}"
    return notes


# ---- 7. FIGURE ---------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, RED, GREY, PINK, SKY = (                                  # Okabe and Ito
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777", "#CC79A7", "#56B4E9")
COLOURS = {"VSML B": BLUE, "VSML A": SKY, "VSML A, ES": GREEN, "Meta RNN": RED, "Hebbian": PINK,
           "SGD": GREY, "Adam": "black"}


def plot(summary, path):
    """Draw the panels that were run, from a summary alone; thin lines: seeds, thick: means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "legend.fontsize": 8})
    cfg, rows = {**summary["config"], "test_classes": summary["classes"]}, summary["per_seed"]
    panels = [plot_meta, functools.partial(plot_online, test="seen"),
              functools.partial(plot_online, test="10 classes"), plot_bars, plot_introspection]
    panels += [plot_clone] * bool(rows[0]["clone"])
    panels += [functools.partial(plot_online, test=test) for test in real_tests(rows[0])]
    height = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(height, 3, layout="constrained", figsize=(13.8, 3.9 * height))
    for letter, axis, panel in zip("abcdefghijkl", axes.flat, panels):
        axis.set_title(f"({letter}) {panel(axis, cfg, rows)}")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    figure.suptitle(f"VSML: a grid of tiny shared LSTMs that learns to learn, meta-trained on "
                    f"{cfg['dataset']}. Thin: each of {len(rows)} seed(s); thick: mean")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): thin lines and their thick mean."""
    for curve in curves if len(curves) > 1 else []:
        axis.plot(x, curve, color=colour, ls=style, lw=0.7, alpha=0.5)
    axis.plot(x, np.mean(curves, 0), color=colour, ls=style, lw=2.2, label=label)


def plot_meta(axis, cfg, rows):
    """Meta-loss, relative to chance, against meta-steps -> title."""
    for stage in rows[0]["history"]:
        if stage in COLOURS:
            C = 3 if stage.endswith("ES") else cfg["classes"]
            points = np.array([row["history"][stage] for row in rows])         # (seeds, logs, 3)
            plot_lines(axis, points[0, :, 0], points[:, :, 1] / math.log(C), COLOURS[stage],
                       f"{stage} ({C} classes)")
    axis.axhline(1, color="black", ls=":", lw=1, label="chance, ln C")
    axis.set(xlabel="meta-step", ylabel="loss of a lifetime / ln C", ylim=(0, None))
    axis.legend()
    return "Meta-training: a plateau, then learning"


def plot_online(axis, cfg, rows, test):
    """Accuracy against examples seen -> title."""
    rules = [rule for rule in rows[0]["tests"][test] if rule in COLOURS]
    length = cfg["real_length" if test in real_tests(rows[0]) else "eval_length"]
    for rule in rules:
        curves = np.array([row["tests"][test][rule]["curve"] for row in rows])
        x = (np.arange(curves.shape[1]) + 0.5) * max(1, length // 40)
        best = "tuned " * (rule in ("SGD", "Adam"))
        plot_lines(axis, x, curves, COLOURS[rule], best + rule, "--" if best else "-")
    axis.set(xlabel="labelled examples seen", ylabel="accuracy", ylim=(0, 1.02))
    axis.legend(loc="lower right")
    return {"seen": "The data set of meta-training", "10 classes":
            "Never seen: new fields, 10 classes, 8 x 8"}.get(test, f"Real: {test}, test images")


def plot_bars(axis, cfg, rows):
    """Cumulative accuracy of every learner on every test -> title."""
    tests = list(rows[0]["tests"])
    rules = [rule for rule in COLOURS if any(rule in rows[0]["tests"][test] for test in tests)]
    for r, rule in enumerate(rules):
        for t, test in enumerate(tests):
            if rule in rows[0]["tests"][test]:
                values = [row["tests"][test][rule]["cumulative"] for row in rows]
                place = t + (r - (len(rules) - 1) / 2) * 0.8 / len(rules)
                axis.bar(place, np.mean(values), 0.8 / len(rules), color=COLOURS[rule])
                axis.plot([place] * len(values), values, "_", color="white", ms=3, mew=0.6)
    axis.set_xticks(range(len(tests)), [test.replace("_", " ") for test in tests], fontsize=8,
                    rotation=35, ha="right", rotation_mode="anchor")
    for t, test in enumerate(tests):
        axis.plot([t - 0.45, t + 0.45], [1 / cfg["test_classes"][test]] * 2, "k:", lw=1)
    for rule in rules:
        axis.bar(0, 0, color=COLOURS[rule], label=rule)
    axis.set(ylabel="accuracy over all examples (dotted: chance)", ylim=(0, 1.32))
    axis.legend(loc="upper left", ncol=4)
    return "One rule, many data sets"


def plot_introspection(axis, cfg, rows):
    """Probability of the right class against earlier examples of it -> title."""
    for rule in (f"VSML {cfg['mode']}", "SGD", "Adam"):
        curves = np.array([row["tests"]["10 classes"][rule]["p_correct"] for row in rows], float)
        plot_lines(axis, np.arange(curves.shape[1]), curves, COLOURS[rule], rule,
                   "-" if rule.startswith("VSML") else "--")
    axis.axhline(0.1, color="black", ls=":", lw=1, label="chance")
    axis.set(xlabel="earlier examples of the same class", ylabel="probability of the right class",
             ylim=(0, 1))
    axis.legend(loc="lower right")
    return "Fast association (10 classes, 8 x 8)"


def plot_clone(axis, cfg, rows):
    """Accuracy of the clone and of true backpropagation on the same lifetimes -> title."""
    for network, colour in (("36-5", BLUE), ("36-32-5", ORANGE)):
        for which, style in (("true", "--"), ("clone", "-")):
            curves = np.array([row["clone"][network][which]["curve"] for row in rows])
            x = (np.arange(curves.shape[1]) + 0.5) * max(1, cfg["eval_length"] // 40)
            text = "backpropagation" if which == "true" else "cloned: only the LSTMs run"
            plot_lines(axis, x, curves, colour, f"{network}, {text}", style)
    axis.axhline(0.2, color="black", ls=":", lw=1, label="chance")
    axis.set(xlabel="labelled examples seen", ylabel="accuracy", ylim=(0, 1.02))
    axis.legend(loc="lower right")
    return "A forward pass that is backpropagation"


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
