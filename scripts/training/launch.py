"""
How several processes share a run. The launch command decides it, not the recipe.

`accelerate launch` passes its settings on in environment variables; under `torchrun` they are set by hand. They are
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
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, parse_flag_from_env
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig


def _restore_to_numbered_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    return storage if location.startswith("cpu:") else None


# With several processes on CPUs, Trainer loads an optimizer's state to "cpu:0", which torch.load does not know.
torch.serialization.register_package(100, lambda storage: None, _restore_to_numbered_cpu)


def restart_count() -> int:
    """How many times a launcher has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def init_process_group_after_restart(timeout: float) -> None:
    """
    After a launcher has restarted the processes, connect them under a key prefix of this restart.

    Launchers keep one store over restarts, and torch 2.13 (`_create_c10d_store`) reads it as a new one each time,
    although it still holds the addresses of the processes that ended.

    Args:
        timeout: seconds, as `TrainingArguments.ddp_timeout`.
    """
    restarts = restart_count()
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    dist.init_process_group(
        store=dist.PrefixStore(f"restart{restarts}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout),
    )


def set_up(args: TrainingArguments, resume: bool, checkpoint: Path | None) -> None:
    """
    Make `args` agree with the launcher, before a `Trainer` is made of them.

    Raises:
        ValueError: the launcher asks for a combination that is not supported, or cannot resume from `checkpoint`.
    """
    sizes, fsdp = ParallelismConfig(), parse_flag_from_env("ACCELERATE_USE_FSDP") or bool(args.fsdp)
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
        if resume:  # its checkpoints lack the optimizer, so none is complete and `checkpoint` is None
            raise ValueError("--resume is not for tensor parallelism: Transformers keeps no optimizer state of it")
        args.save_only_model = True
    if checkpoint is not None and is_sharded_checkpoint(checkpoint) != fsdp:
        raise ValueError(
            f"{checkpoint} is of a run {'without' if fsdp else 'with'} FSDP; resume with the launch settings of that "
            "run; the number of processes may differ"
        )
    if (fsdp or sizes.tp_size > 1) and args.world_size > 1 and args.device.type == "cpu":
        # To try a launch without GPUs: accelerate shards on accelerators only, though its steps work on CPUs too.
        args.distributed_state.distributed_type = DistributedType.MULTI_XPU


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint of `Trainer` was saved under FSDP: the weights as a folder of shards, or as one file."""
    return (folder / "pytorch_model_fsdp_0").is_dir() or (folder / "pytorch_model_fsdp.bin").is_file()


def make_model(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model from `make` as this process needs it: whole or, under tensor parallelism, this process's part."""
    model = make()
    tp_size = ParallelismConfig().tp_size
    if tp_size == 1:
        return model
    model = type(model).from_pretrained(  # Transformers shards a model as it loads it
        None, config=model.config, state_dict=model.state_dict(), distributed_config=DistributedConfig(tp_size=tp_size)
    )
    model.register_load_state_dict_pre_hook(shard_loaded_weights)
    return model


def shard_loaded_weights(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], *_: object) -> None:
    """Before `load_state_dict`, which loads the best checkpoint: shard whole weights as those of the model."""
    for name, own in model.state_dict().items():
        if isinstance(own, DTensor) and name in state_dict and not isinstance(state_dict[name], DTensor):
            state_dict[name] = distribute_tensor(
                state_dict[name].to(own.device), own.device_mesh, own.placements, src_data_rank=None
            )


class ShardsCallback(TrainerCallback):
    """
    Adds what `Trainer` leaves out under FSDP. It makes a checkpoint's folder before the weights are saved: without it
    `Trainer` does not record the newest checkpoint as the best. And it writes config.json beside the shards, which are
    a model for `AutoModel` after `accelerate merge-weights CHECKPOINT/pytorch_model_fsdp_0 CHECKPOINT`.
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
    """Add to a `Trainer` what sharding needs."""
    if trainer.is_fsdp_enabled:
        trainer.add_callback(ShardsCallback())
    if trainer.get_tp_size() > 1:  # every process has the results of every row, so they are not gathered
        trainer.gather_function = trainer.accelerator.gather_for_metrics = lambda results, **_: results


def whole_model(trainer: Trainer, make: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """
    The trained model in one piece on the first process, None on the others; every process must call this. It is a new
    model from `make`, on the CPU, whose config is the recipe's: `Trainer` sets its `use_cache` to False.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    weights = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not trainer.is_world_process_zero():
        return None
    whole = make()
    whole.load_state_dict(weights)
    return whole
