"""Scripts as their users start them, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def launch(*command):
    """Runs a script by `accelerate launch` from the repository; returns what it printed."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
