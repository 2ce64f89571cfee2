"""Regular languages: automata against definitions of another kind, how strings are drawn, scores, and a whole run."""

import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from scripts import evaluate, train
from scripts.data.sources.regular_languages import AMPLE, AUTOMATA, BINS, PARTS, Options, load
from scripts.tasks.next_symbols import number_symbols, pad_strings, row_scores, string_metrics
from scripts.training.recipe import read_recipe


def no_odd_zeros_after_odd_ones(text):
    runs = [(symbol, len(list(run))) for symbol, run in itertools.groupby(text)]
    return not any(a == "1" and m % 2 and n % 2 for (a, m), (_, n) in itertools.pairwise(runs))


def brackets(depth):
    """The regular expression of D_n."""
    return f"(a{brackets(depth - 1)}b)*" if depth else ""


def matches(expression):
    return lambda text: re.fullmatch(expression, text) is not None


DEFINITIONS = {
    "tomita-1": matches("1*"),
    "tomita-2": matches("(10)*"),
    "tomita-3": no_odd_zeros_after_odd_ones,
    "tomita-4": lambda text: "000" not in text,
    "tomita-5": lambda text: text.count("0") % 2 == 0 and text.count("1") % 2 == 0,
    "tomita-6": lambda text: (text.count("0") - text.count("1")) % 3 == 0,
    "tomita-7": matches("0*1*0*1*"),
    "parity": matches("0*(10*10*)*"),
    "aa-star": matches("(aa)*"),
    "abab-star": matches("(abab)*"),
    "d-2": matches(brackets(2)),
    "d-4": matches(brackets(4)),
    "d-12": matches(brackets(12)),
}
LANGUAGES = list(DEFINITIONS)


def accepts(automaton, text):
    state = 0
    for symbol in text:
        if symbol not in automaton.transitions[state]:
            return False
        state = automaton.transitions[state][symbol]
    return state in automaton.accepting


def words(alphabet, longest):
    return ("".join(word) for n in range(longest + 1) for word in itertools.product(alphabet, repeat=n))


@pytest.fixture(scope="module")
def drawn():
    """The splits of each language, as lists of strings, drawn once."""
    return {
        name: {split: rows["text"] for split, rows in load(Options("regular_languages", name, train=2000)).items()}
        for name in LANGUAGES
    }


def test_every_language_has_a_definition_to_be_tested_against():
    assert LANGUAGES == list(AUTOMATA)


@pytest.mark.parametrize("name", LANGUAGES)
class TestAutomata:
    def test_they_accept_what_the_definition_does(self, name):
        automaton = AUTOMATA[name]
        for word in words(automaton.alphabet, 10):
            assert accepts(automaton, word) == DEFINITIONS[name](word), word

    def test_what_may_follow_is_what_some_string_of_the_language_goes_on_with(self, name):
        automaton = AUTOMATA[name]
        language = {word for word in words(automaton.alphabet, 12) if DEFINITIONS[name](word)}
        prefixes = {word[:n] for word in language for n in range(len(word) + 1)}
        for prefix in (prefix for prefix in prefixes if 1 <= len(prefix) <= 5):
            expected = [prefix + symbol in prefixes for symbol in automaton.alphabet] + [prefix in language]
            assert automaton.next_symbols(prefix)[-1].tolist() == expected, prefix

    def test_the_number_of_strings_of_each_length_is_right(self, name):
        automaton = AUTOMATA[name]
        counts = Counter(len(word) for word in words(automaton.alphabet, 10) if DEFINITIONS[name](word))
        assert automaton.completions(10)[:, 0].tolist() == [counts[length] for length in range(11)]

    def test_the_strings_drawn_are_of_the_language_and_of_its_lengths(self, name, drawn):
        possible = [[n for n in range(a, b + 1) if AUTOMATA[name].completions(b)[n, 0]] for a, b in BINS]
        for split, texts in drawn[name].items():
            assert all(DEFINITIONS[name](text) for text in texts)
            counts = Counter(map(len, texts))
            for lengths, bin_size in zip(possible, {"train": (2000, 0)}.get(split, (len(texts) // 2,) * 2)):
                shares = [counts[length] for length in lengths]
                assert sum(shares) == bin_size and max(shares) - min(shares) <= 1

    def test_ample_lengths_have_distinct_strings_in_one_split_each(self, name, drawn):
        everything = [text for texts in drawn[name].values() for text in texts]
        completions = AUTOMATA[name].completions(100)[:, 0]
        lengths = Counter(map(len, everything))
        ample = [text for text in everything if completions[len(text)] >= AMPLE * lengths[len(text)]]
        assert len(set(ample)) == len(ample)
        assert (not ample) == (name in ("tomita-1", "tomita-2", "aa-star", "abab-star"))


@pytest.mark.parametrize("name", PARTS)
def test_half_of_the_brackets_are_as_deep_as_they_may_be(name, drawn):
    n = int(name.removeprefix("d-"))
    (part,) = PARTS[name]
    for word in words("ab", 12):
        assert accepts(part, word) == (DEFINITIONS[name](word) and not matches(brackets(n - 1))(word)), word
    assert accepts(part, "ab" + "a" * n + "b" * n) and not accepts(part, "ab" + "a" * (n - 1) + "b" * (n - 1))
    by_length = {}
    for text in itertools.chain(*drawn[name].values()):
        by_length.setdefault(len(text), []).append(accepts(part, text))
    counts = part.completions(100)[:, 0]
    deep = [sum(found) / len(found) for length, found in by_length.items() if counts[length] >= AMPLE * len(found)]
    assert deep and min(deep) >= 0.5


def test_a_bracket_language_is_as_deep_as_its_number_says():
    automaton = AUTOMATA["d-12"]
    deepest = "a" * 12 + "b" * 12
    assert DEFINITIONS["d-12"](deepest)
    assert automaton.next_symbols(deepest)[[10, 11, 12, 23]].tolist() == [
        [True, True, False], [False, True, False], [True, True, False], [True, False, True],
    ]  # fmt: skip


def test_strings_of_a_length_are_drawn_alike():
    automaton = AUTOMATA["tomita-4"]
    texts = automaton.sample(6, 40_000, automaton.completions(6), np.random.default_rng(0))
    counts = Counter(texts)
    expected = 40_000 / 44  # of the 64 words of six symbols, 44 have no 000
    assert len(counts) == 44
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 77  # chi-squared, 43 degrees, 0.1 %


def test_the_seed_decides_what_is_drawn():
    first, again, other = (load(Options("regular_languages", "parity", train=50, seed=seed)) for seed in (0, 0, 1))
    assert first["test"]["text"] == again["test"]["text"] != other["test"]["text"]


def test_a_batch_has_the_symbols_and_what_may_follow_each():
    batch = pad_strings([number_symbols(text, AUTOMATA["d-2"]) for text in ("aabb", "ab")], padding=2)
    assert batch["input_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [[1, 1, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1]],
        [[1, 1, 0], [1, 0, 1], [-100] * 3, [-100] * 3],
    ]


def test_a_string_is_right_if_all_of_its_positions_are():
    texts = ["01" * 15, "001" * 16 + "00", "1" * 60, "10" * 30, "1" * 99]
    batch = pad_strings([number_symbols(text, AUTOMATA["tomita-4"]) for text in texts], padding=2)
    logits = torch.where(batch["labels"] == 1, 2.0, -2.0)
    logits[1, 49, 0] *= -1  # one answer of the second
    logits[2, 60:] = 5.0  # padding is not scored
    logits[3, 7, 2] *= -1
    scores = row_scores((logits,), batch["labels"])
    assert scores[:, 0].tolist() == [1, 0, 1, 0, 1] and scores[:, 1].tolist() == [30, 50, 60, 60, 99]
    found = string_metrics(
        EvalPrediction(scores.numpy(), batch["labels"].numpy()),
        metrics=["string_accuracy", "string_accuracy_long", "nats_per_frame"],
    )
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    nats = (3 * 80 * right + wrong - right) / 80
    assert found == {
        "string_accuracy": 0.5,
        "string_accuracy_long": pytest.approx(2 / 3),
        "nats_per_frame": pytest.approx(nats),
    }


SMALL = [
    "data.train=600", "data.validation=60", "data.test=80", "training.use_cpu=true", "training.disable_tqdm=true",
    "training.max_steps=60", "training.eval_steps=30", "training.save_steps=30", "model.local_window=3",
]  # fmt: skip


def arguments(*settings):
    return [part for setting in settings for part in ("--set", setting)]


def test_the_recipe_learns_and_its_model_scores_the_same(tmp_path):
    folder = tmp_path / "run"
    result = train.main(
        ["regular-languages", "--output-dir", str(folder), *arguments("data.language=tomita-1", *SMALL)]
    )
    assert result["metrics"]["test"]["string_accuracy"] == result["metrics"]["test"]["string_accuracy_long"] == 1
    config = json.loads((folder / "final" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1", "2": "<end>"} and config["vocab_size"] == 3
    for batch in (7, 100):
        scored = evaluate.main([str(folder / "final"), *arguments(f"training.per_device_eval_batch_size={batch}")])
        assert scored["metrics"] == pytest.approx(result["metrics"]["test"], rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.language=tomita-8", "`data.language` must be 'tomita-1', .* or 'd-12', got 'tomita-8'"),
        ("data.train=0", "`data.train` must be greater than 0, got 0"),
        ('report.metrics=["string_acuracy"]', "`report.metrics` of next_symbols are of .* did you mean `string_acc"),
        ('report.compressors=["gzip"]', "`report.compressors` is for language_modeling"),
        ("tokenizer.kind=character", r"section `\[tokenizer\]` is for text"),
        ("model.is_causal=false", "`is_causal` must be True for next_symbols"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, setting, message):
    with pytest.raises(SystemExit, match=message):
        train.main(["regular-languages", "--output-dir", str(tmp_path), *arguments(setting)])


def test_the_task_is_for_these_languages_alone(tmp_path):
    with pytest.raises(ValueError, match="`data.source` must be regular_languages for next_symbols, got 'digits'"):
        read_recipe("digits", ["task.name=next_symbols", 'report.metrics=["string_accuracy"]']).prepare(None, ())
