"""`onelora sample`, from a checkout: see onelora_diffusion/cli/sample.py."""

import sys

from onelora_diffusion.cli.sample import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
