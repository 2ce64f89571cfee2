"""Data larger than memory: every token once a pass, whoever reads it and wherever it stops, in bounded memory."""

import json
import os
import signal
import threading
import tracemalloc
from collections import Counter

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from transformers import AutoModelForCausalLM, default_data_collator

from scripts import evaluate, train
from scripts.data.sources import files, hub, reader
from scripts.data.streaming import StreamedWindows, StreamError, StreamLoader
from scripts.data.tokenization import Options as TokenizerOptions
from scripts.data.tokenization import build_tokenizer
from scripts.data.windows import IGNORED, TokenStream, Windows
from scripts.tasks.language_modeling import token_stream
from scripts.training.recipe import read_recipe
from scripts.training.trainer import RecipeTrainer
from tests.conftest import tiny_config
from tests.streamed_recipe import SIZES, words_of, write_files, write_streamed


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def recipe(paths, tmp_path_factory):
    return write_streamed(tmp_path_factory.mktemp("recipe"), paths, hidden_dropout=0.2)


@pytest.fixture(scope="module")
def tokenizer(paths):
    return build_tokenizer(TokenizerOptions(kind="word"), [" ".join(words_of(paths))])


def stream(documents, tokenizer, **settings):
    settings = {"window": 9, "stride": 8, "block": 4, "seed": 1, **settings}
    return StreamedWindows(documents, tokenizer, **settings)


def read(paths, **settings):
    named = {"train": paths, "validation": paths[0], "test": paths[0], "streaming": True}
    return files.load(files.Options("files", **{**named, **settings}))["train"]


def loader(paths, tokenizer, rank=0, processes=1, workers=0, everywhere=bool):
    part = stream(read(paths), tokenizer).split(rank, processes)
    return StreamLoader(part, default_data_collator, 4, everywhere, num_workers=workers)


def predicted(rows, tokenizer) -> Counter:
    """How often the rows predict each word."""
    ids = [id for row in rows for id in row["labels"].flatten(0, -2)[..., 1:].flatten().tolist() if id != IGNORED]
    return Counter(token for token in tokenizer.convert_ids_to_tokens(ids) if token.startswith("w"))


def one_pass(batches):
    """The batches of the first pass of a loader."""
    for batch in batches:
        if batches.epoch:
            return
        yield batch


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_token_is_predicted_once_in_a_pass_by_one_process(tmp_path, tokenizer, suffix, processes):
    paths = write_files(tmp_path, suffix)
    counts = Counter()
    for rank in range(processes):
        part = stream(read(paths), tokenizer).split(rank, processes)
        rows = [{"labels": torch.from_numpy(row["labels"])[None]} for row, _ in part]
        counts.update(predicted(rows, tokenizer))
    assert counts == words_of(write_files(tmp_path, "jsonl"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_goes_on_gives_what_it_would_have_given(paths, tokenizer, workers):
    whole, batches = loader(paths, tokenizer, workers=workers), []
    for batch in whole:
        batches.append(batch["input_ids"].tolist())
        if len(batches) == 14:
            break
    assert whole.epoch > 0 and batches[0] != batches[len(batches) // 2]
    for stride in (4, 5) if workers else (1, 2, 3):  # stopped again and again
        state, seen = None, []
        while len(seen) < len(batches):
            part = loader(paths, tokenizer, workers=workers)
            if state is not None:
                part.load_state_dict(json.loads(state))
            seen += [batch["input_ids"].tolist() for _, batch in zip(range(stride), part)]
            state = json.dumps(part.state_dict())  # as a checkpoint has it
        assert seen[: len(batches)] == batches


def test_each_pass_has_an_order_of_its_own(paths, tokenizer):
    batches, passes = loader(paths, tokenizer), {0: [], 1: []}
    for batch in batches:
        if batches.epoch == 2:
            break
        passes[batches.epoch].append(batch)
    first, second = (predicted(passes[n], tokenizer) for n in (0, 1))
    assert first == second == words_of(paths)
    assert list(first) != list(second)


def test_processes_with_unequal_parts_end_a_pass_together(tmp_path):
    paths = write_files(tmp_path, sizes=(30, 2))  # one file each
    tokenizer = build_tokenizer(TokenizerOptions(kind="word"), [" ".join(words_of(paths))])
    barrier, ended, seen = threading.Barrier(2), [False, False], [[], []]

    def run(rank):
        def everywhere(true):
            ended[rank] = true
            barrier.wait(60)
            both = all(ended)
            barrier.wait(60)
            return both

        seen[rank] = list(one_pass(loader(paths, tokenizer, rank, 2, everywhere=everywhere)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen[0]) == len(seen[1]) > 2
    assert predicted(seen[0] + seen[1], tokenizer) == words_of(paths)
    blank = seen[1][-1]
    model = AutoModelForCausalLM.from_config(tiny_config(vocab_size=len(tokenizer)))
    loss = model(**blank, num_items_in_batch=torch.tensor(9)).loss
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_what_is_held_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 4096)
    text = "".join(f"line {n} of a text without an end\n" for n in range(600))  # 6 pieces
    tokenizer = build_tokenizer(TokenizerOptions(kind="character"), [text])
    (tmp_path / "text.txt").write_text(text)

    def held(copies: int) -> tuple[int, int]:
        documents = read([str(tmp_path / "text.txt")] * copies)
        arrow, rows = pa.total_allocated_bytes(), 0
        tracemalloc.start()
        for _ in stream(documents, tokenizer, window=257, stride=256, block=2):
            rows += 1
        peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow
        tracemalloc.stop()
        return peak, rows

    (small, few), (large, many) = held(1), held(8)
    assert many > 7.9 * few
    assert large < 1.1 * small


def test_the_tokens_of_a_corpus_on_disk_are_not_copied(tmp_path):
    tokenizer = build_tokenizer(TokenizerOptions(kind="character"), ["ab"])
    documents = Dataset.from_dict({"text": ["abba" * 500] * 500}).with_format(None)
    documents.save_to_disk(tmp_path / "corpus")
    documents = Dataset.load_from_disk(str(tmp_path / "corpus"))
    token_stream(documents, tokenizer)  # the cache is written
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    tokens = token_stream(documents, tokenizer)
    rows = Windows(tokens, window=512, stride=511, score_once=False)
    assert len(tokens) == 1 + 500 * 2001 and len(rows[len(rows) - 1]["input_ids"]) == 512
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow
    tracemalloc.stop()
    assert peak < len(tokens) * 4 / 10


@pytest.mark.parametrize("start", [0, 1])
def test_a_slice_of_the_stream_is_what_the_documents_are_joined_to(start):
    lists = [[3, 2], [2], [4, 5, 6, 2], [7, 2], [2], [8, 9, 2]]
    chunks = [pa.array(lists[:2]), pa.array([], type=pa.list_(pa.int64())), pa.array(lists[2:3]), pa.array(lists)[3:]]
    chunks = [chunk.cast(pa.list_(pa.int32())) for chunk in chunks]
    stream, whole = TokenStream(chunks, 2), [2, *(id for ids in lists for id in ids)]
    begins = [n for n, id in enumerate(whole) if id == 2]
    for first in range(start, len(whole), 2):
        for last in range(first, len(whole) + 1):
            assert stream[first:last].tolist() == whole[first:last]
            inside = [n - first for n in begins if first <= n < last]
            assert stream.document_begins(first, last).tolist() == inside


@pytest.mark.parametrize("streamed", [False, True], ids=["on-disk", "streamed"])
def test_separate_documents_do_not_see_each_other(tokenizer, paths, streamed):
    texts = ["w0_1_0 w0_1_1", "w0_2_0", "w0_3_0 w0_3_1 w0_3_2 w2_0_0"]
    documents = Dataset.from_dict({"text": texts})
    if streamed:
        rows = stream(documents.to_iterable_dataset(), tokenizer, window=11, stride=10, separate=True)
        row = {name: torch.from_numpy(values) for name, values in next(iter(rows))[0].items()}
    else:
        row = Windows(token_stream(documents, tokenizer), window=11, stride=10, score_once=False, separate=True)[0]
    # <eos> a b | <eos> c | <eos> d e f g | <eos>
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 0]
    model = AutoModelForCausalLM.from_config(tiny_config(vocab_size=len(tokenizer))).eval()
    whole = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0]
    for start, end in ((0, 3), (3, 5), (5, 10)):
        alone = model(input_ids=row["input_ids"][None, start:end]).logits[0]
        torch.testing.assert_close(whole[start:end], alone, rtol=1e-5, atol=1e-5)
    assert row["labels"].tolist() == row["input_ids"].tolist()  # so each token is predicted, the first one by `<eos>`


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "final" / "curve.json").read_text())["training"]]


def record(monkeypatch, stop_at=None):
    """Write down the rows of each step; send SIGTERM at one of them."""
    seen, step = {}, RecipeTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        seen.setdefault(self.state.global_step, []).append(inputs["input_ids"].tolist())
        if self.state.global_step == stop_at and len(seen[stop_at]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(RecipeTrainer, "training_step", training_step)
    return seen


def test_an_interrupted_stream_is_trained_on_as_an_uninterrupted_one(recipe, tmp_path, monkeypatch):
    # 12 steps of two batches are more than one pass; the stop is at a step that is not one of `save_steps`.
    settings = ["--set", "training.gradient_accumulation_steps=2", "--set", "task.documents=separate"]
    with monkeypatch.context() as patch:
        expected = record(patch)
        whole = train.main([str(recipe), "--output-dir", str(tmp_path / "whole"), *settings])
    arguments = [str(recipe), "--output-dir", str(tmp_path / "stopped"), *settings]
    with monkeypatch.context() as patch:
        seen = record(patch, stop_at=5)
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert not (tmp_path / "stopped" / "final").exists()
        result = train.main([*arguments, "--resume"])
    assert seen == expected and set(seen) == set(range(12))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert result["metrics"] == whole["metrics"] and result["tokens_seen"] == whole["tokens_seen"]
    # A run at its end has nothing left to train on.
    with monkeypatch.context() as patch:
        assert record(patch) == {} and train.main([*arguments, "--resume"])["steps"] == 12
    history = json.loads((tmp_path / "stopped" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    trained = [entry for entry in history if "loss" in entry]
    assert [entry["percent"] for entry in trained] == [round(100 * n / 12, 2) for n in range(1, 13)]
    assert [entry["epoch"] for entry in trained] == pytest.approx([n / 12 for n in range(1, 13)])


def test_another_number_of_processes_or_workers_is_refused(paths, tokenizer, recipe, tmp_path):
    with pytest.raises(StreamError, match="written with 1 workers .* now there are 2; .*dataloader_num_workers"):
        loader(paths, tokenizer, workers=2).load_state_dict(loader(paths, tokenizer).state_dict())
    with pytest.raises(StreamError, match="a stream of an older version cannot be resumed; begin a new run"):
        loader(paths, tokenizer).load_state_dict({"epoch": 0, "batches": 0, "workers": [None], "next_worker": 0})
    arguments = [str(recipe), "--output-dir", str(tmp_path), "--set", "training.max_steps=4"]
    train.main(arguments)
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["stateful_callbacks"]["StreamState"]["attributes"]["processes"] *= 2
    state.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="error: the checkpoint was written by 2 processes, now there are 1"):
        train.main([*arguments, "--resume"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.max_steps=-1"], "`training.max_steps` must be above 0 where `data.streaming` is set, got -1"),
        (["task.train_once=true"], "`task.train_once` is not for `data.streaming`; leave one of them out"),
        (["data.test="], "`data.test` is missing; nothing can be held out from a stream"),
        (["data.shuffle_documents=0"], "`data.shuffle_documents` must be greater than 0, got 0"),
        (["data.text_column=txt"], "`data.text_column` is 'txt', but .* has the columns text; did you mean"),
        (["tokenizer.max_texts=0"], "`tokenizer.max_texts` must be greater than 0, or left out, got 0"),
        (["task.documents=apart"], "`task.documents` must be 'joined' or 'separate', got 'apart'"),
        (["task.name=sequence_classification"], "`task.window` is not a setting"),
    ],
)
def test_what_does_not_go_with_a_stream_is_named(recipe, tmp_path, settings, message):
    arguments = [part for setting in settings for part in ("--set", setting)]
    with pytest.raises(SystemExit, match=message):
        train.main([str(recipe), "--output-dir", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


def test_only_a_language_model_takes_a_stream(paths, tmp_path):
    folder = write_streamed(tmp_path, paths)
    content = (folder / "training.toml").read_text().replace("language_modeling", "sequence_classification")
    lines = [line for line in content.splitlines() if not line.startswith(("window", "eval_stride"))]
    (folder / "training.toml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="`data.streaming` is for language_modeling, not for sequence_classification"):
        read_recipe(folder)


def test_a_stream_cannot_be_scored(recipe, tmp_path):
    train.main([str(recipe), "--output-dir", str(tmp_path), "--set", "training.max_steps=1"])
    with pytest.raises(SystemExit, match="`--split train` is an endless stream; .*--set data.streaming=false"):
        evaluate.main([str(tmp_path / "final"), "--split", "train"])
    scored = evaluate.main([str(tmp_path / "final"), "--split", "train", "--set", "data.streaming=false"])
    assert scored["metrics"]["perplexity"] > 1


def test_a_cell_without_text_is_named(tokenizer):
    documents = Dataset.from_dict({"text": ["w0_0_0", None]}).to_iterable_dataset()
    with pytest.raises(StreamError, match="`data.text_column` holds None, not text, in a row of the train split"):
        list(stream(documents, tokenizer))


def test_data_without_a_row_end_the_run(tokenizer):
    empty = IterableDataset.from_generator(lambda: iter(()), features=Features({"text": Value("string")}))
    with pytest.raises(StreamError, match="the train split of `data` gives no row"):
        next(iter(StreamLoader(stream(empty, tokenizer), default_data_collator, 4)))


def test_a_vocabulary_may_be_learnt_from_the_first_documents(recipe):
    few, all_of_it = (
        read_recipe(recipe, settings).prepare(None, ("train",)).tokenizer
        for settings in (["tokenizer.max_texts=3"], [])
    )
    assert len(few) < len(all_of_it) == 3 + sum(words_of(read_recipe(recipe).data.train).values())


def test_text_files_are_read_in_pieces_that_end_with_a_line(tmp_path):
    lines = [f"{n} " + "x" * (n % 300) + "\n" for n in range(2000)]
    (tmp_path / "lines.txt").write_text("".join(lines))
    (tmp_path / "one_line.txt").write_text("y" * 300_000)
    names = [str(tmp_path / "lines.txt"), str(tmp_path / "one_line.txt")]
    pieces = [row["text"] for row in files.streamed(names, {"text": "text"}, reader.ReaderOptions())]
    assert "".join(pieces) == "".join(lines) + "y" * 300_000
    assert len(pieces) > 5 and max(map(len, pieces)) <= 2 * reader.PIECE
    assert all(piece.endswith("\n") for piece in pieces if piece[0] != "y")


def test_a_dataset_by_its_name_is_streamed_too(tmp_path):
    write_files(tmp_path)
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, number in (("train", 2), ("test", 1)):
        (folder / f"{split}.jsonl").write_text(
            (tmp_path / f"part{number}.jsonl").read_text().replace('"text"', '"body"')
        )
    options = hub.Options("hub", str(folder), validation="test", test="test", text_column="body", streaming=True)
    splits = hub.load(options)
    assert isinstance(splits["train"], IterableDataset) and isinstance(splits["test"], Dataset)
    assert len(list(splits["train"])) == SIZES[2] and splits["test"].column_names == ["text"]
    with pytest.raises(ValueError, match="`data.validation` is missing; nothing can be held out from a stream"):
        hub.Options("hub", str(folder), test="test", streaming=True)
