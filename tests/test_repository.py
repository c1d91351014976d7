"""What holds for the whole set: imports, the shared section 8, the README, the headers."""
import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = [name for name in ("gpl_icl", "vsml", "metagenrl", "rcgvf", "policy_gen", "bayes_meta")
           if (ROOT / f"{name}.py").exists()]
BANNERS = ["CONFIGURATION", "TASKS", "MODEL", "LEARNING RULE", "TRAINING", "EVALUATION", "FIGURE", "RUN"]
PACKAGES = {"numpy", "torch", "matplotlib", "tqdm"}


def text(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_only_the_four_packages_and_no_other_script(name):
    tree = ast.parse(text(name))
    top = {node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = {node.module.split(".")[0]}
        else:
            continue
        bridges = set() if node in top else {"gymnasium", "minigrid"}   # inside a function that can do without
        assert modules <= set(sys.stdlib_module_names) | PACKAGES | bridges


@pytest.mark.parametrize("name", SCRIPTS)
def test_eight_sections_in_order(name):
    assert re.findall(r"^# -+ \d\. ([A-Z ]+?) -+$", text(name), re.M) == BANNERS


def test_section_8_is_the_same_text_everywhere():
    sections = {re.search(r"^# -+ 8\. RUN.*", text(name), re.M | re.S)[0] for name in SCRIPTS}
    assert len(sections) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_runs_nothing(name, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_public_functions_have_docstrings(name):
    for node in ast.parse(text(name)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("Config",):
            assert ast.get_docstring(node), node.name


def versions(requirement_lines):
    return {re.split(r"[=><]=", line)[0]: tuple(map(int, re.split(r"[=><]=", line)[1].split(".")))
            for line in requirement_lines}


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_names_the_four_packages_of_the_requirements(name):
    header = re.search(r'^# dependencies = \[(.*)\]$', text(name), re.M)[1]
    lower = versions(re.findall(r'"([^"]+)"', header))
    exact = versions((ROOT / "requirements.txt").read_text().split())
    assert set(lower) == set(exact) == PACKAGES
    assert all(lower[package] <= exact[package] for package in PACKAGES)


def test_readme_shows_every_script_and_its_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f"{name}.py" in readme and f"results/{name}/figure.png" in readme
        for file in ("figure.png", "summary.json"):
            assert (ROOT / "results" / name / file).exists()
    for page in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text_of_page = page.read_text(encoding="utf-8")
        for path in re.findall(r"\]\(([^)#:]+)\)", text_of_page) + re.findall(r'(?:src|href)="([^":]+)"', text_of_page):
            assert (page.parent / path).exists(), path
    assert 150 <= readme.count("\n") <= 220
    for name in SCRIPTS:
        lines = str(text(name).count("\n"))
        assert re.search(rf"^\| \[{name}\.py\].*\| {lines} \|$", readme, re.M), f"{name}.py has {lines} lines"


def test_every_result_is_in_the_long_table():
    """results/README.md names each folder, with a command that makes it."""
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    for folder in (path for path in (ROOT / "results").iterdir() if path.is_dir()):
        assert f"--out results/{folder.name}\n" in page, folder.name
        assert (folder / "summary.json").exists() and (folder / "figure.png").exists()


def test_readme_commands_exist():
    """Every option in a README command is one of the script's."""
    readme = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "results/README.md"))
    readme = readme.replace("\\\n", " ")
    commands = re.findall(r"(?<!tests/)\b(\w+)\.py((?: +--?[\w-]+(?: +[^-\s`#&]\S*)?)+)", readme)
    assert commands
    for name, options in commands:
        assert name in SCRIPTS, name
        source = text(name)
        for option in re.findall(r"--[\w-]+", options):
            field = option[2:].removeprefix("no-").replace("-", "_")
            assert f'"{option}"' in source or re.search(rf"^    {field}: ", source, re.M) or \
                option == "--no-compile", f"{name}.py {option}"


def test_ci_runs_the_readme_test_command():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for part in ("-r requirements.txt -r tests/requirements.txt", ".venv/bin/python -m pytest"):
        assert part in readme and part in ci
