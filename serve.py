"""`onelora serve`, from a checkout: see onelora_diffusion/cli/serve.py."""

import sys

from onelora_diffusion.cli.serve import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
