"""A data-to-text task that needs no file: invented places, described as the E2E challenge describes restaurants.

An input is a place's name and two to seven of its attributes, written as an E2E meaning representation. A reference is
put together from phrases: an opening that says some attributes, then sentences that say the others, each exactly once.

Every choice is a raw draw of PCG64, whose stream NumPy guarantees, so that a seed means the same data everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from spdf_jax.data.examples import TASK_SPLITS, THREE_WAYS, Example, Task, TaskSplit, make_task, split_of_input

_T = TypeVar("_T")

_NAMES = (
    "The Copper Pot", "The Blue Heron", "The Old Mill", "The Silver Spoon", "The Walnut Tree", "The Paper Lantern",
    "The Stone Oven", "The Lazy Fox", "The Green Door", "The Salt Cellar", "The Tin Kettle", "The Quiet Corner",
    "Saffron House", "Juniper", "Marigold", "Olive and Thyme", "Harvest Table", "Lemon Grove", "Pepper Lane",
    "Cedar Room", "Nutmeg", "Rosewood", "Plum Garden", "Ember", "Driftwood", "Basil Court", "Honeycomb", "Maple Yard",
    "Ginger Loft", "Moonrise", "Sparrow", "Tamarind",
)  # fmt: skip
_PLACES = (
    "City Library", "Grand Theatre", "Clock Tower", "Railway Station", "Botanic Garden", "Town Hall", "Crown Hotel",
    "Science Museum", "Stone Bridge", "Lighthouse", "Opera House", "Flower Market",
)  # fmt: skip
_AREAS = {
    "old town": "in the old town",
    "harbour": "at the harbour",
    "market square": "on the market square",
    "university quarter": "in the university quarter",
    "canal district": "in the canal district",
}
_VALUES: dict[str, tuple[str, ...]] = {
    "eatType": ("restaurant", "pub", "coffee shop", "bistro", "tea room"),
    "food": ("Thai", "Italian", "Indian", "French", "Greek", "Japanese", "Mexican", "Lebanese", "Korean", "vegan"),
    "priceRange": ("cheap", "moderate", "high"),
    "customer rating": ("1 out of 5", "2 out of 5", "3 out of 5", "4 out of 5", "5 out of 5"),
    "area": tuple(_AREAS),
    "familyFriendly": ("yes", "no"),
    "near": _PLACES,
}


class _Phrases(NamedTuple):
    """Ways to say one value of one attribute, and its tone: 1 good, -1 bad, 0 neither."""

    tone: int
    before: tuple[str, ...]  # the noun: an adjective
    after: tuple[str, ...]  # the noun
    predicates: tuple[str, ...]  # after "it"
    sentences: tuple[str, ...]  # on their own


_PRICES = {
    "cheap": _Phrases(
        1,
        ("cheap", "inexpensive", "low-priced"),
        ("with low prices",),
        ("is cheap", "has low prices", "is easy on the wallet"),
        ("Prices are low.", "You will not spend much there."),
    ),
    "moderate": _Phrases(
        0,
        ("moderately priced", "mid-priced"),
        ("with moderate prices",),
        ("is moderately priced", "has moderate prices", "is in the middle price range"),
        ("Prices are moderate.", "Expect to pay a moderate price."),
    ),
    "high": _Phrases(
        -1,
        ("expensive", "high-priced"),
        ("with high prices",),
        ("is expensive", "has high prices", "charges high prices"),
        ("Prices are high.", "Expect to pay a high price."),
    ),
}
_FAMILIES = {
    "yes": _Phrases(
        1,
        ("family-friendly", "child-friendly"),
        ("that welcomes children",),
        ("is family-friendly", "welcomes families with children", "is a good choice for families"),
        ("Children are welcome.", "Families are welcome."),
    ),
    "no": _Phrases(
        -1,
        ("adults-only",),
        ("that does not admit children",),
        ("is not family-friendly", "does not admit children", "is not a place for families"),
        ("Children are not admitted.", "It is for adults only."),
    ),
}


def restaurant_task(*, train_examples: int, validation_examples: int, test_examples: int, seed: int) -> Task:
    """Draws the task: the same seed gives the same examples, and more of them leave the first ones as they are.

    Which split an input can be in is decided by its hash, so no input is in two.

    Args:
      train_examples, validation_examples, test_examples: Inputs of each split, two to six references each.
      seed: Of all choices.

    Returns:
      The task, scored as E2E is.

    >>> task = restaurant_task(train_examples=2, validation_examples=1, test_examples=1, seed=0)
    >>> task.train[1].context
    'name[Cedar Room], food[French], customer rating[4 out of 5], near[Stone Bridge]'
    >>> task.train[1].references[3]
    'Cedar Room, a place with a customer rating of 4 out of 5, is close to the Stone Bridge. The food is French.'
    """
    sizes = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    splits = {split: _split(split, sizes[split], seed) for split in TASK_SPLITS}
    return make_task(dict(splits), style="e2e", where="task.name='restaurant'")


class _Draws:
    """Choices from one stream of random bits."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, n: int) -> int:
        return int(self._bits.random_raw()) % n

    def pick(self, options: Sequence[_T]) -> _T:
        return options[self.below(len(options))]

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def shuffled(self, options: Sequence[_T]) -> list[_T]:
        keys = self._bits.random_raw(len(options))
        return [options[i] for i in np.argsort(keys, kind="stable")]


def _split(split: TaskSplit, n_examples: int, seed: int) -> list[Example]:
    """The first `n_examples` inputs of a stream of inputs that belong to this split."""
    draws = _Draws(seed, TASK_SPLITS.index(split))
    examples: dict[str, Example] = {}
    while len(examples) < n_examples:
        attributes = _attributes(draws)
        context = ", ".join(f"{key}[{value}]" for key, value in attributes.items())
        if split_of_input(context, THREE_WAYS) == split and context not in examples:
            examples[context] = Example(context, _references(draws, attributes))
    return list(examples.values())


def _attributes(draws: _Draws) -> dict[str, str]:
    """A name and two to seven attributes, in E2E's order."""
    chosen = draws.shuffled(tuple(_VALUES))[: 2 + draws.below(6)]
    values = {key: draws.pick(options) for key, options in _VALUES.items() if key in chosen}
    return {"name": draws.pick(_NAMES), **values}


def _references(draws: _Draws, attributes: dict[str, str]) -> tuple[str, ...]:
    """Two to six different texts."""
    wanted = 2 + draws.below(5)
    texts: dict[str, None] = {}
    for _ in range(10 * wanted):
        if len(texts) < wanted:
            texts[_reference(draws, attributes)] = None
    assert len(texts) > 1, attributes
    return tuple(texts)


def _reference(draws: _Draws, attributes: dict[str, str]) -> str:
    """One text that says every attribute once."""
    name, noun = attributes["name"], attributes.get("eatType") or draws.pick(("place", "venue", "spot"))
    phrases = {key: _phrases(key, attributes) for key in attributes if key not in ("name", "eatType")}
    order = draws.shuffled(tuple(phrases))
    before, after = _around_noun(draws, phrases, order[: draws.pick((0, 1, 2, 2, 3, 3))])
    left = [phrases[key] for key in order if key not in (*before, *after)]

    # "a cheap, family-friendly Thai bistro": the cuisine stands next to the noun, without a comma.
    adjectives = ", ".join(text for key, text in before.items() if key != "food")
    thing = _with_article(" ".join(filter(None, [adjectives, before.get("food"), noun])))
    described = " ".join([thing, *after.values()])
    where = " ".join(after.values()) if after.keys() & {"area", "near"} else ""
    plan = draws.below(8)
    if not (before or after or "eatType" in attributes):
        opening = f"{name} {draws.pick(left.pop().predicates)}."
    elif plan < 3 and where:
        opening = draws.pick(
            (
                f"{where[0].upper()}{where[1:]} there is {thing} called {name}.",
                f"There is {thing} called {name} {where}.",
            )
        )
    elif plan < 5 and left:
        opening = f"{name}, {described}, {draws.pick(left.pop().predicates)}."
    elif plan == 5:
        opening = draws.pick((f"Try {name}, {described}.", f"You could try {name}, {described}."))
    else:
        opening = f"{name} is {described}."

    sentences = [opening]
    while left:
        n = 1 + draws.below(2)
        sentences.append(_sentence(draws, name, noun, left[:n]))
        left = left[n:]
    return " ".join(sentences)


def _around_noun(
    draws: _Draws, phrases: dict[str, _Phrases], wanted: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What to say before a noun and after it: after it one phrase only, or the area and then what is near."""
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for key in wanted:
        sides = [side for side in ("before", "after") if getattr(phrases[key], side)]
        if draws.pick(sides) == "before":
            before[key] = draws.pick(phrases[key].before)
        elif not after or {key, *after} == {"area", "near"}:
            after[key] = draws.pick(phrases[key].after)
    return before, dict(sorted(after.items()))


def _sentence(draws: _Draws, name: str, noun: str, said: Sequence[_Phrases]) -> str:
    """A sentence that says one attribute or two."""
    if len(said) == 1 and said[0].sentences and draws.chance(40):
        return draws.pick(said[0].sentences)
    subject = draws.pick(("It", "It", "It", f"The {noun}", name))
    link = " but " if {phrases.tone for phrases in said} == {1, -1} else " and "
    return f"{subject} {link.join(draws.pick(phrases.predicates) for phrases in said)}."


def _phrases(key: str, attributes: dict[str, str]) -> _Phrases:
    """How to say `attributes[key]`."""
    value = attributes[key]
    if key == "priceRange":
        return _PRICES[value]
    if key == "familyFriendly":
        return _FAMILIES[value]
    if key == "customer rating":
        return _Phrases(
            (value[0] > "3") - (value[0] < "3"),
            (),
            (f"with a customer rating of {value}", f"rated {value} by its customers"),
            (f"has a customer rating of {value}", f"is rated {value} by its customers", f"scores {value}"),
            (f"Customers rate it {value}.", f"Its customer rating is {value}."),
        )
    if key == "food":
        return _Phrases(
            0,
            # Nobody says "a Thai pub", though "a Thai restaurant".
            (value,) if attributes.get("eatType") in (None, "restaurant", "bistro") else (),
            (f"serving {value} food", f"with {value} food on the menu"),
            (f"serves {value} food", f"offers {value} dishes", f"has {value} food on the menu"),
            (f"The food is {value}.", f"The menu is {value}."),
        )
    if key == "area":
        where = _AREAS[value]
        return _Phrases(0, (), (where,), (f"is {where}", f"can be found {where}", f"stands {where}"), ())
    return _Phrases(
        0,
        (),
        (f"near the {value}", f"close to the {value}"),
        (f"is near the {value}", f"is close to the {value}", f"is a short walk from the {value}"),
        (),
    )


def _with_article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeioAEIO' else 'a'} {noun_phrase}"
