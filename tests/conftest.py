"""Lets the tests import the scripts, which lie beside this folder."""
import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")        # before torch: two threads wait for each other on a busy machine

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
