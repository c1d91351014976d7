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
  classes. Learning is then a forward pass: no gradient, no inner loss, no update rule.

ALGORITHM (meta-training, Algorithm 1 of the paper)
  repeat
    for each of B sequences: draw a task k of K, T examples (xbar_j, ybar_j), half of them bursts
    x_j = A_k xbar_j,  y_j = rho_k(ybar_j)       A_k: entries N(0, 1/D); rho_k permutes C classes
    token_j = concat(x_j, onehot(y_{j-1})), zeros at first      a label is seen one step late
    J(theta) = 1/(BT) sum_{b,j} cross_entropy(f_theta(token_1 .. token_j), y_j)
    theta <- Adam(theta, grad J)

SYMBOLS, in the code, shape or meaning
  B, T, C     batch, length, CLASSES   sequences a step, examples a sequence, classes
  D, H        n_in, width              inputs of an example, width of the model
  K           num_tasks                meta-training tasks; 0: unlimited, a new one each sequence
  x, y        x, y                     (B, T, D), (B, T): training sets, one a row
  f_theta     model(x, y)              (B, T, C) logits; at j they see x_{<=j} and y_{<j} only

RESULT (quick: seeds 0-2, mean [95 % t interval], 5.2 minutes a seed on two cores; `paper`: in part)
  Accuracy, last third of 30 examples; chance 0.1. (b) is of 3,000 steps, the others of 1,200.
  (a) 16 tasks are memorised: known 0.993 [0.989, 0.997], new 0.095; 1,024 are learned: new 0.488.
  (b) Unlimited tasks make a general learner: new tasks 0.537 [0.523, 0.551], another data set 0.577
      [0.575, 0.578]; 1-NN 0.619, 0.653; SGD 0.561, 0.543. MNIST (14 x 14, T = 100), last of 100:
      0.558 [0.498, 0.618], Fashion-MNIST 0.558; the paper 0.737, 0.622, `paper` 0.738, 0.617.
  (c) Without bursts the loss on new tasks does not fall below that of chance, ln 10.
  (d) State counts: 2, 4, 8 examples in sight 0.132, 0.231, 0.319; all 0.491, at half width 0.392.

DIFFERS
  1. quick is small: glyphs of matplotlib's fonts instead of MNIST, T = 30 instead of 100.
  2. Bursts (ours, in all presets): half of the training sequences hold five images only. Without,
     or with the paper's label bias alone, a small model stays near chance for minutes.
  3. Each set of images is normalised by itself, less each pixel's mean; (d) is of one architecture.
  4. Ours, as the paper's are not known: pre-norm, positions, zero read-out, Adam's settings, SGD.

RUN
  python gpl_icl.py                                      # glyphs: no files, no network
  python gpl_icl.py --data-dir data --length 100 --image-size 14 --steps 4000 --sweep ""
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help. [paper: x]: it states x."""
    data_dir: str = ""             # folder with mnist/ and fashion_mnist/, IDX files; "": glyphs
    image_size: int = 8            # pixels a side
    length: int = 30               # examples of a sequence, T [paper: 100]
    batch: int = 32                # sequences a step, B
    num_tasks: int = 0             # meta-training tasks, K; 0: unlimited
    burst: float = 0.5             # share of sequences made of five images only [ours]
    label_bias: float = 0.0        # share with one fixed label permutation [paper, section 4.3]
    width: int = 96                # of the model, H
    layers: int = 2                # transformer blocks
    heads: int = 2                 # attention heads
    window: int = 0                # examples that the model can look back on; 0: all
    fast_weights: int = 0          # heads of a fast-weight matrix in the last block; 0: attention
    steps: int = 3000              # meta-training steps of the general learner
    sweep: str = "16,128,1024"     # numbers of tasks of panel (a); "": the general learner alone
    sweep_steps: int = 1200        # meta-training steps of all models but the general learner
    learning_rate: float = 1e-3    # of Adam
    seed: int = 0                  # first seed
    num_seeds: int = 1             # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 100           # steps between tests on new tasks
    save_every: int = 300          # steps between checkpoints

    def __post_init__(self):
        if min(self.image_size, self.length, self.batch, self.width, self.heads, self.steps,
               self.sweep_steps, self.layers - 1, self.window + 1, self.num_tasks + 1) < 1:
            raise ValueError("sizes and steps must be at least 1, --layers at least 2")
        if not 0 <= min(self.burst, self.label_bias) <= max(self.burst, self.label_bias) <= 1:
            raise ValueError("--burst and --label-bias must be between 0 and 1")
        if self.width % self.heads or self.width % (self.fast_weights or 1):
            raise ValueError(f"--heads, and 16 for the sweep, must divide --width {self.width}")
        if not re.fullmatch(r"([1-9]\d{0,8}(,[1-9]\d{0,8})*)?", self.sweep):
            raise ValueError(f"--sweep must be numbers such as 16,128, not {self.sweep!r}")
        if self.sweep and (self.num_tasks or self.label_bias or self.window or self.fast_weights):
            raise ValueError('--num-tasks, --label-bias, --window, --fast-weights need --sweep ""')


PRESETS = {
    "smoke": dict(batch=8, width=32, steps=8, sweep="8", sweep_steps=8, log_every=8, save_every=5),
    "quick": {},
    "paper": dict(data_dir="data", image_size=28, length=100, batch=512, width=256, layers=4,
                  heads=8, steps=50_000, sweep="64,1024,4096,16384,65536", sweep_steps=50_000,
                  learning_rate=3e-4, log_every=500, save_every=2500),
}


def variants(cfg):
    """The models of the figure -> {name: Config}; "unlimited" is the general learner."""
    models = {f"k{k}": dict(num_tasks=int(k)) for k in cfg.sweep.split(",") if k}          # (a)
    models |= {"uniform": dict(burst=0.0), "label_bias": dict(burst=0.0, label_bias=0.9)}  # (c)
    models |= {f"window{examples}": dict(window=examples) for examples in (2, 4, 8)}       # (d)
    models |= {f"fast{heads}": dict(fast_weights=heads) for heads in (1, 16)}
    models["half_width"] = dict(width=cfg.width // 2)
    return {"unlimited": cfg} | {name: replace(cfg, sweep="", steps=cfg.sweep_steps, **own)
                                 for name, own in models.items() if cfg.sweep}


# ---- 2. TASKS ----------------------------------------------------------------------------------

CLASSES = 10
FONTS = ("DejaVu Sans", "DejaVu Sans:bold", "DejaVu Sans Mono", "DejaVu Serif", "DejaVu Serif:bold",
         "STIXGeneral", "STIXGeneral:bold", "cmr10")


def glyphs(characters, size, per_class=500):
    """Characters in matplotlib's own fonts, each bent by a random affine map near the identity
    -> images (N, size, size) in [0, 1], labels (N,); N = len(characters) * per_class."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    across, down = len(characters), len(FONTS)
    with style.context("default"):                           # not the user's own settings
        figure = Figure((across, down), dpi=32)              # 32 x 32 pixels a character
        for f, font in enumerate(FONTS):
            for c, character in enumerate(characters):
                figure.text((c + 0.5) / across, (f + 0.46) / down, character, font=font, size=64,
                            ha="center", va="center")
        pixels = FigureCanvasAgg(figure).print_to_buffer()[0]                  # bytes, RGBA
    page = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    page = page.view(down, 32, across, 32, 4)[..., 0].transpose(1, 2)          # (fonts, C, 32, 32)
    labels = torch.arange(across).repeat(per_class)
    ink = 1 - page[torch.randint(down, labels.shape), labels][:, None] / 255   # (N, 1, 32, 32)
    bend = torch.tensor([[0.08, 0.10, 0.05], [0.10, 0.08, 0.05]])
    affine = torch.eye(2, 3) + bend * (2 * torch.rand(len(labels), 2, 3) - 1)
    grid = F.affine_grid(affine, [len(labels), 1, 2 * size, 2 * size], align_corners=False)
    return F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2)[:, 0], labels


def read_images(folder, split):
    """Official files of MNIST or a relative -> images (N, rows, columns) in [0, 1], labels (N,)."""
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        path = folder / f"{split}-{kind}-ubyte.gz"
        try:                         # bytes 0, 0, type, dimensions; sizes of 32 bits each; data
            raw = bytearray(gzip.decompress(path.read_bytes()))
            sizes = [int.from_bytes(raw[n:n + 4]) for n in range(4, 4 + 4 * raw[3], 4)]
            arrays.append(torch.frombuffer(raw[4 + 4 * raw[3]:], dtype=torch.uint8).view(sizes))
        except Exception as error:                           # a broken file raises almost any
            raise ValueError(f"{path} is missing or broken: {error}") from None
    images, labels = arrays
    if images.dim() != 3 or labels.shape != images.shape[:1] or labels.max() >= CLASSES:
        raise ValueError(f"{folder}: the {split} labels do not fit the images")
    return images.float() / 255, labels.long()


def base_data(cfg, device):
    """-> (train, test, unseen): images (N, D) and labels (N,) each; unseen is another data set."""
    if cfg.data_dir:
        sets = [read_images(pathlib.Path(cfg.data_dir, name), split) for name, split in (
            ("mnist", "train"), ("mnist", "t10k"), ("fashion_mnist", "t10k"))]
    else:
        sets = [glyphs(text, cfg.image_size) for text in 2 * ["0123456789"] + ["ABCDEFGHIJ"]]
    data = []
    for images, labels in sets:
        images = F.interpolate(images[:, None], 2 * [cfg.image_size], mode="area").flatten(1)
        images = images - images.mean(0)                     # (N, D)
        data.append(((images / images.std()).to(device), labels.to(device)))
    return data


def sample(data, shape, num_tasks=0, burst=0.0, label_bias=0.0):
    """data: images (N, D), labels (N,); shape: B, T -> x (B, T, D), y (B, T): training sets, each
    from a task of its own. No image comes twice in a set, but for bursts."""
    (images, labels), (batch, length), device = data, shape, data[0].device
    n, n_in = images.shape
    place = torch.randint(n, (batch, 1), device=device) + torch.arange(length, device=device)
    index = torch.randperm(n, device=device)[place % n]      # (B, T), stretches of one random order
    # Burst (ours): five images make up the sequence. To copy the label of an identical input is
    # the easiest form of in-context learning, and a stepping stone to the general form.
    repeats = index[:, :5].gather(1, torch.randint(min(5, length), shape, device=device))
    index = torch.where(torch.rand(batch, 1, device=device) < burst, repeats, index)
    if num_tasks:                    # a task is a function of its number: nothing is stored
        numbers = torch.randint(num_tasks, (batch,)).tolist()
        own = [torch.Generator(device).manual_seed(k) for k in numbers]
        A = torch.stack([torch.randn(n_in, n_in, generator=g, device=device) for g in own])
        rho = torch.stack([torch.randperm(CLASSES, generator=g, device=device) for g in own])
    else:
        A = torch.randn(batch, n_in, n_in, device=device)
        rho = torch.rand(batch, CLASSES, device=device).argsort(1)
    fixed = torch.rand(batch, 1, device=device) < label_bias
    rho = torch.where(fixed, torch.arange(CLASSES, device=device), rho)
    # A variance of 1/D keeps lengths; with a deviation of 1/D, a common slip, positions drown x
    return images[index] @ A.mT / math.sqrt(n_in), rho.gather(1, labels[index])


def sample_random(shape, n_in, device):
    """The `random` data, whose optimum is known: ten random points with random labels, drawn with
    replacement -> x (B, T, D), y (B, T)."""
    points = (torch.rand(shape[0], 10, n_in, device=device) - 0.5) * math.sqrt(12)
    names = torch.randint(CLASSES, (shape[0], 10), device=device)
    which = torch.randint(10, shape, device=device)
    return points.gather(1, which[..., None].expand(-1, -1, n_in)), names.gather(1, which)


# ---- 3. MODEL ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, H) -> (B, T, H), that reads the last `reach` tokens. With
    fast_weights it reads a matrix instead, W_t = W_{t-1} + v_t k_t^T / d, read_t = W_t q_t, d =
    H / heads: a recurrent network, in parallel form. state: numbers that a token carries on."""

    def __init__(self, width, heads, length, reach, fast_weights):
        super().__init__()
        self.heads, self.fast_weights = heads, fast_weights
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        lag = torch.arange(length)[:, None] - torch.arange(length)
        self.register_buffer("visible", (lag >= 0) & (lag < reach))            # (T, T)
        self.state = width**2 // heads if fast_weights else 2 * width * (min(reach, length) - 1)

    def forward(self, h):
        qkv = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B, heads, T, d)
        if self.fast_weights:
            read = (q @ k.mT * self.visible / q.shape[-1]) @ v                 # W_t q_t, all t
        else:
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible)
        h = h + self.out(read.transpose(1, 2).flatten(2))    # (B, T, H)
        return h + self.down(F.relu(self.up(self.norm2(h))))


class Transformer(nn.Module):
    """f_theta: x (B, T, D), y (B, T) -> logits (B, T, C). The circuit to be learned: a first
    layer joins input j - 1 with its label, which comes one token later; a second compares inputs
    and fetches labels. So, for a window of w examples, the first block reads two tokens and the
    last w (and one more label is in sight, without its input)."""

    def __init__(self, cfg, n_in):
        super().__init__()
        self.embed = nn.Linear(n_in + CLASSES, cfg.width)
        # Positions of the usual deviation, 0.02, would drown in D random inputs.
        self.position = nn.Parameter(0.5 * torch.randn(cfg.length, cfg.width))
        reach = [cfg.length] * cfg.layers
        if cfg.window or cfg.fast_weights:
            reach = [2] + [1] * (cfg.layers - 2) + [cfg.window]
        blocks = [Block(cfg.width, cfg.heads, cfg.length, tokens, False) for tokens in reach]
        if cfg.fast_weights:
            blocks[-1] = Block(cfg.width, cfg.fast_weights, cfg.length, cfg.length, True)
        self.blocks, self.state = nn.Sequential(*blocks), sum(block.state for block in blocks)
        self.norm, self.head = nn.LayerNorm(cfg.width), nn.Linear(cfg.width, CLASSES)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)                        # the loss starts at exactly ln C

    def forward(self, x, y):
        # Token j holds label j - 1, and zeros at the start; never label j itself.
        before = F.pad(F.one_hot(y, CLASSES)[:, :-1], (0, 0, 1, 0))            # (B, T, C)
        h = self.embed(torch.cat([x, before], -1)) + self.position             # (B, T, H)
        return self.head(self.norm(self.blocks(h)))


# ---- 4. LEARNING RULE --------------------------------------------------------------------------


def meta_loss(model, x, y):
    """J in nats -> scalar. There is no inner loss: the tasks decide what is learned."""
    # J = 1/(BT) sum_{b,j} cross_entropy(f_theta(token_1 .. token_j), y_j): every position counts
    return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())


# ---- 5. TRAINING -------------------------------------------------------------------------------


def train(cfg, run, stage, model, data, tests):
    """Meta-train in place -> rows of the log. data: images, labels; tests: {name: (x, y)}."""
    # Gradients on the plateau are tiny; a usual epsilon doubles its length [paper, section 4.3]
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-10, fused=True)
    loss_function = run.compile(lambda x, y: meta_loss(model, x, y))
    for step in run.steps(stage, cfg.steps, model=model, adam=adam):
        # COLLECT
        x, y = sample(data, (cfg.batch, cfg.length), cfg.num_tasks, cfg.burst, cfg.label_bias)
        # META UPDATE
        adam.param_groups[0]["lr"] = cfg.learning_rate * min(1, (step + 1) / 100)
        adam.zero_grad()
        loss_function(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 in (cfg.steps, cfg.sweep_steps):
            scores = {name: evaluate(model, *test) for name, test in tests.items()}
            run.log(loss=scores["unseen_tasks"][0], **{k: late(v) for k, (_, v) in scores.items()})
    return [row for row in run.rows if row["stage"] == stage]


# ---- 6. EVALUATION -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, x, y):
    """x (B, T, D), y (B, T) -> J in nats, accuracy at each position (T,): the learning curve."""
    logits = model(x, y)
    accuracy = (logits.argmax(-1) == y).float().mean(0).tolist()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()).item(), accuracy


def late(accuracy):
    """Mean accuracy over the last third of the positions."""
    return statistics.fmean(accuracy[-max(1, len(accuracy) // 3):])


def written_rules(x, y):
    """x (B, T, D), y (B, T) -> {rule: accuracy (T,)}. 1nn: the label of the nearest input before.
    sgd, the paper's baseline: softmax regression, a step an example, the best of 4 rates here."""
    future = torch.full(2 * x.shape[1:2], torch.inf, device=x.device).triu()   # (T, T)
    nearest = (torch.cdist(x, x) + future).argmin(-1)        # (B, T)
    right = (y.gather(1, nearest) == y).float().mean(0)
    rates = torch.tensor([0.001, 0.003, 0.01, 0.03], device=x.device).view(4, 1, 1, 1)
    weights, accuracy = x.new_zeros(4, len(x), CLASSES, x.shape[2]), []        # (4, B, C, D)
    for x_j, y_j in zip(x.unbind(1), y.unbind(1)):
        p = (weights @ x_j[..., None])[..., 0].softmax(-1)   # (4, B, C)
        accuracy.append((p.argmax(-1) == y_j).float().mean(1).tolist())
        weights += rates * (F.one_hot(y_j, CLASSES) - p)[..., None] * x_j[:, None]
    return {"1nn": [1 / CLASSES] + right.tolist()[1:], "sgd": max(zip(*accuracy), key=late)}


def random_optimum(length, memory=10**9):
    """Best accuracy (T,) on `random` with the last `memory` whole examples at hand: a point that is
    none of n earlier ones, of the probability 0.9^n, can only be guessed."""
    return [1 - 0.9 ** min(j, memory) * (1 - 1 / CLASSES) for j in range(length)]


def experiment(cfg, run):
    """Train and test all models of one seed -> {"headline": {name: number}, ..}."""
    torch.manual_seed(12345)                                 # images, tests alike for all
    train_data, test_data, unseen_data = base_data(cfg, run.device)
    n_in, shape = train_data[0].shape[1], (512, cfg.length)
    tests = {"unseen_tasks": sample(test_data, shape), "unseen_dataset": sample(unseen_data, shape),
             "random": sample_random(shape, n_in, run.device)}
    known = {f"k{k}": {"seen": sample(test_data, shape, int(k))} for k in cfg.sweep.split(",") if k}
    torch.manual_seed(run.seed)
    models, head = {}, {}
    for name, own in variants(cfg).items():
        own_tests = tests | known.get(name, {})
        model = Transformer(own, n_in).to(run.device)
        rows = train(own, run, name, model, train_data, own_tests)
        early = [row for row in rows if row["step"] <= cfg.sweep_steps][-1]    # equal steps
        models[name] = {"rows": rows, "early": early, "state": model.state,
                        "parameters": sum(p.numel() for p in model.parameters()),
                        "curves": {k: evaluate(model, *test)[1] for k, test in own_tests.items()}}
        for test in ("seen", "unseen_tasks") if name in known else ("unseen_tasks", "random"):
            key = test.removesuffix("_tasks") if name in known else test
            head[f"{name}_{key}_late".replace("unlimited", "early")] = early[test]
    general = models["unlimited"]["curves"]
    head["unlimited_first_position"] = general["unseen_tasks"][0]
    head["random_late"] = late(general["random"])
    rules = {test: written_rules(*tests[test]) for test in ("unseen_tasks", "unseen_dataset")}
    for test in rules:
        for learner, curve in {"unlimited": general[test], **rules[test]}.items():
            head |= {f"{learner}_{test}_late": late(curve), f"{learner}_{test}_last": curve[-1]}
    return {"headline": head, "models": models, "rules": rules}


BESIDE = {"unlimited_unseen_tasks_last": "the paper 0.737 (MNIST, T = 100)",
          "unlimited_unseen_dataset_last": "the paper 0.622 (Fashion-MNIST, T = 100)"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

STYLES = {"seen": ("#CC79A7", "known tasks"), "unseen_tasks": ("#0072B2", "new tasks"),
          "unseen_dataset": ("#E69F00", "new data set"), "random": ("#009E73", "random")}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Four panels, or (b) alone without a sweep, from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    cfg, seeds = summary["config"], [seed["models"] for seed in summary["per_seed"]]
    figure = Figure((12, 8.4) if cfg["sweep"] else (6, 4.2), layout="constrained")
    axes = figure.subplot_mosaic("ab;cd" if cfg["sweep"] else "b")
    for test in ("random", "unseen_tasks", "unseen_dataset"):
        colour, label = STYLES[test]
        curves = [seed["unlimited"]["curves"][test] for seed in seeds]
        lines(axes["b"], range(cfg["length"]), curves, colour, label)
        for rule, line in summary["per_seed"][0]["rules"].get(test, {}).items():
            axes["b"].plot(line, "--" if rule == "1nn" else ":", c=colour, label=f"{label}, {rule}")
    axes["b"].plot(random_optimum(cfg["length"]), "k", lw=0.8, label="random, exact optimum")
    axes["b"].set(xlabel=f"labelled examples seen; {cfg['steps']:,} steps", ylabel="accuracy",
                  title="(b) The general learner learns what it never saw")
    if cfg["sweep"]:
        plot_sweep(axes["a"], axes["c"], axes["d"], cfg, seeds)
    for letter, axis in axes.items():
        chance = math.log(CLASSES) if letter == "c" else 1 / CLASSES
        axis.axhline(chance, color="k", ls=":", label="chance")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_sweep(a, c, d, cfg, seeds):
    """Draw the panels on the models of the sweep."""
    ticks, steps = cfg["sweep"].split(",") + ["unlimited"], f"{cfg['sweep_steps']:,} steps"
    late_of = lambda names, test: [[seed[name]["early"][test] for name in names] for seed in seeds]
    finite = [f"k{k}" for k in ticks[:-1]]
    first = [[seed[name]["curves"]["seen"][0] for name in finite] for seed in seeds]
    lines(a, ticks[:-1], first, STYLES["seen"][0], "known tasks, first example", "--")
    for test in ("seen", "unseen_tasks", "unseen_dataset"):
        names, (colour, label) = finite + ["unlimited"] * (test != "seen"), STYLES[test]
        lines(a, ticks[:len(names)], late_of(names, test), colour, f"{label}, late")
    a.set(xlabel=f"K, meta-training tasks; {steps}", ylabel="accuracy",
          title="(a) Few tasks are memorised, many are learned")
    for name, colour, label in (("unlimited", "#0072B2", f"burst {cfg['burst']:g} (ours)"),
                                ("uniform", "#D55E00", "uniform"),
                                ("label_bias", "#E69F00", "label bias 0.9 (the paper's)")):
        losses = [[row["loss"] for row in seed[name]["rows"]] for seed in seeds]
        lines(c, [row["step"] for row in seeds[0][name]["rows"]], losses, colour, label)
    c.set(xlabel="meta-training step", ylabel="loss on new tasks (nats)",
          title="(c) With bursts, learning in context begins")
    names = ["window2", "window4", "window8", "unlimited", "fast16", "fast1", "half_width"]
    state = [seeds[0][name]["state"] for name in names]
    best = [late(random_optimum(cfg["length"], n)) for n in (2, 4, 8, cfg["length"])]
    d.plot(state[:4], best, "k_", ms=24, label="random, exact: 2, 4, 8, all whole examples")
    for test in ("random", "unseen_tasks"):
        lines(d, state, late_of(names, test), *STYLES[test], "o")
    for name, x, y in zip(names, state, late_of(names, "random")[0]):
        d.text(1.1 * x, y, f"{name}\n{seeds[0][name]['parameters']:,}", size=8, va="center")
    d.set(xscale="log", xlim=(state[0] / 2, 3 * state[3]), ylabel="late accuracy",
          xlabel=f"state, numbers carried on; {steps}",
          title="(d) State counts more than parameters")


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
