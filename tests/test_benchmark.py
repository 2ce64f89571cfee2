"""The benchmark script: its rows, what it writes, and that it goes on where it was."""

import json

import pytest
import torch

from scripts import benchmark
from scripts.benchmarks import adapters, attention, layer_norm_lstm, local_rnn, measuring, models, structured_linear
from scripts.benchmarks.measuring import Case


CPU = torch.device("cpu")


@pytest.mark.parametrize("module", [local_rnn, attention, models, adapters, structured_linear, layer_norm_lstm])
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
    monkeypatch.setattr(measuring, "alternate", lambda *functions: [(2.0, 4.0), (2.0, 4.0), (9.0, 3.0)])
    case = Case("a", "b", lambda device, small: (None, None), quantity, target)
    row = measuring.measure(case, CPU, False)
    assert (row["ours"], row["theirs"], row["ratio"], row["reached"]) == (2, 4, ratio, reached)
    assert (row["lowest"], row["highest"]) == ((1 / 3, 2) if quantity == "speed-up" else (0.5, 3))


def test_the_two_functions_are_called_in_turn_after_a_first_call_of_each():
    calls = []
    pairs = measuring.alternate(lambda: calls.append("ours"), lambda: calls.append("theirs"))
    assert calls == ["ours", "theirs"] * (1 + measuring.REPEATS)
    assert len(pairs) == measuring.REPEATS and all(seconds >= 0 for pair in pairs for seconds in pair)


def build_buffers(device, small):
    """One function that fills 1 byte, one that fills 96 MiB."""
    return lambda: torch.ones(1), lambda: torch.ones(1 if small else 24 * 2**20)


def test_peak_memory_is_that_of_one_call():
    held = torch.ones(48 * 2**20)  # what the measuring process holds or held does not count
    case = Case("a", "b", build_buffers, "memory", target=0.5)
    row = measuring.measure(case, CPU, False)
    assert 90 < row["theirs"] / 2**20 < 110 and row["ours"] < 2**23 and row["reached"]
    assert held.numel()


def test_a_run_writes_its_rows_and_resumes_with_them(tmp_path, capsys):
    arguments = ["--small", "--device", "cpu", "--only", "LocalRNN rnn", "--output-dir", str(tmp_path)]
    benchmark.main(arguments)
    table, path = capsys.readouterr().out, tmp_path / "results.jsonl"
    results = path.read_text()
    rows = [json.loads(line) for line in results.splitlines()]
    assert sorted(row["quantity"] for row in rows) == ["memory", "speed-up", "speed-up", "time"]
    assert all(row["machine"]["processors"] for row in rows)
    assert table.count("LocalRNN rnn") == 4
    with pytest.raises(SystemExit, match="--resume"):
        benchmark.main(arguments)
    benchmark.main([*arguments, "--resume"])
    again = capsys.readouterr()
    assert again.out == table and "1/4" not in again.err  # nothing is measured again
    assert path.read_text() == results
    path.write_text("".join(results.splitlines(keepends=True)[1:]))
    benchmark.main([*arguments, "--resume"])
    assert "1/4" in capsys.readouterr().err and len(path.read_text().splitlines()) == 4


def test_words_that_no_row_has_are_an_error_that_lists_the_rows():
    with pytest.raises(SystemExit, match="(?s)'conformer'.*LocalRNN gru"):
        benchmark.all_cases("cpu", "conformer")
