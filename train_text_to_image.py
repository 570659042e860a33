"""`onelora train-text-to-image`, from a checkout: see onelora_diffusion/cli/train_text_to_image.py."""

import sys

from onelora_diffusion.cli.train_text_to_image import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
