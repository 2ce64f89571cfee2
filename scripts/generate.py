"""
Generate text with a trained language model.

    python -m scripts.generate runs/stdlib-code/final --prompt "def read_file(path):"
    python -m scripts.generate runs/stdlib-code/final --prompt "class " --temperature 0.9 --seed 3 --max-new-tokens 800

CHECKPOINT is the final/ of a run, or the name of a model on the Hub. The prompt begins a new document. The text goes to
stdout; its last line is one JSON object with the prompt, the completion and the settings.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import modeling_rtransformer  # noqa: F401 - registers the model type
from scripts.training.checkpoints import load_model, saved_model


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the folder of a saved language model, or its name on the Hub")
    parser.add_argument("--prompt", required=True, help="the beginning of the text")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--max-seconds", type=float, help="stop after this time; no limit if left out")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 for greedy decoding")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most probable tokens; 0 for all")
    # Below 1, a small model of source code never ends a run of spaces: one more space alone has that probability.
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most probable tokens of this total probability"
    )
    parser.add_argument(
        "--no-repeat", type=int, default=0, help="never write the same so many tokens again, spaces included; 0 for off"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> dict:
    """Continue the prompt; the result."""
    if Path(options.checkpoint).is_dir():
        options.checkpoint = str(saved_model(options.checkpoint))
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(AutoModelForCausalLM, options.checkpoint).eval().to(device)
    prompt = tokenizer(options.prompt, add_special_tokens=False, return_tensors="pt").input_ids.long()
    unknown = int((prompt == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    if unknown:
        print(f"{unknown} tokens of the prompt are not in the vocabulary; the model reads <unk>", file=sys.stderr)
    prompt = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), prompt], dim=1).to(device)
    sampling = {"do_sample": options.temperature > 0, "no_repeat_ngram_size": options.no_repeat}
    if options.temperature > 0:
        sampling |= {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    never = [index for index in (tokenizer.unk_token_id, tokenizer.pad_token_id) if index is not None]
    set_seed(options.seed)
    started = time.monotonic()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.max_new_tokens,
        max_time=options.max_seconds,
        suppress_tokens=never,
        **sampling,
    )
    new = output[0, prompt.shape[1] :]
    return {
        "prompt": options.prompt,
        "completion": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "seconds": round(time.monotonic() - started, 2),
        "seed": options.seed,
        **sampling,
    }


def main(arguments: list[str] | None = None) -> dict:
    """Print the prompt with its continuation; the result."""
    options = parse_arguments(arguments)
    try:
        result = generate(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack characters
    print(options.prompt + result["completion"])
    return result


if __name__ == "__main__":
    print(json.dumps(main()))
