"""vsml.py: the grid against plain loops over synapses, its symmetries, the outer loops, the rivals, short runs."""
import gzip
import itertools
import json
import math
import pathlib
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import vsml as V

CPU = torch.device("cpu")
SMALL = V.Config(side=4, classes=3, length=30, batch=8, log_every=10)


class Alone:
    """A `Run` that keeps its rows, and no files."""
    device = CPU

    def __init__(self):
        self.rows = []

    def steps(self, stage, total, **state):
        yield from range(total)

    def log(self, **numbers):
        self.rows.append(numbers)


def lifetimes(B=3, T=5, D=4, C=3):
    """Random examples and one-hot labels, in float64."""
    return torch.randn(B, T, D).double(), F.one_hot(torch.randint(C, (B, T)), C).double()


def rule_of(mode="B", ticks=1, pool=torch.mean):
    """A rule with parameters large enough to matter, and first states in float64, too."""
    rule = V.VSML(ticks, mode, pool, N=4).double()
    for p in rule.parameters():
        torch.nn.init.normal_(p)
    first_state = rule.first_state
    rule.first_state = lambda *sizes: [(h.double(), c.double()) for h, c in first_state(*sizes)]
    return rule


def plain_lifetime(rule, x, targets, layers):
    """One lifetime, a loop over synapses: each an LSTM that reads [m_i, m_o, h] -> logits (T, C)."""
    grids = [{(i, o): (h[i, o], c[i, o]) for i in range(h.shape[0]) for o in range(h.shape[1])} for h, c in layers]
    sizes = [h.shape[:2] for h, _ in layers]

    def visit(k, below, above):
        for i, o in grids[k]:
            h, c = grids[k][i, o]
            for _ in range(rule.ticks):
                entry, g, forget, out = (torch.cat([below[i:i + 1], above[o:o + 1], h]) @ rule.W + rule.b).split(4)
                c = (forget + 5).sigmoid() * c + (entry - 5).sigmoid() * g.tanh()
                h = out.sigmoid() * c.tanh()
            grids[k][i, o] = h, c
        I, O = map(range, sizes[k])
        return (torch.stack([rule.pool(torch.cat([rule.up(grids[k][i, o][0]) for i in I])) for o in O]),
                torch.stack([rule.pool(torch.cat([rule.down(grids[k][i, o][0]) for o in O])) for i in I]))
    logits, error = [], torch.zeros_like(targets[0])
    for t in range(len(x)):
        m, heard = x[t], []
        for k in range(len(grids)):
            heard.append(m)
            m, _ = visit(k, m, error if rule.mode == "A" else torch.zeros(sizes[k][1]).double())
        logits.append(100 * torch.tanh(m / 100))
        error = m = logits[-1].softmax(0) - targets[t]
        for k in reversed(range(len(grids) * (rule.mode == "B"))):
            _, m = visit(k, heard[k], m)
    return torch.stack(logits)


@pytest.mark.parametrize("mode, ticks, pool, sizes", [("A", 2, torch.mean, (4, 3)), ("B", 1, torch.mean, (4, 3)),
                                                      ("B", 2, torch.sum, (4, 2, 3))])
def test_grid_equals_a_loop_over_synapses(mode, ticks, pool, sizes):
    torch.manual_seed(0)
    rule, (x, targets) = rule_of(mode, ticks, pool), lifetimes()
    layers = rule.first_state(3, *sizes)
    logits = rule(x, targets, layers)
    for b in range(3):
        expected = plain_lifetime(rule, x[b], targets[b], [(h[b], c[b]) for h, c in layers])
        torch.testing.assert_close(logits[b], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["A", "B"])
def test_symmetries(mode):
    torch.manual_seed(0)
    rule, (x, targets) = rule_of(mode), lifetimes()
    (h, c), = rule.first_state(3, 4, 3)
    logits, pixel, label = rule(x, targets, [(h, c)]), torch.randperm(4), torch.tensor([2, 0, 1])
    moved = rule(x[..., pixel], targets[..., label], [(h, c[:, pixel][:, :, label])])
    torch.testing.assert_close(moved, logits[..., label], atol=1e-12, rtol=0)  # order of pixels and classes
    twice = rule(x.repeat(1, 1, 2), targets, [(h.repeat(1, 2, 1, 1), c.repeat(1, 2, 1, 1))])
    torch.testing.assert_close(twice, logits, atol=1e-12, rtol=0)              # number of pixels: means
    alike = rule(x, targets, [(h, c[:, :, :1].expand(h.shape))])
    new = targets.cumsum(1) - targets == 0                   # classes not seen yet cannot be told apart
    spread = alike.masked_fill(~new, -math.inf).amax(-1) - alike.masked_fill(~new, math.inf).amin(-1)
    assert spread.max() < 1e-12 and new.any()


@pytest.mark.parametrize("name", ["A", "B", "Meta RNN", "class means"])
def test_labels_are_seen_after_the_prediction(name):
    torch.manual_seed(0)
    (x, targets), t, rule = lifetimes(T=6), 3, rule_of(name if name in "AB" else "B")
    layers = rule.first_state(3, 4, 3)
    learner = {"Meta RNN": V.MetaRNN(4, 3).double(), "class means": V.class_means}.get(
        name, lambda x, targets: rule(x, targets, layers))
    other = targets.clone()
    other[:, t:] = targets[:, t:].roll(1, -1)
    before, after = learner(x, targets), learner(x, other)
    assert torch.equal(before[:, :t + 1], after[:, :t + 1]) and not torch.equal(before[:, t + 1], after[:, t + 1])


def test_first_state_is_half_random_and_decays_slowly():
    torch.manual_seed(0)
    rule = V.VSML(ticks=3)
    (h, c), = rule.first_state(50, 25, 10)
    assert not h.any() and not c[..., 8:].any() and c[..., :8].std() == pytest.approx(1 / 5, rel=0.03)
    torch.nn.init.zeros_(rule.W)
    torch.testing.assert_close(rule.visit(h, c, h[..., 0, 0], h[:, 0, :, 0])[1], c / (1 + math.exp(-5))**3)


def test_es_gradient_is_the_estimate_of_algorithm_1():
    """Member by member: parameters + sigma eps and - sigma eps, the same lifetime, the same first state."""
    torch.manual_seed(0)
    rule, sigma, (x, targets) = rule_of(), 0.05, lifetimes(B=4)
    torch.manual_seed(1)
    mean = V.es_gradient(rule, x, targets, 3, sigma)
    torch.manual_seed(1)
    (h, c), = rule.first_state(4, 4, 3)
    eps = {name: torch.randn(4, *p.shape, dtype=torch.float64) for name, p in rule.named_parameters()}

    def loss(p, side):
        member = rule_of()
        member.load_state_dict({name: w + side * eps[name][p] for name, w in rule.state_dict().items()})
        logits = member(x[p:p + 1], targets[p:p + 1], [(h[p:p + 1], c[p:p + 1])])
        return V.cross_entropy(logits, targets[p:p + 1]).item()
    pairs = [(loss(p, sigma), loss(p, -sigma)) for p in range(4)]
    assert mean.item() == pytest.approx(sum(map(sum, pairs)) / 8, rel=1e-5)
    for name, p in rule.named_parameters():
        expected = sum((plus - minus) / (2 * sigma) * e for (plus, minus), e in zip(pairs, eps[name])) / 4
        torch.testing.assert_close(p.grad, expected, atol=1e-4, rtol=1e-4)


class Backpropagation(torch.nn.Module):
    """What the clone should be: a synapse of tanh units under gradient descent. wrong: one thing that it does badly."""
    N, mode, pool = 4, "B", staticmethod(torch.sum)
    forward, first_state, b = V.VSML.forward, V.VSML.first_state, torch.zeros(1)

    def __init__(self, wrong=""):
        super().__init__()
        self.wrong = wrong

    def visit(self, h, c, below, above):
        w, b, a, e = c[..., 0], c[..., 1], below.tanh()[:, :, None], above[:, None]
        rate, drift = 0.04 if self.wrong == "learn" else 0.05, 0.01 * (1 - 2 * above.any()) * (self.wrong == "keep")
        change = torch.stack([-rate * e * a, -rate * e + 0 * w + drift], -1)   # drifts back in the second visit
        self.y, self.e = a * w + b + (0.1 if self.wrong == "y" else 0), e * w * (1 - a**2)
        return h, torch.cat([c[..., :2] + change, c[..., 2:]], -1)

    def up(self, h):
        return self.y[..., None]

    def down(self, h):
        return (0.9 if self.wrong == "error" else 1) * self.e[..., None]


def test_what_is_cloned_is_backpropagation():
    torch.manual_seed(0)
    c, x, targets = torch.randn(2, 4, 3, 4), torch.randn(2, 4), torch.eye(3)[[2, 0]]
    loss = lambda rule: V.clone_loss(rule, (torch.zeros_like(c), c), x, lambda logits: logits.softmax(-1) - targets)
    gap, (_, after) = loss(true := Backpropagation())
    assert gap < 1e-10
    w, b, m = (part.clone().requires_grad_() for part in (c[..., 0], c[..., 1], x))
    (2 * V.cross_entropy(V.tanh_network(m, [w, b]), targets)).backward()       # what autograd says
    torch.testing.assert_close(after[..., 0], w.detach() - 0.05 * w.grad)
    torch.testing.assert_close(after[..., 1], b.detach() - 0.05 * b.grad)
    torch.testing.assert_close(true.e.sum(2), m.grad)
    for wrong in ("y", "error", "keep", "learn"):            # each of the four targets counts
        assert loss(Backpropagation(wrong))[0] > 1e-4, wrong
    cfg = replace(SMALL, lifetimes=16, test_length=60)       # and it is measured beside the true one
    exact, slow = (V.evaluate_clone(cfg, Backpropagation(wrong), CPU) for wrong in ("", "learn"))
    for layers, row in exact.items():
        assert row["agreement"] == 1 > slow[layers]["agreement"] and row["clone"]["late"] == row["true"]["late"]


def test_class_means_by_plain_loops():
    """Posterior of a prototype ~ N(0, 1/2) in noise of variance 1/2: mean S / (n + 1), variance 1/2 / (n + 1)."""
    torch.manual_seed(0)
    x, targets = lifetimes(B=2, T=6)
    logits = V.class_means(x, targets)
    for b, t, k in itertools.product(range(2), range(6), range(3)):
        seen = x[b, :t][targets[b, :t, k] == 1]
        mean, variance = seen.sum(0) / (len(seen) + 1), 0.5 + 0.5 / (len(seen) + 1)
        expected = torch.distributions.Normal(mean, variance**0.5).log_prob(x[b, t]).sum()
        constant = 0.5 * 4 * math.log(2 * math.pi)
        assert logits[b, t, k].item() == pytest.approx(expected.item() + constant, abs=1e-10)


def test_score_of_known_predictions():
    y, right = torch.tensor([[0, 1] * 20]), torch.zeros(1, 40, 1)
    right[:, 10:20] = right[:, 30:] = 1
    logits = F.one_hot(y, 2).float() * (10 * right - 1)      # log-odds of the right class: 9 or -1
    found = V.score(logits, y)
    assert (found["all"], found["first20"], found["late"], found["curve"]) == (0.5, 0.5, 1, [0, 1, 0, 1])
    low, high = 1 / (1 + math.e), 1 / (1 + math.exp(-9))
    assert found["p"] == pytest.approx([low] * 5 + [high] * 5)
    assert "first20" not in V.score(logits[:, :15], y[:, :15])


def test_rivals_have_their_best_rate():
    """Softmax regression by hand, w <- w + rate x (y - p); with a bias."""
    torch.manual_seed(0)
    y = torch.randint(2, (2, 40))
    x, targets = 3 + y[..., None].float() + 0.01 * torch.randn(2, 40, 1), F.one_hot(y, 2).float()
    rows = V.evaluate(V.VSML(), V.MetaRNN(1, 2), {"new": (x, y, 2), "other": (x.repeat(1, 1, 2), y, 2)})
    found, tried = rows["new"]["SGD"], {}
    assert rows["new"].keys() - rows["other"].keys() == {"Meta RNN"}           # its sizes are fixed
    for rate in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        w, logits = torch.zeros(2, 2, 2), []
        for t in range(40):
            one = torch.cat([x[:, t], torch.ones(2, 1)], 1)
            logits.append(torch.einsum("bd,bdc->bc", one, w))
            w = w + rate * one[:, :, None] * (targets[:, t] - logits[-1].softmax(-1))[:, None]
        tried[rate] = V.score(torch.stack(logits, 1), y)
    for key, rate in (("all", "rate"), ("first20", "first20_rate"), ("late", "late_rate")):
        assert found[key] == max(row[key] for row in tried.values()) == tried[found[rate]][key]
    assert found["p"] == pytest.approx(tried[found["rate"]]["p"], abs=1e-4)


def test_fields_and_projections():
    torch.manual_seed(0)
    prototypes = V.make_fields(100, 5, 6, CPU)
    torch.testing.assert_close(prototypes.std(-1, correction=0), torch.ones(100, 5))
    assert prototypes.view(100, 5, 6, 6).diff(dim=-1).square().mean() < 1      # smooth; white: 2
    x, y = V.sample_fields(prototypes, 100, 50)
    assert (x - prototypes[torch.arange(100)[:, None], y] / 2**0.5).var() == pytest.approx(0.5, rel=0.02)
    few = V.project(x, 0.25)
    assert torch.equal(few[25:], x[25:]) and not torch.equal(few[24], x[24])
    many = V.project(x[:1].expand(500, -1, -1), 1)           # of one lifetime: a projection of its own for each
    assert many[0, 0].sub(many[1, 0]).abs().max() > 0.1
    assert many.square().sum(-1).mean() == pytest.approx(x[0].square().sum(-1).mean().item(), rel=0.05)


def test_image_files(tmp_path):
    def write(name, images, labels):
        (tmp_path / name).mkdir()
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, data.dim()]) + b"".join(size.to_bytes(4, "big") for size in data.shape)
            packed = gzip.compress(header + bytes(data.flatten().tolist()))
            (tmp_path / name / f"train-{kind}-ubyte.gz").write_bytes(packed)
    cfg = replace(SMALL, data_dir=str(tmp_path), length=20, test_length=20)
    images, labels = torch.arange(30)[:, None, None] + torch.tensor([[0], [2]] * 4).expand(8, 8), torch.arange(30) % 10
    write("mine", images, labels)
    write("odd", images, labels[:20])
    x, y = V.load_sampler(cfg, "mine", "train", 4, 10, CPU)(50, 20)
    number = ((x[..., 0] * 0.3081 + 0.1307) * 255 - 1).round().long()
    assert x.shape == (50, 20, 16) and torch.equal(number % 10, y)
    assert all(len(set(row)) == 20 for row in number.tolist())                 # no image twice
    for name, longest, classes, words in (("mine", 31, 10, "do not fit"), ("mine", 20, 9, "do not fit"),
                                          ("odd", 20, 10, "do not fit"), ("other", 20, 10, "other/train-images-idx3")):
        with pytest.raises(ValueError, match=words):
            V.load_sampler(replace(cfg, test_length=longest), name, "train", 4, classes, CPU)


@torch.no_grad()
def accuracy(rule, shuffle=False):
    """On new data sets of 3 classes; shuffle: the labels mean nothing."""
    x, y = V.sample_fields(V.make_fields(64, 3, 4, CPU), 64, 60)
    y = y.gather(1, torch.rand(64, 60).argsort(1)) if shuffle else y
    return V.score(rule(x, F.one_hot(y, 3).float()), y)["all"]


def test_a_learned_rule_learns_new_data_sets():
    """150 meta-steps, seeds 0-9: 0.84 to 0.90; controls, untrained and shuffled labels, 0.32 to 0.35; chance 1/3."""
    torch.manual_seed(0)
    rule, sample = V.VSML(), partial(V.sample_fields, V.make_fields(1, 3, 4, CPU))
    assert accuracy(rule) < 0.42
    V.meta_train(replace(SMALL, steps=150), Alone(), "vsml", rule, sample, "bptt", 0.03)
    assert 0.78 < accuracy(rule) < 0.95 and accuracy(rule, shuffle=True) < 0.42


def test_bad_options_are_refused():
    for options in ({"mode": "C"}, {"optimizer": "adam"}, {"steps": 0}, {"chunk": -1}, {"projected": 1.5}):
        pytest.raises(ValueError, V.Config, **options)
    with pytest.raises(ValueError, match="mode B"):
        V.VSML(mode="A")(torch.zeros(1, 1, 4), torch.zeros(1, 1, 3), V.VSML().first_state(1, 4, 2, 3))


def test_published_rates_are_inside_their_grid():
    """A best rate at an end of the grid might not be the best; `late` of easy tests is 1 at many rates."""
    for path in (pathlib.Path(V.__file__).parent / "results").glob("vsml*/summary.json"):
        for tests in (seed["tests"] for seed in json.loads(path.read_text())["per_seed"]):
            assert all(0.0003 < row[name]["rate"] < 0.3 for row in tests.values() for name in ("SGD", "Adam")), path
            assert 0.0003 < min(tests["10 classes"]["SGD"][key] for key in ("first20_rate", "late_rate")) < 0.3
