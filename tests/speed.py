"""Rates of the hot paths, beside slower ways to the same numbers: python tests/speed.py [NAME ...] [--add].

Ratios are taken in one run, all ways called in turn; on a CPU by one core, where it says so.
"""
import contextlib
import copy
import ctypes
import json
import pathlib
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import policy_gen  # noqa: E402


if sys.platform == "linux":                                  # as class Run does
    with contextlib.suppress(AttributeError):
        for option in (-1, -3):
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


class Machine:
    """What the functions below need of a script's `run`."""
    device, world, rank, compiled, seeds = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1, 0, False, [0]
    compile = staticmethod(lambda function: function)
    average = watch = log = staticmethod(lambda *anything: None)
    share = staticmethod(lambda batch, dim=1: batch)
    steps = staticmethod(lambda stage, total, state: range(total))

    def clock(self, name):
        return contextlib.nullcontext()


def policy_gen_speed(cfg, run):
    """One episode's updates at the paper's sizes, for 1 and 8 seeds; rollouts of n different
    policies, beside Gymnasium's where it is installed. On a CPU, of one core."""
    device, rates, threads = run.device, {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for S in (1, 8):
        update, flops, product = paper_update(run, S)
        rates[f"paper_update_{S}_seeds"] = {"seconds_per_seed": update / S,
                                            "share_of_product_rate": flops / update / product}
    for kind in ("Swimmer", "InvertedPendulum"):
        env = policy_gen.environment(policy_gen.Config(env=kind, horizon=20), device)
        sizes = policy_gen.policy_sizes(env, 32)
        for n in (1, 16, 64, 1024):
            policies = 0.1 * torch.randn(1, n, policy_gen.policy_size(sizes), device=device)
            moments = [torch.full((1, sizes[0]), value, device=device) for value in (0.0, 1.0)]
            play = lambda step: policy_gen.rollout(env, policy_gen.follow(policies, env, sizes), moments, starts, step)
            starts = torch.rand(1, n, env.draws, device=device)
            steps = {"eager": env.step, "compiled": torch.compile(env.step)}
            seconds = policy_gen.median_seconds(device, [lambda step=step: play(step)
                                              for step in steps.values()], repeats=3)
            rates[f"{kind}_steps_per_second_n{n}"] = {
                name: env.horizon * n / part for name, part in zip(steps, seconds)}
        rates |= gymnasium_rate(kind, sizes, 1) | gymnasium_rate(kind, sizes, 64)
    torch.set_num_threads(threads)
    return rates


def paper_update(run, S):
    """The 4 + 19 steps of one episode -> their seconds, their flops (products alone), and the flops
    a second of one large product."""
    alone, env = copy.copy(run), policy_gen.environment(policy_gen.Config(env="Swimmer"), run.device)
    alone.seeds, sizes = list(range(S)), policy_gen.policy_sizes(env, 256)
    big = policy_gen.Config(env="Swimmer", policy_hidden=256, hyper_hidden=256, probes=200,
                 evaluator_hidden=256)
    generator, evaluator = policy_gen.networks(big, env, alone)
    of_g, of_v = [*generator.parameters()], [*evaluator.parameters()]
    adam_g, adam_v = torch.optim.Adam(of_g), torch.optim.Adam(of_v)
    theta, returns = (torch.randn(S, 16, *shape, device=run.device)
                      for shape in ((policy_gen.policy_size(sizes),), ()))
    square = torch.randn(2048, 2048, device=run.device)
    works = [lambda: policy_gen.descend(policy_gen.generator_loss(generator, evaluator, returns, env.scale), of_g,
                             adam_g, alone),
             lambda: policy_gen.descend(policy_gen.evaluator_loss(evaluator, theta, returns), of_v, adam_v, alone),
             lambda: square @ square]
    flops = []
    for work in works:
        with FlopCounterMode(display=False) as counter:
            work()
        flops.append(counter.get_total_flops())
    g, v, product = policy_gen.median_seconds(run.device, works)
    return 19 * g + 4 * v, 19 * flops[0] + 4 * flops[1], flops[2] / product


def gymnasium_rate(kind, sizes, n):
    """Steps a second of Gymnasium's own simulators with n different policies in torch."""
    try:
        import gymnasium
        simulators = gymnasium.make_vec(f"{kind}-v5", n, vectorization_mode="sync")
    except Exception:                                        # not installed
        return {}
    layers = policy_gen.split_policy(0.1 * torch.randn(n, policy_gen.policy_size(sizes)), sizes)
    obs, _ = simulators.reset(seed=0)

    def play():
        nonlocal obs
        for _ in range(20):
            state = torch.as_tensor(obs, dtype=torch.float32)[:, None]
            obs = simulators.step(policy_gen.policy_layers(layers, state, 1.0)[:, 0].numpy())[0]
    seconds, = policy_gen.median_seconds(torch.device("cpu"), [play], repeats=3)
    return {f"gymnasium_{kind}_steps_per_second_n{n}": 20 * n / seconds}


def main(names):
    """Print the rates of the scripts named, or of all; with --add also into results/NAME/summary.json."""
    run, add = Machine(), "--add" in names
    settings = {"policy_gen": lambda: policy_gen_speed(policy_gen.Config(), run)}
    for name in [name for name in names if name != "--add"] or settings:
        rates = settings[name]()
        print(json.dumps({name: rates}), flush=True)
        if add:
            path = pathlib.Path(__file__).parent.parent / "results" / name / "summary.json"
            summary = json.loads(path.read_text())
            summary["rates"]["speed"] = {"command": f"python tests/speed.py {name} --add", **rates}
            path.write_text(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
