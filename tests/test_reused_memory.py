"""The pool of large buffers: which buffer is reused, when, and that none is used twice at a time."""

import os
import shutil

import pytest
import torch

from modeling_rtransformer import local_rnn_c
from modeling_rtransformer.local_rnn import LocalRNN
from modeling_rtransformer.reused_memory import LARGE, ReusedMemory


FLOATS = torch.empty(0)
COUNT = LARGE // 4


def test_a_freed_buffer_is_reused_and_one_in_use_is_not():
    memory = ReusedMemory()
    first = memory.empty(FLOATS, 2, COUNT)
    place, row = first.data_ptr(), first[1]
    del first
    assert memory.empty(FLOATS, 2, COUNT).data_ptr() != place  # a view is still there
    del row
    assert len(memory.pool) == 2
    taken = [memory.empty(FLOATS, 2, COUNT).fill_(number) for number in range(3)]
    assert place in [each.data_ptr() for each in taken] and not memory.pool
    assert [each.unique().item() for each in taken] == [0, 1, 2]


def test_the_smallest_that_is_large_enough_is_reused_and_one_too_small_is_replaced():
    memory = ReusedMemory()
    small, large = memory.empty(FLOATS, COUNT), memory.empty(FLOATS, 4 * COUNT)
    places = small.data_ptr(), large.data_ptr()
    del small, large
    again = memory.empty(FLOATS, COUNT)
    assert again.data_ptr() == places[0] and again.shape == (COUNT,)
    assert memory.empty(FLOATS, 3 * COUNT).data_ptr() == places[1]
    larger = memory.empty(FLOATS, 5 * COUNT)
    assert not memory.pool and larger.numel() == 5 * COUNT


def test_small_tensors_and_other_types_are_as_asked_for():
    memory = ReusedMemory()
    memory.empty(FLOATS, COUNT - 1)
    assert not memory.pool
    assert memory.empty(FLOATS.double(), COUNT, 2).dtype == torch.float64
    memory.clear()
    assert not memory.pool


def test_where_the_system_gives_none_pytorch_is_asked():
    memory = ReusedMemory()
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):  # what Trainer's auto_find_batch_size looks for
        memory.empty(FLOATS, 2**60)
    assert memory.empty(FLOATS, COUNT).fill_(1).sum() == COUNT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_process_has_its_own():
    memory = ReusedMemory()
    numbers = memory.empty(FLOATS, COUNT).zero_()
    child = os.fork()
    if child == 0:
        numbers.view(torch.int32).numpy()[:] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not numbers.any()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_a_graph_that_is_kept_keeps_what_it_needs():
    """Two backward passes give the same, whatever runs in between; a pass without gradients empties the pool."""
    torch.manual_seed(0)
    made = LocalRNN(32, 5, "gru")
    made.implementation = "c"
    inputs = torch.randn(4, 800, 32, requires_grad=True)
    pool = local_rnn_c.KEPT.pool
    pool.clear()
    loss = made(inputs).square().sum()
    before = torch.autograd.grad(loss, inputs, retain_graph=True)
    made(torch.randn(4, 800, 32)).sum().backward()
    assert len(pool) == 2
    made(torch.randn(4, 800, 32)).sum().backward()
    assert len(pool) == 2
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), before, rtol=0, atol=0)
    assert len(pool) == 4
    with torch.no_grad():
        made(inputs)
    assert not pool
