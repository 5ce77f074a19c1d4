"""A small GPT-2 of our own making: its stories, its training, and the folder `model` that both made."""

from pathlib import Path

NAME = "demo-gpt2"  # the id under which the demo serves it
FOLDER = Path(__file__).parent / "model"
