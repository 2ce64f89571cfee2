"""
Regular languages, each sampled from its automaton. Needs no download.

One example is a string of the language, `text`.

| language | its strings |
|---|---|
| `tomita-1` | 1* |
| `tomita-2` | (10)* |
| `tomita-3` | no odd run of 0s right after an odd run of 1s |
| `tomita-4` | no 000 |
| `tomita-5` | an even number of 0s and an even number of 1s |
| `tomita-6` | as many 0s as 1s, modulo 3 |
| `tomita-7` | 0*1*0*1* |
| `parity` | 0s and 1s, an even number of 1s |
| `aa-star`, `abab-star` | (aa)*, (abab)* |
| `d-2`, `d-4`, `d-12` | D_n = (a D_(n-1) b)* with D_0 the empty string: brackets at most n deep |

Training strings have 2 to 50 symbols. Validation and test have two bins of equal size, 2 to 50 and 51 to 100 symbols.
In a bin all lengths that the language has get equal shares, and strings are drawn uniformly from those of their length.
If the language has at least four times as many strings of a length as are drawn, the drawn strings are distinct, and
each is in one split only. For short lengths, and for languages like 1* with one string of each length, strings are
repeated within and across splits.

Where D_n has enough strings of a length that reach the depth n, half of the drawn strings of that length do. Of all
strings of D_12 with at most 50 symbols only 0.3 % reach the depth 12, too few to learn that no further bracket may be
opened. The paper's authors nest their strings deeply as well, with another generator.

Source: Bhattamishra, Ahuja, Goyal 2020, "On the Ability and Limitations of Transformers to Recognize Formal Languages"
(arXiv 2009.11264), section 4 and appendix.
"""

# Q states, S symbols of the alphabet, N steps still to go

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict
from pydantic import PositiveInt


END = "<end>"
BINS = ((2, 50), (51, 100))
DEPTHS = (2, 4, 12)  # of D_n
AMPLE = 4  # times as many strings of a length as are drawn are enough to draw distinct ones


class Automaton(NamedTuple):
    """
    A deterministic automaton that starts in state 0. `transitions[q]` maps each symbol that may follow in state q to
    the next state. Every state leads to an accepting one, so a symbol is legal exactly if it has a transition.
    """

    alphabet: str
    transitions: tuple[dict[str, int], ...]
    accepting: frozenset[int]

    def next_symbols(self, text: str) -> np.ndarray:
        """The legal next symbols after each position of a string, its end last: `(len(text), S + 1)`, bool."""
        state, rows = 0, []
        for symbol in text:
            state = self.transitions[state][symbol]
            rows.append([*(other in self.transitions[state] for other in self.alphabet), state in self.accepting])
        return np.array(rows)

    def completions(self, longest: int) -> np.ndarray:
        """The number of strings of N symbols from a state to an accepting one: `(longest + 1, Q)`."""
        counts = np.zeros((longest + 1, len(self.transitions)))
        counts[0, list(self.accepting)] = 1
        for steps in range(1, longest + 1):
            for state, following in enumerate(self.transitions):
                counts[steps, state] = sum(counts[steps - 1, after] for after in following.values())
        return counts

    def sample(self, length: int, count: int, completions: np.ndarray, rng: np.random.Generator) -> list[str]:
        """`count` strings, drawn uniformly from those of `length`, of which the language must have at least one."""
        after = np.array([[row.get(symbol, -1) for symbol in self.alphabet] for row in self.transitions])  # (Q, S)
        states, symbols = np.zeros(count, dtype=int), np.zeros((count, length), dtype=int)
        for place in range(length):  # a symbol's probability is its share of the possible completions
            weights = np.where(after >= 0, completions[length - place - 1, after], 0)
            shares = weights.cumsum(axis=1) / weights.sum(axis=1, keepdims=True).clip(min=1)
            symbols[:, place] = (rng.random(count)[:, None] >= shares[states]).sum(axis=1)
            states = after[states, symbols[:, place]]
        return ["".join(self.alphabet[symbol] for symbol in row) for row in symbols.tolist()]


def brackets(depth: int) -> Automaton:
    """D_n: the state is the number of open brackets."""
    transitions = [{"a": 1}, *({"a": n + 1, "b": n - 1} for n in range(1, depth)), {"b": depth - 1}]
    return Automaton("ab", tuple(transitions), frozenset({0}))


def deep_brackets(depth: int) -> Automaton:
    """D_n without D_(n-1): the state is the number of open brackets, plus n once the depth n has been reached."""
    before = [{"a": n + 1 if n + 1 < depth else 2 * depth, **({"b": n - 1} if n else {})} for n in range(depth)]
    since = [{symbol: depth + n for symbol, n in row.items()} for row in brackets(depth).transitions]
    return Automaton("ab", (*before, *since), frozenset({depth}))


AUTOMATA: dict[str, Automaton] = {
    "tomita-1": Automaton("01", ({"1": 0},), frozenset({0})),
    "tomita-2": Automaton("01", ({"1": 1}, {"0": 0}), frozenset({0})),
    # an even run of 1s (or none) and what follows; an odd run; an odd, an even run of 0s after that
    "tomita-3": Automaton("01", ({"0": 0, "1": 1}, {"0": 2, "1": 0}, {"0": 3}, {"0": 2, "1": 1}), frozenset({0, 1, 3})),
    "tomita-4": Automaton("01", ({"0": 1, "1": 0}, {"0": 2, "1": 0}, {"1": 0}), frozenset({0, 1, 2})),
    "tomita-5": Automaton(
        "01", ({"0": 1, "1": 2}, {"0": 0, "1": 3}, {"0": 3, "1": 0}, {"0": 2, "1": 1}), frozenset({0})
    ),
    "tomita-6": Automaton("01", ({"0": 1, "1": 2}, {"0": 2, "1": 0}, {"0": 0, "1": 1}), frozenset({0})),
    "tomita-7": Automaton(
        "01", ({"0": 0, "1": 1}, {"0": 2, "1": 1}, {"0": 2, "1": 3}, {"1": 3}), frozenset({0, 1, 2, 3})
    ),
    "parity": Automaton("01", ({"0": 0, "1": 1}, {"0": 1, "1": 0}), frozenset({0})),
    "aa-star": Automaton("a", ({"a": 1}, {"a": 0}), frozenset({0})),
    "abab-star": Automaton("ab", ({"a": 1}, {"b": 2}, {"a": 3}, {"b": 0}), frozenset({0})),
    **{f"d-{depth}": brackets(depth) for depth in DEPTHS},
}

# Subsets of a language from which as many strings of a length are drawn as from the whole language.
PARTS = {f"d-{depth}": (deep_brackets(depth),) for depth in DEPTHS}


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        language: one of the table above.
        train: number of training strings.
        validation, test: number of strings in each of the two bins.
        seed: of the random draws.
    """

    source: str
    language: Literal[tuple(AUTOMATA)]
    train: PositiveInt = 10_000
    validation: PositiveInt = 1_000
    test: PositiveInt = 2_000
    seed: int = 0


def load(options: Options) -> DatasetDict:
    """Draw the strings of all splits."""
    automata = (AUTOMATA[options.language], *PARTS.get(options.language, ()))
    rng = np.random.default_rng(options.seed)
    short, long = BINS
    drawn = draw(automata, short, (options.train, options.validation, options.test), rng)
    strings = dict(zip(("train", "validation", "test"), drawn, strict=True))
    for split, texts in zip(("validation", "test"), draw(automata, long, (options.validation, options.test), rng)):
        strings[split] = strings[split] + texts
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in strings.items()})


def draw(
    automata: Sequence[Automaton], lengths: tuple[int, int], counts: Sequence[int], rng: np.random.Generator
) -> list[list[str]]:
    """
    A list of strings for each of `counts`, with lengths in the bin `lengths`, shortest first.

    Args:
        automata: of the language, then of the subsets in `PARTS`.
    """
    completions = [automaton.completions(lengths[1]) for automaton in automata]
    possible = [length for length in range(lengths[0], lengths[1] + 1) if completions[0][length, 0] > 0]
    splits: list[list[str]] = [[] for _ in counts]
    for length, *wanted in zip(possible, *(shares(count, len(possible)) for count in counts), strict=True):
        ample = [strings[length, 0] >= AMPLE * sum(wanted) for strings in completions]
        taken = [index for index in range(len(automata)) if index == 0 or ample[index]]
        seen: set[str] | None = set() if ample[0] else None
        for index, *goals in zip(taken, *(shares(count, len(taken)) for count in wanted), strict=True):
            for texts, goal in zip(splits, goals, strict=True):
                texts += take(goal, automata[index], length, completions[index], rng, seen)
    return splits


def take(
    count: int,
    automaton: Automaton,
    length: int,
    completions: np.ndarray,
    rng: np.random.Generator,
    seen: set[str] | None,
) -> list[str]:
    """`count` strings of a length; with `seen`, distinct from the strings in it, to which they are added."""
    texts: list[str] = []
    while len(texts) < count:
        for text in automaton.sample(length, count - len(texts), completions, rng):
            if seen is None or text not in seen:
                texts.append(text)
            if seen is not None:
                seen.add(text)
    return texts


def shares(count: int, among: int) -> list[int]:
    """`count` divided into `among` nearly equal integers, the larger first."""
    return [count // among + (index < count % among) for index in range(among)]
