"""The configuration checks every field, and says the paper's settings."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_rtransformer import RTransformerConfig, rem_heads


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, r"`hidden_size` must be divisible .* \(4\), got 30"),
        ({"local_window": 0}, "`local_window` must be at least 1, got 0"),
        ({"num_local_rnns": -1}, "`num_local_rnns` must be at least 0, got -1"),
        (
            {"local_rnn_type": "gruu"},
            "`local_rnn_type` must be one of gru, lstm, rnn, hard_lstm, got 'gruu'; did you mean `gru`",
        ),
        (
            {"rem_kinds": ["regular"] * 7 + ["cyclic"]},
            r"`rem_kinds\[7\]` must be one of none, regular, .* got 'cyclic'",
        ),
        ({"rem_kinds": ["first_cyclicla"] * 8}, "did you mean `first_cyclical`"),
        ({"rem_kinds": ["regular"]}, "`rem_kinds` must be None or one entry for each of the 8 heads"),
        ({"rem_dilations": [1, 2]}, r"`rem_dilations` must be one value, or one for each of the 8 heads, got \[1, 2\]"),
        ({"rem_dilations": 0}, "`rem_dilations` must be at least 1, got 0"),
        ({"rem_gate": "heads"}, "`rem_gate` must be one of layer, head, got 'heads'; did you mean `head`"),
        ({"rem_layers": [0, 3]}, "`rem_layers` must be indices of the 3 blocks, from 0 to 2, got"),
        (
            {"position_embedding": "rotary"},
            "`position_embedding` must be one of none, sinusoidal, relative, t5, got 'rotary'",
        ),
        ({"position_embedding": "sinusoidal", "hidden_size": 15, "num_attention_heads": 5}, "must be even"),
        (
            {"layer_norm_type": "rsm"},
            "`layer_norm_type` must be one of standard, original, rms, got 'rsm'; did you mean",
        ),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` must be in \[0, 1\), got 1.0"),
        ({"num_input_features": 0}, "`num_input_features` must be at least 1, or None for token ids, got 0"),
        ({"hidden_act": "rleu"}, "`hidden_act` must be one of .* got 'rleu'; did you mean `relu`"),
        ({"local_windw": 3}, "`local_windw` is not a field of RTransformerConfig; did you mean `local_window`"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        RTransformerConfig(**fields)


def test_a_value_of_the_wrong_type_names_the_field():
    with pytest.raises(StrictDataclassError, match="local_window"):
        RTransformerConfig(local_window="7")


def test_a_wrong_change_is_refused_when_the_config_is_validated():
    config = RTransformerConfig()
    config.local_window = 0
    with pytest.raises(StrictDataclassError, match="`local_window` must be at least 1, got 0"):
        config.validate()


def test_the_papers_text8_setting_can_be_said():
    heads = rem_heads(8, dilated_first_cyclical=2, dilated_second_cyclical=2, dilations=[6, 6, 12, 12])
    assert heads["rem_kinds"] == ["first_cyclical"] * 2 + ["second_cyclical"] * 2 + ["none"] * 4
    assert heads["rem_dilations"] == [6, 6, 12, 12, 1, 1, 1, 1]
    config = RTransformerConfig(**heads)
    assert config.layer_rem_heads(0)[-1] == (3, "second_cyclical", 12)


def test_all_six_counts_are_laid_out_in_the_papers_order():
    heads = rem_heads(
        8,
        regular=1,
        first_cyclical=1,
        second_cyclical=1,
        dilated_regular=1,
        dilated_first_cyclical=1,
        dilated_second_cyclical=1,
        dilations=[2, 3, 4],
    )
    kinds = ["regular", "first_cyclical", "second_cyclical"]
    assert heads == {"rem_kinds": kinds * 2 + ["none"] * 2, "rem_dilations": [1, 1, 1, 2, 3, 4, 1, 1]}


@pytest.mark.parametrize(
    ("counts", "message"),
    [({"regular": 9}, "at most `num_attention_heads` .8., got 9"), ({"dilated_regular": 2, "dilations": [3]}, "2 dil")],
)
def test_counts_that_do_not_fit_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        rem_heads(8, **counts)


def test_rem_heads_can_be_kept_to_some_blocks():
    config = RTransformerConfig(rem_kinds=["regular"] * 8, rem_layers=[1])
    assert [len(config.layer_rem_heads(layer)) for layer in range(3)] == [0, 8, 0]


def test_it_survives_saving_with_every_choice(tmp_path):
    config = RTransformerConfig(
        num_attention_heads=4,
        local_rnn_type="lstm",
        rem_kinds=["regular", "none", "first_cyclical", "second_cyclical"],
        rem_dilations=[1, 1, 3, 5],
        rem_gate="head",
        rem_layers=[0, 2],
        is_causal=False,
        final_norm=False,
        num_labels=5,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RTransformerConfig
    where_from = {"transformers_version": None, "_name_or_path": None}
    assert {**loaded.to_dict(), **where_from} == {**config.to_dict(), **where_from}


def test_it_carries_the_whole_auto_map():
    auto_map = RTransformerConfig().to_dict()["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"} <= auto_map.keys()


@pytest.mark.parametrize(
    ("fields", "layer_type"),
    [({}, "hybrid"), ({"num_local_rnns": 0}, "full_attention"), ({"local_window": 1}, "full_attention")],
)
def test_the_cache_holds_windows_only_where_there_are_some(fields, layer_type):
    assert RTransformerConfig(num_hidden_layers=2, **fields).layer_types == [layer_type] * 2


def test_with_continuous_input_there_is_no_embedding_to_tie():
    assert RTransformerConfig(num_input_features=3).tie_word_embeddings is False
