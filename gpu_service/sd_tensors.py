"""The tensors of a Stable Diffusion as the layer spec knows them: component, block, part. No torch.

Three networks make one model. The UNet's layers are its blocks, in the order of a pass; those of the text encoder are
numbered. The autoencoder is counted and never trained. Names are `component.` and the checkpoint's own.
"""

import re
from collections.abc import Mapping

from gpu_service.errors import UnsupportedModel
from gpu_service.layers import LINEAR_PARTS, TensorInfo

# Within a block: where a tensor's name goes on after the block's -> its part.
UNET_PARTS = (
    (r"resnets\.\d+\.norm\d", "norm.resnet"),
    (r"resnets\.\d+\.conv(\d|_shortcut)", "conv.resnet"),
    (r"resnets\.\d+\.time_emb_proj", "time.resnet"),
    (r"attentions\.\d+\.norm", "norm.attn"),
    (r"attentions\.\d+\.proj_(in|out)", "attn.proj"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.norm1", "norm.self"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.norm2", "norm.cross"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.norm3", "norm.mlp"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_([qkv])", r"attn.self.\1"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_out\.0", "attn.self.o"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.attn2\.to_([qkv])", r"attn.cross.\1"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.attn2\.to_out\.0", "attn.cross.o"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.ff\.net\.0\.proj", "mlp.up"),
    (r"attentions\.\d+\.transformer_blocks\.\d+\.ff\.net\.2", "mlp.down"),
    (r"(?:down|up)samplers\.\d+\.conv", "conv.sample"),
)
UNET_OUTER_PARTS = (
    (r"conv_in", "conv.in"),
    (r"time_embedding\.linear_[12]", "time.embed"),
    (r"conv_norm_out", "norm.final"),
    (r"conv_out", "conv.out"),
)
ENCODER_PARTS = (
    (r"layer_norm1", "norm.attn"),
    (r"self_attn\.([qkv])_proj", r"attn.\1"),
    (r"self_attn\.out_proj", "attn.o"),
    (r"layer_norm2", "norm.mlp"),
    (r"mlp\.fc1", "mlp.up"),
    (r"mlp\.fc2", "mlp.down"),
)
ENCODER_OUTER_PARTS = (
    (r"embeddings\.token_embedding", "embed"),
    (r"embeddings\.position_embedding", "embed.position"),
    (r"final_layer_norm", "norm.final"),
)
IN_A_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(.+)")
IN_A_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
CONSTANT = re.compile(r"(?:text_model\.)?embeddings\.position_ids")  # that old checkpoints carry

Shapes = Mapping[str, tuple[int, ...]]


def sd_tensors(shapes: Mapping[str, Shapes], blocks: tuple[str, ...]) -> list[TensorInfo]:
    """By component; `blocks` are the UNet's in the order of a pass. Raises UnsupportedModel for a foreign tensor."""
    unet = [_of_unet(name, tuple(shape), blocks) for name, shape in shapes["unet"].items()]
    encoder = [_of_encoder(n, tuple(s)) for n, s in shapes["text_encoder"].items() if not CONSTANT.fullmatch(n)]
    vae = [TensorInfo(f"vae.{n}", tuple(s), "vae", None, False, component="vae") for n, s in shapes["vae"].items()]
    return [*sorted(unet, key=_place), *sorted(encoder, key=_place), *vae]


def _of_unet(name: str, shape: tuple[int, ...], blocks: tuple[str, ...]) -> TensorInfo:
    inside = IN_A_BLOCK.fullmatch(_module(name))
    block = (inside[3] or f"{inside[1]}.{inside[2]}") if inside else None
    part = _part(inside[4], UNET_PARTS) if inside else _part(_module(name), UNET_OUTER_PARTS)
    if part is None or (block and block not in blocks):
        raise _foreign("unet", name)
    layer = blocks.index(block) if block else None
    return TensorInfo(f"unet.{name}", shape, part, layer, _linear(shape, part), component="unet", block=block)


def _of_encoder(name: str, shape: tuple[int, ...]) -> TensorInfo:
    module = _module(name).removeprefix("text_model.")
    inside = IN_A_LAYER.fullmatch(module)
    part = _part(inside[2], ENCODER_PARTS) if inside else _part(module, ENCODER_OUTER_PARTS)
    if part is None:
        raise _foreign("text_encoder", name)
    layer = int(inside[1]) if inside else None
    held = f"text_encoder.{name.removeprefix('text_model.')}"
    return TensorInfo(held, shape, part, layer, _linear(shape, part), component="text_encoder")


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _part(module: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((found.expand(part) for pattern, part in table if (found := re.fullmatch(pattern, module))), None)


def _linear(shape: tuple[int, ...], part: str) -> bool:
    """A matrix, also where it stands as a convolution of one by one, as before and behind 1.x's transformers."""
    return part.startswith(LINEAR_PARTS) and (len(shape) == 2 or shape[2:] == (1, 1))


def _place(tensor: TensorInfo) -> tuple[float, list[tuple[int, str]]]:
    """In the order of a pass, and within a block by name, numbers counted."""
    outside = -1.0 if tensor.is_first else float("inf")
    pieces = [(int(p), "") if p.isdigit() else (-1, p) for p in tensor.name.split(".")]
    return (outside if tensor.layer is None else tensor.layer, pieces)


def _foreign(component: str, name: str) -> UnsupportedModel:
    return UnsupportedModel(f"its {component} has a tensor '{name}', which no model of its family has", param="model")
