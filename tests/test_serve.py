"""`python -m scripts.serve`: the server of Transformers on the loopback device answers as `generate` does."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from modeling_rtransformer import RTransformerForCausalLM, RTransformerForMaskedLM
from scripts import serve
from scripts.data.tokenization import Options, build_tokenizer
from tests.conftest import tiny_config


TEXT = "the quick brown fox jumps over the lazy dog: ask, answer.\n"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
NEEDS_SERVER = pytest.mark.skipif(not is_serve_available(), reason="fastapi, uvicorn and openai are not installed")


def save(folder, model_class=RTransformerForCausalLM, **fields):
    """A tiny model with a tokenizer of characters that writes conversations."""
    tokenizer = build_tokenizer(Options(kind="character", chat_template=TEMPLATE), [TEXT])
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **fields)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("served"))


def test_a_chat_template_is_a_setting_that_is_saved(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    written = tokenizer.apply_chat_template([{"role": "ask", "content": "the fox"}], tokenize=False)
    assert written == "ask: the fox\n"


@pytest.mark.parametrize("template, reason", [("{{ bos_token }}", "got `bos_token`"), ("{% for %}", "Jinja template")])
def test_a_chat_template_that_cannot_work_is_refused(template, reason):
    with pytest.raises(ValueError, match=f"`tokenizer.chat_template` must be .*{reason}"):
        Options(kind="character", chat_template=template)


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    save(tmp_path, RTransformerForMaskedLM, is_causal=False)
    with pytest.raises(ValueError, match="must be a causal language model to be served.*RTransformerForMaskedLM"):
        serve.make_known(str(tmp_path))


@pytest.fixture(scope="module")
def server(checkpoint):
    """The address of a server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    log = open(checkpoint / "log", "w+")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address + "/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (checkpoint / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def ask(server, path, **body):
    body = json.dumps({"max_tokens": 12, "temperature": 0, **body}).encode()
    request = urllib.request.Request(server + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def generated(checkpoint, ids):
    """What `generate` writes after these ids."""
    model = RTransformerForCausalLM.from_pretrained(checkpoint)
    output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)
    return AutoTokenizer.from_pretrained(checkpoint).decode(output[0, len(ids) :], skip_special_tokens=True)


@NEEDS_SERVER
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_completion_is_what_generate_writes(server, checkpoint, stream):
    ids = AutoTokenizer.from_pretrained(checkpoint)("the fox").input_ids
    answer = ask(server, "/v1/completions", model=str(checkpoint), prompt="the fox", stream=stream)
    if stream:
        events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: {")]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    else:
        text = json.loads(answer)["choices"][0]["text"]
    assert text == generated(checkpoint, ids) != ""


@NEEDS_SERVER
def test_a_chat_goes_through_the_template(server, checkpoint):
    messages = [{"role": "user", "content": "the fox"}]
    ids = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(messages)["input_ids"]
    answer = json.loads(ask(server, "/v1/chat/completions", model=str(checkpoint), messages=messages))
    assert answer["choices"][0]["message"]["content"] == generated(checkpoint, ids) != ""
