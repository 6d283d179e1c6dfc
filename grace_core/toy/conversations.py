"""Multi-turn conversations about one picture, drawn from a mixture of question forms."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from grace_core.toy.pictures import COLOURS, Scene
from grace_core.toy.questions import (
    DESCRIBE_PROMPT,
    FAMILIES,
    Asked,
    Question,
    ask_choice,
    ask_free,
    ask_yesno,
    describe,
    think_of,
)


@dataclass(frozen=True)
class Turn:
    """One exchange; `wrong` tells that the annotator got it wrong."""

    prompt: str
    answer: str
    wrong: bool = False


@dataclass(frozen=True)
class Mixture:
    """What is asked, how often.

    Attributes:
        forms: relative weight of `free`, `yesno`, `mcq` and `describe` turns.
        turns: least and greatest number of turns.
        wrong_answer_share: share of turns whose answer is wrong, in [0, 1).
    """

    forms: Mapping[str, float] = field(
        default_factory=lambda: {"free": 0.3, "yesno": 0.3, "mcq": 0.3, "describe": 0.1}
    )
    turns: tuple[int, int] = (1, 3)
    wrong_answer_share: float = 0.0

    def __post_init__(self) -> None:
        assert set(self.forms) <= {"free", "yesno", "mcq", "describe"}
        assert 1 <= self.turns[0] <= self.turns[1]
        assert 0.0 <= self.wrong_answer_share < 1.0


def converse(scene: Scene, mixture: Mixture, rng: random.Random) -> list[Turn]:
    """Draw a conversation of `turns[0]` to `turns[1]` turns; a family recurs after all others."""
    families: list[str] = []
    turns: list[Turn] = []
    for _ in range(rng.randint(*mixture.turns)):
        if not families:
            families = rng.sample(sorted(FAMILIES), len(FAMILIES))
        form = rng.choices(list(mixture.forms), list(mixture.forms.values()))[0]
        wrong = rng.random() < mixture.wrong_answer_share
        if form == "describe":
            if all(turn.prompt != DESCRIBE_PROMPT for turn in turns):
                turns.append(_description(scene, rng, wrong))
            continue
        question = _next_question(scene, families, rng)
        if question is None:
            families = []
            continue
        asked = _ask(question, form, rng)
        answer = rng.choice(asked.wrong) if wrong else asked.answer
        turns.append(Turn(asked.prompt, answer, wrong))
    return turns or [_description(scene, rng, False)]


def _next_question(scene: Scene, families: list[str], rng: random.Random) -> Question | None:
    """Take the first family that the scene offers off the list."""
    for family in list(families):
        question = think_of(family, scene, rng)
        if question is not None:
            families.remove(family)
            return question
    return None


def _ask(question: Question, form: str, rng: random.Random) -> Asked:
    if form == "mcq":
        return ask_choice(question, rng)
    if form == "yesno":
        return ask_yesno(question, rng, truth=rng.random() < 0.5)
    return ask_free(question, rng)


def _description(scene: Scene, rng: random.Random, wrong: bool) -> Turn:
    if wrong:
        index = rng.randrange(len(scene.shapes))
        shape = scene.shapes[index]
        colour = rng.choice([name for name in COLOURS if name != shape.colour])
        shapes = list(scene.shapes)
        shapes[index] = replace(shape, colour=colour)
        scene = replace(scene, shapes=tuple(shapes))
    return Turn(DESCRIBE_PROMPT, describe(scene), wrong)
