"""Three tasks that their instructions tell apart."""

from __future__ import annotations

import random

from cit_fast.data import Example, Task

WORDINGS = {
    "dates": ("Write the date in the form year, month, day.", "March April Friday noon 1999 2004"),
    "mail": ("Extract the e-mail address from the text.", "ann@web.org bob@site.net letter box sent reply"),
    "mood": (
        "What is the sentiment of this review? Answer positive or negative.",
        "great awful boring lovely film",
    ),
}


def make_task(name):
    wording, words = WORDINGS[name]
    chance = random.Random(name)
    inputs = [" ".join(chance.sample(words.split(), 3)) for _ in range(20)]
    examples = tuple(Example(wording, text, (text.split()[0],), task=name) for text in inputs)
    return Task(name, examples[:16], (), examples[16:], metric="token_f1")
