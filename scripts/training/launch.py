"""
How several processes share a run. The launcher says it, and the recipe says nothing of it.

`accelerate launch` hands its settings on in environment variables; under `torchrun` they are set by hand. These are
read here and by accelerate itself:

| variables | what it means |
|---|---|
| none | data parallel (DDP): each process has the whole model and its part of the batch |
| `ACCELERATE_USE_FSDP=true FSDP_VERSION=2` and others of `FSDP_` | FSDP2: a process keeps its part of every weight |
| and `ACCELERATE_USE_PARALLELISM_CONFIG=true`, `PARALLELISM_CONFIG_DP_REPLICATE_SIZE`, `..._DP_SHARD_SIZE` | hybrid |
| `PARALLELISM_CONFIG_TP_SIZE` above 1 | tensor parallel: a process has some heads and a part of the feed-forward |
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from scripts.training.averaging import UNAVERAGED
from scripts.training.checkpoints import is_sharded_checkpoint


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def set_up(args: TrainingArguments, resume: bool, checkpoint: Path | None, averaged: bool = False) -> None:
    """
    Make `args` agree with the launcher; before a `Trainer` is made of them.

    Args:
        averaged: whether the run keeps an average of the weights.

    Raises:
        ValueError: the launcher asks for what cannot be had together, or cannot go on from `checkpoint`.
    """
    sizes, fsdp = ParallelismConfig(), is_on("ACCELERATE_USE_FSDP") or bool(args.fsdp)
    if sizes.tp_size > 1 and (fsdp or sizes.data_parallel_size > 1):
        raise ValueError(
            f"`PARALLELISM_CONFIG_TP_SIZE` must be 1 with FSDP or data parallelism beside it, got {sizes.tp_size}; "
            "checkpoints of both together could not be resumed"
        )
    if sizes.tp_size > 1 and sizes.tp_size != args.world_size:
        raise ValueError(
            f"`PARALLELISM_CONFIG_TP_SIZE` must be the number of processes ({args.world_size}), got {sizes.tp_size}"
        )
    if sizes.tp_size > 1:
        if not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
            raise ValueError(
                f"training with tensor parallelism needs Transformers 5.23, this is {transformers.__version__}"
            )
        if resume:  # without an optimizer no checkpoint is whole, so there is none here either
            raise ValueError("--resume is not for tensor parallelism: Transformers keeps no optimizer state of it")
        args.save_only_model = True
    if checkpoint is not None and is_sharded_checkpoint(checkpoint) != fsdp:
        raise ValueError(
            f"{checkpoint} is of a run {'without' if fsdp else 'with'} FSDP; go on with the launcher's settings of "
            "then, on as many processes as you like"
        )
    if averaged and (fsdp or is_on("ACCELERATE_USE_DEEPSPEED") or args.deepspeed or sizes.non_data_parallel_size > 1):
        raise ValueError(
            "`averaging.decay` is for one process, or several with DDP, each of which has all weights, not for FSDP, "
            "DeepSpeed, tensor or context parallelism; leave it out"
        )
    if checkpoint is not None and (checkpoint / UNAVERAGED).is_file() != averaged:
        raise ValueError(
            f"{checkpoint} is of a run {'without' if averaged else 'with'} `averaging.decay`; go on with the recipe "
            "of then, or begin anew in another --output-dir"
        )
    if (fsdp or sizes.tp_size > 1) and args.world_size > 1 and args.device.type == "cpu":
        # accelerate shards on accelerators alone, though all that it then does works on a processor too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def make_model(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A new model as this process is to have it: whole or, under tensor parallelism, its part of it."""
    model = make()
    tp_size = ParallelismConfig().tp_size
    if tp_size == 1:
        return model
    model = type(model).from_pretrained(  # Transformers shards a model as it loads it
        None, config=model.config, state_dict=model.state_dict(), distributed_config=DistributedConfig(tp_size=tp_size)
    )
    model.register_load_state_dict_pre_hook(shard_what_is_loaded)
    return model


def shard_what_is_loaded(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], *_: object) -> None:
    """Before `load_state_dict`, by which `Trainer` loads the best checkpoint: cut whole weights as the model's are."""
    for name, own in model.state_dict().items():
        if isinstance(own, DTensor) and name in state_dict and not isinstance(state_dict[name], DTensor):
            state_dict[name] = distribute_tensor(
                state_dict[name].to(own.device), own.device_mesh, own.placements, src_data_rank=None
            )


def is_sharded(model: PreTrainedModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


class ShardsCallback(TrainerCallback):
    """
    Two things that `Trainer` leaves out of checkpoints under FSDP. Their folder is there before the model is saved:
    without it the newest is not taken for the best when it is. And config.json lies beside the shards, which are a
    model for `AutoModel` once `accelerate merge-weights CHECKPOINT/pytorch_model_fsdp_0 CHECKPOINT` has merged them.
    """

    def on_evaluate(self, args, state, control, **kwargs):
        if args.should_save and control.should_save:
            self._folder(args, state).mkdir(parents=True, exist_ok=True)

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.should_save:
            model.config.save_pretrained(self._folder(args, state))

    def _folder(self, args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def attach(trainer: Trainer) -> None:
    """Add to a `Trainer` what sharding asks for."""
    if trainer.is_fsdp_enabled:
        trainer.add_callback(ShardsCallback())
    if trainer.get_tp_size() > 1:  # every process has the results of every row, so they are not gathered
        trainer.gather_function = trainer.accelerator.gather_for_metrics = lambda results, **_: results


def whole_model(trainer: Trainer, make: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """
    The trained model in one piece on the first process, None on the others; every process must call this. Shards are
    gathered into a model from `make`, which is an ordinary one on the CPU.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    first = trainer.is_world_process_zero()
    if not is_sharded(model):
        return model if first else None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not first:
        return None
    whole = make()
    whole.load_state_dict(weights)
    return whole
