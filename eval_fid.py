"""`onelora eval-fid`, from a checkout: see onelora_diffusion/cli/eval_fid.py."""

import sys

from onelora_diffusion.cli.eval_fid import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
