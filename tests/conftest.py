"""Lets the tests import the scripts, which lie beside this folder, and run them as a reader would."""
import os
import pathlib
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")        # before torch: two threads wait for each other on a busy machine

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def script(tmp_path):
    """script("gpl_icl.py", ...) runs it in an empty folder -> CompletedProcess; wait=False -> Popen.

    One thread each: models this small gain nothing from two, and two scripts may run side by side.
    """
    def start(name, *options, wait=True, launcher=(), **more):
        command = [sys.executable, *launcher, str(ROOT / name), *map(str, options)]
        kind = dict(cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}) | more
        return subprocess.run(command, **kind) if wait else subprocess.Popen(command, **kind)
    return start
