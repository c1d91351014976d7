"""gpl_icl.py: the mathematics against slow oracles, two short runs, and its own bad input."""
import gzip
import math
import struct
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

import gpl_icl as G

CPU = torch.device("cpu")
SMALL = G.Config(length=12, width=32, batch=16, sweep="")


class Alone:
    """A `Run` that keeps its rows, and no files."""
    device = CPU

    def __init__(self):
        self.rows = []

    def compile(self, function):
        return function

    def steps(self, stage, total, **state):
        self.stage = stage
        yield from range(total)

    def log(self, **numbers):
        self.rows.append({"stage": self.stage, **numbers})


def woken(cfg, n_in=20, seed=0):
    """A transformer whose read-out is not zero, so that its inputs show in its logits; in float64."""
    torch.manual_seed(seed)
    model = G.Transformer(cfg, n_in).double()
    torch.nn.init.normal_(model.head.weight)
    return model


def some_sets(cfg, n_in=20, batch=3):
    torch.manual_seed(1)
    return torch.randn(batch, cfg.length, n_in, dtype=torch.float64), torch.randint(10, (batch, cfg.length))


KINDS = {"attention": {}, "window": dict(window=4), "fast weights": dict(fast_weights=2)}


# ---- model ----

def test_starts_at_exactly_chance():
    x, y = some_sets(SMALL)
    assert G.meta_loss(G.Transformer(SMALL, 20), x.float(), y).item() == pytest.approx(math.log(10), abs=1e-6)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_causal_and_leak_free_to_the_bit(changes):
    model, (x, y), t = woken(replace(SMALL, **changes)), some_sets(SMALL), 5
    other_x, other_y = x.clone(), y.clone()
    other_x[:, t] += 1
    other_y[:, t] = (y[:, t] + 3) % 10
    logits = model(x, y)
    assert torch.equal(logits[:, :t], model(other_x, y)[:, :t])               # no later input
    assert torch.equal(logits[:, :t + 1], model(x, other_y)[:, :t + 1])       # no label of its own or later
    assert not torch.equal(logits[:, t + 1], model(x, other_y)[:, t + 1])     # but the one before


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window_reaches_so_many_examples(window, layers):
    """The last prediction depends on the inputs of the last `window` examples and on no earlier one."""
    cfg = replace(SMALL, window=window, layers=layers)
    x, y = some_sets(cfg)
    x.requires_grad_()
    woken(cfg)(x, y)[:, -1].sum().backward()
    reached = x.grad.abs().amax((0, 2)) > 0
    assert reached.tolist() == [j >= cfg.length - 1 - window for j in range(cfg.length)]


def test_fast_weights_equal_their_recurrence():
    torch.manual_seed(0)
    block, h = G.Block(32, 4, 12, 12, True).double(), torch.randn(3, 12, 32, dtype=torch.float64)
    matrix, read = torch.zeros(3, 4, 8, 8, dtype=torch.float64), []
    for now in h.unbind(1):
        q, k, v = block.qkv(block.norm1(now)).view(3, 3, 4, 8).unbind(1)      # (B, heads, d) each
        matrix = matrix + v[..., :, None] * k[..., None, :] / 8
        read.append((matrix @ q[..., None])[..., 0].flatten(1))
    expected = h + block.out(torch.stack(read, 1))
    expected = expected + block.down(F.relu(block.up(block.norm2(expected))))
    torch.testing.assert_close(block(h), expected)
    assert block.state == matrix[0].numel()


def test_parameters_and_state():
    count = lambda cfg, n_in: sum(p.numel() for p in G.Transformer(cfg, n_in).parameters())
    paper = G.Config(**G.PRESETS["paper"])
    assert count(paper, 784) - 100 * 256 == 3_365_642                         # computed by hand in the brief
    assert G.Transformer(paper, 4).state == 4 * 2 * 256 * 99
    assert G.Transformer(replace(SMALL, window=4), 4).state == 2 * 32 * 4     # 2 H w
    assert G.Transformer(replace(SMALL, window=99), 4).state == 2 * 32 * 1 + 2 * 32 * 11
    assert G.Transformer(replace(SMALL, fast_weights=2), 4).state == 2 * 32 + 32 * 32 // 2


# ---- tasks ----

def identity_data(n=64):
    """Base data whose images are the unit vectors: a set shows the columns of its task's matrix."""
    return torch.eye(n), torch.arange(n) % 10


@pytest.mark.parametrize("num_tasks", [0, 10**6])
def test_projection_keeps_lengths(num_tasks):
    torch.manual_seed(0)
    x, _ = G.sample(identity_data(), (400, 30), num_tasks)
    assert x.square().sum(-1).mean() == pytest.approx(1, abs=0.01)            # the variance is 1/D, not the deviation
    assert (x[:, 0] * x[:, 1]).sum(-1).var() * 64 == pytest.approx(1, abs=0.2)
    assert x.mean().abs() < 1e-3


def test_a_task_is_a_function_of_its_number():
    """Sets drawn from three tasks show three matrices and three permutations, the same in each call."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        x, y = G.sample(identity_data(10), (40, 10), num_tasks=3)
        order = x[..., 0].argsort(1)                         # the ten images, in an order that only A decides
        found.append({(tuple(column.tolist()), tuple(labels.tolist()))
                      for column, labels in zip(x[..., 0].gather(1, order), y.gather(1, order))})
    assert found[0] == found[1] and len(found[0]) == 3
    assert all(sorted(labels) == list(range(10)) for _, labels in found[0])


def test_mixtures():
    torch.manual_seed(0)
    data = torch.randn(500, 8), torch.arange(500) % 10
    different = lambda x: [len(row.round(decimals=4).unique(dim=0)) for row in x]
    assert different(G.sample(data, (32, 40))[0]) == [40] * 32                # no image twice
    assert set(different(G.sample(data, (32, 200), burst=1.0)[0])) == {5}
    share = sum(n == 5 for n in different(G.sample(data, (400, 60), burst=0.5)[0]))
    assert 140 < share < 260                                                  # 200 +- 6 deviations
    ordered = torch.eye(10), torch.arange(10)
    x, y = G.sample(ordered, (300, 10), label_bias=1.0)
    assert torch.equal(y.sort(1).values, torch.arange(10).expand(300, 10))
    biased, free = ((G.sample((torch.ones(10, 1), torch.full((10,), 3)), (400, 1), label_bias=bias)[1] == 3).sum()
                    for bias in (0.5, 0.0))
    assert 160 < biased < 280 and free < 80                                   # a half and a tenth of the rest; a tenth


def test_the_optimum_of_random_is_that_of_a_perfect_memory():
    """Looking up the same point among the last n examples, else guessing, over 20,000 sequences."""
    torch.manual_seed(0)
    x, y = G.sample_random((20_000, 12), 8, CPU)
    same = (torch.cdist(x, x) < 1e-3).tril(-1)
    for memory in (2, 5, 12):
        seen = same.triu(-memory)
        right = torch.where(seen.any(-1), (y[:, None] == y[..., None]).logical_and(seen).any(-1).float(), 0.1)
        for j, best in enumerate(G.random_optimum(12, memory)):
            assert right[:, j].mean() == pytest.approx(best, abs=4 * 0.5 / math.sqrt(20_000))


def test_written_rules_equal_plain_loops():
    torch.manual_seed(0)
    cfg, data = SMALL, (torch.randn(200, 6), torch.randint(10, (200,)))
    x, y = G.sample(data, (40, 12))
    rules, right = G.written_rules(x, y), [0.0] * 12
    for inputs, labels in zip(x, y):
        for j in range(1, 12):
            guess = KNeighborsClassifier(1).fit(inputs[:j], labels[:j]).predict(inputs[j:j + 1])
            right[j] += (guess[0] == labels[j].item()) / 40
    assert rules["1nn"] == pytest.approx([0.1] + right[1:], abs=1e-6)

    curves = []
    for rate in (0.001, 0.003, 0.01, 0.03):
        right = torch.zeros(12)
        for inputs, labels in zip(x.double(), y):
            weights = torch.zeros(10, 6, dtype=torch.float64, requires_grad=True)
            for j in range(12):
                logits = weights @ inputs[j]
                right[j] += (logits.argmax() == labels[j]) / 40
                slope, = torch.autograd.grad(F.cross_entropy(logits[None], labels[j:j + 1]), weights)
                weights = (weights - rate * slope).detach().requires_grad_()
        curves.append(right.tolist())
    assert rules["sgd"] == pytest.approx(max(curves, key=G.late), abs=0.03)   # one guess in 40 may tie


# ---- data ----

def write_idx(path, array):
    header = struct.pack(f">4B{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
    path.write_bytes(gzip.compress(header + array.to(torch.uint8).numpy().tobytes()))


def write_images(folder, split, n=20, labels=None):
    folder.mkdir(exist_ok=True)
    images = torch.arange(n * 28 * 28).view(n, 28, 28) % 251
    write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
    write_idx(folder / f"{split}-labels-idx1-ubyte.gz", torch.arange(n) % 10 if labels is None else labels)
    return images


def test_official_files_are_read_as_they_are(tmp_path):
    images = write_images(tmp_path / "mnist", "train")
    read, labels = G.read_images(tmp_path / "mnist", "train")
    torch.testing.assert_close(read, images / 255)
    assert labels.tolist() == [n % 10 for n in range(20)]


def test_broken_files_are_named(tmp_path):
    folder = tmp_path / "mnist"
    write_images(folder, "train", labels=torch.arange(19) % 10)
    with pytest.raises(ValueError, match="mnist.*labels do not fit"):
        G.read_images(folder, "train")
    write_images(folder, "train", labels=torch.full((20,), 10))
    with pytest.raises(ValueError, match="mnist.*labels do not fit"):
        G.read_images(folder, "train")
    for content in (b"", b"no gzip", gzip.compress(b""), gzip.compress(b"\0\0\x08\x03" + b"\0" * 9)):
        write_images(folder, "train")
        (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz"):
            G.read_images(folder, "train")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    write_idx(folder / "train-images-idx3-ubyte.gz", torch.zeros(20, 28, 28))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz"):
        G.read_images(folder, "train")


def test_glyphs_are_drawn_and_normalised():
    images, labels = G.glyphs("0123456789", 8)
    assert images.shape == (5000, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert 0.1 < images.mean() < 0.4 and torch.bincount(labels).tolist() == [500] * 10
    for images, labels in G.base_data(G.Config(image_size=5), CPU):
        assert images.shape == (5000, 25) and images.mean(0).abs().max() < 1e-5
        assert images.std() == pytest.approx(1, abs=1e-4)


def test_bad_input_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(*options):
        with pytest.raises(SystemExit) as stop:
            G.main(["--preset", "smoke", *options])
        assert "\n" not in stop.value.code and not list(tmp_path.glob("runs/*/*"))
        return stop.value.code
    assert "nowhere" in refused("--data-dir", "nowhere")
    assert "--heads" in refused("--heads", "5")
    assert "--sweep" in refused("--sweep", "16,many")
    assert "--layers" in refused("--layers", "1")
    assert "at least 1" in refused("--length", "0")
    assert "--burst" in refused("--burst", "7")
    assert "--sweep" in refused("--num-tasks", "5")                           # else each model would have five
    assert "--heads" in refused("--width", "36", "--heads", "2")              # 16 heads in a variant


# ---- short runs ----

def trained(seed, steps, **changes):
    """A small transformer after so many steps, and its late accuracy on the tests."""
    cfg = replace(G.Config(length=10, width=32, sweep="", log_every=10**6), steps=steps, sweep_steps=steps, **changes)
    torch.manual_seed(12345)
    train_data, test_data, _ = G.base_data(cfg, CPU)
    tests = {"unseen_tasks": G.sample(test_data, (512, 10)), "seen": G.sample(test_data, (512, 10), 4),
             "random": G.sample_random((512, 10), 64, CPU)}
    torch.manual_seed(seed)
    model, run = G.Transformer(cfg, 64), Alone()
    G.train(cfg, run, "stage", model, train_data, tests)
    return model, tests, run.rows[-1]


def test_four_tasks_are_memorised():
    """120 steps, seeds 0-9: known tasks 0.78 to 0.85, new ones 0.09 to 0.11. Control: unlimited tasks, 0.07 to 0.14."""
    model, tests, row = trained(0, 120, num_tasks=4)
    assert row["seen"] > 0.7 and row["unseen_tasks"] < 0.2
    x, y = tests["seen"]
    zeroed = (model(x, torch.zeros_like(y)).argmax(-1) == y).float().mean()   # it needs no labels to know the task
    assert zeroed > 0.65
    shuffled = y.flatten()[torch.randperm(y.numel())].view_as(y)
    assert abs((model(x, shuffled).argmax(-1) == shuffled).float().mean() - 0.1) < 0.03
    assert trained(0, 120)[2]["seen"] < 0.2


def test_bursts_teach_in_context_learning():
    """800 steps of bursts, seeds 0-9: `random` 0.50 to 0.56, optimum 0.61. Controls: no bursts, 0.09 to 0.11; a
    window of one example, 0.26 (whole example 0.19, with the stray label 0.27)."""
    model, tests, row = trained(0, 800, burst=1.0, learning_rate=3e-3)
    best = G.late(G.random_optimum(10))
    assert 0.4 < row["random"] < best + 3 * math.sqrt(0.25 / 512)
    x, y = tests["random"]
    context, query = slice(0, 9), slice(9, 10)
    turned = torch.cat([x[:, context].flip(1), x[:, query]], 1), torch.cat([y[:, context].flip(1), y[:, query]], 1)
    assert abs(G.evaluate(model, *turned)[1][-1] - G.evaluate(model, x, y)[1][-1]) < 0.12
    assert trained(0, 800, burst=0.0, learning_rate=3e-3)[2]["random"] < 0.25
    assert trained(0, 800, burst=1.0, learning_rate=3e-3, window=1)[2]["random"] < 0.3
