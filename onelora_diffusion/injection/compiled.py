"""Recompile after hooks were added or removed, since torch.compile assumes that a module's hooks do not change."""

import sys

import torch


def anything_is_compiled() -> bool:
    """Whether this process has run compiled code, of this model or another."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    return convert_frame is not None and bool(convert_frame.input_codes.seen)


def forget_compiled() -> None:
    """Discard all compiled code, which is compiled again when it runs next."""
    if anything_is_compiled():
        torch._dynamo.reset_code_caches()
