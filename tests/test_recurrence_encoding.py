"""REMs have the values of the paper's table, and the O(L) product equals the dense one."""

import math

import pytest
import torch

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM, rem_heads
from modeling_rtransformer.recurrence_encoding import RecurrenceEncoding, chunk_length, rem_matrix, rem_rows, rem_scan


def encoding(rem_heads, num_heads=None, gate="layer", is_causal=True, seed=0):
    module = RecurrenceEncoding(rem_heads, num_heads or len(rem_heads), gate, is_causal).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


# With decay 1/2 and, for the cyclical kinds, angle pi / 2, so that cos and sin of n pi / 2 are 0, 1, 0, -1, ...
HALF = {
    "regular": {1: 1 / 2, 2: 1 / 4, 3: 1 / 8, 4: 1 / 16},
    "first_cyclical": {1: 0, 2: -1 / 4, 3: 0, 4: 1 / 16},
    "second_cyclical": {1: 1 / 2, 2: 0, 3: -1 / 8, 4: 0},
}
DILATED = {
    "regular": {2: 1 / 2, 4: 1 / 4},
    "first_cyclical": {4: -1 / 4},
    "second_cyclical": {2: 1 / 2},
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kind", HALF)
def test_the_matrix_has_the_values_worked_out_by_hand(kind, dilation, is_causal):
    module = encoding([(0, kind, dilation)], is_causal=is_causal)
    with torch.no_grad():
        module.eta.fill_(math.atanh(0.5))
        module.nu.fill_(0.0)  # sigmoid(0) = 1/2
        module.theta.fill_(math.pi / 2)
    by_distance = {**dict.fromkeys(range(1, 5), 0), **(HALF if dilation == 1 else DILATED)[kind]}
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for row in range(5):
        for column in range(5):
            distance = row - column if is_causal else abs(row - column)
            if distance >= 1:
                expected[row, column] = by_distance[distance]
    torch.testing.assert_close(module.matrix(torch.arange(5), 5)[0, 0], expected)


def test_a_negative_decay_alternates_in_sign():
    module = encoding([(0, "regular", 1)])
    with torch.no_grad():
        module.eta.fill_(-math.atanh(0.5))
    row = module.matrix(torch.tensor([3]), 4)[0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([-1 / 8, 1 / 4, -1 / 2, 0], dtype=torch.float64))


ALL_KINDS = [
    (0, "regular", 1),
    (1, "first_cyclical", 1),
    (2, "second_cyclical", 1),
    (4, "regular", 3),
    (5, "first_cyclical", 3),
    (6, "second_cyclical", 5),
]


def dense_product(module, values, segment_ids=None):
    """P V of all heads, from the matrix itself."""
    length = values.shape[2]
    return module.matrix(torch.arange(length), length, segment_ids).to(values.dtype) @ values


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 200, 517])
def test_the_scan_equals_the_dense_product(length, is_causal, packed):
    torch.manual_seed(0)
    module = encoding(ALL_KINDS, num_heads=8, is_causal=is_causal)
    values = torch.randn(2, 8, length, 3, dtype=torch.float64, requires_grad=True)
    segment_ids = None
    if packed:  # boundaries inside chunks, over several chunks, and different ones a row
        segment_ids = torch.stack([torch.arange(length) // 7, (torch.arange(length) > length // 3).long()])
    fast = module.product(values, segment_ids=segment_ids)
    dense = dense_product(module, values, segment_ids).index_select(1, module.head_index)
    torch.testing.assert_close(fast, dense)
    weights = torch.randn(fast.shape, dtype=torch.float64)
    wanted = (values, module.eta, module.nu, module.theta)
    torch.testing.assert_close(
        torch.autograd.grad((fast * weights).sum(), wanted), torch.autograd.grad((dense * weights).sum(), wanted)
    )


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
def test_float32_is_as_exact_as_the_dense_product(packed):
    torch.manual_seed(0)
    module = encoding(ALL_KINDS, num_heads=8)
    values = torch.randn(2, 8, 517, 8, dtype=torch.float64)
    segment_ids = (torch.arange(517) // 100).expand(2, -1) if packed else None
    with torch.no_grad():
        exact = dense_product(module, values, segment_ids).index_select(1, module.head_index)
        module, values = module.float(), values.float()
        plain = dense_product(module, values, segment_ids).index_select(1, module.head_index)
        fast = module.product(values, segment_ids=segment_ids)
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


@pytest.mark.parametrize("queries", [1, 3, 150])
def test_queries_after_a_past_are_the_last_rows(queries):
    torch.manual_seed(0)
    module = encoding(ALL_KINDS, num_heads=8)
    values = torch.randn(2, 8, 200, 3, dtype=torch.float64)
    whole = module.product(values)
    torch.testing.assert_close(module.product(values, torch.arange(200 - queries, 200)), whole[:, :, 200 - queries :])


def test_rows_and_scan_of_one_group_agree_with_the_matrix():
    module = encoding([(0, "first_cyclical", 2), (1, "second_cyclical", 2)])
    heads = module.heads()
    values = torch.randn(1, 2, 30, 4, dtype=torch.float64)
    positions = torch.arange(30)
    dense = rem_matrix(heads, positions, 30, 2, is_causal=True) @ values
    torch.testing.assert_close(rem_rows(heads, values, positions, 2), dense)
    torch.testing.assert_close(rem_scan(heads, values, 2), dense)


@pytest.mark.parametrize("is_causal", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
def test_gradcheck(is_causal, packed):
    module = encoding(ALL_KINDS, num_heads=7, gate="head", is_causal=is_causal)
    values = torch.randn(1, 7, 70, 1, dtype=torch.float64, requires_grad=True)
    attention = torch.randn(1, 70, 7, 1, dtype=torch.float64, requires_grad=True)
    segment_ids = (torch.arange(70) // 40)[None] if packed else None

    def mixed(attention, values, *parameters):
        named = dict(zip(dict(module.named_parameters()), parameters))
        return torch.func.functional_call(module, named, (attention, values, None, segment_ids))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(mixed, (attention, values, *parameters), fast_mode=True)


def test_padded_values_of_zero_contribute_nothing():
    module = encoding(ALL_KINDS, num_heads=7)
    values = torch.randn(1, 7, 90, 2, dtype=torch.float64)
    left = torch.cat([torch.zeros(1, 7, 13, 2, dtype=torch.float64), values], dim=2)
    torch.testing.assert_close(module.product(left)[:, :, 13:], module.product(values))


def test_memory_is_linear_in_the_length():
    # The two square tables, within a chunk and between chunks, stay of the order of the length.
    for length in (64, 1000, 4096, 65536, 1 << 20):
        chunk = chunk_length(length)
        assert chunk**2 + (length / chunk) ** 2 <= 5 * max(length, 4096)


def test_a_plain_head_is_left_as_it_is():
    module = encoding([(1, "regular", 1)], num_heads=3)
    attention = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    mixed = module(attention, torch.randn(2, 3, 9, 4, dtype=torch.float64))
    assert torch.equal(mixed[:, :, [0, 2]], attention[:, :, [0, 2]])
    assert not torch.allclose(mixed[:, 1:, 1], attention[:, 1:, 1])


def test_a_first_and_a_second_cyclical_head_share_their_eigenvalue():
    module = encoding([(0, "first_cyclical", 3), (1, "first_cyclical", 6), (2, "second_cyclical", 9)])
    heads = module.heads()
    assert module.nu.shape == module.theta.shape == (2,)
    assert heads.decay[0] == heads.decay[2] != heads.decay[1]
    assert heads.angle[0] == heads.angle[2] != heads.angle[1]


@pytest.mark.parametrize(
    ("counts", "gate", "expected"),
    [
        ({"dilated_first_cyclical": 2, "dilated_second_cyclical": 2, "dilations": [6, 6, 12, 12]}, "layer", 5),
        ({"dilated_first_cyclical": 2, "dilated_second_cyclical": 2, "dilations": [3, 6, 9, 12]}, "head", 8),
        ({"regular": 3}, "layer", 4),
        ({"regular": 1, "first_cyclical": 1, "second_cyclical": 1}, "layer", 4),
        ({"first_cyclical": 1, "dilated_second_cyclical": 1, "dilations": [2]}, "layer", 5),
    ],
)
def test_parameters_added_to_each_layer(counts, gate, expected):
    def parameters(**fields):
        config = RTransformerConfig(hidden_size=32, num_attention_heads=8, num_hidden_layers=2, **fields)
        return RTransformerForCausalLM(config).num_parameters()

    assert parameters(**rem_heads(8, **counts), rem_gate=gate) - parameters() == 2 * expected
