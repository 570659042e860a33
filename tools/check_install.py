"""Whether an installed package works by itself, without a network: `make test-install`, in an empty environment.

    python tools/check_install.py README.md

It runs the README's first snippet, and asks for every public name.
"""

import os
import re
import socket
import sys
from pathlib import Path


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"

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


if __name__ == "__main__":
    main()
