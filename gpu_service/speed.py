"""How fast a model runs here, measured when it is loaded: what a job takes is told from it."""

import time

import torch

from gpu_service.cache import Whole
from gpu_service.decoder import Decoder
from gpu_service.rows import Rows
from gpu_service.sd import PictureBase

PROBE_TOKENS = 64  # of the pass that is measured


@torch.inference_mode()
def token_s(decoder: Decoder, rows: Rows, device: torch.device) -> float:
    """Seconds that a token takes in a short prompt; of two passes the second counts."""
    ids, seconds = torch.ones((1, PROBE_TOKENS), dtype=torch.long, device=device), 0.0
    for _ in range(2):
        start = time.perf_counter()
        attention = Whole(PROBE_TOKENS, device)
        h = decoder.layers(decoder.embed(ids, rows, attention), 0, decoder.n_layers, rows, attention)
        decoder.unembed(decoder.final_norm(h, rows), rows).sum().item()  # waits for the device
        seconds = time.perf_counter() - start
    return seconds / PROBE_TOKENS


@torch.inference_mode()
def pass_s(base: PictureBase) -> float:
    """Seconds that a pass of the UNet takes for one picture of the native size; of two the second counts."""
    side, config, seconds = base.source.native // base.source.factor, base.unet.config, 0.0
    latents = torch.zeros((1, config.in_channels, side, side), dtype=base.dtype, device=base.device)
    text = torch.zeros((1, base.source.context_tokens, config.cross_attention_dim), dtype=base.dtype).to(base.device)
    for _ in range(2):
        start = time.perf_counter()
        base.unet(latents, 1, encoder_hidden_states=text, return_dict=False)[0].sum().item()  # waits for the device
        seconds = time.perf_counter() - start
    return seconds
