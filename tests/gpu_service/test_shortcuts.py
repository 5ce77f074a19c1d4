"""What is left out of a pass changes no bit of it, and what is laid over the weights is seen."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gpu_service import sd, shortcuts
from gpu_service.device import Device
from gpu_service.image import Pictures, Request, Wanted
from gpu_service.sd import PictureBase
from tests.gpu_service import tiny_sd

# Some of diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cpu: Device) -> PictureBase:
    folder = tiny_sd.make(tmp_path_factory.mktemp("models") / tiny_sd.NAME)
    return sd.load(sd.open_folder(tiny_sd.NAME, folder, None), cpu)


@pytest.fixture(scope="module")
def theirs(base: PictureBase) -> Any:
    """The UNet without shortcuts, its convolutions in the same order of memory."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base.source.folder / "unet").eval().requires_grad_(False)
    return unet.to(memory_format=torch.channels_last)


def given(places: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(places)
    texts = torch.randn(places, 77, 32, generator=dice)
    return torch.randn(places, 4, side, side, generator=dice), torch.arange(places) * 100.0, texts


@pytest.mark.parametrize("places", [1, 2, 6])
@pytest.mark.parametrize("side", [4, 16, 40])
def test_a_pass_is_diffusers_own_to_the_last_bit_the_first_time_and_the_next(
    base: PictureBase, theirs: Any, places: int, side: int
) -> None:
    x, times, texts = given(places, side)
    with torch.inference_mode():
        wanted = theirs(x, times, texts).sample
        base.texts.give(texts)
        for _ in range(2):
            assert torch.equal(base.unet(x, times, texts).sample, wanted)
        other = texts + 1  # that nobody told of
        assert torch.equal(base.unet(x, times, other).sample, theirs(x, times, other).sample)


@pytest.mark.parametrize("ending", ["attn2.to_k.weight", "attn2.to_v.weight", "conv1.weight", "conv_in.weight"])
def test_a_weight_that_is_laid_over_for_a_pass_is_seen_in_that_pass_alone(
    base: PictureBase, theirs: Any, ending: str
) -> None:
    name = next(n for n, _ in base.unet.named_parameters() if n.endswith(ending))
    over = {name: base.unet.get_parameter(name) * 1.5}
    x, times, texts = given(2, 16)
    with torch.inference_mode():
        base.texts.give(texts)
        before = base.unet(x, times, texts).sample
        changed = functional_call(base.unet, over, (x, times, texts)).sample
        assert torch.equal(changed, functional_call(theirs, over, (x, times, texts)).sample)
        assert not torch.equal(changed, before)
        assert torch.equal(base.unet(x, times, texts).sample, before)


def test_gradients_are_diffusers_own(base: PictureBase, theirs: Any) -> None:
    found = list[Tensor]()
    for unet in (base.unet, theirs):
        x, times, texts = given(2, 16)
        texts.requires_grad_()
        base.texts.give(texts)
        unet(x, times, texts).sample.square().sum().backward()
        assert texts.grad is not None
        found.append(texts.grad)
    assert torch.equal(found[0], found[1])


def test_texts_that_were_told_are_read_once_and_others_are_not_kept(base: PictureBase) -> None:
    key = next(m for name, m in base.unet.named_modules() if name.endswith("attn2.to_k"))
    told, other = given(2, 16)[2], given(3, 16)[2]
    with torch.inference_mode():
        base.texts.give(told)
        assert key(told) is key(told)
        assert key(other) is not key(other)
        base.texts.give(None)
        assert key(told) is not key(told)


def test_nothing_is_kept_of_texts_once_the_pictures_of_two_models_are_there(base: PictureBase, cpu: Device) -> None:
    other = sd.load(base.source, cpu)
    pictures, shown = Pictures(), list[Any]()
    for number, model in enumerate((base, other, other)):
        prompt, negative = base.source.chunks("a red heart", "")
        wanted = Wanted(tiny_sd.NAME, prompt, negative, 32, 32, 2 + number, 7.5, None, (number,), previews=number)
        pictures.add(Request(model, wanted, shown.append, lambda: False))
    read = list[weakref.ref[Tensor]]()
    while len(pictures):
        pictures.step()
        read += [weakref.ref(pictures._texts[1])] if pictures._texts else []
    assert len([each for each in shown if each.preview is None]) == 3
    assert read
    gc.collect()
    assert not [texts for texts in read if texts() is not None]


def test_large_models_keep_one_copy_of_their_convolutions() -> None:
    large = nn.Conv2d(1, 1, 3)
    large.weight = nn.Parameter(torch.empty(1).expand(2**27, 1, 3, 3), requires_grad=False)
    shortcuts.pack(large)
    assert "forward" not in vars(large)
