"""A linear RNN as RSA heads: equal for any spectrum, exact for any gate; what cannot be converted is named."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from modeling_rtransformer import RTransformerConfig, RTransformerForSequenceClassification
from modeling_rtransformer.block import RTransformerAttention
from modeling_rtransformer.linear_rnn import (
    LinearRNN,
    attention_fields,
    load_linear_rnn_,
    real_jordan_form,
    rsa_from_linear_rnn,
)
from modeling_rtransformer.positions import SequenceInfo
from scripts import convert


def rotation(radius, angle):
    angle = torch.tensor(angle, dtype=torch.float64)
    return radius * torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])


def mixed(*blocks):
    """A matrix with the eigenvalues of the blocks, in a basis that is not orthogonal."""
    matrix = torch.block_diag(*[torch.as_tensor(block, dtype=torch.float64) for block in blocks])
    basis = torch.eye(len(matrix), dtype=torch.float64) + 0.4 * torch.randn(
        len(matrix), len(matrix), dtype=torch.float64
    )
    return basis @ matrix @ basis.inverse()


def scaled_normal(units):
    matrix = torch.randn(units, units, dtype=torch.float64)
    return 0.98 * matrix / torch.linalg.eigvals(matrix).abs().max()


SPECTRA = {
    "one-unit": lambda: torch.tensor([[0.7]], dtype=torch.float64),
    "one-negative": lambda: torch.tensor([[-0.9]], dtype=torch.float64),
    "zero-and-both-signs": lambda: mixed(0.0, 0.95, -0.95, 0.1),
    "one-pair": lambda: mixed(rotation(0.9, 0.3)),
    "pair-near-the-unit-circle": lambda: mixed(rotation(0.9999, 3.1), 0.999),
    "real-and-pairs": lambda: mixed(0.5, -0.3, rotation(0.8, 1.0), rotation(0.6, 2.5)),
    "equal-but-not-defective": lambda: 0.5 * torch.eye(3, dtype=torch.float64),
    "normal-7": lambda: scaled_normal(7),
    "normal-20": lambda: scaled_normal(20),
}


def linear_rnn(recurrent, features=3):
    units = len(recurrent)
    projection = torch.randn(units, features, dtype=torch.float64)
    return LinearRNN(recurrent, projection, torch.randn(units, dtype=torch.float64))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_model_is_the_linear_rnn(spectrum, attention):
    rnn = linear_rnn(SPECTRA[spectrum]())
    inputs = torch.randn(2, 131, 3, dtype=torch.float64)
    model = rsa_from_linear_rnn(rnn, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    states = model(input_values=inputs).last_hidden_state[..., : len(rnn.bias)]
    torch.testing.assert_close(states, rnn.run(inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gate", [0.02, 0.3, 0.98])
def test_it_is_exact_for_every_gate_and_for_any_queries(gate):
    rnn = linear_rnn(SPECTRA["real-and-pairs"]())
    inputs = torch.randn(2, 63, 3, dtype=torch.float64)
    model = rsa_from_linear_rnn(rnn, gate=gate)
    nn.init.normal_(model.layers[0].self_attn.q_proj.weight, std=3.0)
    assert model.layers[0].self_attn.recurrence.gates()[0].item() == pytest.approx(gate)
    states = model(input_values=inputs).last_hidden_state[..., :6]
    torch.testing.assert_close(states, rnn.run(inputs), rtol=0, atol=1e-9)


def test_the_definition_is_torchs_rnn_without_the_tanh():
    # Where states are so small that tanh is the identity, torch's own RNN is the linear one.
    rnn = nn.RNN(3, 5, batch_first=True).double()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.mul_(0.9)
        rnn.bias_ih_l0.mul_(1e-7)
        rnn.bias_hh_l0.mul_(1e-7)
        rnn.weight_ih_l0.mul_(1e-7)
    inputs = torch.randn(2, 40, 3, dtype=torch.float64)
    linear = LinearRNN.from_torch(rnn)
    torch.testing.assert_close(linear.run(inputs), rnn(inputs)[0], rtol=1e-9, atol=0)
    states = rsa_from_linear_rnn(linear)(input_values=inputs).last_hidden_state[..., :5]
    torch.testing.assert_close(states, rnn(inputs)[0], rtol=1e-9, atol=1e-18)


def test_the_fit_is_nearer_to_a_tanh_rnn_than_the_tangent():
    rnn = nn.RNN(2, 12, batch_first=True).double()
    inputs = 3 * torch.randn(16, 50, 2, dtype=torch.float64)
    states = rnn(inputs)[0]
    errors = {
        name: (LinearRNN.from_torch(rnn, seen).run(inputs) - states).square().mean().item()
        for name, seen in (("tangent", None), ("fit", inputs))
    }
    assert errors["fit"] < 0.5 * errors["tangent"]


def test_it_can_be_saved_trained_and_read_out_by_a_head(tmp_path):
    rnn = linear_rnn(SPECTRA["real-and-pairs"]())
    inputs = torch.randn(4, 30, 3, dtype=torch.float64)
    model = rsa_from_linear_rnn(rnn, RTransformerForSequenceClassification, num_labels=2)
    model(input_values=inputs, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    attention = model.model.layers[0].self_attn
    for name in ("v_proj", "o_proj", "k_proj"):
        assert getattr(attention, name).weight.grad.abs().max() > 0
    for parameter in attention.recurrence.parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype="auto").eval()
    states = loaded(input_values=inputs).last_hidden_state[..., :6]
    torch.testing.assert_close(states, rnn.run(inputs), rtol=0, atol=1e-9)


def test_an_attention_layer_of_a_wider_model_takes_it():
    form = real_jordan_form(SPECTRA["real-and-pairs"]())
    fields = attention_fields(form)
    wider = {**fields, "hidden_size": 3 * fields["hidden_size"]}
    layer = RTransformerAttention(RTransformerConfig(num_local_rnns=0, **wider), 0).double()
    for name, index in layer.recurrence.index_buffers().items():
        getattr(layer.recurrence, name).copy_(index)
    load_linear_rnn_(layer, form)
    inputs = torch.randn(2, 40, wider["hidden_size"], dtype=torch.float64)
    silent = LinearRNN(SPECTRA["real-and-pairs"](), torch.eye(6, dtype=torch.float64), torch.zeros(6).double())
    recurrent = form.power(1)
    states = silent._replace(recurrent=recurrent).run(inputs[..., :6])
    sequence = SequenceInfo(attention_mask=torch.full((40, 40), -torch.inf).triu(1).double()[None, None])
    torch.testing.assert_close(layer(inputs, sequence)[0][..., :6], states - inputs[..., :6])
    assert layer(inputs, sequence)[0][..., 6:].abs().max() == 0


@pytest.mark.parametrize("exponent", [1, 2, 17])
def test_the_real_jordan_form_has_the_matrix_powers(exponent):
    matrix = SPECTRA["normal-20"]()
    power = real_jordan_form(matrix).power(exponent)
    torch.testing.assert_close(power, torch.linalg.matrix_power(matrix, exponent), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.5]], r"eigenvalue 1.5 with \|eigenvalue\| = 1.5, but a REM reaches only those below 1"),
        ([[0.0, 1.0], [-1.0, 0.0]], r"eigenvalue 0\+1i with \|eigenvalue\| = 1"),
        ([[0.5, 1.0], [0.0, 0.5]], r"defective or nearly so.*eigenvalues 0.5 and 0.5 lie 0.0e\+00 apart.*perturbation"),
        ([[0.5, 1.0], [0.0, 0.5 + 1e-9]], r"defective or nearly so"),
        ([[0.5, 1.0]], r"must be a square matrix of finite numbers, got shape \(1, 2\)"),
        ([[float("nan")]], "finite"),
    ],
)
def test_what_cannot_be_converted_is_named(matrix, message):
    with pytest.raises(ValueError, match=message):
        real_jordan_form(torch.tensor(matrix, dtype=torch.float64))


def test_a_perturbation_converts_a_defective_matrix_with_an_error_of_its_size():
    rnn = linear_rnn(torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64))
    inputs = torch.randn(2, 60, 3, dtype=torch.float64)
    states = rsa_from_linear_rnn(rnn, perturbation=1e-8)(input_values=inputs).last_hidden_state[..., :2]
    error = (states - rnn.run(inputs)).abs().max()
    assert 1e-12 < error < 1e-6


def test_eigenvalues_that_are_too_large_can_be_brought_down():
    matrix = mixed(1.5, -0.3, rotation(2.0, 0.7))
    values = torch.linalg.eigvals(real_jordan_form(matrix, largest=0.9).power(1))
    assert sorted(values.abs().tolist()) == pytest.approx([0.3, 0.9, 0.9, 0.9])
    assert values.angle().max().item() == pytest.approx(torch.pi) and 0.7 == pytest.approx(
        values[values.imag > 0].angle().item()
    )
    with pytest.raises(ValueError, match="`largest` must lie above 0 and below 1, got 1.0"):
        real_jordan_form(matrix, largest=1.0)


@pytest.mark.parametrize("gate", [0.0, 1.0, float("nan")])
def test_a_gate_has_to_leave_room_for_both(gate):
    with pytest.raises(ValueError, match="`gate` must lie above 0 and below 1, got"):
        rsa_from_linear_rnn(linear_rnn(SPECTRA["one-unit"]()), gate=gate)


def test_a_layer_with_other_heads_is_refused():
    form = real_jordan_form(SPECTRA["one-pair"]())
    layer = RTransformerAttention(RTransformerConfig(hidden_size=6, num_attention_heads=3, num_local_rnns=0), 0)
    with pytest.raises(ValueError, match="must be causal with the undilated REM heads"):
        load_linear_rnn_(layer, form)


@pytest.mark.parametrize(
    ("rnn", "message"),
    [
        (nn.RNN(2, 3, nonlinearity="relu"), "`rnn.nonlinearity` must be 'tanh' for a linear part, got 'relu'"),
        (nn.GRU(2, 3), "`rnn.nonlinearity` must be 'tanh' for a linear part, got 'GRU'"),
        (nn.RNN(2, 3, num_layers=2), "`rnn.num_layers` must be 1"),
        (nn.RNN(2, 3, bidirectional=True), "`rnn.bidirectional` must be False"),
    ],
    ids=["relu", "gru", "two-layers", "bidirectional"],
)
def test_other_rnns_have_no_linear_part(rnn, message):
    with pytest.raises(ValueError, match=message):
        LinearRNN.from_torch(rnn)


def test_the_script_converts_a_file_and_tells_the_error(tmp_path, capsys):
    rnn = nn.RNN(2, 5)
    save_file(
        {f"encoder.{name}": value.detach() for name, value in rnn.state_dict().items()}, tmp_path / "rnn.safetensors"
    )
    save_file({"inputs": torch.randn(4, 30, 2)}, tmp_path / "inputs.safetensors")
    arguments = [str(tmp_path / "rnn.safetensors")]
    exact = convert.main(["rnn", *arguments, str(tmp_path / "linear"), "--nonlinearity", "none"])
    assert json.loads(capsys.readouterr().out) == exact and exact["error"] < 1e-9
    tangent = convert.main(["rnn", *arguments, str(tmp_path / "tanh")])
    inputs = ["--inputs", str(tmp_path / "inputs.safetensors")]
    fitted = convert.main(["rnn", *arguments, str(tmp_path / "fit"), *inputs])
    large = convert.main(["rnn", *arguments, str(tmp_path / "largest"), "--largest", "0.3"])
    assert large["error"] != tangent["error"]
    assert 1e-3 < fitted["error"] < 1 and 1e-3 < tangent["error"]
    model = AutoModel.from_pretrained(tmp_path / "fit")
    assert model.dtype == torch.float64 and model.config.rem_kinds == fitted["rem_kinds"]


def test_the_script_refuses_what_is_no_rnn(tmp_path, capsys):
    save_file(
        {"gru.weight_hh_l0": torch.zeros(9, 3), "gru.weight_ih_l0": torch.zeros(9, 2)}, tmp_path / "gru.safetensors"
    )
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, message in (("gru", "must be square, as in a plain RNN, got (9, 3)"), ("other", "must hold one")):
        with pytest.raises(SystemExit):
            convert.main(["rnn", str(tmp_path / f"{name}.safetensors"), str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
