"""Questions about a scene, in six families, and the three forms they are asked in.

Families: `colour`, `count`, `exists`, `where`, `larger`, `word`. Forms: free (a short answer),
yes/no, and multiple choice in LLaVA's manner (options on lines of their own, answered by the
letter).
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from grace_core.toy.lettering import WORDS
from grace_core.toy.pictures import COLOURS, KINDS, PLACES, Scene, Shape

CHOICE_INSTRUCTION = "Answer with the letter."
YESNO_INSTRUCTION = "Answer yes or no."
LETTERS = "ABCD"
MAX_COUNT = 3


@dataclass(frozen=True)
class Question:
    """One thing to ask about a scene, with its right answer and every plausible wrong one.

    `yesno` turns a candidate answer into the yes/no question that is true exactly for `answer`.
    """

    family: str
    free: str
    choice: str
    answer: str
    wrong: tuple[str, ...]
    yesno: Callable[[str], str]


@dataclass(frozen=True)
class Asked:
    """A question in one form: the bare question, its options if any, and the expected reply."""

    family: str
    form: str
    question: str
    choices: dict[str, str] | None
    answer: str
    wrong: tuple[str, ...]
    """Replies of the same form that are wrong."""

    @property
    def prompt(self) -> str:
        """The text put to the model."""
        return form_prompt(self.form, self.question, self.choices)


def form_prompt(form: str, question: str, choices: dict[str, str] | None) -> str:
    """The prompt of a question: options and instruction follow on lines of their own."""
    if form == "mcq":
        assert choices
        options = "".join(f"\n{letter}. {text}" for letter, text in choices.items())
        return f"{question}{options}\n{CHOICE_INSTRUCTION}"
    if form == "yesno":
        return f"{question}\n{YESNO_INSTRUCTION}"
    return question


def think_of(family: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of the family about the scene, or None where the scene offers none."""
    return FAMILIES[family](scene, rng)


def ask_free(question: Question, rng: random.Random) -> Asked:
    """Ask for a short answer; `exists` has only yes and no to answer."""
    if question.family == "exists":
        asked = ask_yesno(question, rng, truth=rng.random() < 0.5)
        return Asked("exists", "free", asked.question, None, asked.answer, asked.wrong)
    return Asked(
        question.family, "free", question.free, None, question.answer, tuple(question.wrong)
    )


def ask_yesno(question: Question, rng: random.Random, *, truth: bool) -> Asked:
    """Ask whether a right (`truth`) or a wrong candidate holds."""
    candidate = question.answer if truth else rng.choice(question.wrong)
    answer, wrong = ("Yes", "No") if truth else ("No", "Yes")
    return Asked(question.family, "yesno", question.yesno(candidate), None, answer, (wrong,))


def ask_choice(question: Question, rng: random.Random, *, slot: int | None = None) -> Asked:
    """Ask with up to four options; the right one stands at `slot` (modulo their number)."""
    texts = rng.sample(question.wrong, min(3, len(question.wrong)))
    slot = rng.randrange(len(texts) + 1) if slot is None else slot % (len(texts) + 1)
    texts.insert(slot, question.answer)
    choices = dict(zip(LETTERS, texts, strict=False))
    wrong = tuple(letter for letter in choices if letter != LETTERS[slot])
    return Asked(question.family, "mcq", question.choice, choices, LETTERS[slot], wrong)


def describe(scene: Scene) -> str:
    """A caption naming size, colour, kind and place of each shape, then the word."""
    parts = [f"{_size(shape)} {shape.name}, {PLACES[shape.place]}" for shape in scene.shapes]
    if scene.word is not None:
        parts.append(f"the word {scene.word.text}")
    return "; ".join(parts)


DESCRIBE_PROMPT = "Describe the picture."


def _size(shape: Shape) -> str:
    return "large" if shape.large else "small"


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    kinds = Counter(shape.kind for shape in scene.shapes)
    single = [shape for shape in scene.shapes if kinds[shape.kind] == 1]
    if not single:
        return None
    shape = rng.choice(single)
    free = f"What colour is the {shape.kind}?"
    wrong = tuple(colour for colour in COLOURS if colour != shape.colour)
    return Question(
        "colour", free, free, shape.colour, wrong, lambda value: f"Is the {shape.kind} {value}?"
    )


def _count(scene: Scene, rng: random.Random) -> Question | None:
    subjects = {"shapes": len(scene.shapes)}
    subjects |= {_plural(kind): sum(s.kind == kind for s in scene.shapes) for kind in KINDS}
    subjects |= {
        f"{colour} shapes": sum(s.colour == colour for s in scene.shapes) for colour in COLOURS
    }
    # First the number, then who has it: else nearly every answer would be 0 or 1.
    number = rng.choice(sorted(set(subjects.values())))
    subject = rng.choice([name for name, n in subjects.items() if n == number])
    free = f"How many {subject} are there?"
    wrong = tuple(str(n) for n in range(MAX_COUNT + 1) if n != number)
    return Question(
        "count",
        free,
        free,
        str(number),
        wrong,
        lambda value: f"Is the number of {subject} {value}?",
    )


def _exists(scene: Scene, rng: random.Random) -> Question:
    present = rng.choice(scene.shapes)
    absent = [f"{c} {k}" for c in COLOURS for k in KINDS if f"{c} {k}" not in scene.names]
    # Wrong candidates share a colour or a kind with something that is there.
    seen = {word for name in scene.names for word in name.split()}
    near = tuple(name for name in absent if seen & set(name.split()))
    ask = "Which of these is in the picture?"
    return Question("exists", ask, ask, present.name, near, lambda value: f"Is there {_a(value)}?")


def _where(scene: Scene, rng: random.Random) -> Question | None:
    single = [shape for shape in scene.shapes if scene.names.count(shape.name) == 1]
    if not single:
        return None
    shape = rng.choice(single)
    free = f"Where is the {shape.name}?"
    wrong = tuple(place for place in PLACES if place != PLACES[shape.place])
    return Question(
        "where",
        free,
        free,
        PLACES[shape.place],
        wrong,
        lambda value: f"Is the {shape.name} at the {value}?",
    )


def _larger(scene: Scene, rng: random.Random) -> Question | None:
    single = [shape for shape in scene.shapes if scene.names.count(shape.name) == 1]
    large = [shape.name for shape in single if shape.large]
    small = [shape.name for shape in single if not shape.large]
    if not large or not small:
        return None
    winner, loser = rng.choice(large), rng.choice(small)
    pair = [winner, loser]
    rng.shuffle(pair)
    return Question(
        "larger",
        f"Which is larger, the {pair[0]} or the {pair[1]}?",
        "Which is larger?",
        winner,
        (loser,),
        lambda value: f"Is the {value} larger than the {loser if value == winner else winner}?",
    )


def _word(scene: Scene, rng: random.Random) -> Question | None:
    if scene.word is None:
        return None
    text = scene.word.text
    free = "What word is shown?"
    wrong = tuple(word for word in WORDS if word != text)
    return Question("word", free, free, text, wrong, lambda value: f"Is the word {value}?")


FAMILIES: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "colour": _colour,
    "count": _count,
    "exists": _exists,
    "where": _where,
    "larger": _larger,
    "word": _word,
}


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
