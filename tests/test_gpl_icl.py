"""gpl_icl.py: the mathematics against slow oracles, short runs, and behaviour at the command line."""
import dataclasses
import gzip
import json
import math
import signal
import struct

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.kernel_ridge import KernelRidge
from sklearn.neighbors import KNeighborsClassifier

import gpl_icl as G

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_data(n=500, n_in=20, classes=10, seed=0):
    x = torch.randn(n, n_in, generator=generator(seed))
    return G.Dataset(x, torch.randint(classes, (n,), generator=generator(seed + 1)), classes)


class Alone:
    """A `Run` that trains in this process and keeps nothing."""
    device, world = CPU, 1
    compile = staticmethod(lambda function: function)
    average = staticmethod(lambda tensors: None)
    share = staticmethod(lambda batch: batch)
    watch = staticmethod(lambda losses: None)

    def __init__(self, seeds):
        self.seeds, self.rows, self.rates = seeds, [], {}

    def steps(self, stage, total, state):
        for self.step in range(total):
            self.stage = stage
            yield self.step

    def clock(self, name):
        return G.contextlib.nullcontext()

    def log(self, rows):
        self.rows += [{"stage": self.stage, "step": self.step + 1, **row} for row in rows]


MODELS = {"transformer": lambda: G.Transformer(20, 10, 12, 32, 2, 2), "lstm": lambda: G.LSTM(20, 10, 16),
          "outer-product lstm": lambda: G.OuterProductLSTM(20, 10, 2, 8), "mlp": lambda: G.MLP(20, 10, 32)}


def woken(build, seed=0):
    """A model whose read-out is not zero, so that its inputs show in its logits."""
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ---- models ----

@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_starts_at_exactly_chance(build):
    x, y = torch.randn(4, 12, 20), torch.randint(10, (4, 12))
    loss = F.cross_entropy(build()(x, y).flatten(0, 1), y.flatten())
    assert abs(loss.item() - math.log(10)) < 1e-6


def leaks(model, t=5):
    """Does the model read what it must not? -> the list of rules it breaks."""
    x, y = torch.randn(3, 12, 20, generator=generator()), torch.randint(10, (3, 12), generator=generator())
    other_x, other_y = x.clone(), y.clone()
    other_x[:, t] += 1
    other_y[:, t] = (y[:, t] + 3) % 10
    base, with_x, with_y = model(x, y), model(other_x, y), model(x, other_y)
    broken = []
    if not torch.allclose(base[:, :t], with_x[:, :t], atol=1e-5):
        broken.append("later input")
    if not torch.allclose(base[:, :t + 1], with_y[:, :t + 1], atol=1e-5):
        broken.append("own label")
    if torch.allclose(base[:, t + 1], with_y[:, t + 1], atol=1e-5):
        broken.append("blind to earlier labels")
    return broken


@pytest.mark.parametrize("name", ["transformer", "lstm", "outer-product lstm"])
def test_causal_and_leak_free(name):
    assert leaks(woken(MODELS[name])) == []


def test_the_leak_test_catches_leaks(monkeypatch):
    assert leaks(woken(MODELS["mlp"])) == ["blind to earlier labels"]
    model = woken(MODELS["transformer"])
    monkeypatch.setattr(G, "causal_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    assert "later input" in leaks(model)
    monkeypatch.undo()
    monkeypatch.setattr(G, "tokens", lambda x, y, classes: torch.cat([x, F.one_hot(y, classes)], -1))
    assert leaks(model) == ["own label"]


def test_tokens_by_hand():
    z = G.tokens(torch.ones(1, 3, 2), torch.tensor([[2, 0, 1]]), 3)
    assert z.tolist() == [[[1, 1, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]]


def test_attention_equals_the_library():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=generator(), dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(G.causal_attention(q, k, v), expected)


def test_lstm_equals_the_library():
    model, library = woken(MODELS["lstm"]), torch.nn.LSTM(30, 16, batch_first=True)
    with torch.no_grad():
        library.weight_ih_l0.copy_(model.input.weight), library.bias_ih_l0.copy_(model.input.bias)
        library.weight_hh_l0.copy_(model.recurrent.weight), library.bias_hh_l0.copy_(model.recurrent.bias)
    x, y = torch.randn(4, 12, 20), torch.randint(10, (4, 12))
    torch.testing.assert_close(model(x, y), model.head(library(G.tokens(x, y, 10))[0]))


def test_saturated_outer_product_lstm_is_linear_attention():
    model, c, writes = G.OuterProductLSTM(20, 10, 1, 4), torch.zeros(2, 1, 4, 4), []
    for t in range(6):
        gates = torch.randn(2, 8, 4, generator=generator(t))
        gates[:, [0, 1, 3, 4]] = 10.0                    # input and forget gate: sigmoid(100) = 1
        writes.append(gates[:, 2, :, None] * gates[:, 5, None, :])
        h, c = model.cell(gates.flatten(1), c)
        read = torch.einsum("bij,bj->bi", sum(writes), gates[:, 6])
        torch.testing.assert_close(c[:, 0], sum(writes))
        torch.testing.assert_close(h, gates[:, 7].sigmoid() * read.tanh())


def test_parameter_counts_and_state_sizes():
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(G.Transformer(784, 10, 100, 256, 4, 8)) - 100 * 256 == 3_365_642
    assert count(G.Transformer(3072, 10, 100, 256, 4, 8)) - 100 * 256 == 3_951_370
    assert count(G.Transformer(64, 10, 30, 64, 2, 4)) == 107_466
    assert count(G.LSTM(784, 10, 256)) == 1_079_818 and count(G.LSTM(3072, 10, 256)) == 3_422_730
    assert G.Transformer(784, 10, 100, 256, 4, 8).state_size(100) == 204_800
    assert G.LSTM(20, 10, 16).state_size(99) == 32 and G.MLP(20, 10, 16).state_size(99) == 0
    assert G.OuterProductLSTM(20, 10, 3, 8).state_size(99) == 3 * 64


def test_gradient_of_the_sequence_loss_by_finite_differences():
    model = woken(lambda: G.Transformer(5, 3, 6, 8, 1, 2)).double()
    params = {name: p.detach()[None].requires_grad_() for name, p in model.named_parameters()}
    x, y = torch.randn(1, 2, 6, 5, dtype=torch.float64), torch.randint(3, (1, 2, 6))
    loss = lambda: F.cross_entropy(G.stacked(model)(params, x, y).flatten(0, 2), y.flatten())
    grads = torch.autograd.grad(loss(), list(params.values()))
    way = [torch.randn_like(g) for g in grads]
    slope = sum((g * w).sum() for g, w in zip(grads, way))
    with torch.no_grad():
        shift = lambda step: [p.add_(step * w) for p, w in zip(params.values(), way)]
        shift(1e-6)
        up = loss()
        shift(-2e-6)
        down = loss()
    torch.testing.assert_close((up - down) / 2e-6, slope, rtol=1e-5, atol=1e-8)


# ---- tasks ----

def test_task_matrix_is_a_function_of_the_id():
    ids = torch.tensor([5, 77, 5, 1 << 40, (1 << 40) + 5])
    A = G.task_matrix(ids, 16)
    assert torch.equal(A[0], A[2]) and torch.equal(A[1], G.task_matrix(torch.tensor(77), 16))
    flat = A[[0, 1, 3, 4]].flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 5 / 16
    rho = G.task_permutation(ids, 10)
    assert torch.equal(rho[0], rho[2]) and torch.equal(rho[3], G.task_permutation(ids[3:4], 10)[0])
    assert torch.equal(rho.sort(-1).values, torch.arange(10).expand(5, 10))


def test_task_words_are_uniform_and_normals_are_normal():
    bits = G.task_bits(torch.arange(200), 5000)
    assert bits.min() >= 0 and bits.max() < 2**32
    counts = torch.bincount(bits.flatten() >> 24, minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    z = G.normal_from_bits(bits).double().flatten()
    assert abs(z.mean()) < 0.005 and abs(z.std() - 1) < 0.005 and abs((z**4).mean() - 3) < 0.03
    assert (G.task_matrix(torch.arange(50), 32).var() * 32 - 1).abs() < 0.02     # variance 1/n_in


def test_extreme_words_give_finite_normals():
    z = G.normal_from_bits(torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert z.isfinite().all() and z[0] == -z[-1] and z[-1] > 5
    # The trap: with one bit more, the largest word rounds to 1 in float32, which is infinite.
    words = torch.tensor([2**32 - 1])
    assert torch.erfinv(((words >> 8).float() + 0.5) / 2**23 - 1).isinf().all()


def test_tasks_are_no_shifted_windows_of_one_stream():
    """With one keyed round, task b would be task a from another starting point."""
    words = G.task_bits(torch.arange(64), 4096)
    assert len(words.unique()) > 0.9999 * words.numel()
    key = lambda i: G.mix(torch.tensor(i) ^ 0)
    one_round = torch.stack([G.mix(torch.arange(4096) + key(i) & G.WORD) for i in range(64)])
    shift = int(key(1) - key(0))                    # how far the windows lie apart: the weak hash,
    window = G.mix(torch.arange(shift, shift + 64) + key(0) & G.WORD)
    assert torch.equal(window, one_round[1, :64])   # had we used it, would show this
    window = G.task_bits(torch.tensor([0]), 64, start=shift)[0]
    assert not torch.equal(window, words[1, :64])


def test_ids_beyond_32_bits_are_distinct_tasks():
    ids = torch.arange(10_000) + (1 << 40)
    words = torch.cat([G.task_bits(ids, 2), G.task_bits(ids - (1 << 40), 2), G.task_bits(ids << 20, 2)])
    assert len(words.unique(dim=0)) == len(words)


def test_permutations_are_uniform():
    all_six = G.task_permutation(torch.arange(12_000), 3) @ torch.tensor([9, 3, 1])
    counts = torch.unique(all_six, return_counts=True)[1]
    assert len(counts) == 6 and scipy.stats.chisquare(counts).pvalue > 1e-4
    for place in (0, 9):
        names = G.task_permutation(torch.arange(10_000), 10)[:, place]
        assert scipy.stats.chisquare(torch.bincount(names, minlength=10)).pvalue > 1e-4


def test_task_words_equal_plain_python_integers():
    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    for task in (0, 7, 2**32 - 1, 2**40 + 3, 2**62 + 12345):
        key1 = mix(task % 2**32 ^ mix(task >> 32))
        key2 = mix((key1 + 0x9E3779B9) % 2**32)
        words = [mix(mix((i + key1) % 2**32) ^ key2) for i in range(5, 25)]
        assert G.task_bits(torch.tensor(task), 20, start=5).tolist() == words
    assert G.task_permutation(torch.tensor([7]), 10)[0].tolist() == [3, 6, 2, 7, 4, 1, 5, 0, 9, 8]


def test_streams_are_independent():
    """torch's CPU generator keeps 32 bits of its seed: purposes told apart by more would be one stream."""
    first = {tuple(torch.rand(4, generator=G.stream(seed, purpose, CPU)).tolist())
             for seed in (0, 1, 2, 1 << 28) for purpose in range(8)}
    assert len(first) == 32


@pytest.mark.parametrize("way", ["hash", "gram"])
def test_projection_keeps_inner_products_with_the_right_noise(way):
    x = torch.randn(2, 40, generator=generator())
    if way == "hash":
        z = x @ G.task_matrix(torch.arange(20_000), 40).mT
    else:
        z = G.gram_projection(x.expand(20_000, 2, 40), torch.randn(20_000, 2, 40, generator=generator()))
    (xx, xy), yy = (x @ x.T)[0], x[1] @ x[1]
    for product, mean, variance in (((z[:, 0] * z[:, 1]).sum(-1), xy, (xx * yy + xy**2) / 40),
                                    (z[:, 0].square().sum(-1), xx, 2 * xx**2 / 40)):
        assert abs(product.mean() - mean) < 5 * (variance / len(product)).sqrt() + 1e-3 * xx
        assert abs(product.var() / variance - 1) < 0.06


def test_gram_projection_is_gaussian_like_the_matrices():
    """Not only two moments: single outputs of both ways come from the same distribution."""
    x = torch.randn(6, 30, generator=generator())
    a = (x @ G.task_matrix(torch.arange(4000), 30).mT)[:, 3, 7]
    b = G.gram_projection(x.expand(4000, 6, 30), torch.randn(4000, 6, 30, generator=generator()))[:, 3, 7]
    assert scipy.stats.ks_2samp(a, b).pvalue > 1e-3


def sample(variants, data=None, seeds=(0,), batch=16, length=12, seed=0, **more):
    generators = [generator(seed + s) for s in seeds]
    return G.sample_batch(data or noise_data(), variants, list(seeds), generators, batch, length, **more)


def test_seen_tasks_can_be_recomputed_from_their_ids():
    data = noise_data(n_in=8)
    x, y = sample([G.Variant("K", 3)], data)
    candidates = [(data.x @ G.task_matrix(torch.tensor(k), 8).mT, G.task_permutation(torch.tensor(k), 10)[data.y])
                  for k in range(3)]
    for sequence, labels in zip(x[0], y[0]):
        fits = [torch.cdist(sequence, z).min(1) for z, _ in candidates]
        best = min(range(3), key=lambda k: fits[k].values.max())
        assert fits[best].values.max() < 1e-2 < min(f.values.max() for k, f in enumerate(fits) if k != best)
        assert torch.equal(candidates[best][1][fits[best].indices], labels)


def test_bank_and_hash_give_the_same_sequences():
    variants = [G.Variant("a", 5), G.Variant("b", 9), G.Variant("u")]
    bank = G.task_bank(variants, [3, 4], 20, CPU)
    assert bank.shape == (2, 9, 20, 20)
    with_bank, without = (sample(variants, seeds=(3, 4), bank=b) for b in (bank, None))
    torch.testing.assert_close(with_bank[0], without[0])
    assert torch.equal(with_bank[1], without[1])


def test_a_seed_alone_equals_its_slice_of_a_joint_batch():
    variants = [G.Variant("a", 5, 0.5, 0.5), G.Variant("u", 0, 0.5)]
    joint, alone = sample(variants, seeds=(0, 1)), sample(variants, seeds=(1,))
    torch.testing.assert_close(joint[0][2:], alone[0])
    assert torch.equal(joint[1][2:], alone[1])


def test_the_order_of_variants_does_not_matter():
    one, other = (sample([G.Variant("u", 0, 0.5), G.Variant("K", 3, 0.5)][::way]) for way in (1, -1))
    assert torch.equal(one[0], other[0].flip(0)) and torch.equal(one[1], other[1].flip(0))
    assert not torch.equal(one[1][0], one[1][1])


def test_mixtures():
    distinct_inputs = lambda x: [len(sequence.round(decimals=3).unique(dim=0)) for sequence in x[0]]
    x, _ = sample([G.Variant("burst", 4, burst=1.0)], batch=32, length=400)
    assert max(distinct_inputs(x)) == 10 and min(distinct_inputs(x)) >= 9
    x, _ = sample([G.Variant("half", 4, burst=0.5)], batch=400, length=40)
    assert 140 < sum(n <= 10 for n in distinct_inputs(x)) < 260        # 200 +- 6 deviations
    x, _ = sample([G.Variant("plain", 4)], batch=32, length=40)
    assert min(distinct_inputs(x)) > 20
    x, _ = sample([G.Variant("test", 4)], batch=32, length=400, distinct=True)
    assert distinct_inputs(x) == [400] * 32
    ordered = G.Dataset(torch.eye(10), torch.arange(10), 10)
    _, y = sample([G.Variant("a", label_bias=1.0)], ordered, length=10, distinct=True)
    _, raw = sample([G.Variant("a", label_bias=0.0)], ordered, length=10, distinct=True)
    assert torch.equal(y.sort(-1).values, raw.sort(-1).values) and not torch.equal(y, raw)
    half = torch.stack([sample([G.Variant("u", label_bias=bias)], ordered, batch=400, length=1)[1]
                        for bias in (0.5, 1.0)])
    assert 160 < (half[0] == half[1]).sum() < 280                       # a half, and a tenth of the rest
    _, y = sample([G.Variant("u")], ordered, batch=400, length=10, distinct=True)
    assert len(y[0].unique(dim=0)) > 390                                # each sequence renames anew
    # One fixed permutation: equal inputs have equal labels in all sequences.
    x, y = sample([G.Variant("a", 1, label_bias=1.0)], ordered, length=10, distinct=True)
    same = torch.cdist(x[0].flatten(0, 1), x[0].flatten(0, 1)) < 1e-3
    assert (y[0].flatten()[:, None] == y[0].flatten())[same].all() and same.sum() == 16 * 160


def test_unlimited_hash_and_gram_are_the_same_distribution():
    data = noise_data(n=50, n_in=12)
    norms = [sample([G.Variant("u")], data, batch=1500, projection=way)[0].norm(dim=-1).flatten()
             for way in ("gram", "hash")]
    assert scipy.stats.ks_2samp(*norms).pvalue > 1e-3


def test_random_data_and_its_optimum():
    x, y = G.random_batch([generator()], 4000, 30, 16, 10)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.02
    same = torch.cdist(x[0], x[0], compute_mode="donot_use_mm_for_euclid_dist") < 1e-4
    earlier = (same & torch.ones(30, 30, dtype=torch.bool).tril(-1)).any(-1)         # (B, T)
    match = torch.where(same, y[0][:, None], -1).tril(-1).amax(-1)     # an oracle: copy, else say 0
    right = torch.where(earlier, match.clamp(min=0), 0) == y[0]
    optimum = G.random_dataset_optimum(30)
    # Exact repeats always have the same label; the copying oracle attains the optimum, position by position.
    assert (torch.where(earlier, match, y[0]) == y[0]).all()
    error = (right.double().mean(0) - optimum).abs() / (optimum * (1 - optimum) / 4000).sqrt()
    assert error.max() < 4.5
    for length, mean in ((30, 0.7127), (50, 0.8209), (100, 0.9100)):
        assert abs(G.random_dataset_optimum(length).mean() - mean) < 5e-5


def test_nothing_beats_the_optimum_of_random():
    assert G.random_dataset_optimum(3, classes=4).tolist() == pytest.approx([0.25, 0.325, 0.3925])
    x, y = G.random_batch([generator(1)], 3000, 30, 64, 10)
    optimum = G.random_dataset_optimum(30).mean()
    for rule in (G.nearest_neighbour, G.kernel_ridge, G.online_sgd):
        accuracy = (rule(x[0], y[0]) == y[0]).double().mean(1)
        assert accuracy.mean() < optimum + 4 * accuracy.std() / 3000**0.5
    assert (G.nearest_neighbour(x[0], y[0]) == y[0]).double().mean() > optimum - 0.01


# ---- hand-written rules ----

def test_nearest_neighbour_equals_scikit_learn():
    x, y = torch.randn(3, 15, 6, generator=generator()), torch.randint(4, (3, 15), generator=generator())
    ours = G.nearest_neighbour(x, y)
    for b in range(3):
        for j in range(1, 15):
            oracle = KNeighborsClassifier(1).fit(x[b, :j], y[b, :j])
            assert ours[b, j] == oracle.predict(x[b, j:j + 1])[0]
    swap = torch.randperm(4, generator=generator())                     # exact label equivariance
    assert torch.equal(G.nearest_neighbour(x, swap[y])[:, 1:], swap[ours][:, 1:])


def test_kernel_ridge_equals_scikit_learn():
    x, y = torch.randn(2, 12, 6, generator=generator()), torch.randint(3, (2, 12), generator=generator())
    y[:, 0] = 2                                                         # all classes are seen
    ours = G.kernel_ridge(x, y, width=0.7, ridge=0.2)
    for b in range(2):
        for j in range(1, 12):
            oracle = KernelRidge(alpha=0.2, kernel="rbf", gamma=1 / (2 * 0.7 * 6))
            oracle.fit(x[b, :j].double(), F.one_hot(y[b, :j], 3).double())
            assert ours[b, j] == oracle.predict(x[b, j:j + 1].double()).argmax()


def test_online_sgd_equals_autograd():
    x, y = torch.randn(2, 10, 5, generator=generator()), torch.randint(3, (2, 10), generator=generator())
    y[:, 0] = 2
    ours = G.online_sgd(x, y, lr=0.3)
    for b in range(2):
        layer = torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        sgd = torch.optim.SGD(layer.parameters(), lr=0.3)
        for j in range(10):
            logits = layer(x[b, j:j + 1])
            assert ours[b, j] == logits.argmax()
            sgd.zero_grad()
            F.cross_entropy(logits, y[b, j:j + 1]).backward()
            sgd.step()


def test_interval_is_student_t():
    for n in (2, 3, 5, 14, 15, 40):
        values = torch.randn(n, generator=generator(n), dtype=torch.float64).tolist()
        low, high = scipy.stats.t.interval(0.95, n - 1, np.mean(values), scipy.stats.sem(values))
        assert np.allclose(G.interval(values)["ci95"], [low, high], rtol=2e-3)
    assert G.interval([0.5])["ci95"] is None


# ---- data ----

def test_glyphs():
    x, y = G.glyphs("01A", 40, 8, 0.4, generator())
    assert x.shape == (120, 8, 8) and x.min() >= 0 and x.max() <= 1 and torch.bincount(y).tolist() == [40] * 3
    assert torch.equal(x, G.glyphs("01A", 40, 8, 0.4, generator())[0])
    assert not torch.equal(x, G.glyphs("01A", 40, 8, 0.4, generator(1))[0])
    plain = G.glyphs("01A", 400, 16, 0.0, generator())[0]               # undistorted: the fonts alone
    assert len(plain.round(decimals=4).flatten(1).unique(dim=0)) == 3 * len(G.FONTS)
    middle = x.mean(0)[2:6, 2:6].mean()
    assert middle > 2 * x.mean(0)[[0, -1]].mean()                       # the ink is in the middle


def write_idx(path, array, compress=True, cut=0):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    raw = gzip.compress(raw) if compress else raw
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw[:len(raw) - cut])


def write_split(folder, split, images, labels, **more):
    write_idx(folder / f"{split}-images-idx3-ubyte.gz", images, **more)
    write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)


def toy_images(n=100, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 6, 6), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)


def test_idx_reader(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for compress in (True, False):
        write_idx(tmp_path / "a", array, compress)
        assert G.load_idx(tmp_path / "a").tolist() == array.tolist()
    for compress, cut, message in ((True, 9, "cut short"), (False, 5, "header says 2 x 3 x 4")):
        write_idx(tmp_path / "a", array, compress, cut)
        with pytest.raises(ValueError, match=message):
            G.load_idx(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"PNG")
    with pytest.raises(ValueError, match="not an IDX file"):
        G.load_idx(tmp_path / "a")


def test_glyph_splits_and_sets_differ():
    sets = [data.x for name in G.GLYPHS for data in G.load_dataset(name, G.Config(), CPU)]
    assert not any(torch.equal(a, b) for i, a in enumerate(sets) for b in sets[:i])


def test_classes_left_out_are_reported(tmp_path, capsys):
    images, labels = toy_images(200)
    labels[7] = 200
    write_split(tmp_path / "mnist", "train", images, labels)
    write_split(tmp_path / "mnist", "t10k", *toy_images())
    cfg = G.Config(dataset="mnist", data_dir=str(tmp_path), length=12)
    assert len(G.load_dataset("mnist", cfg, CPU)[0].x) == 199
    assert "1 of 200 examples are left out" in capsys.readouterr().out


def test_a_data_set_without_train_split_is_cut(tmp_path):
    write_split(tmp_path / "mnist", "t10k", *toy_images())
    cfg = G.Config(dataset="mnist", data_dir=str(tmp_path), length=12)
    train, test = G.load_dataset("mnist", cfg, CPU)
    assert (len(train.x), len(test.x), train.x.shape[1]) == (80, 20, 64)
    held_out = G.load_dataset("mnist", cfg, CPU, held_out=True)[1]
    assert len(held_out.x) == 100 and held_out.x.mean().abs() < 1e-5


@pytest.mark.parametrize("center", ["pixel", "global"])
def test_normalisation_uses_the_train_split(tmp_path, center):
    write_split(tmp_path / "mnist", "train", *toy_images(200, 1))
    write_split(tmp_path / "mnist", "t10k", *toy_images(100, 2))
    cfg = G.Config(dataset="mnist", data_dir=str(tmp_path), length=12, center=center, image_size=6)
    train, test = G.load_dataset("mnist", cfg, CPU)
    assert abs(train.x.mean()) < 1e-5 and abs(train.x.std() - 1) < 1e-3
    assert abs(test.x.mean()) > 1e-5
    assert (train.x.mean(0).abs().max() < 1e-5) == (center == "pixel")
    rgb = G.load_dataset("mnist", dataclasses.replace(cfg, rgb=True), CPU)[0].x
    assert torch.allclose(rgb.view(-1, 3, 36)[:, 0], rgb.view(-1, 3, 36)[:, 2], atol=1e-5)
    assert rgb.shape[1] == 108


def test_real_images_where_they_are():
    folder = G.pathlib.Path(__file__).parent.parent / "data"
    if not (folder / "mnist" / G.FILES[2]).exists():
        pytest.skip("no MNIST files in data/")
    cfg = G.Config(dataset="mnist", data_dir=str(folder), image_size=28, center="global")
    assert G.load_dataset("mnist", cfg, CPU)[1].x.shape == (10_000, 784)


# ---- training ----

def tiny(**more):
    """Smoke-sized: 12 examples a sequence, 8 sequences, width 32, glyphs of 8 x 8 pixels."""
    return G.Config(**{**G.PRESETS["smoke"], "steps": 120, "log_every": 40, **more})


@pytest.fixture(scope="module")
def digits():
    return G.load_dataset("glyph_digits", tiny(), CPU)


def meta_train(digits, seeds, variants, steps, **more):
    cfg, run = tiny(**more), Alone(seeds)
    build = lambda: G.Transformer(64, 10, cfg.length, cfg.d_model, cfg.layers, cfg.heads)
    probe = sample([G.Variant("test")], digits[1], seeds, 64, cfg.length, seed=50, distinct=True)
    probe = [t.unflatten(0, (len(seeds), 1))[:, 0] for t in probe]
    forward, params = G.train(cfg, run, "test", build, variants, digits[0], probe, steps)
    return forward, params, run.rows


def test_a_stack_equals_separate_runs(digits):
    # Keys' biases have no gradient but rounding, which a tiny epsilon would turn into whole steps.
    variants = [G.Variant("K=4", 4, 0.5), G.Variant("u", 0, 0.5)]
    _, joint, _ = meta_train(digits, [0, 1], variants, 3, adam_eps=1e-6)
    for i, (seed, variant) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        _, alone, _ = meta_train(digits, [seed], variants[variant:variant + 1], 3, adam_eps=1e-6)
        for name in joint:
            torch.testing.assert_close(joint[name][i], alone[name][0], atol=1e-5, rtol=1e-4)
    start = G.initial_stack(MODELS["transformer"], [0, 1], 2, CPU)["embed.weight"]
    assert torch.equal(start[0], start[1]) and not torch.allclose(start[0], start[2], atol=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_stacked(name):
    models = [woken(MODELS[name], seed) for seed in (0, 1)]
    params = {k: torch.stack([dict(m.named_parameters())[k] for m in models])
              for k, _ in models[0].named_parameters()}
    x, y = torch.randn(2, 3, 12, 20), torch.randint(10, (2, 3, 12))
    together = G.stacked(models[0])(params, x, y)
    for i, model in enumerate(models):
        torch.testing.assert_close(together[i], model(x[i], y[i]), atol=1e-5, rtol=1e-4)


def test_clipping_is_by_run_over_all_parameters():
    p, q = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 1, 1, requires_grad=True)
    p.grad, q.grad = torch.tensor([[3.0, 0.0], [0.03, 0.0]]), torch.tensor([[[4.0]], [[0.04]]])
    G.clip_gradients({"p": p, "q": q}, 1.0)
    torch.testing.assert_close(p.grad, torch.tensor([[0.6, 0.0], [0.03, 0.0]]))
    torch.testing.assert_close(q.grad, torch.tensor([[[0.8]], [[0.04]]]))


def test_meta_step_clips_and_steps():
    p = torch.zeros(2, 2, requires_grad=True)
    loss = lambda params, x, y: (params["p"] * torch.tensor([[3.0, 4.0], [0.3, 0.4]])).sum(1)
    losses = G.meta_step(loss, {"p": p}, torch.optim.SGD([p], lr=1.0), None, None, 1.0, Alone([0]))
    torch.testing.assert_close(p.detach(), -torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    assert losses.tolist() == [0, 0] and not losses.requires_grad


def test_sequence_loss_and_late_by_hand():
    logits, y = torch.zeros(2, 1, 3, 2), torch.tensor([[[0, 1, 1]], [[0, 0, 1]]])
    logits[0, 0, :, 1] = torch.tensor([0.0, 1.0, 5.0])                  # right, surer and surer
    nats = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-5))]
    assert G.sequence_loss(logits, y).tolist() == pytest.approx([sum(nats) / 3, math.log(2)])
    assert G.late(np.arange(30)) == 24.5 and G.late([0.0, 0.5]) == 0.5


def test_evaluate_by_hand():
    """Two seeds x two variants, 200 sequences: more than one chunk, one batch a seed."""
    y = torch.randint(10, (2, 200, 3), generator=generator())
    x = F.one_hot(y, 10).float()
    x[1, 150:] = x[1, 150:].roll(1, -1)                                 # seed 1: the last 50 wrong
    scale = torch.tensor([1.0, 2.0, 1.0, 2.0])
    forward = lambda params, xs, ys: xs * scale[:, None, None, None]
    loss, accuracy = G.evaluate(forward, {"p": scale}, x, y)
    assert accuracy.tolist() == [[1.0] * 3] * 2 + [[0.75] * 3] * 2
    right = [math.log(1 + 9 * math.exp(-s)) for s in (1, 2)]
    wrong = [r + s for r, s in zip(right, (1, 2))]
    expected = right + [0.75 * r + 0.25 * w for r, w in zip(right, wrong)]
    assert loss[:, 1].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_optimiser_has_the_small_epsilon():
    _, params, adam, _ = G.learner(G.Config(), Alone([0]), MODELS["mlp"], [0], 1)
    assert adam.defaults["eps"] == 1e-10 and adam.defaults["betas"] == (0.9, 0.98)
    assert G.learner(G.Config(), Alone([0]), MODELS["mlp"], [0], 1, 1e-4)[2].defaults["eps"] == 1e-4


def test_same_seed_is_bit_equal_and_another_is_not(digits):
    first, again, other = (meta_train(digits, [seed], [G.Variant("u", 0, 0.5)], 4)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_experiment_tests_on_what_it_did_not_train_on(monkeypatch):
    cfg = tiny(steps=2, sweep="4", sweep_steps=2, eval_sequences=16, num_seeds=2, seed=5)
    calls, sample_batch = [], G.sample_batch

    def spy(data, variants, seeds, generators, batch, length, bank=None, distinct=False, *rest):
        calls.append((data.x, [tuple(v)[1:] for v in variants], distinct))
        return sample_batch(data, variants, seeds, generators, batch, length, bank, distinct, *rest)
    monkeypatch.setattr(G, "sample_batch", spy)
    result = G.experiment(cfg, Alone([5, 6]))
    train, test = (data.x for data in G.load_dataset("glyph_digits", cfg, CPU))
    letters = G.load_dataset("glyph_letters", cfg, CPU, held_out=True)[1].x
    new, own = [(0, 0.0, 0.0)], [(4, 0.0, 0.0), (0, 0.0, 0.0)]          # never biased
    expected = [(test, new, True), (letters, new, True), (train, new, True)]         # tests, validation
    expected += [(train, [(0, 0.5, 0.0)], False)] * 2 + [(train, new, True)]         # learner, seen tasks
    expected += [(train, [(4, 0.5, 0.0), (0, 0.5, 0.0)], False)] * 2 + [(train, own, True)]
    assert len(calls) == len(expected)
    for (x, variants, distinct), (expected_x, expected_variants, expected_distinct) in zip(calls, expected):
        assert torch.equal(x, expected_x) and (variants, distinct) == (expected_variants, expected_distinct)
    for seed, row in zip((5, 6), result["per_seed"]):
        sweep, headline = row["curves"]["sweep"], row["headline"]
        assert row["seed"] == seed
        assert headline["k4_seen_late"] == G.late(sweep["K=4"]["seen_tasks"])
        assert headline["k4_unseen_late"] == G.late(sweep["K=4"]["unseen_tasks"])
        learnt = row["curves"]["learner"]["unlimited"]
        for kind in ("unseen_tasks", "unseen_dataset"):
            assert headline[f"unlimited_{kind}_late"] == G.late(learnt[kind])
            assert headline[f"unlimited_{kind}_last"] == learnt[kind][-1]
        assert headline["random_late"] == G.late(learnt["random"])
        assert row["history"]["sweep"]["K=4"][-1][0] == 2
    assert result["per_seed"][0]["curves"] != result["per_seed"][1]["curves"]


def test_reference_curves_are_the_rules_with_the_best_settings():
    data = G.load_dataset("glyph_digits", tiny(), CPU)[0]
    x, y = sample([G.Variant("u")], data, seeds=(0, 1), batch=64, distinct=True)
    curves = G.reference_curves({"t": (x, y)}, (x, y))["t"]
    accuracy = lambda rule, s, *setting: (rule(x[s], y[s], *setting) == y[s]).float().mean(0)
    for s in (0, 1):
        assert torch.equal(curves["1-NN"][s], accuracy(G.nearest_neighbour, s))
    for name, rule, settings in (
            ("online SGD", G.online_sgd, [(lr,) for lr in (0.001, 0.003, 0.01, 0.03, 0.1)]),
            ("kernel ridge", G.kernel_ridge, [(w, r) for w in (0.25, 0.5, 1.0) for r in (0.03, 0.3)])):
        best = max(settings, key=lambda setting: accuracy(rule, 0, *setting).mean())
        for s in (0, 1):
            assert torch.equal(curves[name][s], accuracy(rule, s, *best))


# Short runs reach expected losses. Thresholds: mean + 4 standard deviations of seeds 0-9, measured on
# 2026-11-22 with torch 2.13.0 on two cores of an AMD EPYC.

def shuffled(data):
    return data._replace(y=data.y[torch.randperm(len(data.y), generator=generator(9))])


def memorised_loss(digits, seeds):
    """Loss on the four tasks trained on: 0.268 +- 0.032 (10 seeds)."""
    forward, params, _ = meta_train(digits, seeds, [G.Variant("K=4", 4, 0.5)], 200, batch=16)
    seen = sample([G.Variant("K=4", 4)], digits[0], seeds, 128, seed=70, distinct=True)
    return G.evaluate(forward, params, *seen)[0].mean(1)


def test_few_tasks_are_memorised(digits):
    loss = memorised_loss(digits, [0, 1])
    assert 0.02 < loss.mean() < 0.268 + 4 * 0.032
    # Control: with labels that say nothing about the images there is nothing to memorise.
    control = memorised_loss([shuffled(data) for data in digits], [0, 1])
    assert control.mean() > 2.2


def test_unlimited_tasks_are_learned_in_context(digits):
    """Loss on `random` after 500 steps on bursts: 1.599 +- 0.073; late accuracy on new digit tasks:
    0.313 +- 0.029 (10 seeds)."""
    size = dict(batch=32, length=20, d_model=64, heads=1)
    unknown = G.random_batch([generator(90)], 256, 20, 64, 10)
    optimum = math.log(10) * (1 - 0.9**20) / 2                          # mean of 0.9^j ln 10
    losses = {}
    for name, burst in (("burst", 1.0), ("uniform", 0.0)):
        forward, params, rows = meta_train(digits, [0], [G.Variant(name, 0, burst)], 500, **size)
        losses[name] = G.evaluate(forward, params, *unknown)[0].mean().item()
        if name == "burst":
            assert rows[-1]["late"] > 0.313 - 4 * 0.029
    assert optimum - 0.02 < losses["burst"] < 1.599 + 4 * 0.073
    assert losses["uniform"] > 2.2                                      # control: the plateau


# ---- behaviour ----

SMOKE = ["--preset", "smoke"]


def comparable(folder):
    """All numbers of a summary that do not depend on the clock."""
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("headline", "per_seed", "models", "beside")}


def run_here(capsys, *options):
    """main() in this process -> (exit status, standard output, standard error)."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        G.main([str(option) for option in options])
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_run_folder_table_and_replot(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_here(capsys, *SMOKE, "--num-seeds", 2)
    folder = tmp_path / "runs" / "gpl_icl" / "smoke-seed0-1"
    assert status == 0 and sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt", "config.json", "figure.png", "metrics.jsonl", "summary.json"]
    lines = out.splitlines()
    assert "about" in lines[0] and "threads 2" in lines[1] or "threads" in lines[1]
    assert str(folder.relative_to(tmp_path)) in lines[2] and "figure.png" in lines[-1]
    summary = json.loads((folder / "summary.json").read_text())
    row = summary["headline"]["random_late"]
    assert row["n"] == 2 == len(row["per_seed"]) and row["ci95"][0] < row["mean"] < row["ci95"][1]
    for key in "seeds minutes hardware command versions rates config threads peak_memory_gb".split():
        assert key in summary
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 and {"stage", "step", "seed", "run", "loss", "late"} <= set(rows[0])
    assert np.isclose(rows[0]["loss"], math.log(10), atol=0.05)
    (folder / "figure.png").unlink()
    assert run_here(capsys, *SMOKE, "--out", folder, "--replot")[0] == 0
    assert (folder / "figure.png").stat().st_size > 10_000
    # The same folder again: refused; with --resume: shown as it is; with another configuration: refused.
    before = (folder / "summary.json").read_bytes()
    assert run_here(capsys, *SMOKE, "--num-seeds", 2)[0] == 2
    assert run_here(capsys, *SMOKE, "--num-seeds", 2, "--resume")[0] == 0
    status, _, error = run_here(capsys, *SMOKE, "--out", folder, "--resume", "--batch", 4)
    assert status == 2 and "batch was 8" in error
    assert (folder / "summary.json").read_bytes() == before


def test_same_seed_same_summary(tmp_path, capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run_here(capsys, *SMOKE, "--seed", seed, "--out", tmp_path / name)[0] == 0
    a, b, c = (comparable(tmp_path / name) for name in "abc")
    assert a == b and a != c


BIG = [*SMOKE, "--sweep", "4", "--sweep-steps", "80", "--steps", "20", "--save-every", "7"]


def test_resume_after_kill_equals_uninterrupted(tmp_path, script):
    whole = script("gpl_icl.py", *BIG, "--out", tmp_path / "whole", wait=False)    # beside the other
    # Killed in the second stage, at a moment that nobody chose.
    process = script("gpl_icl.py", *BIG, "--out", tmp_path / "cut", wait=False)
    while "sweep 25/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    # And once more by SIGTERM, which saves first.
    process = script("gpl_icl.py", *BIG, "--out", tmp_path / "cut", "--resume", wait=False)
    while "sweep 45/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143 and "--resume" in error
    done = script("gpl_icl.py", *BIG, "--out", tmp_path / "cut", "--resume")
    assert done.returncode == 0 and "(resumed)" in done.stdout
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("cut", "whole")]
    assert metrics[0] == metrics[1]


def test_two_processes_equal_one(tmp_path, capsys, script):
    options = [*SMOKE, "--steps", "12", "--eval-sequences", "16", "--device", "cpu", "--adam-eps", "1e-5"]
    assert run_here(capsys, *options, "--out", tmp_path / "one")[0] == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = script("gpl_icl.py", *options, "--out", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("into ") == 1                               # one process speaks
    a, b = (torch.load(tmp_path / name / "checkpoint.pt")["stages"]["learner"]["state"]["params"]
            for name in ("one", "two"))
    start = G.initial_stack(lambda: G.Transformer(64, 10, 12, 32, 2, 2), [0], 1, CPU)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
        assert not torch.allclose(a[name], start[name], atol=1e-4)      # and they did learn
    losses = [[json.loads(line)["training_loss"] for line in open(tmp_path / name / "metrics.jsonl")]
              for name in ("one", "two")]
    assert np.allclose(*losses, atol=1e-4)


def bad_data(kind, folder):
    """Make a folder of MNIST files with one fault -> options that read it."""
    images, labels = toy_images(200)
    if kind == "constant":
        images = np.full_like(images, 7)
    write_split(folder / "mnist", "train", images, labels[:150] if kind == "labels" else labels,
                cut=30 if kind == "truncated" else 0)
    write_split(folder / "mnist", "t10k", images, labels)
    if kind == "missing file":
        (folder / "mnist" / G.FILES[1]).unlink()
    return ["--dataset", "mnist", "--unseen", "mnist", "--data-dir",
            folder / "nowhere" if kind == "missing folder" else folder]


@pytest.mark.parametrize("kind, message", [
    ("missing folder", "is missing: put it there, or add --download"), ("missing file", "is missing"),
    ("truncated", "damaged or cut short"), ("labels", "do not fit the images"), ("constant", "is constant")])
def test_bad_data(kind, message, tmp_path, capsys):
    options = bad_data(kind, tmp_path / "data")
    status, _, error = run_here(capsys, *SMOKE, "--out", tmp_path / "out", *options)
    assert status == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, message", [
    (["--image-size", "0"], "--image-size must be above 0"), (["--classes", "12"], "--classes 12 needs 0 to 11"),
    (["--bogus", "1"], "--bogus"), (["--steps", "many"], "--steps"), (["--preset", "huge"], "--preset"),
    (["--learning-rate", "nan"], "finite"), (["--learning-rate", "inf"], "finite"), (["--burst", "1.5"], "at most 1"),
    (["--heads", "3"], "must divide"), (["--sweep", "16,x"], "--sweep"), (["--center", "left"], "--center is pixel or global"),
    (["--dataset", "imagenet"], "no data set 'imagenet'"), (["--features", "none.npz"], "none.npz"),
    (["--length", "6000"], "--length 6000 is too long"), (["--batch", "-1"], "--batch must be above 0"),
    (["--classes", "1"], "at least 2"), (["--sweep", "4,4"], "--sweep"), (["--seed", 2**64], "--seed"),
    (["--sweep-steps", "0"], "--sweep-steps"), (["--num-seeds", "0"], "--num-seeds"), (["--step", "3"], "--step")])
def test_bad_options(options, message, tmp_path, capsys):
    status, _, error = run_here(capsys, *SMOKE, "--out", tmp_path / "out", *options)
    assert status == 2 and message in error and error.count("\n") == 1 and "error:" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_cuda(tmp_path, capsys):
    status, _, error = run_here(capsys, *SMOKE, "--out", tmp_path / "out", "--device", "cuda")
    assert status == 2 and "--device cuda: this machine has none" in error and not (tmp_path / "out").exists()


def test_damaged_and_foreign_checkpoints(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_here(capsys, *SMOKE, "--out", folder)[0] == 0
    (folder / "summary.json").unlink()
    good = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(good[:len(good) // 2])
    status, _, error = run_here(capsys, *SMOKE, "--out", folder, "--resume")
    assert status == 2 and "checkpoint.pt is damaged" in error
    assert (folder / "checkpoint.pt").read_bytes() == good[:len(good) // 2]          # nothing was lost
    (folder / "checkpoint.pt").write_bytes(good)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "batch": 16}))
    status, _, error = run_here(capsys, *SMOKE, "--batch", 16, "--out", folder, "--resume")
    assert status == 2 and "checkpoint.pt is of another run: batch was 8, now 16" in error
    (folder / "config.json").write_text(json.dumps(config))
    assert run_here(capsys, *SMOKE, "--out", folder, "--resume")[0] == 0             # from the end


@pytest.mark.parametrize("more, message", [([], "the loss is nan at step 2"),
                                           (["--save-every", "1"], "NaN or infinity after step 1")])
def test_not_a_number_stops_at_once(more, message, tmp_path, capsys):
    """Also where the loss is still finite but the weights are not: no checkpoint may hold them."""
    options = ["--learning-rate", "1e38", "--clip", "1e38", "--warmup", "0", "--seed", "7", *more]
    status, _, error = run_here(capsys, *SMOKE, *options, "--out", tmp_path / "run")
    assert status == 1 and message in error and "7" in error
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_published_results_are_not_taken_for_a_new_run(tmp_path, capsys):
    folder = tmp_path / "results"
    assert run_here(capsys, *SMOKE, "--out", folder)[0] == 0
    for name in ("config.json", "checkpoint.pt", "metrics.jsonl"):
        (folder / name).unlink()
    assert run_here(capsys, *SMOKE, "--seed", 7, "--out", folder)[0] == 2
    status, _, error = run_here(capsys, *SMOKE, "--seed", 7, "--out", folder, "--resume")
    assert status == 2 and "seed was 0, now 7" in error
    (folder / "summary.json").write_text("{}")
    for options in (["--resume"], ["--replot"]):
        assert run_here(capsys, *SMOKE, "--out", folder, *options)[0] == 2


def test_features_of_ones_own(tmp_path, capsys):
    x, y = np.random.default_rng(0).normal(size=(300, 5)), np.arange(300) % 10
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    options = [*SMOKE, "--features", tmp_path / "mine.npz", "--steps", 5, "--out", tmp_path / "run"]
    status, _, error = run_here(capsys, *options)
    assert status == 2 and "glyph_letters has 64 inputs" in error
    assert run_here(capsys, *options, "--unseen", tmp_path / "mine.npz")[0] == 0
    np.savez(tmp_path / "mine.npz", x=x)
    status, _, error = run_here(capsys, *options, "--out", tmp_path / "other")
    assert status == 2 and "must hold arrays x (N, D) and y (N,)" in error


def test_help_shows_every_field_with_its_presets(capsys):
    status, out, _ = run_here(capsys, "--help")
    words = " ".join(out.split())
    assert status == 0
    for field in dataclasses.fields(G.Config):
        assert "--" + field.name.replace("_", "-") in words
    assert "[smoke 12 | quick 30 | paper 100]" in words
