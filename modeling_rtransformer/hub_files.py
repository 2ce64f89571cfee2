# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
What a model's repository on the Hub consists of, and a callback that keeps the pushes of `Trainer` to it.

`save_pretrained` and `push_to_hub` of a model write the code beside the weights by themselves. `Trainer` does so with
its last push; the pushes during training copy only the weights, and all of them take `training_args.bin` along, a
pickle with the paths and the Hub token that the training was given. [`HubFilesCallback`] mends both.
"""

from pathlib import Path

from transformers import PreTrainedConfig, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save


WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
REPORT_FILES = ("README.md", "results.json", "curve.json", "curve.png", "gates.png", "training.toml")
# Everything that is ever pushed, as patterns for the root of the repository; what is not named here stays at home.
HUB_FILES = ("config.json", "generation_config.json", "*.py", *WEIGHT_FILES, *TOKENIZER_FILES, *REPORT_FILES)
# Files that can run code when they are read. They are never pushed, and deleted where an older push has left them.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


def save_code(folder: str | Path, config: PreTrainedConfig) -> list[str]:
    """Write the code of all classes of a config into `folder`, as it is in this package; returns the names, sorted."""
    return sorted({Path(path).name for path in custom_object_save(config, folder)})


class HubFilesCallback(TrainerCallback):
    """
    For `Trainer(args=TrainingArguments(push_to_hub=True, ...), callbacks=[HubFilesCallback()])`: every push carries the
    code, and nothing but [`HUB_FILES`].

    What is left out is said in a `.gitignore` in the output folder, to which `huggingface_hub` keeps: no pickle, so no
    optimizer state either, and no data that happen to lie there. It is pushed itself, since the Hub goes by the one in
    the repository when `Trainer` pushes a whole checkpoint into a folder of its own.
    """

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir)
        save_code(folder, model.config)
        lines = ["/*", "!/.gitignore", *(f"!/{pattern}" for pattern in HUB_FILES)]
        (folder / ".gitignore").write_text("\n".join(lines) + "\n", encoding="utf-8")


__all__ = ["HUB_FILES", "HubFilesCallback", "save_code"]
