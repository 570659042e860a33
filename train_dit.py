"""`onelora train-dit`, from a checkout: see onelora_diffusion/cli/train_dit.py."""

import sys

from onelora_diffusion.cli.train_dit import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
