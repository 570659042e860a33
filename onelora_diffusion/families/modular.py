"""A modular pipeline of diffusers with the face of a pipeline, by which it is recorded."""

import inspect
from pathlib import Path

from onelora_diffusion.denoisers import DENOISERS
from onelora_diffusion.families.family import encodes_prompts


class Modular:
    """What a modular pipeline lacks: a call with a signature, and `encode_prompt`, its blocks that encode prompts."""

    def encode_prompt(self, state, name: str) -> list:
        """The outputs of the block `name`, run on a state."""
        block = self._encoding[name]
        _, state = block(self, state)
        return [state.get(output.name) for output in block.intermediate_outputs]

    def register_modules(self, **parts) -> None:
        self.register_components(**parts)


class _Encoding:
    """In the place of a block that encodes prompts: what its pipeline's `encode_prompt` returns."""

    def __init__(self, name: str, block):
        vars(self).update(name=name, block=block)

    def __getattr__(self, name: str):
        return getattr(self.block, name)

    def __call__(self, pipeline, state):
        values = pipeline.encode_prompt(state, self.name)
        for output, value in zip(self.block.intermediate_outputs, values, strict=True):
            state.set(output.name, value, output.kwargs_type)
        return pipeline, state


def load_modular(folder: Path, **settings):
    """The modular pipeline in a folder, with its components, as one that can be recorded.

    Args:
        settings: of the components' `from_pretrained`; a dictionary has them by component.

    Raises:
        ValueError: a component does not load, or no block of its own encodes prompts.
    """
    from diffusers import ModularPipeline

    pipeline = ModularPipeline.from_pretrained(folder, trust_remote_code=False)
    unused = _without_rewriting(pipeline)
    pipeline.load_components(names=[name for name in pipeline.components if name not in unused], **settings)
    missing = set(pipeline.null_component_names) - unused
    specs = {name: pipeline.get_component_spec(name) for name in sorted(missing)}
    if missing := [name for name, spec in specs.items() if spec.pretrained_model_name_or_path]:
        raise ValueError(f"its {missing[0]} does not")  # diffusers has said why, and goes on
    return as_pipeline(pipeline)


def _without_rewriting(pipeline) -> set[str]:
    """Take out the blocks that put other words for a prompt (FLUX.3's), and return the components of these alone."""
    blocks = pipeline._blocks.sub_blocks
    rewriting = [n for n, block in blocks.items() if "prompt" in [out.name for out in block.intermediate_outputs]]
    parts = {part.name for name in rewriting for part in blocks.pop(name).expected_components}
    return parts - {part.name for part in pipeline._blocks.expected_components}


def as_pipeline(pipeline):
    """A modular pipeline, which is changed, with what a recording asks of a pipeline; ValueError as `load_modular`."""
    _without_rewriting(pipeline)
    kind, blocks = type(pipeline), pipeline._blocks.sub_blocks
    needs = {name: [part.name for part in block.expected_components] for name, block in blocks.items()}
    encoding = [name for name, parts in needs.items() if any(map(encodes_prompts, parts))]
    if not encoding or any(part in DENOISERS for name in encoding for part in needs[name]):
        raise ValueError(f"{kind.__name__} has no block that encodes prompts alone, of {', '.join(blocks)}")

    def call(self, **given):
        return kind.__call__(self, **given)

    parameters = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default)
        for each in pipeline._blocks.inputs
        if each.name
    ]
    call.__signature__ = inspect.Signature(parameters)
    _silence(pipeline._blocks)
    pipeline._encoding = {name: blocks[name] for name in encoding}
    for name in encoding:
        blocks[name] = _Encoding(name, blocks[name])
    pipeline.__class__ = type(kind.__name__, (Modular, kind), {"__call__": call})
    return pipeline


def _silence(blocks) -> None:
    """Blocks do not show their progress."""
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for block in blocks.sub_blocks.values():
        _silence(block)
