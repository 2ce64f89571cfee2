"""The C kernels of the LocalRNN: how they come to be, and what they make of numbers that are none or out of range."""

import shutil
import subprocess

import pytest
import torch

from modeling_rtransformer import compiled_c, local_rnn_c, local_rnn_steps
from modeling_rtransformer.local_rnn import LocalRNN
from modeling_rtransformer.local_rnn_steps import KERNEL_TYPES


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
TINY = "double twice(double x) { return 2 * x; }"


def forget():
    """As in the next process."""
    for function in (compiled_c.load, local_rnn_c.kernels, local_rnn_steps.reason_without_c):
        function.cache_clear()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing compiled yet, and an empty cache."""
    forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    yield tmp_path / "rtransformer"
    forget()


def in_c(rnn_type, hidden=6, window=4):
    torch.manual_seed(0)
    made = LocalRNN(hidden, window, rnn_type)
    made.implementation = "c"
    return made


@needs_gcc
@pytest.mark.parametrize("rnn_type", KERNEL_TYPES)
def test_what_is_not_a_number_reaches_the_windows_that_hold_it_and_no_other(rnn_type):
    inputs = torch.randn(2, 23, 6)
    inputs[1, 9, 2] = torch.nan
    lost = in_c(rnn_type)(inputs).isnan().any(-1)
    assert lost.nonzero().tolist() == [[1, position] for position in range(6, 10)]  # of 20 positions


@needs_gcc
@pytest.mark.parametrize("rnn_type", KERNEL_TYPES)
def test_gates_that_are_shut_or_open_wide_are_as_the_plain_ones(rnn_type):
    """Sums from below exp's range to above it, also without end."""
    made = in_c(rnn_type, hidden=17)
    with torch.no_grad():
        made.input_proj.weight.mul_(30)
    inputs = torch.randn(3, 40, 17) * torch.logspace(-12, 3, 40)[:, None]
    inputs[2, 5] = torch.inf  # times weights of both signs: what becomes of it is for the plain form to say
    found = made(inputs)
    made.implementation = "plain"
    torch.testing.assert_close(found, made(inputs), equal_nan=True)
    assert found[:2].isfinite().all()


def results(made, inputs):
    outputs = made(inputs)
    return [outputs, *torch.autograd.grad(outputs.square().sum(), [inputs, *made.parameters()])]


@needs_gcc
@pytest.mark.parametrize("rnn_type", KERNEL_TYPES)
@pytest.mark.parametrize(("hidden", "window"), [(64, 4), (8, 90)])
def test_the_number_of_threads_changes_nothing(rnn_type, hidden, window):
    """Also where blocks share more inputs than they have positions."""
    made, inputs = in_c(rnn_type, hidden, window), torch.randn(2, 400 + window, hidden, requires_grad=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(made, inputs))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found)
    made.implementation = "plain"
    torch.testing.assert_close(found[0], results(made, inputs), rtol=1e-4, atol=1e-4)


@needs_gcc
@pytest.mark.parametrize("rnn_type", KERNEL_TYPES)
@pytest.mark.parametrize("hidden", [6, 40, 88, 136])
def test_a_position_is_the_same_to_the_last_bit_whatever_is_beside_it(rnn_type, hidden):
    """In any batch, at any place of a block, with and without what a backward pass needs."""
    made = in_c(rnn_type, hidden)
    inputs = made.input_proj(torch.randn(5, 303, hidden)).detach()
    made.input_proj = torch.nn.Identity()  # a library's product, which is not
    together = made(inputs)
    for row, start, length in ((0, 0, 303), (4, 0, 50), (2, 100, 150), (3, 290, 4)):
        with torch.no_grad():
            alone = made(inputs[row : row + 1, start : start + length])
        assert torch.equal(alone[0], together[row, start : start + alone.shape[1]])


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="float32 and float64 on a CPU, not torch.bfloat16 on cpu; take 'auto'"):
        in_c("gru").bfloat16()(torch.randn(1, 9, 6, dtype=torch.bfloat16))


@needs_gcc
def test_a_library_is_made_once_and_kept(fresh, monkeypatch):
    assert compiled_c.load(TINY) is compiled_c.load(TINY)
    (kept,) = fresh.iterdir()
    forget()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was compiled again"))
    compiled_c.load(TINY)
    assert list(fresh.iterdir()) == [kept]


@needs_gcc
def test_where_nothing_can_be_written_a_library_serves_its_process(fresh):
    fresh.write_text("a file where the folder should be")
    assert compiled_c.load(TINY).twice is not None
    assert fresh.read_text() == "a file where the folder should be"


def test_without_a_compiler_plain_operations_run_and_asking_for_c_says_what_is_missing(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O9")
    inputs, weight = torch.randn(4, 720, 96), torch.randn(96, 32)
    name, reason, warn = local_rnn_steps.best_implementation(inputs, weight, 7)
    assert name == "plain" and reason.startswith("there is no C compiler `no-such-compiler`") and warn
    with pytest.raises(ImportError, match="no C compiler `no-such-compiler`: install gcc, or name another in .CC"):
        in_c("gru")(torch.randn(1, 9, 6))
    assert not list(fresh.iterdir())


@needs_gcc
def test_what_does_not_compile_or_load_is_told_in_the_compilers_words(fresh):
    with pytest.raises(compiled_c.NoCompiler, match="failed: .*expected"):
        compiled_c.load("int broken(")
    with pytest.raises(compiled_c.NoCompiler, match="does not load: .*nowhere_defined"):
        compiled_c.load("int nowhere_defined(void); int f(void) { return nowhere_defined(); }")
    assert not [path for path in fresh.iterdir() if path.is_dir()]
