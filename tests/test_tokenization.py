"""Tokenizers: what they give back, what they do not know, and that they survive saving."""

import pytest
from transformers import AutoTokenizer

from scripts.data.tokenization import Options, build_tokenizer, characters_per_token, token_ids


TEXTS = ["def f(x):\n    return x  # naïve\n", "a <eos> b\n\n\tétude <unk>\r\n", "木 and 😀 and <pad>"]
OPTIONS = {
    "character": Options("character"),
    "word": Options("word"),
    "byte_bpe": Options("byte_bpe", vocab_size=300),
}


@pytest.mark.parametrize("kind", ["character", "byte_bpe"])
def test_decoding_gives_the_text_back(kind):
    tokenizer = build_tokenizer(OPTIONS[kind], TEXTS)
    for text in [*TEXTS, "", " ", "\n\n  \n"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_byte_pairs_spell_what_they_have_never_seen():
    tokenizer = build_tokenizer(OPTIONS["byte_bpe"], ["abc"])
    assert tokenizer.decode(tokenizer("木😀\x00é").input_ids) == "木😀\x00é"


def test_words_are_split_at_white_space_and_lines_end_with_eos():
    tokenizer = build_tokenizer(OPTIONS["word"], ["the cat\nthe dog\n"])
    assert tokenizer.tokenize("the dog\nthe bird") == ["the", "dog", "<eos>", "the", "<unk>"]
    assert tokenizer.decode(tokenizer("dog  the\n").input_ids, skip_special_tokens=True) == "dog the"


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_saved_tokenizer_loads_as_it_was(kind, tmp_path):
    tokenizer = build_tokenizer(OPTIONS[kind], TEXTS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert loaded.padding_side == "right"
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<eos>", "<eos>")
    assert loaded.unk_token == tokenizer.unk_token


@pytest.mark.parametrize("kind", ["character", "byte_bpe"])
def test_text_that_spells_a_special_token_is_text(kind):
    tokenizer = build_tokenizer(OPTIONS[kind], TEXTS)
    ids = tokenizer("<eos><unk><pad>").input_ids
    assert not {tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} & set(ids)


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_ids_of_many_texts_are_those_of_the_tokenizer(kind):
    tokenizer = build_tokenizer(OPTIONS[kind], TEXTS)
    texts = [*TEXTS, "", "unseen: \U0001f40d ß", "a\x00b"]
    assert [list(ids) for ids in token_ids(tokenizer, texts)] == [tokenizer(text).input_ids for text in texts]


def test_rare_and_surplus_characters_are_left_out():
    assert len(build_tokenizer(Options("character", min_frequency=2), ["aabbc"])) == 3 + 2
    tokenizer = build_tokenizer(Options("character", vocab_size=4), ["abbb"])
    assert tokenizer.tokenize("ab") == ["<unk>", "b"]


@pytest.mark.parametrize("kind", ["character", "byte_bpe"])
def test_characters_per_token_sum_to_the_length_of_the_text(kind):
    tokenizer = build_tokenizer(OPTIONS[kind], TEXTS)
    characters = characters_per_token(tokenizer)
    for text in [*TEXTS, "火 and 🌳 unseen"]:
        assert sum(characters[index] for index in tokenizer(text).input_ids) == len(text)
    assert characters[tokenizer.eos_token_id] == characters[tokenizer.pad_token_id] == 0


def test_words_have_no_length_in_characters():
    assert characters_per_token(build_tokenizer(OPTIONS["word"], TEXTS)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "byte_bpe"}, "`tokenizer.vocab_size` is missing; byte_bpe needs it"),
        ({"kind": "byte_bpe", "vocab_size": 256}, "`tokenizer.vocab_size` must be at least 258 for byte_bpe, got 256"),
        ({"kind": "character", "vocab_size": 3}, "`tokenizer.vocab_size` must be at least 4 for character, got 3"),
    ],
)
def test_impossible_vocabularies_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)
