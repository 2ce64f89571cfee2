"""Published Transformer-XL and Block-Recurrent Transformers, converted: equal outputs, memories and gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_rtransformer.memory import detach_memory
from scripts.conversion import block_recurrent, transformer_xl
from scripts.convert import main


GOLDEN = Path(__file__).parent / "golden" / "xl_brt"  # made by the authors' code in float64, every parameter moved
EXACT = {"rtol": 1e-9, "atol": 1e-10}
XL = ["txl_post_norm", "txl_pre_norm_clamp", "rsa_xl_post_norm", "rsa_xl_text8_like"]
BRT = ["brt_paper_bias_skip", "brt_plain_lstm_dual", "rsa_brt_plain_bias_skip", "rsa_brt_paper_enwik8_like"]


def read(name):
    """The settings and the tensors of a file, and its parameters by the reference's names."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        settings = {key: json.loads(value) for key, value in file.metadata().items()}
    golden = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("weight."): value for key, value in golden.items() if key.startswith("weight.")}
    return settings, golden, weights


def rem_fields(settings):
    if settings["rem_kinds"] is None:
        return {}
    return {name: settings[name] for name in ("rem_kinds", "rem_dilations", "rem_gate")}


def xl_model(name, **given):
    settings, golden, weights = read(name)
    fields = {
        "memory_length": settings["memory_lengths"][0],
        "memory_mask": "segment",
        "norm_position": "pre" if settings["pre_lnorm"] else "post",
        "clamp_length": settings["clamp_len"] if settings["clamp_len"] > 0 else None,
        **rem_fields(settings),
        **given,
    }
    return transformer_xl.convert_state(weights, **fields), settings, golden


def brt_model(name, **given):
    settings, golden, weights = read(name)
    strictly_before = "strictly before" in settings["mask"]
    fields = {
        "block_length": settings["window"],
        "memory_length": settings["window"] - (0 if strictly_before else 1),
        "see_own_position": not strictly_before,
        "num_attention_heads": settings["n_head"],
        **rem_fields(settings),
        **given,
    }
    return block_recurrent.convert_state(weights, **fields), settings, golden


def mean_nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", XL)
def test_transformer_xl_gives_the_authors_outputs_memories_and_gradients(name, attention):
    model, settings, golden = xl_model(name)
    model.set_attn_implementation(attention)
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.numel()}
    totals = dict.fromkeys(parameters, 0)
    cache = DynamicCache(config=model.config)
    ids, targets = (golden[key].split(settings["segment_lengths"], dim=1) for key in ("input_ids", "target_ids"))
    for segment in range(len(ids)):
        output = model(ids[segment], cache=cache, output_hidden_states=True)
        loss = mean_nll(output.logits, targets[segment])
        torch.testing.assert_close(output.logits, golden[f"seg{segment}.logits"], **EXACT)
        torch.testing.assert_close(loss, golden["loss"][segment], **EXACT)
        for layer_idx, layer in enumerate(model.model.layers):
            hidden = output.hidden_states[layer_idx + 1]
            torch.testing.assert_close(hidden, golden[f"seg{segment}.hidden.{layer_idx}"], **EXACT)
            memory = golden[f"seg{segment}.memory.{layer_idx}"]
            memory = layer.self_attn_norm(memory) if settings["pre_lnorm"] else memory
            for kept, proj in ((cache.layers[layer_idx].keys, "k_proj"), (cache.layers[layer_idx].values, "v_proj")):
                expected = getattr(layer.self_attn, proj)(memory).unflatten(-1, kept.shape[1::2]).transpose(1, 2)
                torch.testing.assert_close(kept, expected, **EXACT)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        totals = {key: totals[key] + gradient for key, gradient in gradients.items()}
        detach_memory(cache)
    last = converted_gradients(transformer_xl.convert_names, golden, "grad_last.")
    of_values = {key: value for key, value in golden.items() if key.startswith("grad_last_kv_detached.")}
    last |= converted_gradients(transformer_xl.convert_names, of_values, "grad_last_kv_detached.")
    whole = converted_gradients(transformer_xl.convert_names, golden, "grad.")
    differs = set(converted_gradients(transformer_xl.convert_names, of_values, "grad_last_kv_detached."))
    torch.testing.assert_close(gradients, last, **EXACT)
    # the projections of remembered hidden states would get the memory's share
    same = whole.keys() - differs
    torch.testing.assert_close({key: totals[key] for key in same}, {key: whole[key] for key in same}, **EXACT)


def converted_gradients(convert_names, golden, prefix):
    """The reference's gradients by our names."""
    found = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    return convert_names(found)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", BRT)
def test_block_recurrent_transformer_gives_the_authors_outputs_states_and_gradients(name, attention):
    model, settings, golden = brt_model(name)
    model.set_attn_implementation(attention)
    window, recurrent = settings["window"], settings["recurrent_layer"]
    starts = golden["start_of_sequence"].bool()
    attended = settings["zero_keys_at_start"] == "attended"
    initial = model.model.layers[recurrent].recurrent_attn.cell.initial
    ids_of_rows = starts.long().cumsum(0)  # (segments, B)

    def prime(cache, segment):
        """The authors' form: a document begins after `window` keys and values that are zero and are attended to."""
        shape = (2, settings["n_head"], window, settings["d_head"])
        for index, layer in enumerate(cache.layers):
            if segment == 0:
                layer.update(torch.zeros(shape).double(), torch.zeros(shape).double())
                if index == recurrent:
                    layer.update_recurrent_state(initial.detach().expand(2, -1, -1))
            else:
                keep = ~starts[segment].view(2, 1, 1, 1)
                layer.keys, layer.values = layer.keys * keep, layer.values * keep

    totals = None
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.numel()}
    lengths = [settings["segment_length"]] * settings["segments"]
    cache = DynamicCache(config=model.config)
    ids, targets = (golden[key].split(lengths, dim=1) for key in ("input_ids", "target_ids"))
    for segment in range(settings["segments"]):
        options = {}
        if attended:
            prime(cache, segment)
        numbers = ids_of_rows[: segment + 1].T.repeat_interleave(settings["segment_length"], dim=1)
        if attended:
            begun = starts[segment] if segment else starts[segment] & False
            # the zeros belong to the document that begins: only the states restart, by hand
            run = restarting(model, recurrent, begun)
        else:
            options["seq_idx"] = numbers
            run = model
        output = run(ids[segment], cache=cache, output_hidden_states=True, **options)
        loss = mean_nll(output.logits, targets[segment])
        torch.testing.assert_close(output.logits, golden[f"seg{segment}.logits"], **EXACT)
        torch.testing.assert_close(loss, golden["loss"][segment], **EXACT)
        for layer_idx, layer in enumerate(cache.layers):
            hidden, expected = output.hidden_states[layer_idx + 1], golden[f"seg{segment}.hidden.{layer_idx}"]
            if layer_idx == settings["n_layer"] - 1:  # after the final norm, whose weights have the division by sqrt(D)
                hidden, expected = hidden * settings["d_model"] ** 0.5, golden[f"seg{segment}.final_norm"]
            torch.testing.assert_close(hidden, expected, **EXACT)
            for kept, what in ((layer.keys, "keys"), (layer.values, "values")):
                expected = golden[f"seg{segment}.cache_{what}.{layer_idx}"].transpose(1, 2)
                torch.testing.assert_close(kept[:, :, -window:], expected, **EXACT)
        state = cache.layers[recurrent].recurrent_states[0]
        torch.testing.assert_close(state, golden[f"seg{segment}.state.{recurrent}"], **EXACT)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        totals = gradients if totals is None else [old + new for old, new in zip(totals, gradients)]
        detach_memory(cache)

    def names(state):
        converted = block_recurrent.convert_parameters(state, model.config)
        return {
            key: value * settings["d_model"] if key.startswith("model.norm.") else value
            for key, value in converted.items()
        }

    for prefix, ours in (("grad.", totals), ("grad_last.", gradients)):
        expected = converted_gradients(names, golden, prefix)
        ours = {key: value for key, value in zip(parameters, ours) if not absent_bias(key, expected)}
        torch.testing.assert_close(ours, expected, **EXACT)


def absent_bias(key, expected):
    """The published projections to keys, values and queries have no biases; ours are zero."""
    return key not in expected and key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))


def restarting(model, recurrent, rows):
    """The model with the states of some rows those of S_0, with their gradient, before the next call."""
    mixer = model.model.layers[recurrent].recurrent_attn
    plain = type(mixer)._states_before

    def states_before(hidden_states, past_length, cache):
        states, own = plain(mixer, hidden_states, past_length, cache)
        begins = rows if past_length > mixer.block_length else torch.ones_like(rows)
        return torch.where(begins[:, None, None], mixer.cell.initial, states), own

    mixer._states_before = states_before
    return model


@pytest.mark.parametrize(
    ("command", "name", "fields"),
    [
        ("transformer-xl", "txl_post_norm", ["memory_length=4", "norm_position=post"]),
        ("block-recurrent", "brt_plain_lstm_dual", ["memory_length=3", "block_length=4", "num_attention_heads=2"]),
    ],
)
def test_the_command_writes_a_model_that_loads(command, name, fields, tmp_path):
    _, golden, weights = read(name)
    save_file(weights, tmp_path / "weights.safetensors")
    settings = [part for field in fields for part in ("--set", field)]
    main([command, str(tmp_path / "weights.safetensors"), str(tmp_path / "out"), *settings])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    length = 6 if command == "transformer-xl" else 8
    logits = model(golden["input_ids"][:, :length]).logits
    if command == "transformer-xl":  # the window is shorter than the segment
        logits, length = logits[:, :5], 5
    torch.testing.assert_close(logits, golden["seg0.logits"][:, :length], **EXACT)


@pytest.mark.parametrize(
    ("convert", "state", "message"),
    [
        (transformer_xl.convert_state, {"r_w_bias": torch.zeros(2, 8)}, "not a Transformer-XL with `attn_type` 0"),
        (block_recurrent.convert_state, {"embed.embedding": torch.zeros(3, 8)}, "not a Block-Recurrent Transformer"),
    ],
)
def test_another_checkpoint_is_refused(convert, state, message):
    with pytest.raises(ValueError, match=message):
        convert(state)


@pytest.mark.parametrize(
    ("kind", "name"), [(transformer_xl, "txl_post_norm"), (block_recurrent, "brt_paper_bias_skip")]
)
def test_missing_and_unknown_parameters_are_named(kind, name):
    _, _, weights = read(name)
    fields = {"block_length": 4, "memory_length": 4} if kind is block_recurrent else {"norm_position": "post"}
    with pytest.raises(ValueError, match="unknown .*extra"):
        kind.convert_state({**weights, "extra": torch.zeros(1)}, **fields)


def test_a_setting_that_is_no_field_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["transformer-xl", str(GOLDEN / "txl_post_norm.safetensors"), str(tmp_path / "out"), "--set", "memory=4"])
    assert "--set must be FIELD=VALUE with a field of RTransformerConfig, got 'memory=4'" in capsys.readouterr().err
