"""The cache under both of its names, and arguments that no model has, in every supported version of Transformers."""

import warnings

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
)
from transformers.utils import logging

from modeling_rtransformer import (
    CONFIGS,
    RTransformerConfig,
    RTransformerForCausalLM,
    RTransformerForecasterConfig,
    RTransformerForSequenceClassification,
    RTransformerModel,
    model_classes,
)
from modeling_rtransformer.language_modeling import CausalLMHead
from modeling_rtransformer.library_versions import CACHE_NAME, CACHE_NAMES, NEWEST_TESTED, warn_if_untested
from scripts.baselines import LinearForecaster, LinearForecasterConfig
from scripts.baselines.recurrent import RecurrentConfig
from scripts.data.tokenization import Options, build_tokenizer
from tests.conftest import tiny_config


WITH_CACHE = [RTransformerModel, RTransformerForCausalLM, RTransformerForSequenceClassification]
HEADS = [head for config in CONFIGS for auto, head in model_classes(config).items() if auto != "AutoModel"]
DEPRECATED = [] if CACHE_NAME == "past_key_values" else ["past_key_values"]


def make(model_class, variant="gru-and-rsa", **fields):
    if model_class.config_class not in (RTransformerConfig, RTransformerForecasterConfig):  # another system
        sizes = {"vocab_size": 37, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        return model_class(model_class.config_class(**sizes, **fields)).eval()
    return model_class(tiny_config(variant, **fields)).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 37, (2, 9))


@pytest.fixture
def log(monkeypatch, caplog):
    """What Transformers logs, each warning as if it were the first."""
    logger = logging.get_logger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    logging.warning_once.cache_clear()
    return caplog


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("model_class", WITH_CACHE)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_is_filled_and_read_under_both_names(model_class, name, cache_class, variant, ids):
    model = make(model_class, variant, num_labels=3)
    options = {"max_cache_len": 12} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    first = model(ids[:, :5], **{name: cache})
    assert int(cache.get_seq_length()) == 5
    last = model(ids[:, 5:], **{name: cache})
    torch.testing.assert_close(last[0][:, -1], model(ids, use_cache=False)[0][:, -1], rtol=1e-5, atol=1e-5)
    for output in (first, last):
        assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"] is cache


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_generate_goes_on_with_a_cache_under_both_names(name, variant, ids):
    model = make(RTransformerForCausalLM, variant)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], cache=cache)
    options = {"do_sample": False, "max_new_tokens": 5}
    expected = model.generate(ids, use_cache=False, **options)
    assert model.generate(ids, **{name: cache}, **options).tolist() == expected.tolist()
    assert cache.get_seq_length() == ids.shape[1] + 4


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_masks_are_made_with_a_cache_under_both_names(name, ids):
    model = make(RTransformerForCausalLM)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = StaticCache(config=model.config, max_cache_len=12)
    masks = model.create_masks_for_generate(model.config, model.model.embed_tokens(ids), mask, **{name: cache})
    assert masks["full_attention"].shape[-2:] == (9, 12)
    assert masks["linear_attention"].tolist() == mask.tolist()


@pytest.mark.parametrize("model_class", WITH_CACHE)
def test_the_old_name_gives_the_librarys_warning_from_5_24_on(model_class, ids):
    model = make(model_class)
    for name in CACHE_NAMES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(ids, **{name: DynamicCache(config=model.config)})
        told = [str(warning.message) for warning in caught if warning.category is FutureWarning]
        expected = [
            f"`past_key_values` is deprecated and will be removed in version 5.40.0 for `{model_class.__name__}"
        ]
        assert [text.split(".forward")[0] for text in told] == (expected if name in DEPRECATED else [])


@pytest.mark.parametrize("model_class", WITH_CACHE)
def test_a_cache_under_both_names_at_once_is_refused(model_class, ids):
    model = make(model_class)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="`cache`.*`past_key_values`|`past_key_values`.*`cache`"):
        model(ids, cache=cache, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name, meant", [("atention_mask", "attention_mask"), ("past_key_vaules", "past_key_values")])
@pytest.mark.parametrize("model_class", [RTransformerModel, *HEADS], ids=lambda model_class: model_class.__name__)
def test_an_argument_that_no_model_has_is_refused(model_class, name, meant, ids):
    fields = {"num_labels": 3}
    inputs = {"input_ids": ids}
    if "TimeSeries" in model_class.__name__:
        fields = {"num_input_features": 2, "prediction_length": 3}
        inputs = {"past_values": torch.randn(2, 9, 2)}
    model = make(model_class, **fields)
    with pytest.raises(TypeError, match=f"`{name}` is not an argument of this model; did you mean `{meant}`"):
        model(**inputs, **{name: None})


BASELINE = RecurrentConfig(vocab_size=37, hidden_size=8, num_labels=3)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_baseline_refuses_arguments_that_it_does_not_read(auto_class, ids):
    model = auto_class.from_config(BASELINE)
    with pytest.raises(TypeError, match="`atention_mask` is not an argument of this model; did you mean `attention_m"):
        model(ids, atention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="`seq_idx` must be left out"):
        model(ids, seq_idx=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(batch, length\), got \(2, 1, 9, 9\)"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    if auto_class is not AutoModel:
        with pytest.raises(ValueError, match="`cache` must be left out"):
            model(ids, cache=DynamicCache())


def test_a_linear_forecaster_refuses_arguments_that_it_does_not_read():
    model = LinearForecaster(LinearForecasterConfig(context_length=9, prediction_length=3))
    with pytest.raises(TypeError, match="`futur_values` is not an argument.*did you mean `future_values`"):
        model(torch.randn(2, 9, 1), futur_values=torch.randn(2, 3, 1))


def test_generate_takes_a_tokenizer_for_its_stop_strings(ids):
    tokenizer = build_tokenizer(Options(kind="character"), ["abcdef "])
    model = make(RTransformerForCausalLM, vocab_size=len(tokenizer))
    prompt = torch.tensor([tokenizer("abc").input_ids])
    whole = model.generate(prompt, do_sample=False, max_new_tokens=9)
    stop = tokenizer.decode(whole[0, 6:8])
    stopped = model.generate(prompt, do_sample=False, max_new_tokens=9, stop_strings=[stop], tokenizer=tokenizer)
    assert stop in tokenizer.decode(stopped[0, 3:]) and stopped.shape[1] < whole.shape[1]


def test_generate_refuses_what_no_model_has(ids):
    with pytest.raises(ValueError, match="atention_mask"):
        make(RTransformerForCausalLM).generate(ids, atention_mask=torch.ones_like(ids), max_new_tokens=2)


@pytest.mark.parametrize("model_class", [RTransformerModel, *HEADS], ids=lambda model_class: model_class.__name__)
def test_shifted_targets_are_refused_by_all_but_causal_language_models(model_class, ids):
    if issubclass(model_class, CausalLMHead):
        pytest.skip("reads them")
    fields, inputs = {"num_labels": 3}, {"input_ids": ids}
    if "TimeSeries" in model_class.__name__:
        fields = {"num_input_features": 2, "prediction_length": 3}
        inputs = {"past_values": torch.randn(2, 9, 2)}
    with pytest.raises(TypeError, match="`shift_labels` is not an argument of this model"):
        make(model_class, **fields)(**inputs, shift_labels=ids)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_the_loss_of_a_batch_in_parts_is_that_of_the_whole(problem):
    """As `Trainer` accumulates gradients: each part with the number of labels of all parts."""
    outputs = 1 if problem == "regression" else 3
    model = make(RTransformerForSequenceClassification, num_labels=outputs, problem_type=problem)
    ids = torch.randint(3, 37, (6, 9))
    labels = {"regression": torch.randn(6), "single_label_classification": torch.randint(3, (6,))}
    labels = labels.get(problem, torch.randint(2, (6, 3)).float())
    parts = zip(ids.split([1, 3, 2]), labels.split([1, 3, 2]))
    losses = [model(part, labels=those, num_items_in_batch=labels.numel()).loss for part, those in parts]
    torch.testing.assert_close(sum(losses), model(ids, labels=labels).loss)


def test_shift_labels_are_the_targets_in_place_of_labels(ids):
    model = make(RTransformerForCausalLM)
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected)
    torch.testing.assert_close(model(ids, labels=torch.zeros_like(ids), shift_labels=targets).loss, expected)
    assert model(ids, labels=ids, shift_labels=ids).loss != expected


def test_a_newer_version_than_the_newest_tested_says_so_once(log):
    warn_if_untested(NEWEST_TESTED + ".1")
    assert log.text == ""
    for _ in range(2):
        warn_if_untested("5.99.0")
    assert log.text.count(f"Transformers 5.99.0 is newer than {NEWEST_TESTED}") == 1
