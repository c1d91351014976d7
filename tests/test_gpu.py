"""On a machine with one NVIDIA GPU:  python -m pytest tests/test_gpu.py -s

For each script: `smoke` on CUDA equals the CPU, compiled equals eager, `paper` makes its first steps. The table at
the end has the largest differences, the rate and the memory of `paper`, and the hours that it would take.
"""
import contextlib
import importlib
import json
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

SCRIPTS = ["gpl_icl", "bayes_meta", "nonstationary", "vsml", "rcgvf", "policy_gen", "metagenrl", "symla", "model_gen"]
PAPER = {"gpl_icl": ["--data-dir", ""],          # what `paper` needs in order to run without files, and soon
         "vsml": ["--data", "fields", "--test", "", "--test-length", "200", "--log-every", "1"]}
TABLE = {}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    for name, row in TABLE.items():
        print(f"\n{name:<14}" + "  ".join(f"{key} {value}" for key, value in row.items()), end="")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}" if TABLE else "")


class OneRandomness(TorchFunctionMode):
    """Draws random numbers on the CPU and moves them, so that CUDA sees those that a run on the CPU sees."""
    makers = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}
    likes = {torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, torch.multinomial}
    fillers = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_, torch.Tensor.random_,
               torch.Tensor.bernoulli_, torch.Tensor.cauchy_, torch.Tensor.geometric_, torch.Tensor.log_normal_}

    def __init__(self):
        super().__init__()
        self.twins = {}                      # CUDA generator -> (itself, CPU generator of the same seed)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cuda":
            twin = torch.Generator().manual_seed(generator.initial_seed())
            kwargs["generator"] = self.twins.setdefault(id(generator), (generator, twin))[1]
        if function in self.makers and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if function in self.likes and args[0].is_cuda:
            return function(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        if function in self.fillers and args[0].is_cuda:
            drawn = function(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs)
            return args[0].copy_(drawn)
        return function(*args, **kwargs)


def smoke_rows(name, folder, *options, mode=contextlib.nullcontext):
    """Run `smoke` in this process -> the rows of its log."""
    script = importlib.import_module(name)
    with mode():
        script.main(["--preset", "smoke", "--out", str(folder), *options])
    return [json.loads(line) for line in (folder / "seed0.jsonl").read_text().splitlines()]


def largest_difference(rows, others):
    """Over the first row of each stage: |a - b| / max(1, |a|)."""
    first = {row["stage"]: row for row in reversed(rows)}
    second = {row["stage"]: row for row in reversed(others)}
    assert first.keys() == second.keys()
    return max(abs(value - second[stage][key]) / max(1, abs(value))
               for stage, row in first.items() for key, value in row.items() if isinstance(value, float))


@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_agrees_with_the_cpu(name, tmp_path):
    cpu = smoke_rows(name, tmp_path / "cpu", "--device", "cpu")
    cuda = smoke_rows(name, tmp_path / "cuda", "--device", "cuda", "--no-compile", mode=OneRandomness)
    difference = largest_difference(cpu, cuda)
    TABLE.setdefault(name, {})["CUDA-CPU"] = f"{difference:.1e}"
    assert difference < 0.02                 # TF32 keeps three digits


@pytest.mark.parametrize("name", SCRIPTS)
def test_compiled_agrees_with_eager(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)        # eager's random numbers
    eager = smoke_rows(name, tmp_path / "eager", "--device", "cuda", "--no-compile")
    compiled = smoke_rows(name, tmp_path / "compiled", "--device", "cuda", "--compile")
    difference = largest_difference(eager, compiled)
    TABLE.setdefault(name, {})["compiled-eager"] = f"{difference:.1e}"
    assert difference < 0.02


@pytest.mark.parametrize("name", SCRIPTS)
def test_paper_makes_its_first_steps(name, tmp_path, monkeypatch):
    """20 steps of each stage, fewer when they are slow; those after the first half are timed."""
    script, seconds, total_steps = importlib.import_module(name), {}, {}
    all_steps = script.Run.steps

    def first_steps(run, stage, total, **state):
        total_steps[stage], run.save_every, times = total, 10**9, []
        for step in all_steps(run, stage, total, **state):
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            middle = len(times) // 2
            seconds[stage] = (times[-1] - times[middle]) / max(1, len(times) - 1 - middle)
            yield step
            if len(times) == 20 or len(times) > 3 and times[-1] - times[0] > 30:
                return

    monkeypatch.setattr(script.Run, "steps", first_steps)
    monkeypatch.setattr(script, "show", lambda folder: None)     # no figure of a training cut short
    torch.cuda.reset_peak_memory_stats()
    script.main(["--preset", "paper", "--log-every", "10", "--device", "cuda", "--out", str(tmp_path / "paper"),
                 *PAPER.get(name, [])])
    hours = sum(total_steps[stage] * seconds[stage] for stage in seconds) / 3600
    slowest = max(seconds, key=seconds.get)
    TABLE.setdefault(name, {}).update({
        "paper": f"{1 / min(seconds.values()):.1f} steps/s ({slowest}: {1 / seconds[slowest]:.2g})",
        "memory": f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
        "hours": f"{hours:.1f} for {len(seconds)} stages"})
    assert seconds
