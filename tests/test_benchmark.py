"""The benchmark script: its rows, what it writes, and that it goes on where it was."""

import json

import pytest
import torch

from scripts import benchmark
from scripts.benchmarks import attention, local_rnn, measuring, models
from scripts.benchmarks.measuring import Case


CPU = torch.device("cpu")


@pytest.mark.parametrize("module", [local_rnn, attention, models])
def test_both_sides_of_every_row_run(module):
    builds = {case.key: case.build for case in module.cases("cpu")}
    for build in builds.values():
        for function in build(CPU, True):
            function()


def test_both_sides_of_the_local_rnn_compute_the_same():
    ours, theirs = local_rnn.build("lstm", 2, 9, 4, 3, False, CPU, False)
    torch.testing.assert_close(ours(), theirs())


@pytest.mark.parametrize(
    "quantity, target, ratio, reached",
    [("speed-up", 2, 2, True), ("speed-up", 2.1, 2, False), ("time", 0.5, 0.5, True), ("time", 0.4, 0.5, False)],
)
def test_a_ratio_is_of_the_medians_and_held_against_its_target(quantity, target, ratio, reached, monkeypatch):
    monkeypatch.setattr(measuring, "alternate", lambda *arguments: ([2.0, 2.0, 9.0], [4.0, 4.0, 3.0]))
    case = Case("a", "b", lambda device, small: (None, None), quantity, target, flops=1e9, tokens=6)
    row = measuring.measure(case, CPU, 3, False, {"flops": 1e9, "bytes": 1e9})
    assert (row["ratio"], row["reached"]) == (ratio, reached)
    assert (row["share_of_roofline"], row["tokens_per_second"], row["their_tokens_per_second"]) == (0.5, 3, 1.5)


def build_buffers(device, small):
    """One function that fills 1 byte, one that fills 96 MiB."""
    return lambda: torch.ones(1), lambda: torch.ones(1 if small else 24 * 2**20)


def test_peak_memory_is_that_of_one_call():
    held = torch.ones(48 * 2**20)  # what the measuring process holds or held does not count
    case = Case("a", "b", build_buffers, "memory", target=0.5)
    row = measuring.measure(case, CPU, 1, False, {})
    assert 90 < row["theirs_bytes"] / 2**20 < 110 and row["ours_bytes"] < 2**23 and row["reached"]
    assert held.numel()


def test_a_run_writes_its_rows_and_resumes_with_them(tmp_path, capsys):
    arguments = [
        "--small",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--only",
        "LocalRNN rnn",
        "--output-dir",
        str(tmp_path),
    ]
    benchmark.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    quantities = [row["quantity"] for row in results["rows"]]
    assert sorted(quantities) == ["memory", "speed-up", "speed-up", "time"]
    assert results["machine"]["processors"] and results["roofline"]["flops"] > 0
    assert (tmp_path / "table.md").read_text().count("LocalRNN rnn") == 4
    with pytest.raises(SystemExit, match="--resume"):
        benchmark.main(arguments)
    capsys.readouterr()
    benchmark.main([*arguments, "--resume"])
    assert "1/4" not in capsys.readouterr().err  # nothing is measured again
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_words_that_no_row_has_are_an_error_that_lists_the_rows():
    with pytest.raises(SystemExit, match="(?s)'conformer'.*LocalRNN gru"):
        benchmark.all_cases("cpu", "conformer")
