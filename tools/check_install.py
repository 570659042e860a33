"""Whether an installed package works by itself, without a network: `make test-install`, in an empty environment.

    python tools/check_install.py README.md

It runs the README's first snippet, asks for every public name, and runs the quickstart in an empty folder: `onelora
train-dit`, and what that prints as the next commands; then two processes of the same by `accelerate launch -m`.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Nothing can be fetched by a process that has these.
OFFLINE = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")}


def main() -> None:
    os.environ.update(OFFLINE)

    def refuse(*arguments):
        raise OSError("there is no network here")

    socket.socket.connect = refuse  # before anything is imported that might keep it
    import onelora_diffusion

    where = Path(onelora_diffusion.__file__)
    if not where.is_relative_to(sys.prefix):
        raise SystemExit(f"check_install.py: {where} is not of this environment")
    readme = Path(sys.argv[1]).read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    print(f"README's first snippet: {onelora_diffusion.count_trainable(names['transformer']):,} trained weights")
    public = [getattr(onelora_diffusion, name) for name in onelora_diffusion.__all__]
    print(f"{len(public)} public names; version {onelora_diffusion.__version__} in {where.parent}")
    with tempfile.TemporaryDirectory() as folder:
        quickstart(Path(folder))


def quickstart(folder: Path) -> None:
    """Runs the commands of a few updates and images in an empty folder."""
    short = "--max-steps 4 --batch-size 8 --sample-every 0"
    printed = run(f"onelora train-dit {short}", folder).splitlines()
    sample, evaluate = (line.strip() for line in printed[printed.index("Next:") + 1 :])
    run(f"{sample} --per-class 1 --num-inference-steps 2", folder)
    run(f"{evaluate} --num-images 20 --num-inference-steps 2", folder)
    accelerate = f"'{sys.executable}' -m accelerate.commands.launch --num_processes 2 --cpu"
    run(f"{accelerate} -m onelora_diffusion.cli.train_dit {short} --output-dir runs/two", folder)
    print("written:", *sorted(str(path.relative_to(folder)) for path in folder.glob("runs/*/*.*")))


def run(command: str, folder: Path) -> str:
    """What a command prints, in a shell that finds this environment's programs first; SystemExit where it fails."""
    print(command, flush=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"check_install.py: it ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
