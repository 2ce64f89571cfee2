"""
The memory of a model that reads streams: carried from batch to batch, detached after each, saved with each checkpoint.

A process has one memory for training and one for scoring. The former is empty when an epoch begins, the latter when a
scoring begins. A checkpoint has the training memory of each process, `memory-RANK.safetensors`, from which a resumed
run goes on as if it had not been interrupted.
"""

# B rows, T tokens of a row

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedConfig, TrainerCallback

from modeling_rtransformer.memory import detach_memory


class Memory:
    """The cache of a batch's streams, and the document numbers of the positions that the next rows may look at."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.clear()

    @property
    def reach(self) -> int:
        """How many of the past positions later ones may look at."""
        window = self.config.local_window if self.config.has_windows else 1
        return max(self.config.sliding_window, window) - 1

    def clear(self) -> None:
        self.cache: DynamicCache | None = None
        self.numbers: torch.Tensor | None = None  # (B, up to `reach`)

    def arguments(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What to give the model in place of the batch: with the cache, and the numbers of the past before its own."""
        if self.cache is None:
            self.cache = DynamicCache(config=self.config)
        arguments = {**batch, "cache": self.cache, "use_cache": True}
        if "seq_idx" in batch:
            numbers = batch["seq_idx"]
            numbers = numbers if self.numbers is None else torch.cat([self.numbers, numbers], dim=1)
            arguments["seq_idx"], self.numbers = numbers, numbers[:, -self.reach :]
        return arguments

    def detach(self) -> None:
        """After a step: the next one does not propagate gradients into it."""
        detach_memory(self.cache)

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors by name; empty without a memory."""
        if self.cache is None:
            return {}
        state = {"length": torch.tensor(self.cache.get_seq_length())}
        if self.numbers is not None:
            state["numbers"] = self.numbers
        for index, layer in enumerate(self.cache.layers):
            state |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
            for name in ("conv_states", "recurrent_states"):
                found = getattr(layer, name, {}).items()
                state |= {f"{index}.{name}.{place}": value for place, value in found if value is not None}
        return {name: value.detach().contiguous().clone() for name, value in state.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what [`Memory.state`] gave."""
        self.clear()
        if not state:
            return
        self.cache, self.numbers = DynamicCache(config=self.config), state.get("numbers")
        for index, layer in enumerate(self.cache.layers):
            layer.update(state[f"{index}.keys"], state[f"{index}.values"])
            layer.cumulative_length = int(state["length"])
            for name, value in state.items():
                kind, _, place = name.removeprefix(f"{index}.").partition(".")
                if name.startswith(f"{index}.conv_states."):
                    layer.update_conv_state(value, int(place), conv_kernel_size=value.shape[-1])
                elif name.startswith(f"{index}.recurrent_states."):
                    layer.update_recurrent_state(value, int(place))


class SaveMemory(TrainerCallback):
    """Clears the training memory when an epoch begins, and saves and restores that of each process."""

    def __init__(self, memory: Memory, checkpoint: Path | None) -> None:
        self.memory, self.checkpoint = memory, checkpoint

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.memory.clear()
        if self.checkpoint is None:
            return
        path = self.checkpoint / f"memory-{args.process_index}.safetensors"
        with safe_open(path, framework="pt") as file:
            settings = file.metadata()
            if settings != self._settings(args):
                raise ValueError(
                    f"{path} was written with {settings}, now it is {self._settings(args)}: the streams of a run stay "
                    "divided among the processes and rows that started it"
                )
            self.memory.load({name: file.get_tensor(name).to(args.device) for name in file.keys()})  # noqa: SIM118
        self.checkpoint = None

    def on_save(self, args, state, control, **kwargs):
        at_end_of_epoch = state.epoch == round(state.epoch)  # the next epoch begins with none
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"memory-{args.process_index}.safetensors"
        save_file({} if at_end_of_epoch else self.memory.state(), path, metadata=self._settings(args))

    @staticmethod
    def _settings(args) -> dict[str, str]:
        return {"processes": str(args.world_size), "rows": str(args.per_device_train_batch_size)}
