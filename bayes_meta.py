# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "torch>=2.9", "matplotlib>=3.8", "tqdm>=4.65"]
# ///
"""Meta-trained agents implement Bayes-optimal agents: amortised Bayes, in one file.

[O19] Ortega et al., "Meta-learning of Sequential Strategies", arXiv 1905.03030 (the theory).
[M20] Mikulik, Deletang, McGrath, Genewein, Martic, Legg, Ortega, "Meta-trained agents implement
      Bayes-optimal agents", arXiv 2010.11223 (the experiment).

IDEA
  Draw a hidden task theta, draw a sequence from it, let a network with a memory predict each next
  symbol; again and again, each time a fresh task. The weights are the same for all tasks, so what
  belongs to one must be worked out in the activations while the sequence is read. One predictor has
  the least log loss, the Bayesian posterior predictive. So gradient descent compiles priors and
  posteriors into a forward pass and, where the network acts, the trade between exploring and
  exploiting. Here exact answers are known: how near to Bayes is a number of nats, or of reward.

ALGORITHM (the three templates of [O19]; w: weights, tau_t: what was seen before t)
  repeat
    for each of B sequences: draw a task theta ~ p(theta)
    1 prediction   x_t ~ p(x | theta)    loss = -1/(BT) sum_{b,t} log p_w(x_t | x_{<t})
    2 imitation    a_t ~ p_w(a | tau_t)  loss = -1/(BT) sum_{b,t} log p_w(best arm | tau_t)
    3 decision     a_t ~ p_w(a | tau_t)  loss = an actor-critic's, for the greatest E sum_t r_t
    w <- Adam(w, gradient cut to norm 1), its rate falling along a cosine
  The best there is: 1 the posterior predictive; 2 P(arm is best | tau_t), so that to draw from it
  is Thompson sampling; 3 the Bayes-optimal player, a dynamic programme over all beliefs.
  Grouped by history, loss 1 is entropy + KL(Bayes || network): only Bayes has the least.

SYMBOLS, in the code, shape or meaning
  B, N, T    batch, sequences, length    sequences a step, sequences of a test, symbols or pulls
  x          x             (B, T)        symbols: faces of a coin or die, or real numbers
  n          counts        (N, T, 2)     Bayes' state for the coin: times of each face in x_{<t}
  h, c       states        (N, T, 2H)    the network's state: that of an LSTM of width H
  D_s        unexplained                 share of the variance of one state that the other leaves
  theta      theta         (B, 2)        of bandits: the probability with which each arm pays 1
  s, f       belief                      times that arm 0 has paid 1, and 0, then those of arm 1
  Q, V       Q, V       (T, T, T, T, 2)  exact value of each arm in each belief, of an episode

RESULT (quick: seeds 0-4, mean [95 % t interval], 2.0 minutes a seed on one core; `paper`: not run)
  KL(Bayes || network), nats a symbol: coin 0.000035 [0.000030, 0.000039], die 0.00012, Gaussian
  0.00018; Bayes with a wrong prior .005, .009, .005. Coin at t = 20, 40, 80: .0001, .0019, .0053.
  D_s, Bayes' state from the network's 0.0004 [0.0002, 0.0006], untrained 0.011 [0.010, 0.013], but
  untrained, forget bias of 1, .00001 (tests): no sign of learning. The other way .211 at first,
  .088 at step 100, then 0.100 [0.057, 0.144]: why it rises is open. Returns: imitation 11.926
  [11.913, 11.939] (Thompson 11.932); actor-critic below the best 0.051 [0.045, 0.057] (greedy .066,
  less tried at ties .036); one arm known 12.351 [12.343, 12.358] (best 12.384, greedy 11).

DIFFERS
  1. [M20] has no public code and was not read again for this: sizes and rates are ours.
  2. D_s in closed form, for the coin; [M20] fits an MLP. No D_o, fewer families, one prior each.
  3. Actor-critic with GAE, best play of a finite episode, for IMPALA and Gittins' indices.
  4. Ours: the known arm; action and reward as a one-hot of the pair; larger first input weights.

RUN
  python bayes_meta.py                                     # all of the figure
  python bayes_meta.py --families gaussian --bandit-steps 5000
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
import torch.distributions as D
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- 1. CONFIGURATION --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run; each comment is the option's --help."""
    families: str = "coin,die,gaussian"  # what to predict
    length: int = 20                     # symbols of a sequence, T
    predict_steps: int = 2000            # meta-training steps of each predictor
    predict_batch: int = 128             # sequences a step, B
    predict_rate: float = 5e-3           # first learning rate of a predictor
    pulls: int = 20                      # of an episode with a bandit, T
    imitation_steps: int = 1200          # steps of the player that imitates the best arm
    bandit_steps: int = 2500             # steps of the actor-critic, both arms unknown
    known_arm_steps: int = 900           # steps of the actor-critic, one arm known
    play_batch: int = 256                # episodes a step, B
    play_rate: float = 5e-3              # first learning rate of a player
    width: int = 48                      # of all LSTMs, H
    sequences: int = 2000                # of a test, N
    seed: int = 0                        # first seed
    num_seeds: int = 1                   # seeds, one after the other: seed, seed + 1, ...
    log_every: int = 50                  # steps between tests
    save_every: int = 250                # steps between checkpoints

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) is int and name != "seed" and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.pulls > 50:
            raise ValueError(f"--pulls {self.pulls}: the table of exact values allows at most 50")
        for name in self.families.split(","):
            if name not in FAMILIES:
                raise ValueError(f"--families: {name!r} is not one of {', '.join(FAMILIES)}")


PRESETS = {
    "smoke": dict(families="coin,gaussian", length=8, predict_steps=10, pulls=5, bandit_steps=10,
                  imitation_steps=10, known_arm_steps=10, play_batch=16, width=8, sequences=50,
                  log_every=5, save_every=4),
    "quick": {},
    "paper": dict(predict_steps=100_000, predict_rate=1e-4, imitation_steps=20_000,
                  bandit_steps=20_000, known_arm_steps=20_000, play_batch=1024, play_rate=1e-3,
                  sequences=10_000, log_every=1000, save_every=5000),
}

# ---- 2. TASKS ----------------------------------------------------------------------------------
# Families of sequences, each with its exact Bayesian solution, in float64; then bandits.
# Distributions do not check their arguments: a GPU would have to wait for that.


def before(x):
    """(B, T, ..) -> x_1 + .. + x_{t-1} at each t, in float64: never x_t."""
    return x.double().cumsum(1) - x.double()


class Die:
    """K faces, their probabilities ~ Dirichlet(1, .., 1): all equally likely. A coin has two.
    sample -> x (B, T); encode(x) -> what a network reads, (B, T, inputs); bayes(x) -> exact
    predictions of x_t given x_{<t}; read(a network's output) -> the network's predictions."""

    def __init__(self, K):
        self.inputs = self.outputs = self.K = K

    def sample(self, batch, length, device):
        weights = torch.empty(batch, self.K, device=device).exponential_()
        return torch.multinomial(weights, length, replacement=True)            # weights / their sum

    def encode(self, x):
        return F.one_hot(x, self.K).float()

    def bayes(self, x, prior=1.0):
        """P(x_t = k | x_{<t}) = (n_k + prior) / (n + K prior), n_k: times of face k in x_{<t}."""
        return D.Categorical(probs=before(F.one_hot(x, self.K)) + prior, validate_args=False)

    def read(self, output):
        return D.Categorical(logits=output, validate_args=False)


class Gaussian:
    """x ~ N(mu, 1), mu ~ N(0, 1); methods as above."""
    inputs = outputs = 2

    def sample(self, batch, length, device):
        return torch.randn(batch, 1, device=device) + torch.randn(batch, length, device=device)

    def encode(self, x):
        return torch.stack([x, torch.ones_like(x)], -1)      # the one tells x = 0 from no x yet

    def bayes(self, x, prior=1.0):
        """N(sum of x_{<t} / (n + prior), 1 + 1 / (n + prior)); prior: 1 / variance of mu."""
        precision = before(torch.ones_like(x)) + prior
        return D.Normal(before(x) / precision, (1 + 1 / precision).sqrt(), validate_args=False)

    def read(self, output):
        return D.Normal(output[..., 0], output[..., 1].exp(), validate_args=False)


FAMILIES = {"coin": Die(2), "die": Die(3), "gaussian": Gaussian()}         # a die of three faces

# Bandits: arms 0 and 1 pay 1 with probability theta ~ U(0, 1). In another task theta of arm 0 is
# `known`, not None: to pull arm 1, worse on average, pays only through what it may teach.
KNOWN = 0.55


def bandit_values(T, known, policy=None, device="cpu"):
    """Dynamic programme over all beliefs, float64 -> Q (T, T, T, T, 2), V of a whole episode.
    Q[t, s0, f0, s1]: expected reward from a pull of each arm after t pulls and from play after it:
    the best, or that of policy(belief, means) -> P(arm 0). f1 follows from t."""
    n = torch.arange(T, device=device).double()
    s0, f0, s1 = n[:, None, None], n[:, None], n
    Q, V = n.new_zeros(T, T, T, T, 2), n.new_zeros(T + 1, T + 1, T + 1)
    for t in reversed(range(T)):
        f1 = (t - s0 - f0 - s1).clamp(min=0)                 # below 0: never met
        mean1 = (s1 + 1) / (s1 + f1 + 2)                     # E[theta_1 | s1, f1]
        mean0 = (s0 + 1) / (s0 + f0 + 2) if known is None else torch.full_like(s0, known)
        # Q_t(b, a) = P(1 | b, a) (1 + V_{t+1}(b, success of a)) + P(0 | b, a) V_{t+1}(b, failure)
        Q[t, ..., 0] = mean0 * (1 + V[1:, :-1, :-1]) + (1 - mean0) * V[:-1, 1:, :-1]
        Q[t, ..., 1] = mean1 * (1 + V[:-1, :-1, 1:]) + (1 - mean1) * V[:-1, :-1, :-1]
        best = (Q[t, ..., 0] > Q[t, ..., 1]).double()
        p = policy((s0, f0, s1, f1), (mean0, mean1)) if policy else best
        V = F.pad(p * Q[t, ..., 0] + (1 - p) * Q[t, ..., 1], (0, 1, 0, 1, 0, 1))
    return Q, V[0, 0, 0].item()


def greedy_policy(belief, means, tie=0.0):
    """P(arm 0) of who pulls the arm of the higher mean, whatever could be learned. Equal means:
    either arm, or, with a small `tie`, the one tried less."""
    s0, f0, s1, f1 = belief
    return (1 + torch.sign(means[0] - means[1] + tie * (s1 + f1 - s0 - f0))) / 2


def thompson_policy(belief, means=None):
    """P(theta_0 > theta_1 | belief), float64: an integral, by the midpoint rule."""
    s0, f0, s1, f1 = (n[..., None] for n in belief)
    theta = (torch.arange(256, device=s0.device).double() + 0.5) / 256
    density0 = theta**s0 * (1 - theta) ** f0
    density1 = theta**s1 * (1 - theta) ** f1
    below = density1.cumsum(-1) - density1 / 2               # theta_1 below theta
    return (density0 * below).sum(-1) / (density0.sum(-1) * density1.sum(-1))


def return_lost(actions, rewards, Q):
    """Whole episodes (B, T) -> mean of sum_t max_a Q(b_t, a) - Q(b_t, a_t). Its expectation is what
    the player's return lacks of the best (performance difference lemma), with far less noise."""
    s0, f0, s1 = (before((actions == arm) & (rewards == reward)).long()
                  for arm, reward in ((0, 1), (0, 0), (1, 1)))
    values = Q[torch.arange(actions.shape[1], device=Q.device), s0, f0, s1]    # (B, T, 2)
    chosen = values.gather(-1, actions[..., None])[..., 0]
    return (values.amax(-1) - chosen).sum(1).mean().item()


# ---- 3. MODEL ----------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM and a linear head, x (B, T, inputs) -> (B, T, outputs), state (h, c)."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.core, self.head = nn.LSTM(inputs, width, batch_first=True), nn.Linear(width, outputs)
        with torch.no_grad():                                # U(-1, 1) / sqrt(width) is too small
            self.core.weight_ih_l0 *= math.sqrt(width / inputs)

    def forward(self, x, state=None):
        h, state = self.core(x, state)
        return self.head(h), state


def shifted(encoded):
    """(B, T, inputs) -> one step later, zeros first: at t, only what was before t has been read."""
    return F.pad(encoded, (0, 0, 1, 0))[:, :-1]


def encode_pulls(actions, rewards):
    """What a player reads of each pull: one-hot of the pair (action, reward), (.., 4)."""
    return F.one_hot(2 * actions + rewards, 4).float()


@torch.no_grad()
def play(model, batch, T, known, device):
    """Draw tasks and play an episode of each -> theta (B, 2), actions and rewards (B, T)."""
    theta = torch.rand(batch, 2, device=device)
    if known is not None:
        theta[:, 0] = known
    pull, state, actions, rewards = theta.new_zeros(batch, 4), None, [], []
    for _ in range(T):
        output, state = model(pull[:, None], state)
        action = torch.multinomial(output[:, 0, :2].softmax(-1), 1)[:, 0]
        reward = torch.bernoulli(theta.gather(1, action[:, None]))[:, 0].long()
        pull = encode_pulls(action, reward)
        actions.append(action)
        rewards.append(reward)
    return theta, torch.stack(actions, 1), torch.stack(rewards, 1)


# ---- 4. LEARNING RULE --------------------------------------------------------------------------
# The three templates: samples only, no posteriors. Players play without gradient, then read their
# episodes once more, whole, with it.


def predict(model, family, x, dtype=torch.float32):
    """Symbols (B, T) -> the network's distributions of x_t given x_{<t}."""
    return family.read(model(shifted(family.encode(x)))[0].to(dtype))


def prediction_loss(model, family, x):
    """1: -1/(BT) sum_{b,t} log p_w(x_t | x_{<t}) in nats."""
    return -predict(model, family, x).log_prob(x).mean()


def imitation_loss(model, actions, rewards, best):
    """2: -1/(BT) sum_{b,t} log p_w(best | tau_t); best (B,): the arm of the higher theta. Own
    actions are interventions, chosen from tau_t alone: they are no evidence of theta."""
    logits = model(shifted(encode_pulls(actions, rewards)))[0][..., :2]
    return F.cross_entropy(logits.flatten(0, 1), best.repeat_interleave(actions.shape[1]))


def actor_critic_loss(model, actions, rewards, entropy_weight):
    """3: 1/(BT) sum_{b,t} -log pi(a_t | tau_t) A_t + 1/2 ((v_t - R_t) / 5)^2 - c H(pi)
    v_t guesses r_t + .. + r_T; delta_t = r_t + v_{t+1} - v_t; A_t = sum_k 0.9^k delta_{t+k}, in the
    loss standardised over the batch; R_t = A_t + v_t. Neither A_t nor R_t carries gradient."""
    output = model(shifted(encode_pulls(actions, rewards)))[0]                 # (B, T, 3)
    pi = D.Categorical(logits=output[..., :2], validate_args=False)
    value = 5 * output[..., 2]
    v = F.pad(value.detach(), (0, 1))                        # v_{T+1} = 0
    t = torch.arange(actions.shape[1], device=actions.device)
    weight = (0.9 ** (t[:, None] - t).clamp(min=0)).tril()   # weight[t + k, t] = 0.9^k
    delta = rewards + v[:, 1:] - v[:, :-1]
    advantage = delta @ weight
    error = (value - v[:, :-1] - advantage) / 5
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    return (error.square() / 2 - pi.log_prob(actions) * advantage
            - entropy_weight * pi.entropy()).mean()


# ---- 5. TRAINING -------------------------------------------------------------------------------


def train(cfg, run, stage, model, steps, rate, loss_of, test):
    """Meta-train the model. loss_of(progress, 0 to 1) -> loss of fresh tasks; test() -> numbers of
    a test, by name -> history [{"step": .., name: ..}, ..], the untrained model first."""
    adam = torch.optim.Adam(model.parameters(), fused=True)
    untrained = {"step": 0, **test()}
    for step in run.steps(stage, steps, model=model, adam=adam):
        # COLLECT
        loss = loss_of(step / steps)
        # META UPDATE
        adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        # LOG
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            run.log(loss=loss.item(), **test())
    return [untrained] + [row for row in run.rows if row["stage"] == stage]


def train_predictor(cfg, run, name, test_x):
    """Template 1 on a family, tested on test_x (N, T) -> model, history."""
    family = FAMILIES[name]
    model = Recurrent(family.inputs, family.outputs, cfg.width).to(run.device)
    loss_function = run.compile(prediction_loss)

    def loss_of(progress):
        x = family.sample(cfg.predict_batch, cfg.length, run.device)
        return loss_function(model, family, x)

    def test():
        more = simulation(model, family, test_x) if name == "coin" else {}
        return {"kl": kl_by_step(model, family, test_x).mean().item(), **more}
    return model, train(cfg, run, name, model, cfg.predict_steps, cfg.predict_rate, loss_of, test)


def train_player(cfg, run, stage, steps, known, Q):
    """Template 2 (stage "imitation") or 3 on a bandit of exact values Q -> model, history."""
    model = Recurrent(4, 3, cfg.width).to(run.device)        # reads pairs; 2 logits, v
    loss_function = run.compile(imitation_loss if stage == "imitation" else actor_critic_loss)

    def loss_of(progress):
        theta, actions, rewards = play(model, cfg.play_batch, cfg.pulls, known, run.device)
        entropy_weight = torch.tensor(0.03 * (1 - progress)).to(run.device)
        more = theta.argmax(1) if stage == "imitation" else entropy_weight
        return loss_function(model, actions, rewards, more)

    def test():
        with torch.random.fork_rng(range(torch.cuda.device_count())):          # logs change nothing
            _, *episodes = play(model, cfg.sequences, cfg.pulls, known, run.device)
        return {"lost": return_lost(*episodes, Q)}
    return model, train(cfg, run, stage, model, steps, cfg.play_rate, loss_of, test)


# ---- 6. EVALUATION -----------------------------------------------------------------------------


@torch.no_grad()
def kl_by_step(model, family, x):
    """KL(Bayes || network) at each t of x (N, T) -> (T,) in nats."""
    network = predict(model, family, x, torch.float64)
    return D.kl_divergence(family.bayes(x), network).mean(0)


def unexplained(source, target):
    """D_s: share of the variance of target (N, T, d') that the best linear map of source (N, T, d)
    leaves, mean over d'. Least squares on half of the sequences, tested on the other half."""
    half = len(source) // 2
    x, y = source[:half].flatten(0, 1), target[:half].flatten(0, 1)
    phi = torch.linalg.solve(x.T @ x + 1e-9 * torch.eye(x.shape[1]).to(x), x.T @ y)
    error = (target[half:] - source[half:] @ phi).square().mean((0, 1))
    return (error / target[half:].var((0, 1), correction=0).clamp(min=1e-12)).mean().item()


@torch.no_grad()
def simulation(model, family, x):
    """Does one state machine simulate the other [M20]? -> D_s of Bayes' state for coins x (N, T)
    and of the network's, each from the other and from t alone."""
    states, state = [], None
    for step in shifted(family.encode(x)).split(1, 1):
        _, state = model(step, state)
        states.append(torch.cat(state, -1)[0].double())
    states, counts = torch.stack(states, 1), before(F.one_hot(x, 2))
    t = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    # One-hot, so that a linear map is any map: the mean of the target in each state seen in the fit
    clock, belief = F.one_hot(t).double(), F.one_hot(t * (t + 1) // 2 + counts[..., 1].long())
    return {"network_to_bayes": unexplained(F.pad(states, (0, 1), value=1.0), counts),
            "bayes_to_network": unexplained(belief.double(), states),
            "clock_to_bayes": unexplained(clock, counts),
            "clock_to_network": unexplained(clock, states)}


def exact_returns(T, known, device):
    """Expected returns of T pulls, of the best rule and of simple ones -> {name: return}."""
    rules = {"best": None, "greedy": greedy_policy, "random": lambda belief, means: 0.5}
    if known is None:
        rules["Thompson"] = thompson_policy
        rules["greedy, ties: arm tried less"] = lambda b, means: greedy_policy(b, means, 1e-9)
    else:                                                    # P(arm 0) = 0 while arm 1 is untried
        rules["one try, then greedy"] = lambda b, means: greedy_policy(b, means) * (b[2] + b[3] > 0)
    return {name: bandit_values(T, known, rule, device)[1] for name, rule in rules.items()}


def experiment(cfg, run):
    """Predictors and players of one seed beside Bayes -> {"headline": {name: number}, ..}."""
    if run.device.type == "mps":
        raise ValueError("--device mps has no float64 for the exact solutions; use --device cpu")
    head, families, players = {}, {}, {}
    for name in cfg.families.split(","):
        family = FAMILIES[name]
        torch.manual_seed(12345)                             # the same tests for all seeds
        long_x = family.sample(cfg.sequences, 4 * cfg.length, run.device)
        torch.manual_seed(run.seed)
        x = long_x[:, :cfg.length]
        model, history = train_predictor(cfg, run, name, x)
        others = {"Bayes, wrong prior": family.bayes(x, 0.5),
                  "always the prior": family.bayes(x[:, :1])}
        others = {k: D.kl_divergence(family.bayes(x), q).mean().item() for k, q in others.items()}
        families[name] = {"history": history, "others": others}
        head[f"{name}_kl"] = history[-1]["kl"]
        if name == "coin":
            for way in ("network_to_bayes", "bayes_to_network"):
                head[f"state_unexplained_{way}"] = history[-1][way]
                head[f"untrained_{way}"] = history[0][way]
            kl = kl_by_step(model, family, long_x).tolist()
            head |= {f"coin_kl_at_{n}_T": kl[n * cfg.length - 1] for n in (1, 2, 4)}

    for stage, steps, known in (("imitation", cfg.imitation_steps, None),
                                ("bandit", cfg.bandit_steps, None),
                                ("known_arm", cfg.known_arm_steps, KNOWN)):
        Q, _ = bandit_values(cfg.pulls, known, device=run.device)
        _, history = train_player(cfg, run, stage, steps, known, Q)
        players[stage] = {"history": history, "exact": exact_returns(cfg.pulls, known, run.device)}
    lost = {stage: player["history"][-1]["lost"] for stage, player in players.items()}
    head["imitation_return"] = players["imitation"]["exact"]["best"] - lost["imitation"]
    head["bandit_return_lost"] = lost["bandit"]
    head["known_arm_return"] = players["known_arm"]["exact"]["best"] - lost["known_arm"]
    return {"headline": head, "families": families, "players": players}


BESIDE = {"imitation_return": "Thompson 11.932 (20 pulls)", "known_arm_return": "best 12.384 (20)"}

# ---- 7. FIGURE ---------------------------------------------------------------------------------

COLOURS = {"coin": "#0072B2", "die": "#009E73", "gaussian": "#CC79A7", "actor-critic": "#0072B2",
           "imitation": "#009E73", "state of Bayes": "#56B4E9", "network's": "#8B5A2B"}


def lines(axis, x, curves, colour, label, style="-"):
    """curves (seeds, points): a thin line a seed, and their thick mean."""
    axis.plot(x, torch.tensor(curves).T.tolist(), style, color=colour, lw=0.6, alpha=0.5)
    axis.plot(x, torch.tensor(curves).mean(0).tolist(), style, color=colour, lw=2, label=label)


def plot(summary, path):
    """Four panels from the summary alone."""
    from matplotlib.figure import Figure                     # no pyplot: no backend, no state
    figure, seeds = Figure((12, 8.4), layout="constrained"), summary["per_seed"]
    a, b, c, d = figure.subplots(2, 2).flat

    def draw(axis, group, member, key, name, label, style="-"):
        histories = [seed[group][member]["history"] for seed in seeds]
        curves = [[row[key] for row in history] for history in histories]
        lines(axis, [row["step"] for row in histories[0]], curves, COLOURS[name], label, style)
    for name, family in seeds[0]["families"].items():
        draw(a, "families", name, "kl", name, name)
        for (other, kl), style in zip(family["others"].items(), ("--", ":")):
            a.axhline(kl, color=COLOURS[name], ls=style, lw=1, label=f"{name}: {other}")
        for way, clock, state in (("network_to_bayes", "clock_to_bayes", "state of Bayes"),
                                  ("bayes_to_network", "clock_to_network", "network's")):
            if name == "coin":
                draw(b, "families", name, way, state, f"{state}, from the other")
                draw(b, "families", name, clock, state, f"{state}, from the step alone", "--")
    draw(c, "players", "imitation", "lost", "imitation", "imitation")
    for axis, stage in ((c, "bandit"), (d, "known_arm")):
        draw(axis, "players", stage, "lost", "actor-critic", "actor-critic")
        returns = seeds[0]["players"][stage]["exact"]
        for rule, style in zip(list(returns)[1:], ("-", ":", "-.", "--")):
            axis.axhline(returns["best"] - returns[rule], color="k", ls=style, lw=1, label=rule)
        axis.set_ylabel(f"return below the best, {returns['best']:.3f}")
    a.set(title="(a) Log loss alone teaches Bayes", ylabel="KL(Bayes || network) a symbol, nats")
    b.set(title="(b) Coin: Bayes' state is in the network's", ylabel="D_s, variance unexplained")
    c.set(title="(c) Two unknown arms: greedy is as near, no proof of exploring")
    d.set(title="(d) One arm known: who does not explore loses")
    for axis in (a, b, c, d):
        axis.set_xscale("symlog", linthresh=summary["config"]["log_every"])
        axis.set(yscale="log", xlabel="meta-training step; 0: untrained", xlim=(0, None))
        if axis.lines:
            axis.legend(fontsize=7)
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
