"""What holds for every script: its form, its command line, its runs; the README against the results."""
import ast
import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tokenize
from dataclasses import dataclass

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ["gpl_icl", "bayes_meta", "nonstationary", "vsml", "rcgvf", "policy_gen", "metagenrl", "symla", "model_gen"]
LINES = {"gpl_icl": 650, "bayes_meta": 700, "nonstationary": 650, "vsml": 750, "rcgvf": 800, "policy_gen": 700,
         "metagenrl": 800, "symla": 650, "model_gen": 700, "mean_field": 700, "modular": 650, "speech_transfer": 750}
DIVERGES = {"nonstationary": ["--transformer-rate", "1e9", "--networks", "sincos:lin"],   # else --learning-rate 1e9
            "bayes_meta": ["--predict-rate", "1e9", "--families", "gaussian"],
            "vsml": ["--learning-rate", "1e38"],             # its logits are bounded
            "policy_gen": ["--evaluator-rate", "1e9"],
            "metagenrl": ["--critic-rate", "1e9"],
            "symla": ["--learning-rate", "1e38"],
            "model_gen": ["--model-rate", "1e9"]}
BANNERS = ["CONFIGURATION", "TASKS", "MODEL", "LEARNING RULE", "TRAINING", "EVALUATION", "FIGURE", "RUN"]
PARTS = ["IDEA", "ALGORITHM", "SYMBOLS", "RESULT", "DIFFERS", "RUN"]
PACKAGES = {"numpy", "torch", "matplotlib", "tqdm"}

every = pytest.mark.parametrize(             # the tests of a script share a process, and its finished run
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SCRIPTS])


def text(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def start(name, *options, folder, launcher=(), **variables):
    """The script as a process of its own, one thread -> Popen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / f"{name}.py"), *map(str, options)], cwd=folder,
                            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(*arguments, **more):
    """-> status, stdout, stderr of `start`."""
    process = start(*arguments, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def results(folder):
    """What a run found out, without its time and its name."""
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["per_seed"]:
        del row["minutes"]
    return summary["headline"], summary["per_seed"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(name) -> the folder of an uninterrupted smoke run of seeds 0 and 1."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "run"
            status, _, err = finish(name, "--preset", "smoke", "--num-seeds", 2, "--out", folders[name], folder=ROOT)
            assert status == 0, err
        return folders[name]
    return folder_of


def refused(name, *options):
    """The one line with which main refuses these options."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(list(map(str, options)))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# ---- form ----

@every
def test_imports_only_the_four_packages_and_no_other_script(name):
    tree = ast.parse(text(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = {node.module.split(".")[0]}
        else:
            continue
        bridges = {"gymnasium"} if name == "policy_gen" and node not in tree.body else set()
        assert modules <= set(sys.stdlib_module_names) | PACKAGES | bridges


@every
def test_eight_sections_in_order(name):
    assert re.findall(r"^# -+ \d\. ([A-Z ]+?) -+$", text(name), re.M) == BANNERS


def test_what_scripts_share_is_the_same_text():
    sections = {re.search(r"^# -+ 8\. RUN.*", text(name), re.M | re.S)[0] for name in SCRIPTS}
    assert len(sections) == 1 and sections.pop().count("\n") <= 215
    for function in ("lines", "before"):
        definitions = {found[0] for name in SCRIPTS if (found := re.search(rf"^def {function}\(.*?(?=\n\n\n)", text(name),
                                                                         re.M | re.S))}
        assert len(definitions) == 1, function


@every
def test_docstring_has_its_parts_in_order(name):
    words = ast.get_docstring(ast.parse(text(name)))
    assert words.split("\n")[0].endswith(", in one file.")
    assert re.findall(rf"^({'|'.join(PARTS)})\b", words, re.M) == PARTS
    for head in ("SYMBOLS, in the code, shape or meaning", "RESULT (quick: seeds 0-"):
        assert f"\n{head}" in words


@every
def test_length_and_density(name):
    lines = text(name).splitlines()
    assert len(lines) <= LINES[name]
    assert max(map(len, lines)) <= 100
    tree = ast.parse(text(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
    for block in (getattr(node, part) for node in ast.walk(tree) for part in ("body", "orelse", "finalbody")
                  if isinstance(getattr(node, part, None), list)):
        assert all(a.end_lineno < b.lineno for a, b in zip(block, block[1:])), "two statements on a line"
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    assert sum(isinstance(node, ast.AnnAssign) for node in config.body) <= 25


@every
def test_three_lines_in_ten_explain(name):
    """Of the lines that are not blank: docstrings, comments, trailing ones counted."""
    explained = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(text(name)).readline)
                 if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            explained |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    filled = [n for n, line in enumerate(text(name).splitlines(), 1) if line.strip()]
    assert 0.3 <= len(explained.intersection(filled)) / len(filled) <= 0.4


@every
def test_public_functions_have_docstrings(name):
    for node in ast.parse(text(name)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


@every
def test_importing_runs_nothing(name, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def versions(requirement_lines):
    return {re.split(r"[=><]=", line)[0]: tuple(map(int, re.split(r"[=><]=", line)[1].split(".")))
            for line in requirement_lines}


@every
def test_header_names_the_four_packages_of_the_requirements(name):
    header = re.search(r'^# dependencies = \[(.*)\]$', text(name), re.M)[1]
    lower = versions(re.findall(r'"([^"]+)"', header))
    exact = versions((ROOT / "requirements.txt").read_text().split())
    assert set(lower) == set(exact) == PACKAGES
    assert all(lower[package] <= exact[package] for package in PACKAGES)


# ---- command line ----

@every
def test_help_explains_every_option_in_every_preset(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option, note in re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", text(name), re.M):
        assert f"--{option.replace('_', '-')}" in shown and " ".join(note.split()) in shown, option
        for preset in script.PRESETS.values():
            assert str(preset.get(option, "")) in shown
    assert "--no-compile" in shown and "smoke" in shown


@dataclass(frozen=True)
class Odd:
    seed: int = 0                # first seed
    sizes: tuple = (1, 2)        # no type of an option


def test_a_field_of_another_type_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.import_module(SCRIPTS[0]), "Config", Odd)
    assert "Config.sizes" in refused(SCRIPTS[0])


@every
def test_bad_input_gives_one_line_and_writes_nothing(name, tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    assert "--no-such-option" in refused(name, "--no-such-option")
    assert "--seed" in refused(name, "--seed", "first")
    assert "--preset" in refused(name, "--preset", "huge")
    assert "--num-seeds" in refused(name, "--num-seeds", 0)
    assert "--log-every" in refused(name, "--log-every", 0)
    assert "nowhere" in refused(name, "--resume", "nowhere")
    assert "nowhere" in refused(name, "--replot", "nowhere")
    assert "settings" in refused(name, "--resume", finished(name), "--seed", 3)
    assert "settings" in refused(name, f"--resume={finished(name)}", "--seed=3")
    if not torch.cuda.is_available():
        assert "--device" in refused(name, "--device", "cuda")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert "mine" in refused(name, "--out", "mine")
    refused(name, "--resume", "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "config.json"]


@every
def test_logging_changes_no_number(name, tmp_path, finished):
    """The last row of each stage, of a run that logs as rarely as it can."""
    script, folder = importlib.import_module(name), tmp_path / "run"
    with contextlib.redirect_stdout(None):
        script.main(["--preset", "smoke", "--device", "cpu", "--log-every", "40", "--out", str(folder)])
    last, expected = ({row["stage"]: row for row in map(json.loads, path.read_text().splitlines())}
                      for path in (folder / "seed0.jsonl", finished(name) / "seed0.jsonl"))
    assert last == expected


@every
def test_as_a_process_it_ends_with_one_line_on_stderr(name, tmp_path):
    status, out, err = finish(name, "--seed", "first", folder=tmp_path)
    assert status == 1 and out == "" and err.count("\n") == 1 and not list(tmp_path.iterdir())


# ---- runs ----

@every
def test_killed_and_resumed_equals_uninterrupted(name, tmp_path, finished):
    expected, folder = results(finished(name)), tmp_path / "run"
    process = start(name, "--preset", "smoke", "--num-seeds", 2, "--out", folder, folder=tmp_path)
    deadline = time.time() + 120
    while len(list(folder.glob("*.pt"))) < 2 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    status, _, err = finish(name, "--resume", folder, folder=tmp_path)
    assert status == 0, err
    assert results(folder) == expected
    for log in folder.glob("*.jsonl"):
        assert log.read_text() == (finished(name) / log.name).read_text()


@every
def test_a_checkpoint_cut_in_half_is_named(name, tmp_path, finished, monkeypatch):
    shutil.copytree(finished(name), tmp_path / "run")
    file = next((tmp_path / "run").glob("seed0*.pt"))
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert str(file) in refused(name, "--resume", tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@every
def test_processes_divide_the_seeds(name, tmp_path, finished):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    status, out, err = finish(name, "--preset", "smoke", "--num-seeds", 2, "--out", tmp_path / "run",
                              folder=tmp_path, launcher=launcher)
    assert status == 0, err
    assert results(tmp_path / "run") == results(finished(name))
    assert out.count("figure.png") == 1


@every
def test_same_seed_same_numbers_in_a_strange_environment(name, tmp_path, finished):
    """Variables that a notebook or a launcher may leave behind."""
    status, out, err = finish(name, "--preset", "smoke", "--seed", 1, folder=tmp_path, MPLBACKEND="module://missing",
                              RANK="3", WORLD_SIZE="", LOCAL_RANK="")
    assert status == 0, err
    again, expected = results(tmp_path / "runs" / name / "smoke-1")[1], results(finished(name))[1]
    assert again == expected[1:] != expected[:1]             # other seeds, other numbers


@every
def test_main_in_a_thread_leaves_the_process_as_it_was(name, tmp_path, monkeypatch):
    import matplotlib
    monkeypatch.setenv("MPLBACKEND", "agg")
    script = importlib.import_module(name)
    state = lambda: (torch.get_rng_state().tolist(), dict(matplotlib.rcParams), signal.getsignal(signal.SIGINT),
                     {key: value for key, value in os.environ.items() if not key.startswith("TORCH")},
                     torch.get_default_dtype(), torch.is_grad_enabled())
    before, failures = state(), []

    def work():
        try:
            with contextlib.redirect_stdout(None):
                script.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "run")])
        except BaseException as error:
            failures.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and state() == before


@every
def test_a_diverging_rate_stops_with_step_and_seed(name, tmp_path):
    status, _, err = finish(name, "--preset", "smoke", "--log-every", 1, *DIVERGES.get(name, ["--learning-rate", "1e9"]),
                            folder=tmp_path)
    assert status == 1 and err.count("\n") == 1 and re.match(r"seed 0 \S+ \d+/\d+: not finite", err), err


@every
def test_a_seed_that_cannot_begin_costs_nothing(name, tmp_path, monkeypatch):
    """Bad data leave no folder behind; what earlier seeds have done stays."""
    script = importlib.import_module(name)

    def experiment(cfg, run):
        if run.seed == 1:
            raise OSError("no such file")
        for _ in run.steps("stage", 1, weights=torch.zeros(2)):
            run.log(loss=1.0)
        return {"headline": {"loss": 1.0}}
    monkeypatch.setattr(script, "experiment", experiment)
    assert "no such file" in refused(name, "--out", tmp_path / "bad", "--seed", 1)
    assert "no such file" in refused(name, "--out", tmp_path / "half", "--num-seeds", 2)
    assert not (tmp_path / "bad").exists()
    assert {path.name for path in (tmp_path / "half").iterdir()} == {"config.json", "seed0.jsonl", "seed0-stage.pt"}


@every
def test_replot_draws_the_same_figure(name, tmp_path, finished):
    """In a process of its own: other tests change matplotlib's settings in this one."""
    shutil.copytree(finished(name), tmp_path / "run")
    (tmp_path / "run" / "figure.png").unlink()
    status, out, err = finish(name, "--replot", tmp_path / "run", folder=tmp_path)
    assert status == 0 and "figure.png" in out, err
    same = (tmp_path / "run" / "figure.png").read_bytes() == (finished(name) / "figure.png").read_bytes()
    assert same


@every
def test_interval_is_students(name):
    import scipy.stats
    interval = importlib.import_module(name).interval
    for n in (2, 3, 5, 9, 10, 30):
        values = [float(i * i % 7) for i in range(n)]
        low, high = scipy.stats.t.interval(0.95, n - 1, sum(values) / n, scipy.stats.sem(values))
        ours = interval(values)
        assert ours["mean"] == pytest.approx(sum(ours["ci95"]) / 2) and ours["n"] == n
        assert ours["ci95"][1] - ours["ci95"][0] == pytest.approx(high - low, rel=5e-3)
    assert interval([2.0]) == {"mean": 2.0, "ci95": None, "n": 1, "per_seed": [2.0]}


# ---- README and results ----

def pages():
    return {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", ROOT / "results" / "README.md")}


def test_readme_shows_every_script_and_its_results():
    readme = pages()[ROOT / "README.md"]
    for name in SCRIPTS:
        assert f"results/{name}/figure.png" in readme
        for file in ("figure.png", "summary.json"):
            assert (ROOT / "results" / name / file).exists()
        lines = str(text(name).count("\n"))
        assert re.search(rf"^\| \[{name}\.py\].*\| {lines} \|$", readme, re.M), f"{name}.py has {lines} lines"
    for page, words in pages().items():
        for path in re.findall(r"\]\(([^)#:]+)\)", words) + re.findall(r'(?:src|href)="([^":]+)"', words):
            assert (page.parent / path).exists(), path
    assert readme.count("\n") <= 150


def test_sentences_of_the_readme_are_short():
    prose = re.sub(r"```.*?```|^[|#].*?$|^(?:\*|\d\.) ", "\n\n", pages()[ROOT / "README.md"], flags=re.M | re.S)
    for paragraph in re.split(r"\n\s*\n", prose):
        for sentence in re.split(r"(?<=[.!?])\s", paragraph):
            assert len(sentence.split()) <= 30, sentence


@every
def test_the_published_run_is_of_this_script(name):
    script = importlib.import_module(name)
    for folder in (ROOT / "results").glob(f"{name}*"):
        summary = json.loads((folder / "summary.json").read_text())
        assert set(summary["config"]) == set(script.Config.__dataclass_fields__), folder
        assert f"{name}.py" in summary["command"]


@every
def test_numbers_of_readme_and_docstring_are_those_of_the_summaries(name):
    """Each `mean [low, high]` stands, rounded, in a summary of this script; the docstring has three at least."""
    rows = [row for folder in (ROOT / "results").glob(f"{name}*")
            for row in json.loads((folder / "summary.json").read_text())["headline"].values() if row["ci95"]]
    readme, long = pages().values()
    texts = {"docstring": ast.get_docstring(ast.parse(text(name))),
             "README.md": re.search(rf"^\| \[{name}\.py\].*$", readme, re.M)[0],
             "results/README.md": re.search(rf"^## {name}\.py$(.*?)(^## |\Z)", long, re.M | re.S)[1]}
    for place, words in texts.items():
        triples = re.findall(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", words)
        assert len(triples) >= (3 if place == "docstring" else 1), place
        for triple in triples:
            digits = len(triple[0].partition(".")[2])
            assert any([f"{x:.{digits}f}" for x in (row["mean"], *row["ci95"])] == list(triple) for row in rows), \
                (place, triple)


def test_every_result_is_in_the_long_table():
    """results/README.md names each folder, with a command that makes it."""
    page = pages()[ROOT / "results" / "README.md"]
    for folder in (path for path in (ROOT / "results").iterdir() if path.is_dir()):
        assert f"--out results/{folder.name}\n" in page, folder.name
        assert (folder / "summary.json").exists() and (folder / "figure.png").exists()


def test_readme_commands_exist():
    """Every option in a README command is one of the script's."""
    commands = re.findall(r"(?<!tests/)\b(\w+)\.py((?: +--?[\w-]+(?: +[^-\s`#&]\S*)?)+)",
                          "\n".join(pages().values()).replace("\\\n", " "))
    assert commands
    for name, options in commands:
        for option in re.findall(r"--[\w-]+", options):
            field = option[2:].removeprefix("no-").replace("-", "_")
            assert f'"{option}"' in text(name) or re.search(rf"^    {field}: ", text(name), re.M) or \
                option == "--no-compile", f"{name}.py {option}"


def test_ci_runs_the_readme_test_command():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for part in ("-r requirements.txt -r tests/requirements.txt", ".venv/bin/python -m pytest"):
        assert part in readme and part in ci
