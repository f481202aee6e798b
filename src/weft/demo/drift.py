"""Synthetic dated documents whose drift is set by dials, and whose best possible accuracy is known exactly.

SYNTHETIC: shows mechanics, no evidence about clinical data. All words are invented.

A document of a year is one style word, background words from the year's own distribution, and a few signal words. Each
signal word is drawn on its own: with the chance `strength` from the words that speak for the document's class, else
from those of another class. So how many words speak for each class is all that the words tell about the class, its
exact posterior is a product, and the best accuracy of a year is a sum over those counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations_with_replacement
from math import factorial, prod

import numpy as np

BANNER = "SYNTHETIC: shows mechanics, no evidence about clinical data."
CONSONANTS = "bdfgjkmnprtvxz"
VOWELS = "aeiou"
MIDDLES = ("lk", "rv", "mz", "nd", "xt", "gr")


@dataclass(frozen=True, kw_only=True)
class Dials:
    """How strong each kind of drift is; 0: none of it."""

    renewal: float = 0.5  # share of each class's words that get synonyms in the third and in the fifth year
    novel: float = 0.25  # share of the signal words that are of terms which begin in that year, from the second on
    flip: float = 0.25  # share of each class's words that speak for the next class from the fourth year on
    prevalence: float = 0.3  # by how much the first class grows rarer from the first year to the last
    style: float = 1.0  # share of documents that have their era's style word; an era is two years
    background: float = 1.0  # share of the background's distribution that is drawn anew each year
    noise: float = 0.02  # share of labels that are another class's; they are no drift, but a limit to all learners

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            assert 0 <= value <= 1, f"the dial {name} is a share between 0 and 1, not {value}"

    @staticmethod
    def off() -> "Dials":
        """No drift at all and no false label: the years are exchangeable."""
        return Dials(**{field.name: 0.0 for field in fields(Dials)})


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What is written: years, classes and sizes. permuted: labels are dealt anew, so that nothing can be learned."""

    first: int = 2019
    years: int = 6
    classes: int = 2
    per_year: int = 400  # documents
    documents_of_patient: int = 4  # on average, over all years
    signal: int = 6  # signal words of a document
    strength: float = 0.82  # chance that a signal word speaks for the document's own class
    filler: int = 10  # background words of a document
    dials: Dials = Dials()
    permuted: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Year:
    """The distribution of one year's documents.

    prior: chance of each class. old, new: words that speak for each class; those of `new` appear in this year first,
    and the share `novel` of the signal words is theirs. style: the era's word; styled: share of documents with it.
    """

    name: str
    prior: tuple[float, ...]
    old: tuple[tuple[str, ...], ...]
    new: tuple[tuple[str, ...], ...]
    novel: float
    style: str
    usual_style: str
    styled: float
    background: tuple[float, ...]
    noise: float
    signal: int
    strength: float

    @property
    def classes(self) -> int:
        return len(self.prior)

    def speaks_for(self) -> dict[str, int]:
        """Signal word -> the class that it speaks for in this year."""
        return {word: k for group in (self.old, self.new) for k, words in enumerate(group) for word in words}

    def likelihood(self, counts: Sequence[int]) -> list[float]:
        """Chance of each class's documents to have so many words that speak for each class, order aside."""
        other = (1 - self.strength) / (self.classes - 1)
        ways = factorial(sum(counts)) // prod(factorial(n) for n in counts)
        return [
            ways * prod((self.strength if k == y else other) ** n for k, n in enumerate(counts))
            for y in range(self.classes)
        ]

    def posterior(self, words: Sequence[str]) -> tuple[float, ...]:
        """Exact chance of each label, given a document's words."""
        speaks = self.speaks_for()
        counts = [sum(speaks.get(word) == k for word in words) for k in range(self.classes)]
        joint = [p * q for p, q in zip(self.prior, self.likelihood(counts), strict=True)]
        return self._noisy([each / sum(joint) for each in joint])

    def bayes_accuracy(self) -> float:
        """Accuracy of the exact posterior's most probable label: no learner's expected accuracy is higher."""
        total = 0.0
        for speaking in combinations_with_replacement(range(self.classes), self.signal):
            counts = [speaking.count(k) for k in range(self.classes)]
            joint = [p * q for p, q in zip(self.prior, self.likelihood(counts), strict=True)]
            total += sum(joint) * max(self._noisy([each / sum(joint) for each in joint]))
        return total

    def chance(self) -> float:
        """The commonest label's share: the best accuracy of one who cannot read."""
        return max(self._noisy(self.prior))

    def _noisy(self, truth: Sequence[float]) -> tuple[float, ...]:
        return tuple((1 - self.noise) * p + self.noise * (1 - p) / (self.classes - 1) for p in truth)


@dataclass(frozen=True)
class Note:
    """One document. patient: several documents have the same."""

    id: str
    patient: str
    date: str
    year: str
    text: str
    label: str


def class_names(drift: Drift) -> tuple[str, ...]:
    """The words of the label column."""
    return tuple(f"kind-{chr(ord('a') + number)}" for number in range(drift.classes))


def invented_words(count: int, seed: int) -> list[str]:
    """Different words that mean nothing, such as `zelkox`: consonant, vowel, two consonants, vowel, x or q or v."""
    rng = np.random.default_rng([seed, 1])
    words: dict[str, None] = {}
    while len(words) < count:
        letters = (CONSONANTS, VOWELS, MIDDLES, VOWELS, CONSONANTS, VOWELS, "xqv")
        words.setdefault("".join(part[int(rng.integers(len(part)))] for part in letters))
    return list(words)


# ---- The years ----------------------------------------------------------------------------------------------------

WORDS_OF_CLASS = 12  # that speak for a class in a year, beside new terms
NEW_TERMS = 4  # of each class in a year
BACKGROUND = 80  # words
CONCENTRATION = 0.3  # of the Dirichlet distribution of a year's background; small: few words are frequent


def years_of(drift: Drift) -> list[Year]:
    """The distributions of all years, from the dials and the seed alone."""
    words = iter(invented_words(_words_needed(drift), drift.seed))
    usual = next(words)
    eras = [next(words) for _ in range((drift.years + 1) // 2)]
    fillers = [next(words) for _ in range(BACKGROUND)]
    assert fillers == background_words(drift)
    rng = np.random.default_rng([drift.seed, 2])
    common = rng.dirichlet(np.full(BACKGROUND, CONCENTRATION))
    groups = [[next(words) for _ in range(WORDS_OF_CLASS)] for _ in range(drift.classes)]
    dials, made = drift.dials, []
    for number in range(drift.years):
        synonyms = [[next(words) for _ in range(WORDS_OF_CLASS)] for _ in range(drift.classes)]
        terms = tuple(tuple(next(words) for _ in range(NEW_TERMS)) for _ in range(drift.classes))
        own = rng.dirichlet(np.full(BACKGROUND, CONCENTRATION))
        if number in (2, 4):
            renewed = round(dials.renewal * WORDS_OF_CLASS)
            groups = [new[:renewed] + old[renewed:] for old, new in zip(groups, synonyms, strict=True)]
        if number == 3:
            groups = flipped(groups, round(dials.flip * WORDS_OF_CLASS))
        novel = dials.novel if number else 0.0
        shift = dials.prevalence * number / max(1, drift.years - 1)
        made.append(
            Year(
                name=str(drift.first + number),
                prior=_prior(drift.classes, shift),
                old=tuple(map(tuple, groups)),
                new=terms if novel else ((),) * drift.classes,
                novel=novel,
                style=eras[number // 2] if dials.style else usual,
                usual_style=usual,
                styled=dials.style,
                background=tuple((1 - dials.background) * common + dials.background * own),
                noise=dials.noise,
                signal=drift.signal,
                strength=drift.strength,
            )
        )
    return made


def flipped(groups: Sequence[Sequence[str]], moved: int) -> list[list[str]]:
    """The last words of each class speak for the next class, those of the last class for the first."""
    kept = [list(group[: len(group) - moved]) for group in groups]
    ends = [list(group[len(group) - moved :]) for group in groups]
    return [own + ends[k - 1] for k, own in enumerate(kept)]


def background_words(drift: Drift) -> list[str]:
    """The words that tell nothing about a class."""
    before = 1 + (drift.years + 1) // 2
    return invented_words(_words_needed(drift), drift.seed)[before : before + BACKGROUND]


def vocabulary(drift: Drift) -> list[str]:
    """Every word that some document of these years can have, in a fixed order."""
    years = years_of(drift)
    words = [years[0].usual_style, *(year.style for year in years), *background_words(drift)]
    words += [word for year in years for group in (*year.old, *year.new) for word in group]
    return list(dict.fromkeys(words))


def _words_needed(drift: Drift) -> int:
    each_year = drift.classes * (WORDS_OF_CLASS + NEW_TERMS)
    return 1 + (drift.years + 1) // 2 + BACKGROUND + drift.classes * WORDS_OF_CLASS + drift.years * each_year


def _prior(classes: int, shift: float) -> tuple[float, ...]:
    first = (1 - shift) / classes  # the dial at 1 leaves none of the first class in the last year
    return (first, *((1 - first) / (classes - 1) for _ in range(classes - 1)))


# ---- The documents ------------------------------------------------------------------------------------------------


def notes(drift: Drift) -> Iterator[Note]:
    """All documents, year by year."""
    for number, year in enumerate(years_of(drift)):
        yield from notes_of(drift, year, drift.per_year, np.random.default_rng([drift.seed, 3, number]))


def notes_of(drift: Drift, year: Year, documents: int, rng: np.random.Generator) -> Iterator[Note]:
    """So many documents of one year. A patient may have documents in several years."""
    labels, background = class_names(drift), background_words(drift)
    patients = max(1, drift.per_year * drift.years // drift.documents_of_patient)
    made = [document(year, drift.filler, background, rng) for _ in range(documents)]
    told = np.array([label for _, label in made])
    if drift.permuted:
        rng.shuffle(told)
    for row, (text, _) in enumerate(made):
        month, day = 1 + 12 * row // documents, 1 + int(rng.integers(28))
        yield Note(
            id=f"n{year.name}{row:05d}",
            patient=f"p{int(rng.integers(patients)):05d}",
            date=f"{year.name}-{month:02d}-{day:02d}",
            year=year.name,
            text=text,
            label=labels[int(told[row])],
        )


def notes_before(drift: Drift, documents: int) -> Iterator[Note]:
    """Other documents of the first year's distribution, for the base model that the years begin with."""
    return notes_of(drift, years_of(drift)[0], documents, np.random.default_rng([drift.seed, 4]))


def document(year: Year, filler: int, background: Sequence[str], rng: np.random.Generator) -> tuple[str, int]:
    """The text of one document, and its label."""
    truth = int(rng.choice(year.classes, p=year.prior))
    words = [background[int(place)] for place in rng.choice(len(background), size=filler, p=year.background)]
    for _ in range(year.signal):
        speaks = truth if rng.random() < year.strength else _another(truth, year.classes, rng)
        terms = year.new[speaks] if rng.random() < year.novel else year.old[speaks]
        words.append(terms[int(rng.integers(len(terms)))])
    rng.shuffle(words)
    style = year.style if rng.random() < year.styled else year.usual_style
    label = _another(truth, year.classes, rng) if rng.random() < year.noise else truth
    return " ".join([style, *words]), label


def _another(one: int, classes: int, rng: np.random.Generator) -> int:
    return (one + 1 + int(rng.integers(classes - 1))) % classes


def truth(drift: Drift) -> Mapping[str, object]:
    """What the generator knows and no learner may read, for a file beside the documents."""
    years, labels = years_of(drift), class_names(drift)
    return {
        "banner": BANNER,
        "drift": asdict(drift),
        "bayes_accuracy": {y.name: y.chance() if drift.permuted else y.bayes_accuracy() for y in years},
        "prior": {y.name: dict(zip(labels, y.prior, strict=True)) for y in years},
        "speaks_for": {y.name: {w: labels[k] for w, k in y.speaks_for().items()} for y in years},
        "style": {y.name: y.style for y in years},
    }
