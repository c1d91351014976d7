# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""General-purpose in-context learning: a transformer becomes a learning algorithm, in one file.

Kirsch, Harrison, Sohl-Dickstein, Metz, "General-Purpose In-Context Learning by Meta-Learning
Transformers", arXiv 2212.04458. No official code was released.

IDEA
  Nobody writes the learning algorithm here. A causal sequence model reads a training set as a
  sequence of (input, label) pairs and must predict each label before it is shown. Many tasks are
  made from one data set: each multiplies the pixels by a random matrix of its own and renames the
  classes. With few tasks the model memorises them. With many it cannot, and past a threshold it
  turns into a learning algorithm, which works on tasks and data sets it has never seen. Learning is
  then a forward pass: no gradient, no inner loss. The switch comes late: for a long while the loss
  sits on a plateau at chance, ln C, and much of the craft is in leaving it.

ALGORITHM (meta-training, Algorithm 1 of the paper)
  repeat
    for each of B sequences: draw a task k of K, and T examples (xbar_j, ybar_j) of the base data
    x_j = A_k xbar_j,  y_j = rho_k(ybar_j)       A_k: entries N(0, 1/D); rho_k permutes C classes
    token_j = concat(x_j, onehot(y_{j-1})), zeros at first      a label is seen one step late
    J(theta) = 1/(BT) sum_{b,j} cross_entropy(f_theta(token_1 .. token_j), y_j)
    theta <- Adam(theta, grad J)
  K may be unlimited: then x_j is drawn without making any A_k, see gram_projection.
  Meta-test: tasks, images and data sets that were not trained on. The accuracy at each position,
  after 0, 1, .. T - 1 labelled examples, is the learning curve of the algorithm f_theta has become.

SYMBOLS
  symbol     in the code            shape       meaning
  S          stack                              runs trained at once: seeds x variants, seeds first
  B, T, C    batch, length, classes             sequences a step, examples a sequence, classes
  D          n_in                               inputs of one example (the paper's N_x)
  H          d_model                            width of the model (the paper's N_M)
  K          num_tasks                          meta-training tasks; 0: a fresh one each sequence
  A_k        task_matrix(ids, D)    (B, D, D)   input projection, a function of the task's id
  rho_k      task_permutation(...)  (B, C)      new name of each class, a function of the same id
  x, y       x, y                   (B, T, D|-) training sets as the model reads them, one a row
  f_theta    model(x, y)            (B, T, C)   logits; at j they depend on x_{<=j} and y_{<j} only
  N_S        model.state_size(T)                numbers carried from one example to the next

RESULT
  Means of 3 seeds (0, 1, 2) with 95 % t intervals; late = mean over the last third of positions.
  quick, glyphs of 8 x 8 pixels, T = 30, 2 CPU cores (AMD EPYC), 7.9 min for all:
    unseen data set (letters), late   0.562 [0.546, 0.578]   1-NN 0.623   chance 0.10
    new tasks of the digits, late     0.589 [0.565, 0.613]   1-NN 0.669
    `random`, late                    0.921 [0.907, 0.936]   optimum 0.929
    16 tasks only: seen 0.995 [0.991, 0.998], unseen 0.098 [0.082, 0.113]; no burst: 0.102
  MNIST of 14 x 14 pixels, T = 100, 5,000 training images, 4,000 steps, 48 min on one core:
    after 99 examples: new tasks 0.619 [0.580, 0.658], the paper's table 0.737 (1-NN 0.715);
    Fashion-MNIST, never trained on, 0.591 [0.510, 0.671], the paper's table 0.622 (1-NN 0.651)
  paper preset (one GPU): not run yet.

DIFFERS
  1. quick is small (glyphs instead of MNIST, T = 30 instead of 100) to fit two CPU cores. In the
     paper preset, T and the data are the paper's; its layers, heads, width, centring and the
     number of steps were recalled, not read again, and its batch and rates are our choice.
  2. burst: half of the training sequences are made of ten images. Ours: without it (or with the
     paper's label bias alone) a small model does not leave the plateau within minutes.
  3. Each pixel's mean is subtracted, not one global mean (`--center global`, as in the paper
     preset): with 64 inputs the mean image makes all inputs alike.
  4. Unlimited tasks go through gram_projection: the same distribution up to a jitter of 1e-4.
  5. Test sequences hold no image twice; small test sets would be flattered by exact repeats.
  6. Not known from the paper, so ours: pre-norm blocks, ReLU, learned positions, Adam's rate and
     betas, warm-up, clipping, the SGD baseline (softmax regression, one pass, tuned rate).
     From memory of it: the form of `random`, of the outer-product LSTM, and label bias 0.9.
  7. Left out: the paper's VSML and MAML rows, its heat maps over model sizes, Omniglot, CIFAR10,
     SVHN and ResNet features; `--features FILE.npz` takes any embedding of yours.
  8. Long, for four models and both real and drawn data are in it.

RUN
  python gpl_icl.py                         # glyphs drawn from fonts: no files, no network
  python gpl_icl.py --dataset mnist --unseen fashion_mnist --download --out runs/gpl_icl/mnist
  torchrun --standalone --nproc_per_node=8 gpl_icl.py --preset paper
"""
import argparse
import contextlib
import copy
import ctypes
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
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [paper]: what it states."""
    dataset: str = "glyph_digits"    # glyph_digits, glyph_letters, mnist, fashion_mnist or kmnist
    unseen: str = "glyph_letters"    # data set for meta-testing only: such a name, or FILE.npz
    features: str = ""               # FILE.npz with x (N, D), y (N,), any embedding, as --dataset
    data_dir: str = "data"           # folder with NAME/train-images-idx3-ubyte.gz and so on
    download: bool = False           # fetch missing official files into --data-dir
    image_size: int = 8              # images are resized to this many pixels a side
    rgb: bool = False                # repeat grey images over three channels
    center: str = "pixel"            # subtract each "pixel"'s mean, or one "global" mean
    distort: float = 0.4             # strength of the glyphs' distortions; 1 is hard
    classes: int = 10                # classes in a sequence, C
    length: int = 30                 # examples in a sequence, T [paper: 100]
    batch: int = 32                  # sequences a step over all processes, B
    burst: float = 0.5               # share of sequences made of 10 images only [ours]
    label_bias: float = 0.0          # share with one fixed label permutation [paper, section 4.3]
    projection: str = "gram"         # unlimited tasks: "gram", or "hash" to make the matrices
    d_model: int = 128               # width of the general learner, H
    layers: int = 2                  # transformer blocks
    heads: int = 2                   # attention heads
    steps: int = 2200                # meta-training steps of the general learner
    sweep: str = "16,128,1024"       # numbers of tasks of panel (a), a transformer each; "": none
    sweep_d_model: int = 64          # width of all models but the general learner
    sweep_steps: int = 1200          # meta-training steps of the transformers of (a) and (c)
    baseline_steps: int = 800        # meta-training steps of the baselines
    plateau: bool = True             # train the interventions of panel (c)
    baselines: bool = True           # train the LSTM, outer-product LSTM and MLP of panel (d)
    learning_rate: float = 1e-3      # of Adam [paper: unknown]; 2e-3 may stay on the plateau
    adam_eps: float = 1e-10          # of Adam; gradients on the plateau are small [paper, 4.3]
    warmup: int = 100                # steps of linear warm-up
    clip: float = 1.0                # bound on the gradient norm of each run
    bf16: bool = False               # bfloat16 autocast of the model (GPU)
    eval_sequences: int = 512        # meta-test sequences a seed and data set
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds trained side by side: seed, seed + 1, ...
    log_every: int = 50              # steps between lines of the log
    save_every: int = 250            # steps between checkpoints

    def __post_init__(self):
        low = {"warmup": 0, "seed": 0, "distort": 0, "burst": 0, "label_bias": 0, "classes": 2}
        high = {"burst": 1, "label_bias": 1, "seed": 1 << 28}
        for name, value in asdict(self).items():
            above = value >= low[name] if name in low else type(value) is str or value > 0
            if type(value) in (int, float) and not (above and value <= high.get(name, 1e300)):
                raise ValueError(f"--{name.replace('_', '-')} must be "
                                 + (f"at least {low[name]}" if name in low else "above 0")
                                 + (f" and at most {high[name]}" if name in high else " and finite")
                                 + f", not {value}")
        if self.center not in ("pixel", "global") or self.projection not in ("gram", "hash"):
            raise ValueError("--center is pixel or global, --projection is gram or hash")
        if self.d_model % self.heads or self.sweep_d_model % self.heads:
            raise ValueError(f"--heads {self.heads} must divide --d-model and --sweep-d-model")
        sizes = self.sweep.split(",") if self.sweep else []
        if not all(re.fullmatch(r"[1-9]\d*", size) for size in sizes) or len({*sizes}) < len(sizes):
            raise ValueError(f"--sweep must be numbers such as 16,128,1024, not {self.sweep!r}")


PRESETS = {
    "smoke": dict(length=12, batch=8, d_model=32, steps=15, warmup=5, sweep="", plateau=False,
                  baselines=False, eval_sequences=64, log_every=5,
                  save_every=5),
    "quick": dict(),
    "paper": dict(dataset="mnist", unseen="fashion_mnist", image_size=28, center="global",
                  length=100, batch=512, burst=0.0, d_model=256, layers=4, heads=8, steps=50_000,
                  sweep="64,256,1024,4096,16384,65536", sweep_d_model=256, sweep_steps=50_000,
                  baseline_steps=100_000, learning_rate=3e-4, warmup=500, bf16=True, log_every=500,
                  save_every=2500),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# A task is a function of its integer id: nothing has to be stored, and task k is the same matrix
# and permutation in training and testing, on any device. After the sampler come the base data.


class Dataset(NamedTuple):
    """Normalised examples."""
    x: torch.Tensor      # (N, D) floats
    y: torch.Tensor      # (N,) classes 0 .. classes - 1
    classes: int


WORD = 0xFFFFFFFF


def mix(x):
    """Scramble 32-bit words held in int64: xor-shift-multiply, constants known as lowbias32."""
    x = (((x >> 16) ^ x) * 0x7FEB352D) & WORD
    x = (((x >> 15) ^ x) * 0x846CA68B) & WORD
    return (x >> 16) ^ x


def task_bits(ids, count, start=0):
    """Task ids (...) -> (..., count) int64: their random 32-bit words from number `start` on."""
    key1 = mix((ids & WORD) ^ mix((ids >> 32) & WORD))
    key2 = mix((key1 + 0x9E3779B9) & WORD)
    counter = torch.arange(start, start + count, device=ids.device)
    # Two keyed rounds. After one, every task would be a shifted window of the same stream.
    return mix(mix((counter + key1[..., None]) & WORD) ^ key2[..., None])


def normal_from_bits(bits):
    """32-bit words -> standard normals. 23 bits and a half are exact in float32; from 24, the
    largest would round to 1, an infinite draw."""
    return math.sqrt(2) * torch.erfinv(((bits >> 9).float() + 0.5) / 2**22 - 1)


def task_matrix(ids, n_in):
    """Task ids (...) -> A (..., n_in, n_in), entries N(0, 1/n_in). Same id, same A.

    1/n_in is the variance, so that A keeps lengths. As a deviation, a common slip, it shrinks the
    inputs by sqrt(n_in), and the label drowns them.
    """
    bits = task_bits(ids, n_in * n_in)
    return (normal_from_bits(bits) / math.sqrt(n_in)).unflatten(-1, (n_in, n_in))


def task_permutation(ids, classes):
    """Task ids (...) -> rho (..., classes): class c is called rho[c]. Same id, same rho."""
    return task_bits(ids, classes, start=1 << 31).sort(dim=-1, stable=True).indices


def gram_projection(x, noise=None):
    """x (..., T, D) -> x A^T with a fresh task matrix A a sequence, without making one.

    Column d of x A^T is x a_d with a_d ~ N(0, I/D): the D columns are independent and Gaussian with
    covariance G = x x^T / D. So L noise with L L^T = G has the law of x A^T, from T D random
    numbers instead of D^2 and T^2 D multiply-adds instead of T D^2. noise (..., T, D): N(0, 1).
    """
    gram = x @ x.mT / x.shape[-1]
    # Repeated images make G singular. The jitter lets their projections differ by a hundredth.
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-4)
    factor = torch.linalg.cholesky_ex(gram)[0]       # _ex: no check, a GPU would wait
    return factor @ (torch.randn_like(x) if noise is None else noise)


class Variant(NamedTuple):
    """One run of a stack: where its training sequences come from."""
    name: str
    num_tasks: int = 0         # K; 0: a fresh task for every sequence
    burst: float = 0.0         # share of sequences made of ten images
    label_bias: float = 0.0    # share of sequences with one fixed label permutation


def stream(seed, purpose, device):
    """Random generator of one seed for one purpose: 0 training, 1-5 tests (4 to tune
    the hand-written rules), 6 weights, 7 glyphs.

    The number is small, because torch's CPU generator keeps only 32 bits of it.
    """
    return torch.Generator(device).manual_seed(8 * seed + purpose)


def per_seed(sampler, generators, *shape):
    """sampler(shape) of each generator -> (seeds, *shape): a seed alone equals its slice of all."""
    return torch.stack([sampler(shape, generator=g, device=g.device) for g in generators])


def sample_batch(data, variants, seeds, generators, batch, length, bank=None, distinct=False,
                 projection="gram", make_matrices=task_matrix):
    """Sequences for a whole stack -> x (S, B, T, D), y (S, B, T); S = seeds x variants.

    data        `Dataset` to draw from
    variants    list of `Variant`: where the sequences of each run come from
    seeds       integers, a generator each. Seed s has tasks of its own, ids s 2^32 + 0 .. K - 1;
                all its variants see the same images and noise, for paired comparisons
    bank        (seeds, K', D, D): matrices made before, for the variants with K <= K'
    distinct    no image twice in a sequence: a fair test. Training draws with replacement
    projection  "gram" or "hash": how unlimited tasks are made;  make_matrices: compiled, on a GPU
    """
    rand = lambda *shape: per_seed(torch.rand, generators, batch, *shape)      # (seeds, B, ...)
    n, seed_index = len(data.x), torch.arange(len(seeds), device=data.x.device)[:, None]
    any_image = rand(n).topk(length).indices if distinct else (rand(length) * n).long()
    # Burst (ours): ten images make up a sequence. Copying the label of an identical earlier input
    # is the easiest form of in-context learning, and a stepping stone to the general form.
    ten_images = (rand(10) * n).long().gather(-1, (rand(length) * 10).long())  # (seeds, B, T)
    burst, fixed, fresh_rho = rand(1), rand(1), rand(data.classes).argsort(-1)
    number = per_seed(lambda shape, **to: torch.randint(1 << 40, shape, **to), generators, batch)
    noise = per_seed(torch.randn, generators, batch, length, data.x.shape[1])
    xs, ys = [], []
    for variant in variants:     # few; at paper size one variant's matrices alone take over a GB
        index = torch.where(burst < variant.burst, ten_images, any_image)      # (seeds, B, T)
        x, y = data.x[index], data.y[index]
        if variant.num_tasks == 0 and projection == "gram":
            x, rho = gram_projection(x, noise), fresh_rho
        else:
            task = number % variant.num_tasks if variant.num_tasks else number + (1 << 62)
            ids = task + (torch.tensor(seeds, device=task.device) << 32)[:, None]
            known = bank is not None and 0 < variant.num_tasks <= bank.shape[1]
            x = x @ (bank[seed_index, task] if known else make_matrices(ids, x.shape[-1])).mT
            rho = task_permutation(ids, data.classes)                          # (seeds, B, C)
        rho = torch.where(fixed < variant.label_bias, torch.arange(data.classes).to(rho), rho)
        xs.append(x), ys.append(rho.gather(-1, y))
    return torch.stack(xs, 1).flatten(0, 1), torch.stack(ys, 1).flatten(0, 1)


def random_batch(generators, batch, length, n_in, classes):
    """The `random` data, as recalled: ten points U(0, 1)^D, standardised and projected, with
    independent uniform labels, drawn with replacement -> x (seeds, B, T, D), y (seeds, B, T).
    Identical inputs stay identical."""
    points = (per_seed(torch.rand, generators, batch, 10, n_in) - 0.5) * math.sqrt(12)
    points = gram_projection(points, per_seed(torch.randn, generators, batch, 10, n_in))
    labels = (per_seed(torch.rand, generators, batch, 10) * classes).long()
    which = (per_seed(torch.rand, generators, batch, length) * 10).long()
    x = points.gather(2, which[..., None].expand(-1, -1, -1, n_in))
    return x, labels.gather(2, which)


# The base data: official image files, embeddings of your own, or glyphs of matplotlib's fonts.

OFFICIAL = {  # data set: host, MD5 of each of FILES
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
              "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                      "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
    "kmnist": ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
               "bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344",
               "5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134")}
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
         "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
GLYPHS = {"glyph_digits": "0123456789", "glyph_letters": "ABCDEFGHIJ"}
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono
    DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif
    DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol
    STIXGeneralItalic STIXGeneralBolIta cmr10 cmb10 cmss10 cmti10 cmtt10""".split()


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
    host, *sums = OFFICIAL[name]
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


def load_images(name, data_dir, download=False):
    """-> [(images (N, h, w) in [0, 1], labels (N,))] for train and t10k, or t10k alone."""
    splits = []
    for files in (FILES[:2], FILES[2:]):
        paths = [pathlib.Path(data_dir) / name / file for file in files]
        for path in paths:
            if download and not path.exists():
                fetch(name, path.name, path)
        if files == FILES[:2] and not any(path.exists() for path in paths):
            continue
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: put it there, or add --download")
        images, labels = load_idx(paths[0]), load_idx(paths[1])
        if images.dim() != 3 or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(f"{paths[1]}: labels {tuple(labels.shape)} do not fit the images "
                             f"{tuple(images.shape)}")
        splits.append((images.float() / 255, labels.long()))
    return splits


def load_features(path):
    """NPZ file with x (N, ...) and y (N,) -> [(x (N, D), y)], in a fixed random order."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = torch.from_numpy(file["x"]).float().flatten(1), torch.from_numpy(file["y"])
    except (KeyError, EOFError, ValueError, TypeError, AttributeError, IndexError,
            zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must hold arrays x (N, D) and y (N,): {error}") from None
    if y.shape != x.shape[:1] or y.is_floating_point() or not x.isfinite().all():
        raise ValueError(f"{path}: x {tuple(x.shape)} must be finite, y {tuple(y.shape)} its "
                         f"integer classes")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[order], y[order].long())]


def glyph_rasters(characters):
    """Each character in each font, longer side 24 pixels, centred: (C, fonts, 32, 32) in [0, 1]."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rasters = torch.zeros(len(characters), len(FONTS), 32, 32)
    for f, name in enumerate(FONTS):
        font = FT2Font(str(folder / f"{name}.ttf"))
        font.set_size(26, 72)
        for c, character in enumerate(characters):
            font.set_text(character)
            font.draw_glyphs_to_bitmap(antialiased=True)
            ink = torch.from_numpy(np.array(font.get_image(), dtype=np.float32) / 255)
            rows, columns = ink.amax(1).nonzero().flatten(), ink.amax(0).nonzero().flatten()
            ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            h, w = (max(1, round(side * 24 / max(ink.shape))) for side in ink.shape)
            ink = F.interpolate(ink[None, None], (h, w), mode="bilinear", antialias=True)[0, 0]
            top, left = (32 - h) // 2, (32 - w) // 2
            rasters[c, f, top:top + h, left:left + w] = ink
    return rasters


def glyphs(characters, per_class, image_size, distort, generator):
    """Characters in random fonts, randomly turned, scaled, sheared and shifted, all in one batch.

    -> images (N, image_size, image_size) in [0, 1], labels (N,), N = len(characters) * per_class,
    on the generator's device. distort: 0 leaves the fonts alone, 1 is hard.
    """
    device, n = generator.device, len(characters) * per_class
    labels = torch.arange(len(characters), device=device).repeat(per_class)
    fonts = torch.randint(len(FONTS), (n,), generator=generator, device=device)
    uniform = distort * (torch.rand(6, n, generator=generator, device=device) * 2 - 1)
    turn, shear, shift = 0.26 * uniform[0], 0.2 * uniform[1], 0.12 * uniform[4:]
    (scale_x, scale_y), cos, sin = (0.2 * uniform[2:4]).exp(), turn.cos(), turn.sin()
    # rotation @ shear @ scale | shift
    affine = torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift[0],
                          sin * scale_x, (shear * sin + cos) * scale_y, shift[1]], 1)
    shape = (n, 1, 2 * image_size, 2 * image_size)
    grid = F.affine_grid(affine.view(n, 2, 3), shape, align_corners=False)
    rasters = glyph_rasters(characters).to(device)[labels, fonts][:, None]     # (N, 1, 32, 32)
    return F.avg_pool2d(F.grid_sample(rasters, grid, align_corners=False), 2)[:, 0], labels


def load_dataset(name, cfg, device, held_out=False):
    """-> (train, test): two `Dataset`s on `device`, both normalised by the statistics of train.

    Data without a train split is cut: its last fifth is the test split. With `held_out` (data for
    meta-testing only) all of it is, and gives its own statistics; the paper, too, normalises every
    data set by itself.
    """
    if name in GLYPHS:
        generator = stream(list(GLYPHS).index(name), 7, device)
        draws = (GLYPHS[name], 500, cfg.image_size, cfg.distort, generator)
        splits = [glyphs(*draws), glyphs(*draws)]
    elif name in OFFICIAL:
        splits = load_images(name, cfg.data_dir, cfg.download)
    elif name.endswith(".npz"):
        splits = load_features(name)
    else:
        raise ValueError(f"no data set {name!r}: {', '.join([*GLYPHS, *OFFICIAL])} or FILE.npz")
    if len(splits) == 1:
        (x, y), cut = splits[0], len(splits[0][0]) * 4 // 5
        print(f"{name} has no train split: " + ("all of it is for meta-testing" if held_out else
                                                 "its last fifth is for meta-testing"))
        splits = [(x, y), (x, y)] if held_out else [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    for s, (x, y) in enumerate(splits):
        if set(range(cfg.classes)) - set(y.tolist()) or y.min() < 0:
            raise ValueError(f"{name} has the classes {sorted(set(y.tolist()))}, --classes "
                             f"{cfg.classes} needs 0 to {cfg.classes - 1}")
        if y.max() >= cfg.classes:
            print(f"{name}: {(y >= cfg.classes).sum()} of {len(y)} examples are left out, their "
                  f"classes are not below --classes {cfg.classes}")
        x, y = x[y < cfg.classes].to(device), y[y < cfg.classes].to(device)
        if len(x) < cfg.length:
            raise ValueError(f"{name} has {len(x)} examples in a split: --length {cfg.length} "
                             f"is too long")
        if x.dim() == 3:
            x = F.interpolate(x[:, None], (cfg.image_size,) * 2, mode="bilinear", antialias=True)
            x = x.expand(-1, 3 if cfg.rgb else 1, -1, -1).flatten(1)           # (N, D)
        splits[s] = x, y
    train = splits[0][0]
    mean = train.mean(0) if cfg.center == "pixel" else train.mean()
    std = (train - mean).std()
    if not std > 1e-6:
        raise ValueError(f"{name} is constant: nothing tells its examples apart")
    return [Dataset((x - mean) / std, y, cfg.classes) for x, y in splits]


# ---- 3. MODEL ----------------------------------------------------------------------------------
# Four predictors, model(x (B, T, D), y (B, T)) -> logits (B, T, C). They differ in how much they
# carry from one example to the next: state_size(T) numbers.


def tokens(x, y, classes):
    """-> (B, T, D + C): input j beside the one-hot label j - 1. Never label j itself."""
    onehot = (y[..., None] == torch.arange(classes, device=y.device)).to(x.dtype)
    return torch.cat([x, F.pad(onehot, (0, 0, 1, 0))[..., :-1, :]], -1)


def zero_head(width, classes):
    """Linear read-out that starts at zero, so that the loss starts at exactly ln C."""
    head = nn.Linear(width, classes)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return head


def causal_attention(q, k, v):
    """q, k, v (..., T, d) -> (..., T, d); position t reads positions up to t."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On CPU the fused kernel is no faster at these lengths, and it does not run under vmap.
    future = torch.full((q.shape[-2],) * 2, -torch.inf, device=q.device).triu(1)
    return (q / math.sqrt(q.shape[-1]) @ k.mT + future).softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, h):                                                      # (B, T, H)
        shape, h = h.shape, h.flatten(0, 1)        # rows: ReLU in place on a view copies
        qkv = self.qkv(self.norm1(h)).view(*shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, heads, T, d)
        h = h + self.out(causal_attention(q, k, v).transpose(1, 2).reshape(h.shape))
        return (h + self.down(F.relu(self.up(self.norm2(h)), inplace=True))).view(shape)


class Transformer(nn.Module):
    """Causal transformer. State: its keys and values, which grow with the sequence."""

    def __init__(self, n_in, classes, length, d_model, layers, heads):
        super().__init__()
        self.classes = classes
        self.embed = nn.Linear(n_in + classes, d_model)
        # Label j - 1 comes one step after input j - 1: the circuit must find "the token before me".
        # Positions at the usual deviation of 0.02 would drown in the D random inputs.
        self.position = nn.Parameter(0.5 * torch.randn(length, d_model))
        self.blocks = nn.Sequential(*[Block(d_model, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d_model), zero_head(d_model, classes)

    def forward(self, x, y):
        h = self.embed(tokens(x, y, self.classes)) + self.position[:x.shape[1]]
        return self.head(self.norm(self.blocks(h)))

    def state_size(self, length):
        return 2 * len(self.blocks) * self.position.shape[1] * length


class Recurrent(nn.Module):
    """h, c = cell(input(token) + recurrent(h), c). A loop: nn.LSTM does not run under vmap."""

    def __init__(self, n_in, classes, gates, hidden, state_shape):
        super().__init__()
        self.classes, self.state_shape = classes, state_shape
        self.input = nn.Linear(n_in + classes, gates)
        self.recurrent = nn.Linear(hidden, gates)
        self.head = zero_head(hidden, classes)

    def forward(self, x, y):
        drive, outputs = self.input(tokens(x, y, self.classes)), []            # (B, T, gates)
        h = drive.new_zeros(x.shape[0], self.recurrent.in_features)
        c = drive.new_zeros(x.shape[0], *self.state_shape)
        for now in drive.unbind(1):
            h, c = self.cell(now + self.recurrent(h), c)
            outputs.append(h)
        return self.head(torch.stack(outputs, 1))


class LSTM(Recurrent):
    """nn.LSTM's equations and initial scale. State: h and c, about the root of its parameters."""

    def __init__(self, n_in, classes, hidden):
        super().__init__(n_in, classes, 4 * hidden, hidden, (hidden,))
        for parameter in (*self.input.parameters(), *self.recurrent.parameters()):
            nn.init.uniform_(parameter, -hidden**-0.5, hidden**-0.5)

    def cell(self, gates, c):
        """gates (B, 4 hidden), c (B, hidden) -> next h and c."""
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def state_size(self, length):
        return 2 * self.recurrent.in_features


class OuterProductLSTM(Recurrent):
    """LSTM whose cell is a matrix a head, written by outer products and read by a query.

    State: heads * size^2, growing like its parameters, where an LSTM's grows like their root.
    """

    def __init__(self, n_in, classes, heads, size):
        super().__init__(n_in, classes, 8 * heads * size, heads * size, (heads, size, size))

    def cell(self, gates, c):
        """gates (B, heads * 8 * size), c (B, heads, size, size) -> next h (B, heads * size), c."""
        gates = gates.unflatten(-1, (c.shape[-3], 8, c.shape[-1]))
        rows, columns, query, out = gates.split((3, 3, 1, 1), -2)              # (B, heads, ., size)
        i, f, g = (rows[..., :, None] * columns[..., None, :]).unbind(-3)      # outer products
        c = (f + 1).sigmoid() * c + i.sigmoid() * g
        return (out.sigmoid() * (query @ c.mT).tanh()).flatten(1), c           # c query, as a row

    def state_size(self, length):
        return math.prod(self.state_shape)


class MLP(nn.Module):
    """The memory-less classifier: it reads x, never a label. It can only memorise tasks."""

    def __init__(self, n_in, classes, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
                                    nn.ReLU(), zero_head(hidden, classes))

    def forward(self, x, y):
        return self.layers(x)

    def state_size(self, length):
        return 0


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# Meta-training is plain gradient descent on the paper's objective J: there is no inner loss. What
# is learned is decided by the tasks (section 2). All runs of a stack take each step together.


def stacked(model):
    """-> f(params, x, y): the model, with a stack axis S in front of all it takes and gives."""
    one = lambda params, x, y: functional_call(model, params, (x, y))

    def forward(params, x, y):
        if len(x) == 1:                      # a stack of one: plain layers are a fifth faster
            return one({name: p.squeeze(0) for name, p in params.items()}, x[0], y[0])[None]
        return vmap(one)(params, x, y)
    return forward


def initial_stack(build, seeds, variants, device):
    """-> {name: (S, ...)}: weights of each seed's own, the same for all variants of the seed."""
    models = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8 * seed + 6)
            models += [dict(build().named_parameters())] * variants
    return {name: torch.stack([model[name].detach() for model in models]).to(device)
            .requires_grad_() for name in models[0]}


def sequence_loss(logits, y):
    """J of each run: logits (S, B, T, C), y (S, B, T) -> (S,) nats, the mean over B and all T."""
    loss = F.cross_entropy(logits.float().flatten(0, 2), y.flatten(), reduction="none")
    return loss.view(y.shape[0], -1).mean(1)


def clip_gradients(params, bound):
    """Scale each run's gradient, over all its parameters, to a norm of at most `bound`."""
    grads = [p.grad for p in params.values()]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads])
    scale = (bound / (norms.norm(dim=0) + 1e-12)).clamp(max=1)                 # (S,)
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))


def meta_step(loss_function, params, adam, x, y, clip, run):
    """theta <- Adam(theta, grad J), every run of the stack on its own batch -> losses (S,)."""
    losses = loss_function(params, x, y)
    adam.zero_grad()
    losses.sum().backward()
    run.average([p.grad for p in params.values()])
    clip_gradients(params, clip)
    adam.step()
    return losses.detach()


# ---- 5. TRAINING -------------------------------------------------------------------------------
# `run` (class Run, section 8) stands for the machine: run.steps(stage, total, state) counts the
# steps, restores and saves `state`; run.share(batch), run.average(tensors) are for many processes.


def learner(cfg, run, build, seeds, variants, adam_eps=0.0):
    """-> (f, params, adam, loss function): an untrained stack and what a step on it needs."""
    forward = stacked(build().to(run.device))
    params = initial_stack(build, seeds, variants, run.device)
    adam = torch.optim.Adam(params.values(), lr=cfg.learning_rate, betas=(0.9, 0.98),
                            eps=adam_eps or cfg.adam_eps, fused=run.device.type != "mps")

    def loss_function(params, x, y):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=cfg.bf16):
            logits = forward(params, x, y)
        return sequence_loss(logits, y)
    return forward, params, adam, run.compile(loss_function)


def task_bank(variants, seeds, n_in, device):
    """Matrices of all tasks of the finite variants, (seeds, K, D, D), as far as memory goes."""
    limit = 1 << (32 if device.type == "cuda" else 28)                         # numbers
    sizes = [variant.num_tasks for variant in variants
             if len(seeds) * variant.num_tasks * n_in**2 <= limit]
    if not any(sizes):
        return None
    offset = (torch.tensor(seeds, device=device) << 32)[:, None]
    ids = torch.arange(max(sizes), device=device) + offset                     # (seeds, K)
    parts = ids.flatten().split(max(1, (1 << 24) // n_in**2))  # bounds the memory of the words
    matrices = torch.cat([task_matrix(part, n_in) for part in parts])
    return matrices.view(*ids.shape, n_in, n_in)


def train(cfg, run, stage, build, variants, data, probe, steps, batch=0, adam_eps=0.0):
    """Meta-train one stack: every variant for every seed.

    build() -> model;  variants: list of `Variant`;  data: `Dataset` to train on
    probe: (x (seeds, E, T, D), y) of new tasks, read every `log_every` steps without any bias
    -> (f, params): the stacked forward function, the trained parameters {name: (S, ...)}
    """
    seeds = run.seeds
    members = [(seed, variant) for seed in seeds for variant in variants]      # S of them
    forward, params, adam, loss_function = learner(cfg, run, build, seeds, len(variants), adam_eps)
    generators = [stream(seed, 0, run.device) for seed in seeds]
    bank = task_bank(variants, seeds, data.x.shape[1], run.device)
    make_matrices = run.compile(task_matrix)
    running = torch.zeros(len(members), device=run.device)     # sum of losses since the last log
    state = {"params": params, "adam": adam, "generators": generators, "running": running}
    for step in run.steps(stage, steps, state):
        # COLLECT
        x, y = sample_batch(data, variants, seeds, generators, batch or cfg.batch, cfg.length, bank,
                            False, cfg.projection, make_matrices)              # (S, B, T, D)
        # META UPDATE
        rate = cfg.learning_rate * min(1, (step + 1) / max(1, cfg.warmup))
        adam.param_groups[0]["lr"] = rate
        losses = meta_step(loss_function, params, adam, run.share(x), run.share(y), cfg.clip, run)
        run.average([losses])                                # each process has seen its share
        running += losses
        run.watch(losses)
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            with run.clock("evaluation"):
                loss, accuracy = evaluate(forward, params, *probe)             # (S, T)
                training = (running / (step % cfg.log_every + 1)).tolist()
                running.zero_()
            run.log([{"seed": seed, "run": variant.name, "training_loss": training[i],
                      "loss": loss[i].mean().item(), "late": late(accuracy[i])}
                     for i, (seed, variant) in enumerate(members)])
    return forward, params


# ---- 6. EVALUATION -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(forward, params, x, y):
    """x (seeds or S, E, T, D), y (seeds or S, E, T) -> loss (S, T), accuracy (S, T), on the CPU."""
    each = len(next(iter(params.values()))) // len(x)          # variants that share a batch
    losses, right = [], []
    for xs, ys in zip(x.split(128, 1), y.split(128, 1)):
        xs, ys = xs.repeat_interleave(each, 0), ys.repeat_interleave(each, 0)
        logits = forward(params, xs, ys).float()                               # (S, E', T, C)
        losses.append(F.cross_entropy(logits.movedim(-1, 1), ys, reduction="none"))
        right.append(logits.argmax(-1) == ys)
    return torch.cat(losses, 1).mean(1).cpu(), torch.cat(right, 1).float().mean(1).cpu()


def late(accuracy):
    """Accuracy by position (T,) -> its mean over the last third, positions 20-29 of 30."""
    return float(np.mean(np.asarray(accuracy)[-max(1, len(accuracy) // 3):]))


def nearest_neighbour(x, y):
    """x (B, T, D), y (B, T) -> predictions (B, T): the label of the nearest input before, or 0."""
    distance = torch.cdist(x, x)
    later = torch.ones_like(distance[0], dtype=torch.bool).triu()
    prediction = y.gather(1, distance.masked_fill(later, torch.inf).argmin(-1))
    prediction[:, 0] = 0
    return prediction


def kernel_ridge(x, y, width=0.5, ridge=0.3):
    """x (B, T, D), y (B, T) -> predictions (B, T) by kernel ridge regression on those before.

    Kernel exp(-|x - x'|^2 / (2 width D)), in float64. One Cholesky factor serves all T training
    sets: with K + ridge I = L L^T, a leading block of L factorises the same block of K + ridge I,
    so that the prediction at position j is L[j, :j] (L^-1 onehot(y))[:j].
    """
    x = x.double()
    kernel = (-torch.cdist(x, x).square() / (2 * width * x.shape[-1])).exp()
    factor = torch.linalg.cholesky(kernel + ridge * torch.eye(x.shape[1], device=x.device))
    solved = torch.linalg.solve_triangular(factor, F.one_hot(y).double(), upper=False)
    return (factor.tril(-1) @ solved).argmax(-1)


def online_sgd(x, y, lr=0.01):
    """x (B, T, D), y (B, T) -> predictions (B, T) of softmax regression from zero weights, one
    pass, one example a step, each predicted before it is learned."""
    x, onehot = F.pad(x, (0, 1), value=1.0), F.one_hot(y).to(x.dtype)          # a one for the bias
    weight, predictions = x.new_zeros(x.shape[0], x.shape[2], onehot.shape[-1]), []
    for now, target in zip(x.unbind(1), onehot.unbind(1)):                     # (B, D + 1), (B, C)
        logits = (now[:, None] @ weight)[:, 0]                                 # (B, C)
        predictions.append(logits.argmax(-1))
        weight -= lr * now[:, :, None] * (logits.softmax(-1) - target)[:, None]
    return torch.stack(predictions, 1)


def random_dataset_optimum(length, classes=10):
    """Best accuracy (T,) on `random` after 0 .. T - 1 examples: the point is new with probability
    0.9^examples, and then one can only guess."""
    return 1 - 0.9 ** torch.arange(length, dtype=torch.float64) * (1 - 1 / classes)


def reference_curves(tests, validation):
    """Accuracy by position of the hand-written rules: {test set: {rule: (seeds, T)}}.

    Their settings are the best on average on `validation`, training images under new tasks; both
    arguments hold x (seeds, E, T, D), y (seeds, E, T).
    """
    x, y = (t[0, :256].cpu() for t in validation)
    score = lambda prediction: (prediction == y).float().mean().item()
    rate = max((0.001, 0.003, 0.01, 0.03, 0.1), key=lambda lr: score(online_sgd(x, y, lr)))
    kernel = max(((width, ridge) for width in (0.25, 0.5, 1.0) for ridge in (0.03, 0.3)),
                 key=lambda setting: score(kernel_ridge(x, y, *setting)))
    rules = {"1-NN": nearest_neighbour, "kernel ridge": lambda x, y: kernel_ridge(x, y, *kernel),
             "online SGD": lambda x, y: online_sgd(x, y, rate)}
    accuracy = lambda rule, x, y: (rule(x.cpu(), y.cpu()) == y.cpu()).float().mean(0)
    return {name: {rule: torch.stack([accuracy(rules[rule], *seed) for seed in zip(x, y)])
                   for rule in rules} for name, (x, y) in tests.items()}


def plan(cfg, flops_per_second):
    """What a run of `cfg` does and how long it should take at this rate of matrix products."""
    small = len(cfg.sweep.split(",")) * bool(cfg.sweep) + 5 * cfg.plateau
    n_in = cfg.image_size**2 * (3 if cfg.rgb else 1) + cfg.classes
    work = lambda steps, width: 6 * steps * width * (n_in + 12 * cfg.layers * width)
    flops = work(cfg.steps, cfg.d_model) + small * work(cfg.sweep_steps, cfg.sweep_d_model)
    flops += 8 * cfg.baselines * work(cfg.baseline_steps, cfg.sweep_d_model)   # slow: small steps
    flops *= cfg.num_seeds * cfg.batch * cfg.length
    minutes = 0.3 + flops / (0.4 * flops_per_second) / 60     # the models reach 0.4 of the rate
    return (f"meta-trains on {cfg.features or cfg.dataset}, for {cfg.num_seeds} seed(s), a general "
            f"learner, {small} smaller ones and {3 * cfg.baselines} baselines: "
            f"about {minutes:.1f} min here")


def experiment(cfg, run):
    """Meta-train the models of the figure; test them and the hand-written rules on the same tasks.

    -> {"per_seed": a dictionary per seed with "headline" numbers, "beside": notes for the closing
    table, "models": sizes}
    """
    name = cfg.features or cfg.dataset
    data = load_dataset(name, cfg, run.device)
    unseen = data[1] if cfg.unseen == name else load_dataset(
        cfg.unseen, cfg, run.device, held_out=True)[1]
    n_in, width = data[0].x.shape[1], cfg.sweep_d_model
    if unseen.x.shape[1] != n_in:
        raise ValueError(f"--unseen {cfg.unseen} has {unseen.x.shape[1]} inputs, {name} has {n_in}")

    half = (cfg.batch + 1) // 2
    if cfg.batch % run.world or cfg.plateau and half % run.world:
        raise ValueError(f"{run.world} processes cannot share batches of {cfg.batch} and {half}")
    streams = lambda purpose: [stream(seed, purpose, run.device) for seed in run.seeds]

    def fresh(source, purpose, variants=(Variant("new tasks"),)):
        """Test sequences, without any bias and without a repeated image."""
        return sample_batch(source, variants, run.seeds, streams(purpose), cfg.eval_sequences,
                            cfg.length, distinct=True)

    with run.clock("evaluation"):
        tests = {"unseen_tasks": fresh(data[1], 1), "unseen_dataset": fresh(unseen, 2),
                 "random": random_batch(streams(3), cfg.eval_sequences, cfg.length, n_in,
                                        cfg.classes)}
        references = reference_curves(tests, fresh(data[0], 4))
    probe, results = [t[:, :256] for t in tests["unseen_tasks"]], {}

    def meta_train(stage, build, variants, steps, **changes):
        """Train a stack and test it. "seen_tasks": each run's own tasks, on training images."""
        forward, params = train(cfg, run, stage, build, variants, data[0], probe, steps, **changes)
        with run.clock("evaluation"):
            own = [variant._replace(burst=0.0, label_bias=0.0) for variant in variants]
            tested = {**tests, "seen_tasks": fresh(data[0], 5, own)}
            curves = {test: evaluate(forward, params, *batch)[1].unflatten(0, (len(run.seeds), -1))
                      for test, batch in tested.items()}                       # (seeds, V, T) each
        size = {"steps": steps, "state": build().state_size(cfg.length),
                "parameters": sum(p[0].numel() for p in params.values())}
        results[stage] = {"runs": [v.name for v in variants], "curves": curves, "size": size}

    transformer = lambda width: lambda: Transformer(
        n_in, cfg.classes, cfg.length, width, cfg.layers, cfg.heads)
    general = [Variant("unlimited", 0, cfg.burst, cfg.label_bias)]
    finite = [general[0]._replace(name=f"K={k}", num_tasks=int(k))
              for k in cfg.sweep.split(",") if k]
    # The interventions of panel (c); "uniform" is none
    levers = [Variant("uniform"), Variant("label bias 0.9", label_bias=0.9)] * cfg.plateau
    meta_train("learner", transformer(cfg.d_model), general, cfg.steps)
    if finite or levers:
        meta_train("sweep", transformer(width), finite + general + levers, cfg.sweep_steps)
    if cfg.plateau:
        steps = cfg.sweep_steps
        meta_train("half batch", transformer(width), general, steps, batch=half)
        meta_train("epsilon 1e-4", transformer(width), general, steps, adam_eps=1e-4)
    if cfg.baselines:
        steps = cfg.baseline_steps
        meta_train("LSTM", lambda: LSTM(n_in, cfg.classes, width), general, steps)
        meta_train("outer-product LSTM", lambda: OuterProductLSTM(
            n_in, cfg.classes, 4, max(1, width // 4)), general, steps)
        meta_train("MLP", lambda: MLP(n_in, cfg.classes, 4 * width), finite[:1] + general, steps)
    rows = [seed_summary(run, i, results, references) for i in range(len(run.seeds))]
    return {"per_seed": rows, "beside": beside(cfg, rows),
            "models": {stage: result["size"] for stage, result in results.items()}}


def seed_summary(run, i, results, references):
    """All numbers of seed number i: headline, learning curves, references, history of training."""
    rounded = lambda curve: [round(value, 4) for value in curve.tolist()]
    curves = {stage: {name: {test: rounded(curve[i, v]) for test, curve in r["curves"].items()}
                      for v, name in enumerate(r["runs"])} for stage, r in results.items()}
    history = {stage: {name: [(row["step"], round(row["loss"], 4), round(row["late"], 4))
                              for row in run.rows if (row["seed"], row["stage"], row["run"])
                              == (run.seeds[i], stage, name)]
                       for name in r["runs"]} for stage, r in results.items()}
    learnt, headline = curves["learner"]["unlimited"], {}
    for test in ("unseen_tasks", "unseen_dataset"):
        headline[f"unlimited_{test}_late"] = late(learnt[test])
        headline[f"unlimited_{test}_last"] = learnt[test][-1]
    first = learnt["unseen_tasks"][0], learnt["unseen_dataset"][0]
    headline |= {"unlimited_first_position": sum(first) / 2, "random_late": late(learnt["random"])}
    for name, tested in curves.get("sweep", {}).items():
        if name.startswith("K="):
            headline[f"k{name[2:]}_seen_late"] = late(tested["seen_tasks"])
            headline[f"k{name[2:]}_unseen_late"] = late(tested["unseen_tasks"])
    if "half batch" in curves:
        # The plateau: the uniform run at the step at which its rival passes 0.35, else at the end.
        rival, uniform = history["sweep"]["unlimited"], history["sweep"]["uniform"]
        passed = [n for n, (_, _, accuracy) in enumerate(rival) if accuracy > 0.35] + [-1]
        headline["uniform_late"] = uniform[passed[0]][2]
    for stage, key in (("sweep", "small_transformer_late"), ("LSTM", "lstm_late"),
                       ("outer-product LSTM", "outer_product_lstm_late"),
                       ("MLP", "mlp_unseen_late")):
        if stage in curves:
            headline[key] = late(curves[stage]["unlimited"]["unseen_tasks"])
    for name, tested in curves.get("MLP", {}).items():
        if name.startswith("K="):
            headline[f"mlp_k{name[2:]}_seen_late"] = late(tested["seen_tasks"])
    rules = {test: {rule: rounded(curve[i]) for rule, curve in by_rule.items()}
             for test, by_rule in references.items()}
    return {"seed": run.seeds[i], "headline": headline, "curves": curves, "references": rules,
            "history": history}


def paper_accuracy(cfg, test):
    """The paper's table: accuracy after 99 examples, meta-trained on MNIST; None for other runs."""
    if (cfg["dataset"], cfg["length"], cfg["features"]) != ("mnist", 100, ""):
        return None
    unseen = {"fashion_mnist": 0.622, "kmnist": 0.534}.get(cfg["unseen"])
    return {"unseen_tasks": 0.737, "unseen_dataset": unseen}.get(test)


def beside(cfg, rows):
    """{headline metric: what the closing table says beside it}: chance, rules, optimum, paper."""
    notes = {}
    for test in ("unseen_tasks", "unseen_dataset", "random"):
        for end, where in (("late", late), ("last", lambda curve: curve[-1])):
            rules = [f"{rule} " + format(statistics.fmean(
                where(row["references"][test][rule]) for row in rows), ".3f")
                for rule in rows[0]["references"][test]]
            metric = f"random_{end}" if test == "random" else f"unlimited_{test}_{end}"
            notes[metric] = ", ".join([f"chance {1 / cfg.classes:.2f}", *rules])
    notes["random_late"] += f", optimum {late(random_dataset_optimum(cfg.length, cfg.classes)):.3f}"
    for test in ("unseen_tasks", "unseen_dataset"):
        if (paper := paper_accuracy(asdict(cfg), test)) is not None:
            notes[f"unlimited_{test}_last"] += f", paper {paper}"
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
    cfg, rows, models = summary["config"], summary["per_seed"], summary["models"]
    panels = [plot_phases] * bool(cfg["sweep"]) + [plot_learning, plot_plateau]
    panels += [plot_memory] * (len(models) > 1)
    figure, axes = plt.subplots(math.ceil(len(panels) / 2), 2, layout="constrained", squeeze=False,
                                figsize=(10.4, 4.2 * math.ceil(len(panels) / 2)))
    for letter, axis, panel in zip("abcd", axes.flat, panels):
        axis.set_title(f"({letter}) {panel(axis, cfg, rows, models)}")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    data = (cfg["features"] or cfg["dataset"]).replace("_", " ")
    figure.suptitle(f"In-context learning, meta-trained on {data}. Thin: each of "
                    f"{len(rows)} seed(s); thick: mean. Late: last third of {cfg['length']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): thin lines and their thick mean."""
    for curve in curves if len(curves) > 1 else []:
        axis.plot(x, curve, color=colour, ls=style, lw=0.7, alpha=0.5)
    axis.plot(x, np.mean(curves, 0), color=colour, ls=style, lw=2.2, label=label)


def plot_phases(axis, cfg, rows, models):
    """Accuracy against the number of tasks, with the three phases shaded -> title."""
    runs = [f"K={k}" for k in cfg["sweep"].split(",")] + ["unlimited"]
    x = [math.log2(int(run[2:])) for run in runs[:-1]]
    x.append(x[-1] + 3)
    series = lambda test, where: np.array(
        [[where(row["curves"]["sweep"][run][test]) for run in runs] for row in rows])   # (seeds, K)
    first, learnt = series("seen_tasks", lambda curve: curve[0]), series("unseen_tasks", late)
    plot_lines(axis, x, first, PINK, "seen tasks, first example", "--")
    plot_lines(axis, x, series("seen_tasks", late), RED, "seen tasks, late")
    plot_lines(axis, x, learnt, BLUE, "unseen tasks, late")
    plot_lines(axis, x, series("unseen_dataset", late), ORANGE, f"unseen data ({cfg['unseen']})")
    # Memorise: right at once. Learn: right on new tasks. Identify: right later, on seen tasks only.
    halfway, named = (learnt.mean(0)[-1] + 1 / cfg["classes"]) / 2, set()
    edges = np.convolve(np.pad(x, 1, "edge"), [0.5, 0.5], "valid")
    for at_once, new, left, right in zip(first.mean(0), learnt.mean(0), edges, edges[1:]):
        name, colour = (("memorise", PINK) if at_once > 0.5 else
                        ("learn", BLUE) if new > halfway else ("identify", GREY))
        axis.axvspan(left, right, color=colour, alpha=0.1, lw=0)
        axis.text(left + 0.1, 1.03, "" if name in named else name, style="italic",
                  fontsize=8)
        named.add(name)
    ticks = [f"$2^{{{power:.0f}}}$" if power % 1 == 0 else f"{2**power:.0f}" for power in x[:-1]]
    axis.set_xticks(x, ticks + ["∞"])
    axis.axhline(1 / cfg["classes"], color=GREY, ls=":", label="chance")
    axis.set(xlabel="number of meta-training tasks", ylabel="accuracy", ylim=(0, 1.09))
    axis.legend(loc="upper right", bbox_to_anchor=(1, 0.94))
    return "From memorising to learning"


def plot_learning(axis, cfg, rows, models):
    """Learning curves of the general learner, beside the hand-written rules -> title."""
    x, styles = np.arange(cfg["length"]), {"1-NN": "--", "kernel ridge": ":", "online SGD": "-."}
    for test, colour, label in (
            ("random", GREEN, "random"),
            ("unseen_tasks", BLUE, f"{cfg['features'] or cfg['dataset']}, new tasks"),
            ("unseen_dataset", ORANGE, f"{cfg['unseen']}, never trained on")):
        curves = [row["curves"]["learner"]["unlimited"][test] for row in rows]
        plot_lines(axis, x, curves, colour, label)
        mean = np.mean(curves, 0)                    # 95 % interval over the test sequences
        spread = 1.96 * np.sqrt(mean * (1 - mean) / cfg["eval_sequences"] / len(rows))
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
        if (paper := paper_accuracy(cfg, test)) is not None:
            axis.plot(x[-1], paper, "*", color=colour, ms=13, mec="k", label="the paper's table")
        for rule in styles if test != "random" else ():
            curve = np.mean([row["references"][test][rule] for row in rows], 0)
            axis.plot(x, curve, styles[rule], color=colour, lw=1)
    for rule, style in styles.items():
        axis.plot([], [], style, color="black", lw=1, label=f"{rule}, in the data's colour")
    optimum = random_dataset_optimum(cfg["length"], cfg["classes"])
    axis.plot(x, optimum, "k", lw=0.8, label="optimum, random")
    axis.axhline(1 / cfg["classes"], color=GREY, ls=":", label="chance")
    axis.set(xlabel="labelled examples seen", ylabel="accuracy", ylim=(0, 1))
    axis.legend(loc="lower right")
    return "The general learner learns in context"


def plot_plateau(axis, cfg, rows, models):
    """Loss on new tasks, without any bias, while meta-training on different mixtures -> title."""
    alone = [("learner", "unlimited", BLUE, f"burst {cfg['burst']:g} (ours), batch {cfg['batch']}")]
    for stage, run, colour, label in alone if "sweep" not in models else (
            ("sweep", "unlimited", BLUE, f"burst {cfg['burst']:g} (ours), batch {cfg['batch']}"),
            ("half batch", "unlimited", SKY, "the same, half the batch"),
            ("epsilon 1e-4", "unlimited", PINK, "the same, Adam epsilon 1e-4"),
            ("sweep", "uniform", RED, "uniform: no intervention"),
            ("sweep", "label bias 0.9", ORANGE, "label bias 0.9 (the paper's idea)")):
        if run in rows[0]["history"].get(stage, {}):
            points = np.array([row["history"][stage][run] for row in rows])    # (seeds, logs, 3)
            plot_lines(axis, points[0, :, 0], points[:, :, 1], colour, label)
    axis.axhline(math.log(cfg["classes"]), color=GREY, ls=":", label="chance, ln C")
    axis.set(xlabel="meta-training step", ylabel="loss on new tasks (nats)")
    axis.legend(loc="lower left")
    return "The plateau" + ", and what shortens it" * cfg["plateau"]


def plot_memory(axis, cfg, rows, models):
    """Accuracy on new tasks against state size (filled) and parameter count (hollow) -> title."""
    for stage, label, colour, height in (
            ("learner", "Transformer", BLUE, 9), ("sweep", "narrow Transformer", SKY, 9),
            ("LSTM", "LSTM", RED, 9), ("outer-product LSTM", "outer-product LSTM", ORANGE, 22),
            ("MLP", "MLP", GREY, 9)):
        if stage in models:
            values = [late(row["curves"][stage]["unlimited"]["unseen_tasks"]) for row in rows]
            state, mean = max(1, models[stage]["state"]), np.mean(values)
            axis.plot([state] * len(values), values, "_", color=colour, ms=14)
            axis.plot(state, mean, "o", color=colour, ms=9)
            axis.plot(models[stage]["parameters"], mean, "o", mfc="none", color=colour, ms=9)
            text = f"{label}, {models[stage]['steps']} steps"
            axis.annotate(text, (state, mean), (0, height), textcoords="offset points",
                          ha="center", fontsize=8)
    axis.plot([], [], "ko", label="numbers carried between examples (MLP: none)")
    axis.plot([], [], "ko", mfc="none", label="parameters")
    axis.axhline(1 / cfg["classes"], color=GREY, ls=":", label="chance")
    axis.set(xscale="log", xlabel="count", ylabel="late accuracy, unseen tasks", ylim=(0, 1))
    axis.legend(loc="upper left")
    return "State size and parameters"


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
