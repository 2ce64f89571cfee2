"""
Train tokenizers with the tokenizers library; they are saved with the model and loaded with `AutoTokenizer`.

| kind | tokens | unknown text | `decode(encode(text))` |
|---|---|---|---|
| `character` | Unicode characters of the training text | `<unk>`, one a character | the text |
| `byte_bpe` | byte pairs merged by frequency, from all 256 bytes | does not exist | the text |
| `pretrained` | those of a saved tokenizer, by `name` | as it does | as it does |
| `word` | words between white space, `<eos>` at line ends | `<unk>`, one a word | the words, separated by one space |

A `<eos>` also ends every document and begins the stream of documents, so generation starts from it. Text that spells
the name of a special token is never read as that token.
"""

import dataclasses
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jinja2 import TemplateError
from pydantic import PositiveInt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.chat_template_utils import render_jinja_template


PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Chinese


@dataclasses.dataclass(frozen=True)
class Options:
    """
    The `[tokenizer]` section.

    Args:
        kind: `character`, `word`, `byte_bpe` or `pretrained`.
        name: of a tokenizer on the Hub, or its folder, for `pretrained`, which takes no other setting.
        vocab_size: number of tokens including special ones; the most frequent are kept. All by default; `byte_bpe`
            requires it.
        min_frequency: leave out tokens that occur fewer times in the training text.
        max_texts: train on this many of the first training documents; on all by default, which reads a whole stream.
        chat_template: a Jinja template that writes a conversation as one text, for `apply_chat_template` and for
            `python -m scripts.serve`. It is text, which never spells a special token: an answer ends with its document.
    """

    kind: Literal["character", "word", "byte_bpe", "pretrained"]
    name: str | None = None
    vocab_size: int | None = None
    min_frequency: int = 1
    max_texts: PositiveInt | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if (self.name is not None) != (self.kind == "pretrained"):
            raise ValueError(f"`tokenizer.name` is for the kind pretrained, which needs it, got {self.name!r}")
        least = 256 + 2 if self.kind == "byte_bpe" else 4
        if self.vocab_size is None and self.kind == "byte_bpe":
            raise ValueError("`tokenizer.vocab_size` is missing; byte_bpe needs it, such as 4096")
        if self.vocab_size is not None and self.vocab_size < least:
            raise ValueError(f"`tokenizer.vocab_size` must be at least {least} for {self.kind}, got {self.vocab_size}")
        if self.chat_template is not None:
            _check_chat_template(self.chat_template)


def _check_chat_template(template: str) -> None:
    """A ValueError for a template that cannot be rendered, or that would spell special tokens as plain text."""
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", PAD, UNK, EOS):
        if name in template:
            raise ValueError(
                f"`tokenizer.chat_template` must be plain text and `messages`, got `{name}`: these tokenizers read the "
                "name of a special token as text"
            )
    try:
        render_jinja_template([[{"role": "user", "content": "text"}]], chat_template=template)
    except TemplateError as error:
        raise ValueError(f"`tokenizer.chat_template` must be a Jinja template of `messages`: {error}") from None


def build_tokenizer(options: Options, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind in `options`, trained on `texts`."""
    if options.kind == "pretrained":
        return pretrained(options.name)
    make = {"character": _character, "word": _word, "byte_bpe": _byte_bpe}[options.kind]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make(options, texts),
        pad_token=PAD,
        unk_token=None if options.kind == "byte_bpe" else UNK,
        bos_token=EOS,
        eos_token=EOS,
        padding_side="right",  # for losses: the first token of a row is no target of a pad; `generate` moves pads
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = options.chat_template
    return tokenizer


def pretrained(name: str) -> PreTrainedTokenizerFast:
    """A saved tokenizer; one without a token for padding pads with its end of a text."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"`tokenizer.name` {name!r} has no fast tokenizer; name one that has a tokenizer.json")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(f"`tokenizer.name` {name!r} has no token for padding and no end of a text; name another")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _vocabulary(options: Options, pieces: Iterable[Iterable[str]]) -> Tokenizer:
    """A tokenizer whose tokens are the pieces that occur, the most frequent first."""
    counts = Counter(itertools.chain.from_iterable(pieces))
    kept = [token for token, count in counts.items() if count >= options.min_frequency and token not in (PAD, UNK, EOS)]
    kept.sort(key=lambda token: (-counts[token], token))
    room = None if options.vocab_size is None else options.vocab_size - 3
    vocabulary = {token: index for index, token in enumerate([PAD, UNK, EOS, *kept[:room]])}
    return Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))


def _character(options: Options, texts: Iterable[str]) -> Tokenizer:
    tokenizer = _vocabulary(options, texts)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _word(options: Options, texts: Iterable[str]) -> Tokenizer:
    tokenizer = _vocabulary(options, (text.split() for text in texts))
    words = [word for word in tokenizer.get_vocab() if word not in (PAD, UNK, EOS)]
    if sum(UNSPACED.search(word) is not None for word in words) > len(words) / 2:
        warnings.warn(
            "`tokenizer.kind` word divides text at white space, which this script does not write between words; "
            "use character or byte_bpe",
            stacklevel=2,
        )
    tokenizer.normalizer = normalizers.Replace("\n", f" {EOS} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _byte_bpe(options: Options, texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def reads_characters(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether each character of a text is one token."""
    state = tokenizer.backend_tokenizer
    splits = isinstance(state.model, models.WordLevel) and isinstance(state.pre_tokenizer, pre_tokenizers.Split)
    return splits and state.normalizer is None


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Sequence[int]]:
    """The ids of each text without special tokens. Characters are looked up in a table, 60 times as fast."""
    if not reads_characters(tokenizer):
        return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    table = np.full(0x110000, tokenizer.unk_token_id, dtype=np.int32)  # by code point
    for token, index in tokenizer.get_vocab().items():
        if len(token) == 1:
            table[ord(token)] = index
    return [table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] for text in texts]


def characters_per_token(tokenizer: PreTrainedTokenizerFast) -> list[int] | None:
    """
    The number of characters of each id, which gives the exact number of characters of a sequence of tokens.

    A byte-level token has as many characters as it has bytes that begin a character in UTF-8. `<unk>` of a character
    vocabulary has one, `<eos>` and `<pad>` have none. None for other tokenizers, such as of words, since unknown words
    have no known length.
    """
    state = tokenizer.backend_tokenizer
    if isinstance(state.model, models.BPE) and isinstance(state.pre_tokenizer, pre_tokenizers.ByteLevel):
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        count = [0] * len(tokenizer)
        for token, index in tokenizer.get_vocab().items():
            if token not in tokenizer.all_special_tokens:
                count[index] = sum(byte_of[character] & 0xC0 != 0x80 for character in token)
        return count
    if not reads_characters(tokenizer):
        return None
    return [
        0 if token in (PAD, EOS) else 1 for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ]
