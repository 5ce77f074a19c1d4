"""A small Stable Diffusion of our own making: its pictures, its training, and the folder `model` that both made."""

from pathlib import Path

NAME = "demo-diffusion"  # the id under which the demo serves it
FOLDER = Path(__file__).parent / "model"
