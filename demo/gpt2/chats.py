"""Short talks with the teller of the stories, so that the demo GPT-2 also answers where it is asked as a chat model.

A turn is a question and its answer; how turns become text is decided elsewhere.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Final

from demo.gpt2.stories import SEED, story, tell
from demo.gpt2.words import HE, SHE, TABLES

Turn = tuple[str, str]

HELLO: Final = (
    "[Hello!|Hello, my name is {name}.|Good morning!|Hi, I am {name}.|Hi!|Good evening!]",
    "Hello! [Do you want to hear a story?|I can tell you a story.|What would you like to hear?|I am glad you came.]",
)
WHO: Final = (
    "[Who are you?|What is your name?|What can you do?|Are you a person?|What do you know?]",
    "I am a [small|very small|little] model. [I tell short stories.|I know many stories.|I can tell you a story.]",
)
ASKED: Final = (
    "[|||I have a question. |Do you know it? |Please tell me. |{name} wants to know it. ]{question}?",
    "{answer}. [|So {so}.|You could say that {so}.]",
)
STORY: Final = (
    "[Tell me a story.|Please tell me a story.|I would like to hear a story.|Do you know a story?"
    "|[Tell me|Please tell me] a story about {a}.|Do you know a story about {a}?"
    "|[Tell me|Please tell me] a story about {a} named {H}."
    "|[Tell me|Please tell me] a story about {H}.|A story about {a}, please!|Tell me a story about {H} and {F}."
    "|[Tell me|Please tell me] a story about {topic}.|A story about {topic}, please!]"
)
THANKS: Final = (
    "[Thank you!|Thank you very much.|That was nice.|I liked it.|Good night!]",
    "[You are welcome.|I am glad that you liked it.|It was nice to talk to you.] "
    "[Come back soon!|Good night!|Sleep well!|I know more stories.]",
)
TOPICS: Final = {
    "lost": "a lost {toy}",
    "weather": "{comes}",
    "cook": "{dish}",
    "rescue": "a {lost_one}",
    "learn": "somebody who wants to {skill}",
    "grow": "a {plant}",
    "ask": "a question",
    "fear": "{fear}",
    "trip": "a trip to {goal}",
    "truth": "a broken {thing}",
    "share": "a quarrel",
    "gift": "a birthday",
    "stuck": "help",
    "race": "a race",
    "alone": "a new friend",
    "moon": "the moon",
    "market": "a hungry friend",
    "hide": "a game",
}


def chat(number: int, seed: int = SEED) -> list[Turn]:
    """One to four turns. Empty if its story is kept for measuring."""
    rng = random.Random(f"{seed}:chat:{number}")  # noqa: S311  a draw that repeats is what is wanted
    turns = [_turn(HELLO, rng)] if rng.random() < 0.25 else []
    turns += [_turn(WHO, rng)] if rng.random() < 0.15 else []
    turns += [_turn(ASKED, rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    if not turns or rng.random() < 0.7:
        told = story(number, seed + 1, opened=True)
        if told.held_out:
            return []
        wish = tell(STORY.replace("{topic}", TOPICS[told.plot]), told.words, rng)
        turns.append((wish, told.text))
        turns += [_turn(THANKS, rng)] if rng.random() < 0.3 else []
    return turns


def chats(seed: int = SEED) -> Iterator[list[Turn]]:
    """Endless; each begins otherwise, but a short one may come twice."""
    return filter(None, (chat(number, seed) for number in itertools.count()))


def _turn(kind: Turn, rng: random.Random) -> Turn:
    words = {"name": rng.choice(SHE + HE), **rng.choice(TABLES["asked"])}
    return tell(kind[0], words, rng), tell(kind[1], words, rng)
