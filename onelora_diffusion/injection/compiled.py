"""Code that was compiled before hooks came or went: torch.compile takes those of a module for unchanging."""

import sys

import torch


def anything_is_compiled() -> bool:
    """Whether this process has run compiled code, of this model or another."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    return convert_frame is not None and bool(convert_frame.input_codes.seen)


def forget_compiled() -> None:
    """Let whatever is compiled be compiled again when it runs next, from modules as they are then."""
    if anything_is_compiled():
        torch._dynamo.reset_code_caches()
