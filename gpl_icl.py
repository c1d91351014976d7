# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""General-purpose in-context learning: a transformer becomes a learning algorithm, in one file.

Kirsch, Harrison, Sohl-Dickstein, Metz, "General-Purpose In-Context Learning by Meta-Learning Transformers",
arXiv 2212.04458. No official code was released.

IDEA
  Nobody writes the learning algorithm here. A causal sequence model reads a training set as a sequence of
  (input, label) pairs and must predict each label before it is shown. Many tasks are made from one data set: each
  multiplies the pixels by a random matrix of its own and renames the classes. With few tasks the model memorises
  them. With many it cannot, and past a threshold it turns into a learning algorithm, which works on tasks and data
  sets it has never seen. Learning is then a forward pass: no gradient, no inner loss.

ALGORITHM (meta-training, Algorithm 1 of the paper)
  repeat
    for each of B sequences: draw a task k of K, and T examples (xbar_j, ybar_j) of the base data
    x_j = A_k xbar_j,   y_j = rho_k(ybar_j)           A_k has entries N(0, 1/D), rho_k permutes the C classes
    token_j = concat(x_j, onehot(y_{j-1})),  y_0 = 0  a label is seen one step after its input
    J(theta) = 1/(BT) sum_{b,j} cross_entropy(f_theta(token_1 .. token_j), y_j)       every position counts
    theta <- Adam(theta, grad J)
  Meta-test: tasks, images and data sets that were not trained on; accuracy at each position j is a learning curve.

SYMBOLS
  symbol     in the code            shape       meaning
  S          stack                              runs trained at once: seeds x variants, seeds first
  B, T, C    batch, length, classes             sequences a step, examples a sequence, classes
  D          n_in                               inputs of one example (the paper's N_x)
  H          d_model                            width of the model (the paper's N_M)
  K          num_tasks                          number of meta-training tasks; 0: a fresh task for every sequence
  A_k        task_matrix(ids, D)    (B, D, D)   input projection, a function of the task's integer id
  rho_k      task_permutation(...)  (B, C)      new name of each class, a function of the same id
  x, y       x, y                   (B, T, D|-) training sets as the model reads them, one a row
  f_theta    model(x, y)            (B, T, C)   logits; those at j depend on x_{<=j} and y_{<j} only
  N_S        model.state_size(T)                numbers the model can carry from one example to the next

RESULT
@RESULT@

DIFFERS
@DIFFERS@

RUN
  python gpl_icl.py                                   glyphs drawn from fonts: no files, no network
  python gpl_icl.py --dataset mnist --unseen fashion_mnist --data-dir data --download
  torchrun --standalone --nproc_per_node=8 gpl_icl.py --preset paper
"""
import argparse
import contextlib
import copy
import gzip
import hashlib
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
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    dataset: str = "glyph_digits"    # meta-training data: glyph_digits, glyph_letters, mnist, fashion_mnist, kmnist
    unseen: str = "glyph_letters"    # data for meta-testing only: the same names, or FILE.npz
    features: str = ""               # FILE.npz with x (N, D), y (N,): any embedding of yours, instead of --dataset
    data_dir: str = "data"           # folder with NAME/train-images-idx3-ubyte.gz and so on
    download: bool = False           # fetch missing official files into --data-dir
    image_size: int = 8              # images are resized to this many pixels a side
    rgb: bool = False                # repeat grey images over three channels, as for the paper's table
    center: str = "pixel"            # what is subtracted: the mean of each "pixel", or one "global" mean [paper]
    distort: float = 0.4             # strength of the glyphs' distortions; 1 is hard
    classes: int = 10                # classes in a sequence, C
    length: int = 30                 # examples in a sequence, T [paper: 100]
    batch: int = 32                  # sequences a step over all processes, B
    burst: float = 0.5               # share of sequences made of 10 images only [ours, against the plateau]
    label_bias: float = 0.0          # share of sequences with one fixed label permutation [paper, section 4.3]
    projection: str = "gram"         # unlimited tasks: "gram", or "hash" to make the matrices
    d_model: int = 128               # width of the general learner, H
    layers: int = 2                  # transformer blocks
    heads: int = 2                   # attention heads
    steps: int = 2500                # meta-training steps of the general learner
    sweep: str = "16,128,1024"       # numbers of tasks of panel (a), a transformer each; "" leaves them out
    sweep_d_model: int = 64          # width of the transformers of panels (a) and (c), and of the baselines
    sweep_steps: int = 1200          # meta-training steps of each of these
    plateau: bool = True             # train the interventions of panel (c)
    baselines: bool = True           # train the LSTM, the outer-product LSTM and the MLP of panel (d)
    learning_rate: float = 1e-3      # of Adam; much more, and small models stay on the plateau [paper: unknown]
    adam_eps: float = 1e-10          # of Adam: small, because gradients on the plateau are [paper, section 4.3]
    warmup: int = 100                # steps of linear warm-up
    clip: float = 1.0                # bound on the gradient norm of each run
    bf16: bool = False               # bfloat16 autocast of the model (GPU)
    eval_sequences: int = 1024       # meta-test sequences a seed and data set
    measure_speed: bool = True       # time the data path and the paper's shapes at the end (15 s)
    seed: int = 0                    # first seed
    num_seeds: int = 1               # seeds trained side by side: seed, seed + 1, ...
    log_every: int = 50              # steps between evaluations
    save_every: int = 250            # steps between checkpoints

    def __post_init__(self):
        low = dict.fromkeys("steps sweep_steps warmup seed distort burst label_bias".split(), 0) | {"classes": 2}
        for name, value in asdict(self).items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option} must be finite, not {value}")
            if type(value) in (int, float) and (value < low[name] if name in low else value <= 0):
                raise ValueError(f"{option} must be {f'at least {low[name]}' if name in low else 'above 0'}, not {value}")
        for name, choices in {"center": ("pixel", "global"), "projection": ("gram", "hash")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}")
        if max(self.burst, self.label_bias) > 1:
            raise ValueError("--burst and --label-bias are shares: at most 1")
        if self.d_model % self.heads or self.sweep_d_model % self.heads:
            raise ValueError(f"--heads {self.heads} must divide --d-model and --sweep-d-model")
        if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", self.sweep):
            raise ValueError(f"--sweep must be numbers of tasks such as 16,128,1024, not {self.sweep!r}")


PRESETS = {
    "smoke": dict(length=12, batch=8, d_model=32, steps=15, sweep="", plateau=False, baselines=False,
                  eval_sequences=64, measure_speed=False, log_every=5, save_every=5, warmup=5),
    "quick": dict(),
    "paper": dict(dataset="mnist", unseen="fashion_mnist", image_size=28, center="global", length=100, batch=512,
                  burst=0.0, d_model=256, layers=4, heads=8, steps=50_000, sweep="64,256,1024,4096,16384,65536",
                  sweep_d_model=256, sweep_steps=50_000, learning_rate=3e-4, warmup=500, bf16=True,
                  eval_sequences=512, log_every=500, save_every=2500),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------------
# First the base data: official image files, or glyphs drawn from matplotlib's fonts. Then the sampler of tasks.

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
FONTS = [f"DejaVu{family}{style}" for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
         for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")] + [
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"]


class Dataset(NamedTuple):
    """Normalised examples."""
    x: torch.Tensor      # (N, D) floats
    y: torch.Tensor      # (N,) classes 0 .. classes - 1
    classes: int


def load_idx(path):
    """IDX file of bytes, gzipped or not -> uint8 tensor of the shape in its header. Raises ValueError, OSError."""
    raw = pathlib.Path(path).read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): delete it and fetch it again") from None
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is not an IDX file of bytes: it should begin with 00 00 08")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path} holds {len(raw) - start} values, its header says {' x '.join(map(str, shape))}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[start:].view(shape)


def fetch(name, file, path):
    """Download one official file; it gets its name only after its MD5 has been checked."""
    host, *sums = OFFICIAL[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    part, md5 = path.with_suffix(".part"), hashlib.md5()
    with urllib.request.urlopen(host + file, timeout=60) as source, open(part, "wb") as target, tqdm(
            total=int(source.headers.get("Content-Length", 0)), unit="B", unit_scale=True, desc=file) as bar:
        while chunk := source.read(1 << 16):
            target.write(chunk), md5.update(chunk), bar.update(len(chunk))
    if md5.hexdigest() != sums[FILES.index(file)]:
        part.unlink()
        raise ValueError(f"{host}{file} has MD5 {md5.hexdigest()}, expected {sums[FILES.index(file)]}: not kept")
    os.replace(part, path)


def load_images(name, data_dir, download=False):
    """-> [(images (N, h, w) in [0, 1], labels (N,))] for train and t10k, or for t10k alone where train is missing."""
    splits = []
    for files in (FILES[:2], FILES[2:]):
        paths = [pathlib.Path(data_dir) / name / file for file in files]
        if files == FILES[:2] and not download and not any(path.exists() for path in paths):
            continue
        for path, file in zip(paths, files):
            if download and not path.exists():
                fetch(name, file, path)
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: put the official file there, or add --download")
        images, labels = load_idx(paths[0]), load_idx(paths[1])
        if images.dim() != 3 or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(f"{paths[1]}: labels {tuple(labels.shape)} do not fit the images {tuple(images.shape)}")
        splits.append((images.float() / 255, labels.long()))
    return splits


def load_features(path):
    """NPZ file with x (N, ...) and y (N,) -> [(x (N, D), y)], in a fixed random order."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = torch.from_numpy(file["x"]).float().flatten(1), torch.from_numpy(file["y"])
    except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz file with arrays x (N, D) and y (N,): {error}") from None
    if y.shape != x.shape[:1] or y.is_floating_point() or not x.isfinite().all():
        raise ValueError(f"{path}: x {tuple(x.shape)} must be finite and y {tuple(y.shape)} its integer classes")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[order], y[order].long())]


def glyph_rasters(characters):
    """Each character in each font, longer side 24 pixels, centred: (C, fonts, 32, 32) in [0, 1]."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    rasters = torch.zeros(len(characters), len(FONTS), 32, 32)
    for f, name in enumerate(FONTS):
        font = FT2Font(str(pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"))
        font.set_size(26, 72)
        for c, character in enumerate(characters):
            font.set_text(character)
            font.draw_glyphs_to_bitmap(antialiased=True)
            ink = torch.from_numpy(np.array(font.get_image(), dtype=np.float32) / 255)
            rows, columns = ink.amax(1).nonzero().flatten(), ink.amax(0).nonzero().flatten()
            ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            h, w = (max(1, round(side * 24 / max(ink.shape))) for side in ink.shape)
            rasters[c, f, (32 - h) // 2:(32 + h) // 2, (32 - w) // 2:(32 + w) // 2] = F.interpolate(
                ink[None, None], (h, w), mode="bilinear", antialias=True)[0, 0]
    return rasters


def glyphs(characters, per_class, image_size, distort, generator):
    """Characters in random fonts, randomly turned, scaled, sheared and shifted, all in one batch.

    -> images (N, image_size, image_size) in [0, 1], labels (N,), N = len(characters) * per_class, on the generator's
    device. distort: 0 leaves the fonts alone, 1 is hard.
    """
    device, n = generator.device, len(characters) * per_class
    labels = torch.arange(len(characters), device=device).repeat(per_class)
    fonts = torch.randint(len(FONTS), (n,), generator=generator, device=device)
    uniform = distort * (torch.rand(6, n, generator=generator, device=device) * 2 - 1)
    turn, shear, (scale_x, scale_y), shift = 0.26 * uniform[0], 0.2 * uniform[1], (0.2 * uniform[2:4]).exp(), 0.12 * uniform[4:]
    cos, sin = turn.cos(), turn.sin()
    affine = torch.stack([torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift[0]], 1),
                          torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, shift[1]], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(affine, (n, 1, 2 * image_size, 2 * image_size), align_corners=False)
    rasters = glyph_rasters(characters).to(device)[labels, fonts]                    # (N, 32, 32)
    return F.avg_pool2d(F.grid_sample(rasters[:, None], grid, align_corners=False), 2)[:, 0], labels


def load_dataset(name, cfg, device, held_out=False):
    """-> (train, test): two `Dataset`s on `device`, both normalised by the statistics of train.

    Data without a train split is cut: its last fifth is the test split. With `held_out` (data for meta-testing only)
    all of it is, and gives its own statistics; the paper, too, normalises each data set by itself.
    """
    if name in GLYPHS:
        generator = torch.Generator(device).manual_seed(list(GLYPHS).index(name))
        splits = [glyphs(GLYPHS[name], 500, cfg.image_size, cfg.distort, generator) for _ in ("train", "test")]
    elif name in OFFICIAL:
        splits = load_images(name, cfg.data_dir, cfg.download)
    elif name.endswith(".npz"):
        splits = load_features(name)
    else:
        raise ValueError(f"unknown data set {name!r}: {', '.join([*GLYPHS, *OFFICIAL])} or FILE.npz")
    if len(splits) == 1:
        (x, y), cut = splits[0], len(splits[0][0]) * 4 // 5
        splits = [(x, y), (x, y)] if held_out else [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    prepared = []
    for x, y in splits:
        if set(range(cfg.classes)) - set(y.tolist()) or y.min() < 0:
            raise ValueError(f"{name} has the classes {sorted(set(y.tolist()))}: --classes {cfg.classes} needs 0 .. {cfg.classes - 1}")
        x, y = x[y < cfg.classes].to(device), y[y < cfg.classes].to(device)
        if len(x) < cfg.length:
            raise ValueError(f"{name} has a split of {len(x)} examples, a sequence needs --length {cfg.length}")
        if x.dim() == 3:
            x = F.interpolate(x[:, None], (cfg.image_size,) * 2, mode="bilinear", antialias=True)
            x = x.expand(-1, 3 if cfg.rgb else 1, -1, -1).flatten(1)                 # (N, D)
        prepared.append((x, y))
    reference = prepared[0][0]
    mean = reference.mean(0) if cfg.center == "pixel" else reference.mean()
    std = (reference - mean).std()
    if not std > 1e-6:
        raise ValueError(f"{name} is constant: nothing tells its examples apart")
    return [Dataset((x - mean) / std, y, cfg.classes) for x, y in prepared]


WORD = 0xFFFFFFFF


def mix(x):
    """Scramble 32-bit words held in int64: xor-shift-multiply with the constants known as lowbias32."""
    x = ((x >> 16) ^ x) * 0x7FEB352D & WORD
    x = ((x >> 15) ^ x) * 0x846CA68B & WORD
    return (x >> 16) ^ x


def task_bits(ids, count, start=0):
    """Task ids (...) -> their random 32-bit words number start .. start + count - 1, int64 (..., count)."""
    key1 = mix(ids & WORD ^ mix(ids >> 32 & WORD))
    key2 = mix(key1 + 0x9E3779B9 & WORD)
    counter = torch.arange(start, start + count, device=ids.device)
    # Two keyed rounds. After one, every task would be a window of the same stream, shifted by its key.
    return mix(mix(counter + key1[..., None] & WORD) ^ key2[..., None])


def normal_from_bits(bits):
    """32-bit words -> standard normals. 23 bits and a half are exact in float32; with 24 some become infinite."""
    return math.sqrt(2) * torch.erfinv(((bits >> 9).float() + 0.5) / 2**22 - 1)


def task_matrix(ids, n_in):
    """Task ids (...) -> A (..., n_in, n_in), entries N(0, 1/n_in): the variance, not the deviation. Same id, same A."""
    return (normal_from_bits(task_bits(ids, n_in * n_in)) / math.sqrt(n_in)).unflatten(-1, (n_in, n_in))


def task_permutation(ids, classes):
    """Task ids (...) -> rho (..., classes): class c is called rho[c] in this task. Same id, same rho."""
    return task_bits(ids, classes, start=1 << 31).sort(dim=-1, stable=True).indices


def gram_projection(x, noise=None):
    """x (..., T, D) -> x A^T with a fresh task matrix A for every sequence, without making one.

    The D outputs are independent, each Gaussian over the T inputs with covariance G = x x^T / D. So L noise with
    L L^T = G has exactly the law of x A^T, from T D random numbers instead of D^2 and with T^2 D multiply-adds
    instead of T D^2. noise (..., T, D): standard normal.
    """
    gram = x @ x.mT / x.shape[-1]
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-4)           # repeated images make G singular
    factor = torch.linalg.cholesky_ex(gram)[0]           # _ex: without an error check, which would stop the GPU
    return factor @ (torch.randn_like(x) if noise is None else noise)


class Variant(NamedTuple):
    """One run of a stack: where its training sequences come from."""
    name: str
    num_tasks: int = 0         # K; 0: a fresh task for every sequence
    burst: float = 0.0         # share of sequences made of ten images
    label_bias: float = 0.0    # share of sequences with one fixed label permutation


def draw(kind, generators, *shape):
    """One draw a seed, each from its own generator: a seed alone equals its slice of a joint run."""
    return torch.stack([kind(shape, generator=g, device=g.device) for g in generators])


def sample_batch(data, variants, seeds, generators, batch, length, bank=None, distinct=False, projection="gram"):
    """Sequences for a whole stack -> x (S, B, T, D), y (S, B, T), S = seeds x variants, seeds first.

    data        `Dataset` to draw from;  variants: list of `Variant`, those with finite num_tasks first
    seeds       integers, one generator each. Seed s has tasks of its own, ids s 2^32 + 0 .. K - 1; its variants
                all see the same images and noise, so that they can be compared in pairs
    bank        (seeds, K', D, D): matrices made before, for the variants with K <= K'
    distinct    no image twice in a sequence, for a fair test; training draws with replacement, like the paper
    """
    n, g = len(data.x), torch.arange(len(seeds), device=data.x.device)
    share = lambda name: torch.tensor([getattr(variant, name) for variant in variants], device=g.device)[:, None]
    uniform = lambda *shape: draw(torch.rand, generators, 1, batch, *shape)          # (G, 1, B, ...)
    index = uniform(n).topk(length).indices if distinct else (uniform(length) * n).long()
    # Burst (ours): ten images make up a sequence. Copying the label of an identical earlier input is the easiest
    # form of in-context learning, and a stepping stone to the general form.
    ten = (uniform(10) * n).long().gather(-1, (uniform(length) * 10).long())
    index = torch.where((uniform() < share("burst"))[..., None], ten, index)         # (G, V, B, T)
    x, y = data.x[index], data.y[index]
    noise = draw(torch.randn, generators, 1, batch, *x.shape[-2:])
    rho = uniform(data.classes).argsort(-1).expand(-1, len(variants), -1, -1)        # (G, V, B, C)
    number = draw(lambda shape, **more: torch.randint(1 << 40, shape, **more), generators, batch)    # (G, B)
    xs, rhos = [], []
    for v, variant in enumerate(variants):           # a loop, since at paper size one variant's matrices take 1.3 GB
        if not variant.num_tasks and projection == "gram":
            xs.append(gram_projection(x[:, v:], noise))                              # this and all that follow
            rhos.append(rho[:, v:])
            break
        number_of_task = number % variant.num_tasks if variant.num_tasks else number + (1 << 62)
        ids = number_of_task + (torch.tensor(seeds, device=g.device) << 32)[:, None]
        known = bank is not None and 0 < variant.num_tasks <= bank.shape[1]
        matrices = bank[g[:, None], number_of_task] if known else task_matrix(ids, x.shape[-1])
        xs.append((x[:, v] @ matrices.mT)[:, None])
        rhos.append(task_permutation(ids, data.classes)[:, None])
    fixed = (uniform() < share("label_bias"))[..., None]
    rho = torch.where(fixed, torch.arange(data.classes, device=g.device), torch.cat(rhos, 1))
    return torch.cat(xs, 1).flatten(0, 1), rho.gather(-1, y).flatten(0, 1)


def random_batch(generators, batch, length, n_in, classes):
    """The paper's `random` data: ten points U(0, 1)^D with independent uniform labels, drawn with replacement.

    -> x (seeds, B, T, D), y (seeds, B, T), normalised and projected; identical inputs stay identical.
    """
    points = (draw(torch.rand, generators, batch, 10, n_in) - 0.5) * math.sqrt(12)
    points = gram_projection(points, draw(torch.randn, generators, batch, 10, n_in))
    labels = (draw(torch.rand, generators, batch, 10) * classes).long()
    which = (draw(torch.rand, generators, batch, length) * 10).long()
    return points.gather(2, which[..., None].expand(-1, -1, -1, n_in)), labels.gather(2, which)


# ---- 3. MODEL ----------------------------------------------------------------------------------------
# Four predictors f(x, y) -> logits. They differ in how much they can carry from one example to the next.


def tokens(x, y, classes):
    """x (B, T, D), y (B, T) -> (B, T, D + C): input j beside the one-hot label j - 1. Never label j itself."""
    onehot = (y[..., None] == torch.arange(classes, device=y.device)).to(x.dtype)
    return torch.cat([x, F.pad(onehot, (0, 0, 1, 0))[..., :-1, :]], -1)


def zero_head(width, classes):
    """Linear read-out that starts at zero, so that the loss starts at exactly ln C."""
    head = nn.Linear(width, classes)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return head


def causal_attention(q, k, v):
    """q, k, v (..., T, d) -> (..., T, d): position t reads positions up to t."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On CPU the fused kernel is no faster at these lengths, and it cannot run under vmap.
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

    def forward(self, h):                                                            # (B, T, H)
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(causal_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.relu(self.up(self.norm2(h))))


class Transformer(nn.Module):
    """Causal transformer over tokens. model(x (B, T, D), y (B, T)) -> logits (B, T, C); T <= length."""

    def __init__(self, n_in, classes, length, d_model, layers, heads):
        super().__init__()
        self.classes = classes
        self.embed = nn.Linear(n_in + classes, d_model)
        # Label j - 1 arrives one step after input j - 1, so the circuit needs "the token before me": positions
        # must not drown in the D random inputs. The usual deviation of 0.02 does.
        self.position = nn.Parameter(0.5 * torch.randn(length, d_model))
        self.blocks = nn.Sequential(*[Block(d_model, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d_model), zero_head(d_model, classes)

    def forward(self, x, y):
        h = self.embed(tokens(x, y, self.classes)) + self.position[:x.shape[1]]      # (B, T, H)
        return self.head(self.norm(self.blocks(h)))

    def state_size(self, length):
        """Numbers in the key-value cache after `length` examples."""
        return 2 * len(self.blocks) * self.position.shape[1] * length


class LSTM(nn.Module):
    """LSTM with nn.LSTM's equations and initial scale; a loop, since nn.LSTM cannot run under vmap.

    model(x (B, T, D), y (B, T)) -> logits (B, T, C).
    """

    def __init__(self, n_in, classes, hidden):
        super().__init__()
        self.classes = classes
        self.input, self.recurrent = nn.Linear(n_in + classes, 4 * hidden), nn.Linear(hidden, 4 * hidden)
        for layer in (self.input, self.recurrent):
            nn.init.uniform_(layer.weight, -hidden**-0.5, hidden**-0.5)
            nn.init.uniform_(layer.bias, -hidden**-0.5, hidden**-0.5)
        self.head = zero_head(hidden, classes)

    def forward(self, x, y):
        drive, outputs = self.input(tokens(x, y, self.classes)), []                  # (B, T, 4 hidden)
        h = c = drive.new_zeros(x.shape[0], self.recurrent.in_features)
        for now in drive.unbind(1):
            i, f, g, o = (now + self.recurrent(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return self.head(torch.stack(outputs, 1))

    def state_size(self, length):
        return 2 * self.recurrent.in_features


class OuterProductLSTM(nn.Module):
    """LSTM whose cell is a matrix a head, written by outer products and read by a product with a query.

    model(x (B, T, D), y (B, T)) -> logits (B, T, C). State heads * size^2: as large as its parameters.
    """

    def __init__(self, n_in, classes, heads, size):
        super().__init__()
        self.classes, self.heads, self.size = classes, heads, size
        self.input = nn.Linear(n_in + classes, heads * 8 * size)
        self.recurrent = nn.Linear(heads * size, heads * 8 * size, bias=False)
        self.head = zero_head(heads * size, classes)

    def cell(self, gates, c):
        """gates (..., 8, size), c (..., size, size) -> new c, output (..., size)."""
        a, b, query, out = gates[..., :3, :], gates[..., 3:6, :], gates[..., 6, :], gates[..., 7, :]
        i, f, g = (a[..., :, None] * b[..., None, :]).unbind(-3)                     # outer products
        c = (f + 1).sigmoid() * c + i.sigmoid() * g
        return c, out.sigmoid() * (c @ query[..., None])[..., 0].tanh()

    def forward(self, x, y):
        drive, outputs = self.input(tokens(x, y, self.classes)), []
        h = drive.new_zeros(x.shape[0], self.heads * self.size)
        c = drive.new_zeros(x.shape[0], self.heads, self.size, self.size)
        for now in drive.unbind(1):
            c, h = self.cell((now + self.recurrent(h)).unflatten(-1, (self.heads, 8, self.size)), c)
            h = h.flatten(1)                                                         # (B, heads * size)
            outputs.append(h)
        return self.head(torch.stack(outputs, 1))

    def state_size(self, length):
        return self.heads * self.size**2


class MLP(nn.Module):
    """The memory-less classifier: sees x, never a label. It can memorise K tasks and nothing else.

    model(x (B, T, D), y (B, T)) -> logits (B, T, C); y is ignored.
    """

    def __init__(self, n_in, classes, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                    zero_head(hidden, classes))

    def forward(self, x, y):
        return self.layers(x)

    def state_size(self, length):
        return 0


# ---- 4. LEARNING RULE --------------------------------------------------------------------------------
# Meta-training is plain gradient descent on the paper's objective J: there is no inner loss. What is learned is
# in how the task distribution is made (section 2). All runs of a stack take each step together.


def stacked(model):
    """-> f(params, x, y): the model with a leading stack axis S on its parameters, x, y and logits."""
    one = lambda params, x, y: functional_call(model, params, (x, y))

    def forward(params, x, y):
        if len(x) == 1:                      # a stack of one: plain layers are a fifth faster than batched ones
            return one({name: p[0] for name, p in params.items()}, x[0], y[0])[None]
        return vmap(one)(params, x, y)
    return forward


def initial_stack(build, seeds, variants, device):
    """-> {name: (S, ...)}: each seed draws its own weights; all variants of a seed start from the same."""
    models = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models += [dict(build().named_parameters())] * variants
    return {name: torch.stack([model[name].detach() for model in models]).to(device).requires_grad_()
            for name in models[0]}


def sequence_loss(logits, y):
    """J of every run: logits (S, B, T, C), y (S, B, T) -> (S,) nats, the mean over sequences and all positions."""
    loss = F.cross_entropy(logits.float().flatten(0, 2), y.flatten(), reduction="none")
    return loss.view(y.shape[0], -1).mean(1)


def clip_gradients(params, bound):
    """Scale each run's gradient, over all its parameters, to a norm of at most `bound`."""
    grads = [p.grad for p in params.values()]
    norm = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]).norm(dim=0)   # (S,)
    scale = (bound / (norm + 1e-12)).clamp(max=1)
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))


# ---- 5. TRAINING -------------------------------------------------------------------------------------


def meta_step(loss_function, params, adam, x, y, clip, run):
    """theta <- Adam(theta, grad J), every run of the stack on its own batch -> losses (S,)."""
    losses = loss_function(params, x, y)
    adam.zero_grad()
    losses.sum().backward()
    run.average([p.grad for p in params.values()])
    clip_gradients(params, clip)
    adam.step()
    return losses.detach()


def task_bank(variants, seeds, n_in, device, limit=1 << 28):
    """Matrices of all tasks of the finite variants, (seeds, K, D, D), as far as `limit` numbers hold them."""
    sizes = [v.num_tasks for v in variants if len(seeds) * v.num_tasks * n_in**2 <= limit]
    if not any(sizes):
        return None
    ids = torch.arange(max(sizes), device=device) + (torch.tensor(seeds, device=device) << 32)[:, None]
    parts = ids.flatten().split(max(1, (1 << 24) // n_in**2))       # bounds the memory of the integer words
    return torch.cat([task_matrix(part, n_in) for part in parts]).view(*ids.shape, n_in, n_in)


def learner(cfg, run, build, seeds, variants, adam_eps=0.0):
    """-> (f, params, adam, loss function): a stack of untrained models and what one step on it needs."""
    forward, params = stacked(build().to(run.device)), initial_stack(build, seeds, variants, run.device)
    adam = torch.optim.Adam(params.values(), lr=cfg.learning_rate, betas=(0.9, 0.98), eps=adam_eps or cfg.adam_eps,
                            fused=run.device.type in ("cuda", "cpu"))

    def loss_function(params, x, y):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=cfg.bf16):
            logits = forward(params, x, y)
        return sequence_loss(logits, y)
    return forward, params, adam, run.compile(loss_function)


def train(cfg, run, stage, build, variants, data, probe, steps, batch=0, adam_eps=0.0):
    """Meta-train one stack: every variant for every seed.

    build() -> model;  variants: list of `Variant`, finite K first;  data: `Dataset` to train on
    probe: (x (seeds, E, T, D), y) of new tasks, evaluated every `log_every` steps without any bias
    -> (f, params): the stacked forward function and the trained parameters, {name: (S, ...)}
    """
    seeds, v = run.seeds, len(variants)
    forward, params, adam, loss_function = learner(cfg, run, build, seeds, v, adam_eps)
    generators = [torch.Generator(run.device).manual_seed(seed) for seed in seeds]
    bank = task_bank(variants, seeds, data.x.shape[1], run.device)
    running = torch.zeros(len(seeds) * v, device=run.device)         # training losses since the last log
    state = {"params": params, "adam": adam, "generators": generators, "running": running}
    for step in run.steps(stage, steps, state):
        # COLLECT
        x, y = sample_batch(data, variants, seeds, generators, batch or cfg.batch, cfg.length, bank,
                            projection=cfg.projection)                               # (S, B, T, D), (S, B, T)
        # META UPDATE
        adam.param_groups[0]["lr"] = cfg.learning_rate * min(1, (step + 1) / max(1, cfg.warmup))
        losses = meta_step(loss_function, params, adam, run.share(x), run.share(y), cfg.clip, run)
        running += losses
        run.watch(losses)
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            with run.clock("evaluation"):
                loss, accuracy = evaluate(forward, params, *probe)                   # (S, T)
                run.average([running])
                training = (running / (step % cfg.log_every + 1)).tolist()
                running.zero_()
            run.log([{"seed": seeds[i // v], "run": variants[i % v].name, "training_loss": training[i],
                      "loss": loss[i].mean().item(), "late": late(accuracy[i])} for i in range(len(losses))])
    return forward, params


# ---- 6. EVALUATION -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(forward, params, x, y):
    """x (seeds or S, E, T, D), y (seeds or S, E, T) -> loss (S, T) and accuracy (S, T) by position, on the CPU."""
    variants = len(next(iter(params.values()))) // len(x)
    losses, right = [], []
    for xs, ys in zip(x.split(128, 1), y.split(128, 1)):
        xs, ys = xs.repeat_interleave(variants, 0), ys.repeat_interleave(variants, 0)
        logits = forward(params, xs, ys).float()                                     # (S, E', T, C)
        losses.append(F.cross_entropy(logits.movedim(-1, 1), ys, reduction="none"))
        right.append(logits.argmax(-1) == ys)
    return torch.cat(losses, 1).mean(1).cpu(), torch.cat(right, 1).float().mean(1).cpu()


def late(accuracy):
    """Accuracy by position (T,) -> its mean over the last third of the positions (20-29 of 30)."""
    return float(np.mean(np.asarray(accuracy)[-max(1, len(accuracy) // 3):]))


def nearest_neighbour(x, y):
    """x (B, T, D), y (B, T) -> predictions (B, T): the label of the nearest earlier input; class 0 at first."""
    distance = torch.cdist(x, x)
    distance = distance.masked_fill(torch.ones_like(distance[0], dtype=torch.bool).triu(), torch.inf)
    prediction = y.gather(1, distance.argmin(-1))
    prediction[:, 0] = 0
    return prediction


def kernel_ridge(x, y, width=0.5, ridge=0.3):
    """x (B, T, D), y (B, T) -> predictions (B, T) by Gaussian kernel ridge regression on the earlier examples.

    Kernel exp(-|x - x'|^2 / (2 width D)). One Cholesky factor answers for all T training sets: with K + ridge I
    = L L^T, the leading block of L factorises the leading block of K, so the prediction at position j is
    L[j, :j] (L^-1 onehot(y))[:j].
    """
    kernel = (-torch.cdist(x.double(), x.double()).square() / (2 * width * x.shape[-1])).exp()
    factor = torch.linalg.cholesky(kernel + ridge * torch.eye(x.shape[1], dtype=torch.float64, device=x.device))
    solved = torch.linalg.solve_triangular(factor, F.one_hot(y).double(), upper=False)
    return (factor.tril(-1) @ solved).argmax(-1)


def online_sgd(x, y, lr=0.01):
    """x (B, T, D), y (B, T) -> predictions (B, T) of softmax regression from zero, one pass, one example a step."""
    onehot = F.one_hot(y).to(x.dtype)
    weight = x.new_zeros(x.shape[0], x.shape[2] + 1, onehot.shape[-1])               # (B, D + 1, C), last row bias
    x = F.pad(x, (0, 1), value=1.0)
    predictions = []
    for t in range(x.shape[1]):
        logits = (x[:, t, None] @ weight)[:, 0]                                      # (B, C)
        predictions.append(logits.argmax(-1))
        weight -= lr * x[:, t, :, None] * (logits.softmax(-1) - onehot[:, t])[:, None]
    return torch.stack(predictions, 1)


def random_dataset_optimum(length):
    """Best accuracy by position (T,) on `random`: the point was shown with probability 1 - 0.9^j, else a guess."""
    return 1 - 0.9 ** torch.arange(1, length + 1, dtype=torch.float64)


def reference_curves(tests, validation):
    """Accuracy by position of the hand-written rules: {test set: {rule: (seeds, T)}}.

    Their settings are those with the best mean accuracy on `validation`, training images under new tasks; both
    arguments hold x (seeds, B, T, D), y (seeds, B, T).
    """
    x, y = (t[0, :256] for t in validation)
    score = lambda prediction: (prediction == y).float().mean().item()
    rate = max((0.001, 0.003, 0.01, 0.03, 0.1), key=lambda lr: score(online_sgd(x, y, lr)))
    kernel = max(((w, r) for w in (0.25, 0.5, 1.0) for r in (0.03, 0.3)), key=lambda k: score(kernel_ridge(x, y, *k)))
    rules = {"1-NN": nearest_neighbour, "kernel ridge": lambda x, y: kernel_ridge(x, y, *kernel),
             "online SGD": lambda x, y: online_sgd(x, y, rate)}
    return {name: {rule: torch.stack([(predict(xs, ys) == ys).float().mean(0) for xs, ys in zip(x, y)])
                   for rule, predict in rules.items()} for name, (x, y) in tests.items()}


def measure_speed(cfg, data, run, repeats=7):
    """Rates and ratios for the learner of this configuration and for the paper's shapes.

    Each repeat times all the works in turn, so that a ratio compares the same moments of a noisy machine.
    """
    device, rates, size = run.device, {}, 32 if run.device.type == "cpu" else 512
    noise = Dataset(torch.randn(2000, 784, device=device), torch.zeros(2000, dtype=torch.long, device=device), 10)
    for name, source, batch, length, d_model, layers, heads in (
            ("this_run", data, cfg.batch, cfg.length, cfg.d_model, cfg.layers, cfg.heads),
            ("paper_shapes", noise, size, 100, 256, 4, 8)):
        n_in, square = source.x.shape[1], torch.randn(2048, 2048, device=device)
        forward, params, adam, loss_function = learner(
            cfg, run, lambda: Transformer(n_in, source.classes, length, d_model, layers, heads), [0], 1)
        generators = [torch.Generator(device).manual_seed(0)]
        sample = lambda: sample_batch(source, [Variant("", 0, cfg.burst)], [0], generators, batch, length)
        x, y = sample()
        works = {"step": lambda: meta_step(loss_function, params, adam, x, y, cfg.clip, run), "data": sample,
                 "product": lambda: square @ square, "gram": lambda: gram_projection(x[0]),
                 "matrices": lambda: x[0] @ (torch.randn(batch, n_in, n_in, device=device) / n_in**0.5).mT}
        times = {work: [] for work in works}
        for _ in range(repeats + 2):
            for work, function in works.items():
                synchronise(device)
                start = time.perf_counter()
                function()
                synchronise(device)
                times[work].append(time.perf_counter() - start)
        took = {work: statistics.median(spent[2:]) for work, spent in times.items()}
        weights = sum(p.numel() for p in params.values()) - length * d_model
        flops = batch * length * (6 * weights + 6 * layers * length * d_model) / took["step"]    # causal attention
        rates[name] = {"sequences_per_second": batch / (took["step"] + took["data"]),
                       "model_sequences_per_second": batch / took["step"],
                       "data_share_of_step": took["data"] / (took["step"] + took["data"]),
                       "model_flops_per_second": flops, "product_flops_per_second": 2 * 2048**3 / took["product"],
                       "model_share_of_product_rate": flops * took["product"] / (2 * 2048**3),
                       "gram_speedup_over_matrices": took["matrices"] / took["gram"]}
    return rates


def plan(cfg, flops_per_second):
    """What a run of this configuration does and how long it should take, given the machine's matrix product rate."""
    small = len(cfg.sweep.split(",")) * bool(cfg.sweep) + 5 * cfg.plateau + 5 * cfg.baselines
    n_in = cfg.image_size**2 * (3 if cfg.rgb else 1) + cfg.classes
    flops = cfg.num_seeds * cfg.batch * cfg.length * sum(
        6 * steps * (n_in * width + 12 * cfg.layers * width**2)
        for steps, width in [(cfg.steps, cfg.d_model)] + small * [(cfg.sweep_steps, cfg.sweep_d_model)])
    return (f"meta-trains {cfg.num_seeds} x (a general learner and {small} smaller runs) on {cfg.features or cfg.dataset}: "
            f"about {0.1 + flops / flops_per_second / 0.35 / 60:.1f} min here")


def experiment(cfg, run):
    """Meta-train every model of the figure, test it, and run the hand-written rules on the same test sequences.

    -> {"per_seed": a dictionary a seed with its "headline" numbers, "beside": notes for the closing table, "models"}
    """
    name = cfg.features or cfg.dataset
    data, (_, unseen) = load_dataset(name, cfg, run.device), load_dataset(cfg.unseen, cfg, run.device, held_out=True)
    n_in, width, steps = data[0].x.shape[1], cfg.sweep_d_model, cfg.sweep_steps
    if unseen.x.shape[1] != n_in:
        raise ValueError(f"{cfg.unseen} has {unseen.x.shape[1]} inputs, {name} has {n_in}: --unseen needs the same")
    streams = lambda first: [torch.Generator(run.device).manual_seed(first + seed) for seed in run.seeds]
    fresh = lambda source, generators: sample_batch(source, [Variant("test")], run.seeds, generators,
                                                    cfg.eval_sequences, cfg.length, distinct=True)
    with run.clock("evaluation"):
        generators = streams(1 << 40)
        tests = {"unseen_tasks": fresh(data[1], generators), "unseen_dataset": fresh(unseen, generators),
                 "random": random_batch(generators, cfg.eval_sequences, cfg.length, n_in, cfg.classes)}
        references = reference_curves(tests, fresh(data[0], generators))
    probe, results = [t[:, :256] for t in tests["unseen_tasks"]], {}

    def meta_train(stage, build, variants, steps, **changes):
        """Train a stack and test it; "seen_tasks" are each run's own tasks, on training images."""
        forward, params = train(cfg, run, stage, build, variants, data[0], probe, steps, **changes)
        with run.clock("evaluation"):
            seen = sample_batch(data[0], [v._replace(burst=0.0, label_bias=0.0) for v in variants], run.seeds,
                                streams(1 << 41), cfg.eval_sequences, cfg.length, distinct=True)
            curves = {test: evaluate(forward, params, *batch)[1].unflatten(0, (len(run.seeds), -1))
                      for test, batch in {**tests, "seen_tasks": seen}.items()}      # (seeds, variants, T) each
        results[stage] = {"runs": [v.name for v in variants], "curves": curves,
                          "size": {"state": build().state_size(cfg.length),
                                   "parameters": sum(p[0].numel() for p in params.values())}}

    transformer = lambda width: lambda: Transformer(n_in, cfg.classes, cfg.length, width, cfg.layers, cfg.heads)
    unlimited = Variant("unlimited", 0, cfg.burst, cfg.label_bias)
    finite = [unlimited._replace(name=f"K={k}", num_tasks=int(k)) for k in cfg.sweep.split(",") if k]
    levers = [Variant("uniform"), Variant("label bias 0.9", label_bias=0.9)] * cfg.plateau
    meta_train("learner", transformer(cfg.d_model), [unlimited], cfg.steps)
    if finite or levers:
        meta_train("sweep", transformer(width), [*finite, unlimited, *levers], steps)
    if cfg.plateau:
        meta_train("half batch", transformer(width), [unlimited], steps, batch=(cfg.batch + 1) // 2)
        meta_train("epsilon 1e-4", transformer(width), [unlimited], steps, adam_eps=1e-4)
    if cfg.baselines:
        meta_train("LSTM", lambda: LSTM(n_in, cfg.classes, width), [unlimited], steps)
        meta_train("outer-product LSTM", lambda: OuterProductLSTM(n_in, cfg.classes, 4, width // 4), [unlimited], steps)
        meta_train("MLP", lambda: MLP(n_in, cfg.classes, 4 * width), [*finite[:1], unlimited], steps)
    if cfg.measure_speed:
        with run.clock("evaluation"):
            run.rates.update(measure_speed(cfg, data[0], run))
    per_seed = [seed_summary(run, i, results, references) for i in range(len(run.seeds))]
    return {"per_seed": per_seed, "beside": beside(cfg, per_seed),
            "models": {stage: result["size"] for stage, result in results.items()}}


def seed_summary(run, i, results, references):
    """All numbers of seed number i: headline, learning curves, references, history of training."""
    rounded = lambda curve: [round(value, 4) for value in curve.tolist()]
    curves = {stage: {name: {test: rounded(curve[i, v]) for test, curve in result["curves"].items()}
                      for v, name in enumerate(result["runs"])} for stage, result in results.items()}
    history = {stage: {name: [] for name in result["runs"]} for stage, result in results.items()}
    for row in run.rows:
        if row["seed"] == run.seeds[i]:
            history[row["stage"]][row["run"]].append([row["step"], round(row["loss"], 4), round(row["late"], 4)])
    learnt = curves["learner"]["unlimited"]
    headline = {}
    for test in ("unseen_tasks", "unseen_dataset"):
        headline |= {f"unlimited_{test}_late": late(learnt[test]), f"unlimited_{test}_last": learnt[test][-1]}
    headline["unlimited_first_position"] = (learnt["unseen_tasks"][0] + learnt["unseen_dataset"][0]) / 2
    headline["random_late"] = late(learnt["random"])
    for name, tested in curves.get("sweep", {}).items():
        if name.startswith("K="):
            headline |= {f"k{name[2:]}_{which}_late": late(tested[f"{which}_tasks"]) for which in ("seen", "unseen")}
    if "half batch" in curves:       # the plateau: where the uniform run stands when the burst run passes 0.35
        burst, uniform = history["sweep"]["unlimited"], history["sweep"]["uniform"]
        n = next((n for n, (_, _, accuracy) in enumerate(burst) if accuracy > 0.35), len(burst) - 1)
        headline |= {"plateau_left_at_step": burst[n][0], "uniform_late": uniform[n][2]}
    for stage, key in (("sweep", "small_transformer_late"), ("LSTM", "lstm_late"),
                       ("outer-product LSTM", "outer_product_lstm_late"), ("MLP", "mlp_unseen_late")):
        if stage in curves:
            headline[key] = late(curves[stage]["unlimited"]["unseen_tasks"])
    return {"seed": run.seeds[i], "headline": headline, "curves": curves, "history": history, "references": {
        test: {rule: rounded(curve[i]) for rule, curve in rules.items()} for test, rules in references.items()}}


def beside(cfg, per_seed):
    """{headline metric: what stands beside it in the closing table}: chance, hand-written rules, optimum, paper."""
    notes, paper = {}, {"unseen_tasks": 0.737}           # its table: after 99 examples, meta-trained on MNIST
    paper |= {"unseen_dataset": {"fashion_mnist": 0.622, "kmnist": 0.534}[cfg.unseen]} if cfg.unseen in OFFICIAL \
        and cfg.unseen != "mnist" else {}
    for test, key in (("unseen_tasks", "unlimited_unseen_tasks"), ("unseen_dataset", "unlimited_unseen_dataset"),
                      ("random", "random")):
        for when, where in (("late", late), ("last", lambda curve: curve[-1])):
            notes[f"{key}_{when}"] = f"chance {1 / cfg.classes:.2f}" + "".join(
                f", {rule} {statistics.fmean(where(row['references'][test][rule]) for row in per_seed):.3f}"
                for rule in per_seed[0]["references"][test])
        if cfg.dataset == "mnist" and cfg.length == 100 and not cfg.features and test in paper:
            notes[f"{key}_last"] += f", paper {paper[test]}"
    notes["random_late"] += f", optimum {late(random_dataset_optimum(cfg.length)):.3f}"
    return notes


# ---- 7. FIGURE ---------------------------------------------------------------------------------------


def plot(summary, path):
    """Draw the four panels from a summary alone: a thin line for each seed, a thick one for their mean."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    blue, orange, green, red, grey, pink, sky = \
        "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777", "#CC79A7", "#56B4E9"
    cfg, rows = summary["config"], summary["per_seed"]
    names = {"unseen_tasks": f"new tasks, {cfg['dataset']}", "unseen_dataset": cfg["unseen"], "random": "random"}
    names = {key: name.replace("_", " ") for key, name in names.items()}
    chance = 1 / cfg["classes"]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")

    def lines(axis, x, curves, colour, label=None, style="-", width=2.2):
        for curve in curves if len(curves) > 1 else []:
            axis.plot(x, curve, color=colour, ls=style, lw=0.7, alpha=0.5)
        axis.plot(x, np.mean(curves, 0), color=colour, ls=style, lw=width, label=label)

    sweep = [name for name in rows[0]["curves"].get("sweep", {}) if name[0] == "K" or name == "unlimited"]
    if sweep:
        x = [math.log2(int(name[2:])) for name in sweep[:-1]]
        x.append((x[-1] if x else 0) + 3)
        at = lambda run, test, where: [where(torch.tensor(row["curves"]["sweep"][run][test])) for row in rows]
        series = lambda test, where: np.array([at(run, test, where) for run in sweep]).T          # (seeds, K)
        first, learnt = series("seen_tasks", lambda t: t[0].item()), series("unseen_tasks", late)
        lines(a, x, first, pink, "seen tasks, first example", "--")
        lines(a, x, series("seen_tasks", late), red, "seen tasks, late")
        lines(a, x, learnt, blue, "unseen tasks, late")
        lines(a, x, series("unseen_dataset", late), orange, f"unseen data ({names['unseen_dataset']}), late")
        kind = ["memorise" if f > (1 + chance) / 2 else "learn" if u > (learnt.mean(0)[-1] + chance) / 2 else "identify"
                for f, u in zip(first.mean(0), learnt.mean(0))]
        for i, name in enumerate(kind):
            left, right = (x[i] + x[max(i - 1, 0)]) / 2, (x[i] + x[min(i + 1, len(x) - 1)]) / 2
            a.axvspan(left, right, color={"memorise": pink, "identify": grey, "learn": blue}[name], alpha=0.1, lw=0)
            if name not in kind[:i]:
                a.text(left + 0.1, 1.03, name, color="black", style="italic")
        a.set_xticks(x, [f"$2^{{{round(p)}}}$" if p == round(p) else f"{2**p:.0f}" for p in x[:-1]] + ["∞"])
    a.axhline(chance, color=grey, ls=":", label="chance")
    a.set(xlabel="number of meta-training tasks", ylabel="accuracy", ylim=(0, 1.09), title="(a) From memorising to learning")
    a.legend(loc="center left", fontsize=8)

    positions = np.arange(cfg["length"])
    for test, colour in (("random", green), ("unseen_tasks", blue), ("unseen_dataset", orange)):
        lines(b, positions, [row["curves"]["learner"]["unlimited"][test] for row in rows], colour, names[test])
        for rule, style in (("nearest_neighbour", "--"), ("kernel_ridge", ":"), ("online_sgd", "-.")):
            if test != "random":
                b.plot(positions, np.mean([row["references"][test][rule] for row in rows], 0), style, color=colour, lw=1)
    b.plot(positions, random_dataset_optimum(cfg["length"]), "k--", lw=1, label="optimum on random")
    for style, label in (("--", "1-NN"), (":", "kernel ridge"), ("-.", "online SGD")):
        b.plot([], [], style, color="black", lw=1, label=label + " (same colours)")
    b.axhline(chance, color=grey, ls=":")
    b.set(xlabel="labelled examples seen", ylabel="accuracy", ylim=(0, 1), title="(b) The general learner learns in context")
    b.legend(fontsize=8)

    shown = [("sweep", "unlimited", blue, f"burst {cfg['burst']:g} (ours), batch {cfg['batch']}"), ("half batch", "unlimited", sky, "half the batch"),
             ("double batch", "unlimited", green, "twice the batch"),
             ("epsilon 1e-4", "unlimited", pink, "Adam epsilon 1e-4"),
             ("sweep", "uniform", red, "uniform: no intervention"),
             ("sweep", "label bias 0.9", orange, "label bias 0.9 (the paper's)")]
    for stage, run, colour, label in shown:
        if run in rows[0]["history"].get(stage, {}):
            curves = [[point[1] for point in row["history"][stage][run]] for row in rows]
            lines(c, [point[0] for point in rows[0]["history"][stage][run]], curves, colour, label)
    c.axhline(math.log(cfg["classes"]), color=grey, ls=":", label="chance, ln C")
    c.set(xlabel="meta-training step", ylabel="loss on new tasks, unbiased (nats)", title="(c) The plateau and what shortens it")
    c.legend(fontsize=8)

    for (stage, model), colour in zip(summary["models"].items(), (blue, blue, sky, green, pink)):
        pass
    picks = [("learner", "Transformer", blue), ("sweep", "Transformer", sky), ("LSTM", "LSTM", red),
             ("outer-product LSTM", "outer-product LSTM", orange), ("MLP", "MLP", grey)]
    for stage, label, colour in picks:
        if stage in summary["models"]:
            model = summary["models"][stage]
            values = [late(torch.tensor(row["curves"][stage]["unlimited"]["unseen_tasks"])) for row in rows]
            size, mean = max(model["state"], 1), np.mean(values)
            d.plot([size] * len(values), values, "o", color=colour, ms=4, alpha=0.5)
            d.plot(size, mean, "o", color=colour, ms=9)
            d.plot(model["parameters"], mean, "o", mfc="none", color=colour, ms=9)
            d.annotate(label, (size, mean), textcoords="offset points", xytext=(0, 9), ha="center", fontsize=8)
    d.plot([], [], "ko", label="state: numbers carried between examples (MLP: 0)")
    d.plot([], [], "ko", mfc="none", label="parameters")
    d.axhline(chance, color=grey, ls=":")
    d.set(xscale="log", xlabel="count", ylabel="late accuracy, unseen tasks", ylim=(0, None), title="(d) State size, not parameters")
    d.legend(fontsize=8)
    figure.suptitle(f"General-purpose in-context learning, meta-trained on {cfg['dataset'].replace('_', ' ')}. Late = last third of {cfg['length']} positions; "
                    f"{len(rows)} seed(s), thin lines; mean thick.", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- 8. RUN ------------------------------------------------------------------------------------------
# Command line, run folder, exact resume, signals, devices, processes: the same text in all six scripts. It knows
# no paper, and of the script only Config, PRESETS, plan(cfg, flops), experiment(cfg, run) and plot(summary, path).

SCRIPT = os.path.basename(__file__)


def die(message, status=2):
    """End the program with one line on standard error."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def write(path, text):
    """Write a whole file or nothing: no reader sees half of one."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def pack(thing):
    """State of a module, optimiser, generator, tensor or container -> tensors and plain containers."""
    if isinstance(thing, dict):
        return {key: pack(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [pack(value) for value in thing]
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    return thing.state_dict() if hasattr(thing, "state_dict") else thing


def unpack(thing, saved):
    """Put what `pack` returned back into `thing`, in place; values that cannot be changed are returned."""
    if isinstance(thing, dict):
        thing.update({key: unpack(thing.get(key), value) for key, value in saved.items()})
    elif isinstance(thing, list):
        thing[:] = [unpack(old, new) for old, new in zip(thing, saved)] if len(thing) == len(saved) else saved
    elif isinstance(thing, torch.Generator):
        thing.set_state(saved)
    elif hasattr(thing, "load_state_dict"):
        thing.load_state_dict(saved)
    elif isinstance(thing, torch.Tensor):
        thing.detach().copy_(saved)
    else:
        return saved
    return thing


def interval(values):
    """Mean of n seeds with a 95 % Student-t interval (None for one seed)."""
    n, mean = len(values), statistics.fmean(values)
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
    half = (t[n - 2] if n <= 16 else 1.96 + 2.5 / (n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else None
    return {"mean": mean, "ci95": half if half is None else [mean - half, mean + half], "n": n, "per_seed": values}


def synchronise(device):
    """Wait until the device has done its work, so that a clock read now means something."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_rate(device, size=2048):
    """FLOP/s of a float32 matrix product on this machine now (best of four): the yardstick for all rates."""
    a, best = torch.randn(size, size, device=device), math.inf
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Run:
    """What `experiment` needs of the machine: device, processes, folder, log, checkpoints, signals, clocks."""

    def __init__(self, cfg, args):
        self.cfg, self.seeds = cfg, list(range(cfg.seed, cfg.seed + cfg.num_seeds))
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.rows, self.rates, self.losses, self.stages = [], {}, [], {}
        self.seconds = {"total": 0.0, "training": 0.0, "evaluation": 0.0}
        self.signal, self.stepping, self.opened = 0, False, False
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(name for name in there if there[name]) if args.device == "auto" else args.device
        if not there[kind]:
            die(f"--device {kind}: this machine has none")
        self.device = torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")                               # TF32
        compiled = kind == "cuda" if args.compile is None else args.compile
        self.compile = torch.compile if compiled else lambda function: function
        self.folder = run_folder(cfg, args)
        self.look(args.resume)
        if self.world > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)
        self.started = time.perf_counter() - self.seconds["total"]
        self.setting = {"hardware": hardware(self.device), "threads": torch.get_num_threads(), "processes": self.world,
                        "compiled": compiled, "versions": {"python": platform.python_version(),
                                                           "torch": torch.__version__, "numpy": np.__version__}}

    def look(self, resume):
        """Refuse a folder that holds another run; with --resume, read its checkpoint."""
        known, checkpoint = self.folder / "config.json", self.folder / "checkpoint.pt"
        if known.exists() and not resume:
            die(f"{self.folder} holds a run: add --resume to go on with it, or --out FOLDER for another place")
        try:
            configs = {path: json.loads(path.read_text()) for path in (known,) if path.exists()}
            if resume and checkpoint.exists():
                saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
                configs[checkpoint] = saved["config"]
                self.stages, self.rows, self.seconds = saved["stages"], saved["rows"], saved["seconds"]
        except Exception as error:                                                   # torch.load raises many kinds
            die(f"{self.folder} is damaged ({type(error).__name__} in config.json or checkpoint.pt): delete it")
        for path, config in configs.items():
            for name, value in asdict(self.cfg).items():
                if config.get(name) != value:
                    die(f"{path} is of another run: --{name.replace('_', '-')} was {config.get(name)!r}, not {value!r}")

    def interrupt(self, number, frame):
        """Ctrl-C and SIGTERM: finish the step, save, leave. Between stages, or the second time: leave."""
        if self.signal or not self.stepping:
            raise SystemExit(128 + number)
        self.signal = number

    def steps(self, stage, total, state):
        """Yield the numbers of the steps still to do of one stage of training.

        `state` is everything that the stage changes: a dictionary of modules, optimisers, generators, tensors and
        containers of these. It is restored before the first step and saved every `save_every` steps and at the
        end, so that a run killed at any moment goes on exactly as if it had not been.
        """
        if not self.opened and self.rank == 0:      # not before: bad input leaves nothing behind
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / "config.json", json.dumps(asdict(self.cfg), indent=1))
            write(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.stage, self.step, self.stepping, self.opened = stage, 0, True, True
        if stage in self.stages:
            self.step = self.stages[stage]["step"]
            unpack(state, self.stages[stage]["state"])
        self.bar = tqdm(total=total, initial=self.step, desc=stage, disable=self.rank > 0 or not sys.stderr.isatty())
        warm, timed, clock = self.step + 10, 0.0, lambda: time.perf_counter() - self.seconds["evaluation"]
        while self.step < total:
            start = clock()
            yield self.step
            spent = clock() - start
            self.seconds["training"] += spent
            timed += spent if self.step >= warm else 0.0
            self.step += 1
            self.bar.update()
            self.end_of_step(state, total)
        self.stepping = False
        self.bar.close()
        if timed:
            self.rates.setdefault("steps_per_second", {})[stage] = (total - warm) / timed

    def end_of_step(self, state, total):
        """Look at the losses, save, and obey a signal (several processes: together, when they save)."""
        saving, stop = self.step % self.cfg.save_every == 0 or self.step == total, self.signal
        if self.world > 1:
            stop = torch.tensor(stop if saving else 0, device=self.device)
            if saving:
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            stop = int(stop)
        if saving or stop or self.device.type == "cpu":
            self.check()
        if saving or stop:
            self.stages[self.stage] = {"step": self.step, "state": pack(state)}
            if self.step == total:                  # a later stage may change the same tensors
                self.stages[self.stage] = copy.deepcopy(self.stages[self.stage])
            self.save()
        if stop:
            die(f"stopped by signal {stop} after step {self.step} of {self.stage}: --resume goes on", 128 + stop)

    def save(self):
        """Write the checkpoint beside the old one, then take its place: there always is a whole one."""
        self.seconds["total"] = time.perf_counter() - self.started
        path, part = self.folder / "checkpoint.pt", self.folder / "checkpoint.part"
        if self.rank == 0:
            try:
                torch.save({"config": asdict(self.cfg), "stages": self.stages, "rows": self.rows,
                            "seconds": self.seconds}, part)
            except RuntimeError as error:                                            # torch's word for a full disk
                raise OSError(f"cannot write {part}: {str(error).splitlines()[0]}") from None
            os.replace(part, path)

    def watch(self, losses):
        """Note the losses of a step, seeds on the leading axis; looked at in bulk, since a look stops a GPU."""
        self.losses.append(losses.detach().flatten())

    def check(self):
        """Stop at the first loss that is not a number; the checkpoint before it stays."""
        finite = torch.stack(self.losses or [torch.zeros(1)]).isfinite()             # (steps, S)
        if not finite.all():
            n, i = (~finite).nonzero()[0].tolist()
            die(f"the loss is {self.losses[n][i].item()} at step {self.step - len(finite) + n + 1} of {self.stage}, "
                f"seed {self.seeds[i * len(self.seeds) // finite.shape[1]]}", 1)
        self.losses.clear()

    def log(self, rows):
        """Append flat dictionaries, one a run, to metrics.jsonl; show the mean of each of their fractions."""
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
        """Average over the processes, in place. By hand: DDP's hooks miss autograd.grad and functional_call."""
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            for t, part in zip(tensors, (flat / self.world).split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def finish(self, result):
        """Write the summary: the result, with intervals over seeds and all that one needs to trust and repeat it."""
        total, headlines = time.perf_counter() - self.started, [row["headline"] for row in result["per_seed"]]
        summary = {"headline": {name: interval([h[name] for h in headlines]) for name in headlines[0]},
                   "seeds": self.seeds, "minutes": total / 60, "seconds": {**self.seconds, "total": total},
                   "peak_memory_gb": peak_memory(self.device), "rates": self.rates, **self.setting,
                   "command": shlex.join(["python", SCRIPT, *sys.argv[1:]]), "config": asdict(self.cfg), **result}
        if self.rank == 0:
            write(self.folder / "summary.json", json.dumps(summary))
        if self.world > 1:
            dist.destroy_process_group()


def run_folder(cfg, args):
    last = f"-{cfg.seed + cfg.num_seeds - 1}" if cfg.num_seeds > 1 else ""
    return pathlib.Path(args.out or f"runs/{SCRIPT[:-3]}/{args.preset}-seed{cfg.seed}{last}")


def hardware(device):
    """Name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = pathlib.Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{os.cpu_count()} cores, {name[1] if name else platform.processor()}, {device.type}"


def peak_memory(device):
    """Largest memory so far, in GB (2^30 bytes): the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)
    except ImportError:                                                              # Windows
        return None


def show(folder):
    """Draw the figure and print the closing table, from the summary alone."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        die(f"nothing to draw: {error}")
    plot(summary, folder / "figure.png")
    for name, row in summary["headline"].items():
        spread = " [{:.4g}, {:.4g}]".format(*row["ci95"]) if row["ci95"] else ""
        print(f"{name:<36} {row['mean']:.4g}{spread} (n={row['n']})  {summary['beside'].get(name, '')}")
    print(f"{summary['minutes']:.1f} minutes; {folder / 'figure.png'}", flush=True)


def parse(argv=None):
    """Command line -> (Config, other options): a preset first, explicit options on top."""
    notes = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(prog=SCRIPT, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error, add = die, parser.add_argument
    add("--preset", help="set of defaults", choices=PRESETS, default="quick")
    add("--device", help="where to run", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--compile", help="torch.compile the hot functions (default: on CUDA)", action=argparse.BooleanOptionalAction)
    add("--out", help="run folder (default: runs/NAME/PRESET-seedN)")
    add("--resume", help="go on with the run in the folder", action="store_true")
    add("--replot", help="only draw the folder's summary.json again", action="store_true")
    for field in fields(Config):
        values = " | ".join(f"{name} {preset.get(field.name, field.default)}" for name, preset in PRESETS.items())
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        add("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
            help=f"{notes.get(field.name, '')} [{values}]".replace("%", "%%"))
    options = vars(parser.parse_args(argv))
    own = {field.name: options.pop(field.name) for field in fields(Config) if field.name in options}
    args = argparse.Namespace(**options)
    try:
        return Config(**{**PRESETS[args.preset], **own}), args
    except ValueError as error:
        die(error)


def main(argv=None):
    cfg, args = parse(argv)
    if args.replot or args.resume and (run_folder(cfg, args) / "summary.json").exists():
        return show(run_folder(cfg, args))
    run = Run(cfg, args)
    if run.rank == 0:
        print(f"{SCRIPT} {plan(cfg, matmul_rate(run.device))}")
        print(", ".join(f"{name} {value}" for name, value in run.setting.items()))
        print(f"into {run.folder}" + " (resumed)" * bool(run.stages), flush=True)
    try:
        run.finish(experiment(cfg, run))
    except (OSError, ValueError) as error:          # before the first step a ValueError is the user's, then ours
        if run.opened and isinstance(error, ValueError):
            raise
        die(error, 1 if run.opened else 2)
    if run.rank == 0:
        show(run.folder)


if __name__ == "__main__":
    main()
