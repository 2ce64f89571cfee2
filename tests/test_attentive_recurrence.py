"""The Attentive Recurrent Network: its steps, what the blocks that read it add, and what it costs a cache: nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM, RTransformerForMaskedLM
from modeling_rtransformer.attentive_recurrence import AttentiveRecurrence, FusionGate
from modeling_rtransformer.linear_rnn import LinearRNN, rsa_from_linear_rnn
from modeling_rtransformer.local_rnn_steps import gru_step
from tests.conftest import tiny_config


GOLDEN = Path(__file__).parent / "golden"  # explicit loops over positions and steps, written apart from this package
NAMES = {
    "cell.weight_ih": "input_proj.weight",
    "cell.bias_ih": "input_proj.bias",
    "cell.weight_hh": "recurrent_proj.weight",
    "cell.bias_hh": "recurrent_proj.bias",
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FIELDS = {
    "gru": {"attentive_steps": 3},
    "lstm-zero-add": {
        "attentive_steps": 2, "attentive_rnn_type": "lstm", "attentive_start": "zero", "attentive_fusion": "add"
    },
    "rnn-all-blocks": {"attentive_steps": 1, "attentive_rnn_type": "rnn", "attentive_layers": [0, 1, 2]},
}  # fmt: skip


def read(path):
    with safe_open(path, framework="pt") as file:
        kwargs = json.loads(file.metadata()["kwargs"])
    return kwargs, load_file(path)


def parameters_of(tensors, prefix):
    """The parameters of one module of a file, by our names, and the gradients that they should get."""
    found = {}
    for kind in ("state_dict.", "grad."):
        names = [name for name in tensors if name.startswith(kind + prefix)]
        found[kind] = {NAMES.get(key, key): tensors[kind + prefix + key] for name in names
                       for key in [name.removeprefix(kind + prefix)]}  # fmt: skip
    return found["state_dict."], found["grad."]


def attend_to(inputs, k_proj, v_proj, heads, **mask):
    """The attention to keys and values of `inputs`, as a block gives it to the recurrence."""

    def split(states):
        return states.view(*states.shape[:2], heads, -1).transpose(1, 2)

    key, value = split(k_proj(inputs)), split(v_proj(inputs))
    return lambda query: F.scaled_dot_product_attention(query, key, value, **mask).transpose(1, 2)


def recurrence_of(tensors, prefix, kwargs, wanted):
    """The recurrence and its keys and values with the parameters of a file; adds the wanted gradients to `wanted`."""
    size = kwargs["hidden"]
    config = RTransformerConfig(
        hidden_size=size,
        num_attention_heads=kwargs["heads"],
        attentive_steps=kwargs["steps"],
        attentive_start=kwargs["start"],
    )
    module = AttentiveRecurrence(config)
    module.k_proj, module.v_proj = nn.Linear(size, size), nn.Linear(size, size)
    state, gradients = parameters_of(tensors, prefix)
    module.load_state_dict(state)
    wanted += [(parameter, gradients[name]) for name, parameter in module.named_parameters()]
    return module


def check(output, tensors, wanted):
    """Forward 1e-5 of the largest output, gradients 1e-4 of the largest of the parameter."""
    expected = tensors["output"]
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    (output.float() ** 2).mean().backward()
    largest = max(gradient.abs().max() for _, gradient in wanted)
    for parameter, gradient in wanted:
        # The softmax does not see the key's bias, so its gradient is rounding.
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7 * largest


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("arn_causal_*")), ids=lambda path: path.stem)
def test_all_positions_side_by_side_equal_loops_over_positions_and_steps(path):
    kwargs, tensors = read(path)
    inputs, wanted = tensors["input"].requires_grad_(), []
    wanted.append((inputs, tensors["grad.input"]))
    module = recurrence_of(tensors, "arn.", kwargs, wanted)
    attend = attend_to(inputs, module.k_proj, module.v_proj, kwargs["heads"], is_causal=True)
    check(module(inputs, attend), tensors, wanted)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("arn_slots_*")), ids=lambda path: path.stem)
def test_the_papers_states_for_a_whole_sequence_are_the_same_steps(path):
    """Two networks from a zero state over a padded sequence; their states side by side go through a linear map."""
    kwargs, tensors = read(path)
    inputs, wanted = tensors["input"].requires_grad_(), []
    wanted.append((inputs, tensors["grad.input"]))
    mask = tensors["mask"].bool()[:, None, None]
    slots = []
    for direction in ("forward", "backward"):
        module = recurrence_of(tensors, f"{direction}_arn.", kwargs, wanted)
        attend = attend_to(inputs, module.k_proj, module.v_proj, kwargs["heads"], attn_mask=mask)
        states = torch.cat(list(module.states(torch.zeros_like(inputs[:, :1]), attend)), dim=1)  # (B, S, D)
        slots.append(states if direction == "forward" else states.flip(1))
    merge = nn.Linear(2 * kwargs["hidden"], kwargs["hidden"])
    state, gradients = parameters_of(tensors, "merge.")
    merge.load_state_dict(state)
    wanted += [(parameter, gradients[name]) for name, parameter in merge.named_parameters()]
    check(merge(torch.cat(slots, dim=-1)), tensors, wanted)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("arn_gated_sum_*")), ids=lambda path: path.stem)
def test_the_gated_sum(path):
    kwargs, tensors = read(path)
    gate = FusionGate(2 * kwargs["hidden"], kwargs["hidden"])
    state, gradients = parameters_of(tensors, "gate.")
    gate.load_state_dict(state)
    inputs = [tensors[name].requires_grad_() for name in ("input", "input_b")]
    wanted = [(parameter, gradients[name]) for name, parameter in gate.named_parameters()]
    wanted += list(zip(inputs, (tensors["grad.input"], tensors["grad.input_b"])))
    check(gate(*inputs), tensors, wanted)


def causal_lm(name="gru", **fields):
    return RTransformerForCausalLM(tiny_config(**{"num_hidden_layers": 3, **FIELDS[name], **fields})).eval()


def ids_of(*shape):
    return torch.randint(3, 37, shape)


def test_off_by_default_and_then_nothing_changes():
    torch.manual_seed(0)
    plain = RTransformerForCausalLM(tiny_config())
    torch.manual_seed(0)
    off = RTransformerForCausalLM(tiny_config(attentive_steps=0, attentive_rnn_type="lstm"))
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert not any("attentive" in name for name in plain.state_dict())
    ids = ids_of(2, 11)
    assert plain(ids).logits.equal(off(ids).logits)


@pytest.mark.parametrize("name", FIELDS)
def test_the_first_block_makes_the_states_and_the_blocks_of_the_short_cut_read_them(name):
    model = causal_lm(name)
    blocks = [layer.self_attn for layer in model.model.layers]
    assert [block.attentive_recurrence is not None for block in blocks] == [True, False, False]
    readers = [block.attentive_fusion is not None for block in blocks]
    assert readers == ([True] * 3 if name == "rnn-all-blocks" else [False, False, True])
    ids = ids_of(2, 11)
    model.train()(ids, labels=ids).loss.backward()
    unused = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert [name for name in unused if "k_proj.bias" not in name and "embed" not in name] == []


@pytest.mark.parametrize("name", FIELDS)
def test_decoding_token_by_token_equals_the_whole_sequence(name):
    model, ids = causal_lm(name), ids_of(2, 13)
    whole, cache, parts = model(ids).logits, DynamicCache(config=model.config), []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 13)):
        parts.append(model(ids[:, start:end], cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", FIELDS)
def test_padding_changes_nothing(name, is_causal, side):
    model_class = RTransformerForCausalLM if is_causal else RTransformerForMaskedLM
    model = model_class(tiny_config(num_hidden_layers=3, is_causal=is_causal, **FIELDS[name])).eval()
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    real = slice(4, None) if side == "left" else slice(0, 8)
    mask[1] = 0
    mask[1, real] = 1
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, real], model(ids[1:, real]).logits[0], **CLOSE)
    torch.testing.assert_close(padded[0], model(ids[:1]).logits[0], **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", FIELDS)
def test_packed_sequences_do_not_see_each_other(name, is_causal):
    model_class = RTransformerForCausalLM if is_causal else RTransformerForMaskedLM
    model = model_class(tiny_config(num_hidden_layers=3, is_causal=is_causal, **FIELDS[name])).eval()
    ids = ids_of(1, 16)
    positions = torch.tensor([[*range(7), *range(9)]])
    packed = model(ids, position_ids=positions).logits[0]
    torch.testing.assert_close(packed[:7], model(ids[:, :7]).logits[0], **CLOSE)
    torch.testing.assert_close(packed[7:], model(ids[:, 7:]).logits[0], **CLOSE)


class TestSlots:
    FIELDS = {
        "is_causal": False, "attentive_form": "slots", "attentive_start": "zero", "attentive_steps": 3,
        "attentive_layers": [0, -1],
    }  # fmt: skip

    def model(self, **fields):
        return RTransformerForMaskedLM(tiny_config(num_hidden_layers=3, **{**self.FIELDS, **fields})).eval()

    def test_it_is_two_recurrences_with_one_state_for_the_sequence(self):
        model, ids = self.model(num_local_rnns=0, rem_kinds=None), ids_of(2, 11)
        block = model.model.layers[0]
        inputs = block.self_attn_norm(model.model.embed_tokens(ids))
        attend = attend_to(inputs, block.self_attn.k_proj, block.self_attn.v_proj, 5)
        module, states = block.self_attn.attentive_recurrence, {}
        for name in ("ahead", "back"):
            each = getattr(module, name)
            hidden, states[name] = torch.zeros(2, 1, 20), []
            for _ in range(3):
                read = each.o_proj(attend(each.q_proj(hidden).view(2, 1, 5, 4).transpose(1, 2)).flatten(2))
                hidden = gru_step(each.input_proj(read), each.recurrent_proj(hidden), hidden)
                states[name].append(hidden)
        slots = [module.merge(torch.cat([states["ahead"][k], states["back"][2 - k]], -1)) for k in range(3)]
        torch.testing.assert_close(module(inputs, attend), torch.cat(slots, dim=1))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, side, attention):
        model = self.model(attentive_fusion="add")
        model.set_attn_implementation(attention)
        ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
        real = slice(4, None) if side == "left" else slice(0, 8)
        mask[1] = 0
        mask[1, real] = 1
        padded = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[1, real], model(ids[1:, real]).logits[0], **CLOSE)
        torch.testing.assert_close(padded[0], model(ids[:1]).logits[0], **CLOSE)

    def test_every_parameter_learns_and_a_saved_model_gives_the_same(self, tmp_path):
        model, ids = self.model(), ids_of(2, 11)
        model.train()(ids, labels=ids).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        model.save_pretrained(tmp_path)
        loaded = RTransformerForMaskedLM.from_pretrained(tmp_path)
        assert loaded.eval()(ids).logits.equal(model.eval()(ids).logits)

    def test_more_than_a_sequence_a_row_is_refused(self):
        model, ids = self.model(), ids_of(1, 8)
        with pytest.raises(ValueError, match="`attentive_form` 'slots' needs a sequence a row, got packed sequences"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
        with pytest.raises(
            ValueError, match="`attention_mask` must be 2D, 0 where padded, with `attentive_form` 'slots'"
        ):
            model(ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"is_causal": True}, "`is_causal` must be False with `attentive_form` 'slots', got True"),
            ({"attentive_start": "input"}, "`attentive_start` must be 'zero' with `attentive_form` 'slots', got input"),
            ({"attentive_steps": 0}, "`attentive_steps` must be at least 1 with `attentive_form` 'slots', got 0"),
            ({"attentive_form": "slot"}, "`attentive_form` must be one of positions, slots, got 'slot'; did you mean"),
        ],
    )
    def test_a_wrong_config_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            self.model(**fields)


def test_a_bidirectional_model_reads_both_sides_and_a_causal_one_does_not():
    ids = ids_of(1, 11)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 3 + 1) % 34 + 3
    seen = []
    for is_causal in (True, False):
        config = tiny_config(is_causal=is_causal, num_local_rnns=0, rem_kinds=None, attentive_steps=2)
        model = RTransformerForMaskedLM(config).eval()
        seen.append((model(ids).logits[0, 0] - model(changed).logits[0, 0]).abs().max().item() > 1e-4)
    assert seen == [False, True]


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_are_the_same_with_checkpointing(name):
    model, ids = causal_lm(name), ids_of(2, 11)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for without, with_checkpointing in zip(*gradients):
        torch.testing.assert_close(with_checkpointing, without)


def test_the_gate_starts_near_the_plain_block():
    fusion = causal_lm().model.layers[-1].self_attn.attentive_fusion
    assert fusion.gate.bias.tolist() == [1.0] * 20


def test_a_linear_rnn_is_not_written_into_a_layer_that_adds_something_to_it():
    rnn = LinearRNN(
        recurrent=torch.diag(torch.tensor([0.5, 0.25])).double(),
        input=torch.eye(2).double(),
        bias=torch.zeros(2).double(),
    )
    rsa_from_linear_rnn(rnn)
    with pytest.raises(ValueError, match="`attentive_layers` must not name the layer"):
        rsa_from_linear_rnn(rnn, attentive_steps=1)


def test_tensor_parallelism_is_refused():
    config = tiny_config(attentive_steps=2)
    config.distributed_config = SimpleNamespace(tp_size=5)
    with pytest.raises(ValueError, match="`attentive_steps` must be 0 with `tp_size` 5, .* got 2"):
        RTransformerForCausalLM(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attentive_steps": -1}, "`attentive_steps` must be at least 1, or 0 for none, got -1"),
        ({"attentive_layers": [-1]}, "`attentive_steps` must be at least 1 with `attentive_layers`, got 0"),
        (
            {"attentive_steps": 2, "attentive_layers": [3]},
            r"`attentive_layers` must be None or indices of the 3 blocks, from -3 to 2, at least one, got \[3\]",
        ),
        ({"attentive_steps": 2, "attentive_layers": [0, -4]}, r"from -3 to 2, at least one, got \[0, -4\]"),
        ({"attentive_steps": 2, "attentive_layers": []}, r"at least one, got \[\]"),
        (
            {"attentive_rnn_type": "gur"},
            "`attentive_rnn_type` must be one of gru, lstm, rnn, got 'gur'; did you mean `gru`",
        ),
        (
            {"attentive_start": "zeros"},
            "`attentive_start` must be one of input, zero, got 'zeros'; did you mean `zero`",
        ),
        ({"attentive_fusion": "sum"}, "`attentive_fusion` must be one of gated_sum, add, got 'sum'"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RTransformerConfig(**fields)
