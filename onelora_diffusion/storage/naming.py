"""Names that other programs use for layers: a model's native names, with its fused layers.

The native names are those that diffusers' own converters of checkpoints read (`diffusers.loaders.single_file_utils`).
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import features_of
from onelora_diffusion.injection.layers import is_servable

Naming = Literal["diffusers", "kohya", "comfyui"]

ALL_NAMINGS = get_args(Naming)
COMFYUI = "diffusion_model."  # the prefix of native names in ComfyUI's files
KOHYA = "lora_unet_"  # the prefix of names in kohya's files, which have underscores for dots

# For each class, lines of `native name = diffusers' path`, or of one name that is both. `*` is the number of a block.
# Braces on both sides stand for several lines; braces on the right alone for a native layer that has the rows of those
# layers, in that order.
_DOUBLE_BLOCKS = """
    double_blocks.*.img_attn.qkv = transformer_blocks.*.attn.{to_q,to_k,to_v}
    double_blocks.*.txt_attn.qkv = transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj}
    double_blocks.*.{img,txt}_attn.proj = transformer_blocks.*.attn.{to_out.0,to_add_out}
    img_in = x_embedder
    txt_in = context_embedder
    final_layer.linear = proj_out
"""
_SINGLE_BLOCKS = """
    single_blocks.*.linear1 = single_transformer_blocks.*.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}
    single_blocks.*.linear2 = single_transformer_blocks.*.proj_out
"""
_FLUX_AND_CHROMA = f"""
    {_DOUBLE_BLOCKS}
    {_SINGLE_BLOCKS}
    double_blocks.*.{{img,txt}}_mlp.{{0,2}} = transformer_blocks.*.{{ff,ff_context}}.net.{{0.proj,2}}
"""
TABLES = {
    "FluxTransformer2DModel": f"""
        {_FLUX_AND_CHROMA}
        {{time,guidance}}_in.{{in,out}}_layer = time_text_embed.{{timestep,guidance}}_embedder.linear_{{1,2}}
        vector_in.{{in,out}}_layer = time_text_embed.text_embedder.linear_{{1,2}}
        double_blocks.*.{{img,txt}}_mod.lin = transformer_blocks.*.{{norm1,norm1_context}}.linear
        single_blocks.*.modulation.lin = single_transformer_blocks.*.norm.linear
        final_layer.adaLN_modulation.1 = norm_out.linear
    """,
    "ChromaTransformer2DModel": f"""
        {_FLUX_AND_CHROMA}
        distilled_guidance_layer.{{in,out}}_proj = distilled_guidance_layer.{{in,out}}_proj
        distilled_guidance_layer.layers.*.{{in,out}}_layer = distilled_guidance_layer.layers.*.linear_{{1,2}}
    """,
    "Flux2Transformer2DModel": f"""
        {_DOUBLE_BLOCKS}
        {{time,guidance}}_in.{{in,out}}_layer = time_guidance_embed.{{timestep,guidance}}_embedder.linear_{{1,2}}
        double_stream_modulation_{{img,txt}}.lin = double_stream_modulation_{{img,txt}}.linear
        single_stream_modulation.lin = single_stream_modulation.linear
        double_blocks.*.{{img,txt}}_mlp.{{0,2}} = transformer_blocks.*.{{ff,ff_context}}.linear_{{in,out}}
        single_blocks.*.linear{{1,2}} = single_transformer_blocks.*.attn.{{to_qkv_mlp_proj,to_out}}
        final_layer.adaLN_modulation.1 = norm_out.linear
    """,
    "SD3Transformer2DModel": """
        context_embedder
        {t,y}_embedder.mlp.{0,2} = time_text_embed.{timestep,text}_embedder.linear_{1,2}
        joint_blocks.*.x_block.attn.qkv = transformer_blocks.*.attn.{to_q,to_k,to_v}
        joint_blocks.*.x_block.attn2.qkv = transformer_blocks.*.attn2.{to_q,to_k,to_v}
        joint_blocks.*.context_block.attn.qkv = transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj}
        joint_blocks.*.{x,context}_block.attn.proj = transformer_blocks.*.attn.{to_out.0,to_add_out}
        joint_blocks.*.x_block.attn2.proj = transformer_blocks.*.attn2.to_out.0
        joint_blocks.*.{x,context}_block.adaLN_modulation.1 = transformer_blocks.*.{norm1,norm1_context}.linear
        joint_blocks.*.{x,context}_block.mlp.fc{1,2} = transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}
        final_layer.adaLN_modulation.1 = norm_out.linear
        final_layer.linear = proj_out
    """,
    "WanTransformer3DModel": """
        {time,text}_embedding.{0,2} = condition_embedder.{time,text}_embedder.linear_{1,2}
        time_projection.1 = condition_embedder.time_proj
        img_emb.proj.{1,3} = condition_embedder.image_embedder.ff.net.{0.proj,2}
        blocks.*.{self_attn,cross_attn}.{q,k,v,o} = blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}
        blocks.*.cross_attn.{k,v}_img = blocks.*.attn2.add_{k,v}_proj
        blocks.*.ffn.{0,2} = blocks.*.ffn.net.{0.proj,2}
        head.head = proj_out
    """,
    "HunyuanVideoTransformer3DModel": f"""
        {{time,guidance}}_in.mlp.{{0,2}} = time_text_embed.{{timestep,guidance}}_embedder.linear_{{1,2}}
        vector_in.{{in,out}}_layer = time_text_embed.text_embedder.linear_{{1,2}}
        txt_in.input_embedder = context_embedder.proj_in
        txt_in.t_embedder.mlp.{{0,2}} = context_embedder.time_text_embed.timestep_embedder.linear_{{1,2}}
        txt_in.c_embedder.linear_{{1,2}} = context_embedder.time_text_embed.text_embedder.linear_{{1,2}}
        txt_in.REFINER.*.self_attn_qkv = context_embedder.TO.*.attn.{{to_q,to_k,to_v}}
        txt_in.REFINER.*.self_attn_proj = context_embedder.TO.*.attn.to_out.0
        txt_in.REFINER.*.mlp.fc{{1,2}} = context_embedder.TO.*.ff.net.{{0.proj,2}}
        txt_in.REFINER.*.adaLN_modulation.1 = context_embedder.TO.*.norm_out.linear
        double_blocks.*.img_attn_qkv = transformer_blocks.*.attn.{{to_q,to_k,to_v}}
        double_blocks.*.txt_attn_qkv = transformer_blocks.*.attn.{{add_q_proj,add_k_proj,add_v_proj}}
        double_blocks.*.{{img,txt}}_attn_proj = transformer_blocks.*.attn.{{to_out.0,to_add_out}}
        double_blocks.*.{{img,txt}}_mod.linear = transformer_blocks.*.{{norm1,norm1_context}}.linear
        double_blocks.*.{{img,txt}}_mlp.fc{{1,2}} = transformer_blocks.*.{{ff,ff_context}}.net.{{0.proj,2}}
        {_SINGLE_BLOCKS}
        single_blocks.*.modulation.linear = single_transformer_blocks.*.norm.linear
        final_layer.adaLN_modulation.1 = norm_out.linear
        final_layer.linear = proj_out
    """.replace("REFINER", "individual_token_refiner.blocks").replace("TO", "token_refiner.refiner_blocks"),
    "LTXVideoTransformer3DModel": """
        patchify_proj = proj_in
        adaln_single.linear = time_embed.linear
        adaln_single.emb.timestep_embedder.linear_{1,2} = time_embed.emb.timestep_embedder.linear_{1,2}
        caption_projection.linear_{1,2}
        transformer_blocks.*.attn{1,2}.{to_q,to_k,to_v,to_out.0}
        transformer_blocks.*.ff.net.{0.proj,2}
        proj_out
    """,
    "Lumina2Transformer2DModel": """
        x_embedder
        cap_embedder.1 = time_caption_embed.caption_embedder.1
        t_embedder.mlp.{0,2} = time_caption_embed.timestep_embedder.linear_{1,2}
        BLOCKS.*.attention.qkv = BLOCKS.*.attn.{to_q,to_k,to_v}
        BLOCKS.*.attention.out = BLOCKS.*.attn.to_out.0
        BLOCKS.*.feed_forward.w{1,2,3} = BLOCKS.*.feed_forward.linear_{1,2,3}
        BLOCKS.*.adaLN_modulation.1 = BLOCKS.*.norm1.linear
        final_layer.adaLN_modulation.1 = norm_out.linear_1
        final_layer.linear = norm_out.linear_2
    """,
    "ZImageTransformer2DModel": """
        x_embedder = all_x_embedder.2-1
        cap_embedder.1
        t_embedder.mlp.{0,2}
        BLOCKS.*.attention.qkv = BLOCKS.*.attention.{to_q,to_k,to_v}
        BLOCKS.*.attention.out = BLOCKS.*.attention.to_out.0
        BLOCKS.*.feed_forward.w{1,2,3}
        BLOCKS.*.adaLN_modulation.0
        final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
        final_layer.linear = all_final_layer.2-1.linear
    """,
}
BLOCKS = ("layers", "noise_refiner", "context_refiner")

UNET = "UNet2DConditionModel"
# Classes whose layers ComfyUI reads by diffusers' names after `transformer.`.
BY_DIFFUSERS_NAMES = (
    *("FluxTransformer2DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel"),
    *("PixArtTransformer2DModel", "QwenImageTransformer2DModel", "AuraFlowTransformer2DModel"),
    *("HiDreamImageTransformer2DModel", "Krea2Transformer2DModel"),
)
# The layers of each class that a program reads, by their native names (of a UNet, by diffusers').
TAKEN = {
    "kohya": {
        UNET: r".+_blocks?\..+",
        "FluxTransformer2DModel": r"(double_blocks|single_blocks|img_in|txt_in|time_in|guidance_in|vector_in)\b.*",
        "SD3Transformer2DModel": ".*",
        "Lumina2Transformer2DModel": ".*",
    },
    "comfyui": {UNET: r".+_blocks?\..+|(time|add|class)_embedding\.linear_[12]"} | dict.fromkeys(TABLES, ".*"),
}

# Native layers for which ComfyUI reads a name of its own alone.
COMFYUI_OWN = {
    r"(time_in|guidance_in|txt_in\.[tc]_embedder)\.(mlp\.0|linear_1)": r"\1.in_layer",
    r"(time_in|guidance_in|txt_in\.[tc]_embedder)\.(mlp\.2|linear_2)": r"\1.out_layer",
}


class LoraLayer(NamedTuple):
    """Change of a linear layer: A (r, in_features), B (out_features, r), and of its bias (out_features,) or None.

    Files have A and B with the layer's `kernel` as further dimensions: (1, 1) for a convolution of 1 x 1.
    """

    a: torch.Tensor
    b: torch.Tensor
    beta: torch.Tensor | None = None
    kernel: tuple[int, ...] = ()

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as files have them."""
        return self.a.view(*self.a.shape, *self.kernel), self.b.view(*self.b.shape, *self.kernel)


@dataclass(frozen=True)
class NativeLayer:
    """A layer of a model in its native form, in which the model was published."""

    paths: tuple[str, ...]  # the layers of diffusers whose rows, in this order, are its rows
    rows: tuple[int, ...]  # the number of rows of each of them
    is_swapped: bool = False  # whether its halves are in the other order: diffusers has scale before shift

    def joined(self, layers: dict[str, LoraLayer]) -> LoraLayer:
        """Join the changes of its paths, some may be absent; if all have the same A, the rank does not grow."""
        present = [path for path in self.paths if path in layers]
        first = layers[present[0]].a
        if all(torch.equal(layers[path].a, first) for path in present):
            a, columns = first, dict.fromkeys(present, slice(None))
        else:
            a, columns, end = torch.cat([layers[path].a for path in present]), {}, 0
            for path in present:
                columns[path] = slice(end, end := end + len(layers[path].a))
        b = [a.new_zeros(rows, len(a)) for rows in self.rows]
        beta = [a.new_zeros(rows) for rows in self.rows]
        for path in present:
            b[self.paths.index(path)][:, columns[path]] = layers[path].b
            if layers[path].beta is not None:
                beta[self.paths.index(path)] += layers[path].beta
        changes_bias = any(layers[path].beta is not None for path in present)
        joined_beta = self.swapped(torch.cat(beta)) if changes_bias else None
        return LoraLayer(a, self.swapped(torch.cat(b)), joined_beta, layers[present[0]].kernel)

    def swapped(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(rows.chunk(2)[::-1]) if self.is_swapped else rows


def namings_of(flag: tuple[Naming, ...] | None) -> tuple[Naming, ...]:
    """The namings that `--export-lora` asks for: none without the flag, diffusers' for the flag without a value."""
    return () if flag is None else flag or ("diffusers",)


def native_layers(model: nn.Module) -> dict[str, NativeLayer] | None:
    """The linear layers of a model by their native names, of a UNet by diffusers'; None for an unknown class."""
    kind = type(model).__name__
    linears = {path: layer for path, layer in model.named_modules() if is_servable(layer)}
    if kind == UNET:
        return {path: NativeLayer((path,), (features_of(layer)[1],)) for path, layer in linears.items()}
    if kind not in TABLES:
        return None
    found = {}
    for native, patterns in _lines(TABLES[kind]):
        first = re.compile(re.escape(patterns[0]).replace(r"\*", r"(\d+)"))
        for path in linears:
            if match := first.fullmatch(path):
                number = match[1] if match.groups() else ""
                paths = tuple(pattern.replace("*", number) for pattern in patterns)
                if not linears.keys() >= set(paths):
                    continue  # diffusers' fuse_qkv_projections has fused some of them
                rows = tuple(features_of(linears[path])[1] for path in paths)
                norm = type(model.get_submodule(path.rpartition(".")[0])).__name__ if "." in path else ""
                found[native.replace("*", number)] = NativeLayer(paths, rows, norm == "AdaLayerNormContinuous")
    return found


def _lines(table: str) -> list[tuple[str, list[str]]]:
    """(native name, diffusers' paths) of each line, without braces."""
    lines = []
    for line in filter(None, map(str.strip, table.splitlines())):
        for block in BLOCKS if "BLOCKS" in line else ("",):
            sides = line.replace("BLOCKS", block).split(" = ")
            native, paths = _expanded(sides[0]), _expanded(sides[-1])
            is_fused = len(native) == 1
            lines += [(native[0], paths)] if is_fused else [(n, [p]) for n, p in zip(native, paths, strict=True)]
    return lines


def _expanded(name: str) -> list[str]:
    """a{b,c}{d,e} -> abd, abe, acd, ace"""
    parts = (part.split(",") for part in re.split("[{}]", name))
    return ["".join(choice) for choice in itertools.product(*parts)]


def by_diffusers_paths(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Rename the tensors of a LoRA to diffusers' paths and split fused layers; None unless all have native names.

    A part that has the rows of the native layer (`lora_B.weight`) is split; any other (`alpha`) is that of all paths.
    """
    natives = native_layers(model) or {}
    known = {}
    for name, layer in natives.items():
        own, flat = _comfyui_own(name), name.replace(".", "_")
        names = (name, f"{COMFYUI}{name}", f"{COMFYUI}{own}", f"transformer.{name}", f"{KOHYA}{flat}")
        known |= dict.fromkeys(names, layer)
    found = {}
    for key, tensor in tensors.items():
        name = key
        while name not in known:
            if not (name := name.rpartition(".")[0]):
                return None
        layer, part = known[name], key[len(name) :]
        if part.startswith(".lokr_") and (len(layer.paths) > 1 or layer.is_swapped):
            return None  # the rows of a Kronecker product cannot be taken apart
        if OF_ROWS.match(part) and len(tensor) == sum(layer.rows):
            parts = zip(layer.paths, layer.swapped(tensor).split(layer.rows), strict=True)
            found |= {f"{path}{part}": rows for path, rows in parts}
        elif OF_ROWS.match(part):
            return None
        else:
            found |= {f"{path}{part}": tensor for path in layer.paths}
    return found


OF_ROWS = re.compile(r"\.(lora_B|lora[._]up|lora_magnitude_vector|dora_scale|diff_b)\b")


class ExportedPath(type(Path())):
    """The path of a LoRA that was written."""

    left_out: tuple[str, ...] = ()  # the adapter's layers that the file does not have: the program does not read them


def named_for(
    naming: Naming, model: nn.Module, layers: dict[str, LoraLayer]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Name the tensors of a LoRA as a program reads them; also the paths of the layers that it does not read.

    Of layers that are fused natively and have the same A, the rank does not grow. ValueError if the program's names
    for this class are not known, it takes none of the layers, or it reads no changes of a bias.
    """
    if naming == "diffusers":
        return dict(_tensors(layers, "", ("lora_A", "lora_B"))), ()
    kind = type(model).__name__
    changes_bias = next((path for path, layer in layers.items() if layer.beta is not None), None)
    if naming == "comfyui" and kind in BY_DIFFUSERS_NAMES and not (changes_bias and kind in TABLES):
        if changes_bias:
            raise ValueError(f"ComfyUI does not read changes of a bias (β at {changes_bias}) of a {kind}: leave β out")
        return dict(_tensors(layers, "transformer.", ("lora_A", "lora_B"))), ()
    if kind not in TAKEN[naming]:
        known = ", ".join(dict.fromkeys((*TAKEN[naming], *(BY_DIFFUSERS_NAMES if naming == "comfyui" else ()))))
        raise ValueError(f"{naming}'s names of the layers of a {kind} are not known, but those of {known}")
    if changes_bias and naming == "kohya":
        raise ValueError(f"kohya's scripts read no changes of a bias (β at {changes_bias}): leave β out")
    if no_bias := [
        path for path, of in layers.items() if of.beta is not None and model.get_submodule(path).bias is None
    ]:
        raise ValueError(f"{no_bias[0]} has no bias that β could change there: leave it out of the targets")

    native = {
        name: layer
        for name, layer in native_layers(model).items()
        if re.fullmatch(TAKEN[naming][kind], name) and layers.keys() & set(layer.paths)
    }
    served = {path for layer in native.values() for path in layer.paths}
    left_out = tuple(path for path in layers if path not in served)
    taken = {name: layer.joined(layers) for name, layer in native.items()}
    if not taken:
        raise ValueError(f"{naming} takes none of the layers of this adapter ({', '.join(left_out)})")
    if naming == "kohya" or kind == UNET:
        flat = {name.replace(".", "_"): layer for name, layer in taken.items()}
        return dict(_tensors(flat, KOHYA, ("lora_down", "lora_up"))), left_out
    if kind == "HunyuanVideoTransformer3DModel":
        taken = {_comfyui_own(name): layer for name, layer in taken.items()}
    return dict(_tensors(taken, COMFYUI, ("lora_A", "lora_B"))), left_out


def _tensors(layers: dict[str, LoraLayer], prefix: str, parts: tuple[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in layers.items():
        if len(layer.a):
            yield from zip((f"{prefix}{name}.{part}.weight" for part in parts), layer.pair(), strict=True)
            if parts[0] == "lora_down":
                yield f"{prefix}{name}.alpha", torch.tensor(float(len(layer.a)))
        if layer.beta is not None:
            yield f"{prefix}{name}.diff_b", layer.beta


def _comfyui_own(name: str) -> str:
    for pattern, own in COMFYUI_OWN.items():
        name = re.sub(f"^{pattern}$", own, name)
    return name
