"""Small pipelines as diffusers' own tests make them, of a checkout of its repository; what those load, is made here.

The components of a test (`get_dummy_components`) are random, but for tokenizers and some text encoders, which it would
load: there ours of the same width take their place, and nothing is downloaded.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLWan
from tiny_models import CHAT, LAYERS, TOKENS, make_encoder, make_qwen_vl, make_t5, make_tokenizer, make_vae
from torch import nn

from onelora_diffusion.denoisers import DENOISERS
from onelora_diffusion.families.arguments import same
from onelora_diffusion.families.recording import ASKED, LONG, SHORT, Recorder
from onelora_diffusion.files import first_line
from tools.stock_calls import NotMadeError

TRIED_SIDE = 64
# What a recording asks for by itself, of a call's arguments.
RECORDED = {*ASKED, "height", "width", "num_inference_steps", "num_frames", "return_dict"}
WIDTH = 32  # of the tests' own small text encoders
DEVELOPERS = ("parameterized", "requests_mock")  # which tests import, and making components does not need


def pipelines_in(folder: Path) -> Iterator[tuple[str, Callable]]:
    """The name of each pipeline class that has a test in a checkout of diffusers, and what makes a small one."""
    sys.path.insert(0, str(folder))
    for name in DEVELOPERS:
        sys.modules.setdefault(name, mock.MagicMock())
    for path in sorted((folder / "tests" / "pipelines").glob("*/test_*.py")):
        if "def get_dummy_components" not in path.read_text() or "onnx" in path.name:
            continue
        module = importlib.import_module(".".join(path.relative_to(folder).with_suffix("").parts))
        for case in vars(module).values():
            is_own = isinstance(case, type) and case.__module__ == module.__name__
            is_made = is_own and hasattr(case, "get_dummy_components")
            if is_made and isinstance(getattr(case, "pipeline_class", None), type):
                yield case.pipeline_class.__name__.removesuffix("Wrapper"), lambda case=case: made(case)


def made(case: type):
    """The pipeline of a test case, with our own tokenizers."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)  # what is not initialised is NaN then
        for cls in (transformers.PreTrainedTokenizerBase, transformers.AutoTokenizer):
            stack.enter_context(mock.patch.object(cls, "from_pretrained", classmethod(_tokenizer)))
        stack.enter_context(mock.patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(_model)))
        stack.enter_context(mock.patch.object(transformers.AutoConfig, "from_pretrained", classmethod(_config)))
        for cls in (transformers.AutoProcessor, transformers.ProcessorMixin):
            stack.enter_context(mock.patch.object(cls, "from_pretrained", classmethod(_processor)))
        test = case()
        try:
            pipeline = _asked_as(case, test)(**test.get_dummy_components())
        except Exception as error:  # whatever a test needs that nothing here gives
            raise NotMadeError(first_line(error)) from error
    scheduler = pipeline.scheduler
    if getattr(scheduler.config, "use_flow_sigmas", False):  # what such sigmas are for, and tests of shapes do not say
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type="flow_prediction")
    vae = getattr(pipeline, "vae", None)
    if isinstance(vae, AutoencoderKL) and len(vae.config.block_out_channels) == 1 and pipeline.vae_scale_factor == 8:
        pipeline.vae = make_vae(
            vae.config.latent_channels, levels=4
        )  # the pipeline counts on its eight pixels a latent
    if isinstance(vae, AutoencoderKLWan) and vae.config.patch_size:  # of patches, and not made to encode; of gigabytes
        small = {"in_channels": vae.config.out_channels, "base_dim": 8, "decoder_base_dim": 8}
        pipeline.vae = AutoencoderKLWan.from_config(vae.config, **small)
    _fit(pipeline, getattr(pipeline, "vae", None))
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.eval()
            for parameter in part.parameters() if name in DENOISERS else ():
                # As gates and outputs are made, through which nothing would be seen; or it is what was in memory.
                if not parameter.any() or parameter.isnan().any():
                    nn.init.normal_(parameter, std=0.1)
            for embedding in part.modules() if name.startswith("text_encoder") else ():
                if isinstance(embedding, nn.Embedding):  # of fewer tokens than our tokenizers have
                    embedding.register_forward_pre_hook(lambda own, args: (args[0] % own.num_embeddings,))
    pipeline.set_progress_bar_config(disable=True)
    if _is_cut(pipeline):
        pipeline.__class__ = _asked_as(case, test, {"max_sequence_length"})
    return pipeline


def _fit(pipeline, vae) -> None:
    """Let a pipeline of clips count on as many pixels and frames a latent as its small autoencoder makes of them."""
    if not hasattr(pipeline, "vae_scale_factor_spatial") or not hasattr(vae, "encode"):
        return
    try:
        with torch.no_grad():
            (encoded,) = vae.encode(torch.zeros(1, 3, 25, 64, 64), return_dict=False)
    except Exception:  # whatever an autoencoder refuses by: it has sizes of its own
        return
    frames, _, side = (encoded if isinstance(encoded, torch.Tensor) else encoded.mode()).shape[-3:]
    pipeline.vae_scale_factor_spatial = 64 // side
    if frames > 1:
        pipeline.vae_scale_factor_temporal = 24 // (frames - 1)


def _asked_as(case: type, test, but: Collection[str] = ()) -> type:
    """The pipeline's class with the test's settings as defaults, such as lengths of prompts and layers of encoders.

    Small transformers have no more places, and small encoders no other layers.
    """
    cls, takes_device = case.pipeline_class, inspect.signature(test.get_dummy_inputs).parameters
    signature = inspect.signature(cls.__call__)
    settings = {
        name: value
        for name, value in test.get_dummy_inputs(*["cpu"] * bool(takes_device)).items()
        if name in signature.parameters.keys() - RECORDED - {*but}
        and isinstance(value, int | tuple)
        and "guidance" not in name
    }

    def call(self, *args, **kwargs):
        return cls.__call__(self, *args, **settings | kwargs)

    own = [p.replace(default=settings.get(p.name, p.default)) for p in signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=own)
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _is_cut(pipeline) -> bool:
    """Whether two prompts are the same to the denoiser: our tokenizer has a token for each letter of a template."""
    off = {"guidance_scale": 1.0, "true_cfg_scale": 1.0}
    try:
        short, long = (Recorder(pipeline).run(each, (TRIED_SIDE,) * 2, **off).calls[0] for each in (SHORT, LONG))
    except Exception:  # whatever has no place in a recording
        return False
    return all(same(short[name], long.get(name)) for name in short)


def _tokenizer(cls, name: str, *args, **kwargs):
    tokenizer = make_tokenizer(77 if "CLIP" in cls.__name__ else 512, CHAT)
    tokenizer.padding_side = "left" if "gemma" in name else "right"
    return tokenizer


def _config(cls, *args, **kwargs):
    return make_t5(WIDTH).config


def _model(cls, name: str, *args, **kwargs):
    kind = cls.__name__
    small = {**TOKENS, "hidden_size": WIDTH, **LAYERS}
    if kind in ("T5EncoderModel", "UMT5EncoderModel"):
        return make_t5(WIDTH, kind)
    if kind == "BertModel":
        return make_encoder(kind, **small)
    if kind == "LlamaForCausalLM":
        return make_encoder(kind, **small | {"hidden_size": WIDTH // 2})
    if kind == "Qwen2VLForConditionalGeneration":
        rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        return make_qwen_vl(kind, WIDTH // 2, rope, {})
    if kind == "Gemma3ForConditionalGeneration":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return make_encoder(kind, text_config=small | {"head_dim": 16}, vision_config=sizes)
    raise NotMadeError(f"nothing here stands in for a {kind}")


def _processor(cls, *args, **kwargs):
    """A processor that is given text alone is its tokenizer."""
    return make_tokenizer(512, CHAT)
