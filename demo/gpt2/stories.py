"""A story grammar: short tales with a cast, a cause and an end. Knows nothing of models.

A plot is text with `[one|another|]` for a choice and `{name}` for a word of the story's cast and tables. Choices nest.
A story is a function of its seed and number, so the text that trained the demo GPT-2 can be made again to the letter.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from demo.gpt2.plots import ENDING, OPENING, PLOTS
from demo.gpt2.words import ANIMALS, CHILDREN, ELDERS, HE, SHE, TABLES, Row

SEED = 7
STRANGERS = ("alone", "market")  # plots in which hero and friend meet for the first time
HELD_OUT = 50  # one story in so many is for measuring only
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
SENTENCE = re.compile(r"(^|[.!?] )([a-z])")  # after a full stop; what follows a quotation keeps its case
AN = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True)
class Being:
    name: str
    he: str
    him: str
    his: str


@dataclass(frozen=True)
class Story:
    text: str
    plot: str
    hero: Being
    friend: Being
    elder: Being  # has no name: "her grandmother"
    words: Mapping[str, str]  # what was drawn for it, used or not

    @property
    def held_out(self) -> bool:
        """Chosen by the text alone, so that no story can be on both sides."""
        return hashlib.sha256(self.text.encode()).digest()[0] % HELD_OUT == 0


def story(number: int, seed: int = SEED, *, opened: bool = False) -> Story:
    """`opened`: surely with the lines that say who the hero is; one story in five starts without."""
    rng = random.Random(f"{seed}:{number}")  # noqa: S311  a draw that repeats is what is wanted
    plot = rng.choice(list(PLOTS))
    hero_row, friend_row = rng.choice(rng.choice((CHILDREN, ANIMALS))), rng.choice(rng.choice((CHILDREN, ANIMALS)))
    hero, friend = (_being(name) for name in rng.sample(SHE + HE, 2))
    elder_row = rng.choice(ELDERS)
    elder = Being("", elder_row["ehe"], elder_row["ehim"], elder_row["ehis"])
    words = {key: value for table in TABLES.values() for key, value in rng.choice(table).items()}
    words |= {**elder_row, **_roles(hero, hero_row, friend, friend_row)}
    words["known"] = "" if plot in STRANGERS else f"{hero.name} had a friend, {words['fa']} named {friend.name}."
    opening = "" if rng.random() < 0.2 and plot not in STRANGERS and not opened else OPENING
    text = ""
    while text.count(friend.name) < 2 and (not text or friend.name in text):  # nobody is named for one line only
        text = "\n\n".join(tell(part, words, rng) for part in (opening, PLOTS[plot] + ENDING) if part)
    return Story(text, plot, hero, friend, elder, words)


def _being(name: str) -> Being:
    return Being(name, *(("she", "her", "her") if name in SHE else ("he", "him", "his")))


def _roles(hero: Being, hero_row: Row, friend: Being, friend_row: Row) -> dict[str, str]:
    return {
        "H": hero.name,
        "a": hero_row["a"].format(girl=_girl(hero)),
        "home": hero_row["home"],
        "he": hero.he,
        "him": hero.him,
        "his": hero.his,
        "F": friend.name,
        "fa": friend_row["a"].format(girl=_girl(friend)),
        "fhe": friend.he,
        "fhim": friend.him,
        "fhis": friend.his,
    }


def _girl(being: Being) -> str:
    return "girl" if being.he == "she" else "boy"


def tell(template: str, words: Mapping[str, str], rng: random.Random) -> str:
    text = template
    while CHOICE.search(text):
        text = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    text = SLOT.sub(lambda match: _word(match[1], words), text)
    text = AN.sub(r"\1n ", text)
    paragraphs = (" ".join(part.split()) for part in text.strip().split("\n\n"))
    return "\n\n".join(SENTENCE.sub(lambda m: m[1] + m[2].upper(), part) for part in paragraphs if part)


def _word(key: str, words: Mapping[str, str]) -> str:
    """`{He}` is `{he}` at the beginning of a sentence; `{H}` and `{F}` are names of their own."""
    if key in words:
        return words[key]
    value = words[key[0].lower() + key[1:]]
    return value[0].upper() + value[1:]


def stories(held_out: bool, seed: int = SEED) -> Iterator[Story]:
    """Endless, and no text twice."""
    seen: set[bytes] = set()
    number = 0
    while True:
        made = story(number, seed)
        number += 1
        digest = hashlib.sha256(made.text.encode()).digest()[:12]
        if made.held_out == held_out and digest not in seen:
            seen.add(digest)
            yield made
