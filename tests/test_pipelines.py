"""The pipelines of Transformers, with a character tokenizer made here."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

import modeling_rtransformer as rtransformer
from tests.conftest import tiny_config


SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", "<sep>"]
CHARACTERS = list("abcdefghijklmnopqrstuvwxyz .?")


@pytest.fixture
def tokenizer():
    vocabulary = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A <sep> $B:1", special_tokens=[("<sep>", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        sep_token="<sep>",
        unk_token=".",
        padding_side="left",
    )


def model(head, variant, **fields):
    model_class = getattr(rtransformer, f"RTransformerFor{head}")
    return model_class(tiny_config(variant, vocab_size=len(SPECIAL + CHARACTERS), eos_token_id=2, **fields)).eval()


def test_text_generation_in_a_batch_equals_one_by_one(tokenizer, variant):
    generator = pipeline("text-generation", model=model("CausalLM", variant), tokenizer=tokenizer)
    prompts = ["a b", "hello there", "what is it?"]
    options = {"max_new_tokens": 9, "do_sample": False, "return_full_text": False}
    together = [row[0]["generated_text"] for row in generator(prompts, batch_size=3, **options)]
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert together == alone and any(together)


def test_fill_mask(tokenizer, variant):
    filler = pipeline("fill-mask", model=model("MaskedLM", variant, is_causal=False), tokenizer=tokenizer)
    guesses = filler("he<mask>lo", top_k=3)
    assert len(guesses) == 3 and guesses[0]["score"] >= guesses[1]["score"] > 0


def test_text_classification_in_a_batch_equals_one_by_one(tokenizer, variant):
    classifier = pipeline(
        "text-classification", model=model("SequenceClassification", variant, num_labels=3), tokenizer=tokenizer
    )
    texts = ["a", "a much longer text"]
    together = classifier(texts, batch_size=2, top_k=None)
    for text, scores in zip(texts, together):
        for ours, theirs in zip(scores, classifier(text, top_k=None)):
            assert ours["label"] == theirs["label"] and ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_token_classification(tokenizer, variant):
    tagger = pipeline(
        "token-classification",
        model=model("TokenClassification", variant, is_causal=False, num_labels=4),
        tokenizer=tokenizer,
        ignore_labels=[],
    )
    assert [tag["word"] for tag in tagger("abc de")] == list("abc de")


def test_question_answering(tokenizer, variant):
    """The pipeline of that name left Transformers 5; the head's answer is read as it read it."""
    answerer = model("QuestionAnswering", variant, is_causal=False)
    inputs = tokenizer("who?", "it was a cat", return_tensors="pt")
    output = answerer(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")},
        start_positions=torch.tensor([7]),
        end_positions=torch.tensor([9]),
    )
    expected = [
        torch.nn.functional.cross_entropy(logits, torch.tensor([position]))
        for logits, position in ((output.start_logits, 7), (output.end_logits, 9))
    ]
    torch.testing.assert_close(output.loss, sum(expected) / 2)
    assert output.start_logits.shape == inputs["input_ids"].shape
