# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The files of a model's repository on the Hub, and a callback that limits the pushes of `Trainer` to them.

`save_pretrained` and `push_to_hub` of a model write the code beside the weights. `Trainer` does so only with its last
push: pushes during training have the weights without the code. Every push of `Trainer` also has `training_args.bin`, a
pickle that holds the paths and the Hub token of the training. [`HubFilesCallback`] mends both.
"""

from pathlib import Path

from transformers import PreTrainedConfig, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save


WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
REPORT_FILES = ("README.md", "results.json", "curve.json", "curve.png", "gates.png", "training.toml")
# Everything that is pushed, as patterns for the root of the repository; files that match none are never pushed.
HUB_FILES = ("config.json", "generation_config.json", "*.py", *WEIGHT_FILES, *TOKENIZER_FILES, *REPORT_FILES)
# Files that can run code when they are read. They are never pushed, and a push deletes those of an older one.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


def save_code(folder: str | Path, config: PreTrainedConfig) -> list[str]:
    """Write the code of all classes of a config into `folder`, as it is in this package; returns the names, sorted."""
    return sorted({Path(path).name for path in custom_object_save(config, folder)})


class HubFilesCallback(TrainerCallback):
    """
    For `Trainer(args=TrainingArguments(push_to_hub=True, ...), callbacks=[HubFilesCallback()])`: every push carries the
    code, and nothing but [`HUB_FILES`].

    It writes a `.gitignore` into the output folder, which `huggingface_hub` obeys and which excludes all other files:
    pickles, and with them the optimizer state, and data. The `.gitignore` is pushed too, because the Hub obeys the one
    in the repository when `Trainer` pushes a complete checkpoint into a subfolder.
    """

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir)
        save_code(folder, model.config)
        lines = ["/*", "!/.gitignore", *(f"!/{pattern}" for pattern in HUB_FILES)]
        (folder / ".gitignore").write_text("\n".join(lines) + "\n", encoding="utf-8")


__all__ = ["HUB_FILES", "HubFilesCallback", "save_code"]
