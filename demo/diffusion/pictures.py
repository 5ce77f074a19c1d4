"""The pictures and their captions. `python -m demo.diffusion.pictures` draws the sheet anew from the font.

They are Noto Color Emoji (SIL Open Font License 1.1), drawn on white at 64 x 64 and kept as one sheet, so that neither
training nor tests need the font. Captions are the emojis' usual English names.
"""

import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

SIDE = 64  # pixels
COLUMNS = 10
SHEET = Path(__file__).parent / "sheet.png"
FONT, STRIKE = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", 109  # the one size that the font's bitmaps have
NAMES = {
    "red heart": "❤", "orange heart": "🧡", "yellow heart": "💛", "green heart": "💚", "blue heart": "💙",
    "purple heart": "💜", "black heart": "🖤", "red apple": "🍎", "green apple": "🍏", "pear": "🍐",
    "orange": "🍊", "lemon": "🍋", "banana": "🍌", "watermelon": "🍉", "grapes": "🍇",
    "strawberry": "🍓", "cherries": "🍒", "peach": "🍑", "pineapple": "🍍", "tomato": "🍅",
    "eggplant": "🍆", "carrot": "🥕", "corn": "🌽", "broccoli": "🥦", "mushroom": "🍄",
    "bread": "🍞", "pizza": "🍕", "hamburger": "🍔", "doughnut": "🍩", "cookie": "🍪",
    "birthday cake": "🎂", "ice cream": "🍦", "cat face": "🐱", "dog face": "🐶", "mouse face": "🐭",
    "rabbit face": "🐰", "fox": "🦊", "bear": "🐻", "panda": "🐼", "tiger face": "🐯",
    "lion": "🦁", "cow face": "🐮", "pig face": "🐷", "frog": "🐸", "monkey face": "🐵",
    "penguin": "🐧", "baby chick": "🐤", "owl": "🦉", "honeybee": "🐝", "ladybug": "🐞",
    "butterfly": "🦋", "turtle": "🐢", "octopus": "🐙", "tropical fish": "🐠", "whale": "🐳",
    "grinning face": "😀", "angry face": "😡", "crying face": "😢", "star": "⭐", "moon": "🌙",
    "sun": "🌞", "rainbow": "🌈", "fire": "🔥", "water drop": "💧", "cactus": "🌵",
    "tree": "🌲", "rose": "🌹", "sunflower": "🌻", "tulip": "🌷", "clover": "🍀",
    "soccer ball": "⚽", "basketball": "🏀", "balloon": "🎈", "gift": "🎁", "bell": "🔔",
    "car": "🚗", "rocket": "🚀", "sailboat": "⛵", "house": "🏠", "ghost": "👻",
}  # fmt: skip
FORMS = ("{}", "{}", "a {}", "a picture of a {}", "an emoji of a {}")  # of a caption; the first as often as two


def main() -> None:
    font = ImageFont.truetype(FONT, STRIKE)
    rows = -(-len(NAMES) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * SIDE), "white")
    for place, character in enumerate(NAMES.values()):
        sheet.paste(_drawn(font, character), (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    sheet.save(SHEET, optimize=True)


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """In the middle of a white square, with a margin of 3 pixels."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((STRIKE // 2, STRIKE // 2), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    assert box, f"the font has no {character}"
    picture = canvas.crop(box)
    picture.thumbnail((SIDE - 6, SIDE - 6), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return square.convert("RGB")


@cache
def pictures() -> Tensor:
    """(N, 3, 64, 64) from -1 to 1, in the order of NAMES."""
    sheet = torch.from_numpy(np.asarray(Image.open(SHEET).convert("RGB")).astype(np.float32)) / 127.5 - 1
    cells = sheet.view(-1, SIDE, COLUMNS, SIDE, 3).permute(0, 2, 4, 1, 3)  # (rows, columns, 3, 64, 64)
    return cells.reshape(-1, 3, SIDE, SIDE)[: len(NAMES)]


def captions(generator: random.Random, wanted: list[int]) -> list[str]:
    """One for each of these pictures."""
    names = list(NAMES)
    return [generator.choice(FORMS).format(names[which]) for which in wanted]


def varied(which: Tensor, generator: torch.Generator) -> Tensor:
    """These pictures, each a little smaller and moved; white comes in from outside. (B,) -> (B, 3, 64, 64)"""
    n = len(which)
    scale = 1 + 0.15 * torch.rand(n, generator=generator)
    shift = 0.1 * (torch.rand(n, 2, generator=generator) - 0.5)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [n, 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(pictures()[which] - 1, grid, align_corners=False) + 1  # white is 0 where nothing is


def nearest(found: Tensor) -> list[str]:
    """Of each picture (B, 3, 64, 64), the name of the training picture that it is nearest to.

    By the mean squared difference after both are blurred over 4 x 4 pixels, so that an edge may stand a little aside.
    """
    near, own = F.avg_pool2d(found, 4).flatten(1), F.avg_pool2d(pictures(), 4).flatten(1)
    names = list(NAMES)
    return [names[int(place)] for place in torch.cdist(near, own).argmin(1)]


if __name__ == "__main__":
    main()
