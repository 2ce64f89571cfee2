"""
One of several processes that a test has launched: works through a plan, a JSON file with a list of steps.

A step has `environment`, what `accelerate launch` sets for a file of configuration/accelerate/, and either `train`,
the arguments of scripts/train.py, or `shard`, a file for the findings of `sharded_and_whole`, with `variants` of the
model. One launch serves many steps, since starting the processes takes longer than what they do.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer
from transformers.distributed import DistributedConfig

from modeling_rtransformer import RTransformerConfig
from scripts import train


PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
REM_KINDS = ["regular", "none", "first_cyclical", "second_cyclical", "regular", "regular", "none", "none"]
MODEL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "local_window": 3,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "rem_kinds": REM_KINDS,  # on four processes the last one has none
    "rem_dilations": [1, 1, 1, 2, 3, 1, 1, 1],
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest_difference(ours: dict, theirs: dict) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def trained(model, ids, mask):
    """Losses, first gradients and last weights of three steps of SGD, each of two accumulated batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, gradients = [], {}
    for _ in range(3):
        for part in (slice(0, 2), slice(2, 3)):
            loss = model(ids[part], attention_mask=mask[part], labels=ids[part]).loss
            loss.backward()
            losses.append(loss.item())
        gradients = gradients or {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def sharded_and_whole(folder: Path, variants: dict[str, dict]) -> dict[str, dict]:
    """The same model whole and tensor parallel: by how much they differ, and what should be equal but is not."""
    findings = {}
    for name, variant in variants.items():
        fields, options = {**MODEL, **variant.get("config", {})}, variant.get("options", {})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(RTransformerConfig(**fields))
        if distributed.get_rank() == 0:
            model.save_pretrained(folder / name)
        distributed.barrier()
        plan = DistributedConfig(tp_size=distributed.get_world_size())
        one = AutoModelForCausalLM.from_pretrained(folder / name, **options)
        many = AutoModelForCausalLM.from_pretrained(folder / name, **options, distributed_config=plan)
        if variant.get("checkpointing"):
            many.train()
            many.gradient_checkpointing_enable()
        torch.manual_seed(1)
        ids, mask = torch.randint(1, 40, (3, 17)), torch.ones(3, 17, dtype=torch.long)
        mask[0, :5] = 0
        of_one, of_many = trained(one, ids, mask), trained(many, ids, mask)
        unequal = []
        for parameter_name, parameter in many.named_parameters():
            if not isinstance(parameter, DTensor):
                others = [torch.empty_like(parameter) for _ in range(distributed.get_world_size())]
                distributed.all_gather(others, parameter.detach())
                if not all(torch.equal(other, parameter) for other in others):
                    unequal.append(parameter_name)
        one.eval(), many.eval()
        continued = [model.generate(ids[1:2], max_new_tokens=6, do_sample=False).tolist() for model in (one, many)]
        many.save_pretrained(folder / f"{name}-saved")
        again = AutoModelForCausalLM.from_pretrained(folder / f"{name}-saved")
        findings[name] = {
            "losses": [of_one[0], of_many[0]],
            "gradients": largest_difference(of_many[1], of_one[1]),
            "weights": largest_difference(of_many[2], of_one[2]),
            "replicated": [n for n, p in many.named_parameters() if not isinstance(p, DTensor)],
            "unequal": unequal,
            "continued": continued,
            "saved": largest_difference(dict(again.named_parameters()), of_many[2]),
        }
    return findings


class Payloads(TorchDispatchMode):
    """Counts the bytes of the whole tensors that collectives of torch.distributed reduce, gather or scatter."""

    KINDS = {
        **dict.fromkeys(("allreduce", "all_reduce"), "all_reduce"),
        **dict.fromkeys(("allgather", "all_gather"), "all_gather"),
        "reduce_scatter": "reduce_scatter",
    }

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(self.KINDS.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor's own collectives come by as plain operations then
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        kind = next((self.KINDS[key] for key in self.KINDS if name.lstrip("_").startswith(key)), None)
        if "c10d" in namespace and kind is not None:
            given = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[kind] += max(t.nbytes for t in given)
            if name == "all_gather_into_tensor":  # functional: the result is not among the arguments
                self.bytes[kind] += result.nbytes - max(t.nbytes for t in given)
        return result


def counted(run: Callable[[], None], path: Path) -> None:
    """Writes what a training sends in its forward and backward passes, and the bytes of its weights and optimizer."""
    plain_step, plain_end, plain_init = Trainer.training_step, train.whole_model, DDP.__init__
    payloads = Payloads()
    found = {}

    def training_step(*args, **kwargs):
        with payloads:
            return plain_step(*args, **kwargs)

    def whole_model(trainer, make):
        def local(tensor):
            return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes

        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the head's weights were kept whole after the last evaluation
        found["weights"] = sum(local(parameter) for parameter in trainer.model.parameters())
        state = [t for each in trainer.optimizer.state.values() for t in each.values()]
        found["optimizer"] = sum(local(tensor) for tensor in state)
        return plain_end(trainer, make)

    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        self.register_comm_hook(None, allreduce_hook)  # the same messages, sent from Python, where they are seen

    Trainer.training_step, train.whole_model, DDP.__init__ = training_step, whole_model, init
    try:
        run()
    finally:
        Trainer.training_step, train.whole_model, DDP.__init__ = plain_step, plain_end, plain_init
    if distributed.get_rank() == 0:
        path.write_text(json.dumps({**found, **payloads.bytes}))


def main() -> None:
    Accelerator.end_training = lambda self: None  # it would end the process group, which the next step still needs
    for step in json.loads(Path(sys.argv[1]).read_text()):
        for name in [name for name in os.environ if name.startswith(PREFIXES)]:
            del os.environ[name]
        os.environ.update(step["environment"])
        if "train" in step:
            counted(lambda arguments=step["train"]: train.main(arguments), Path(step["count"]))
            continue
        path = Path(step["shard"])
        findings = sharded_and_whole(path.with_suffix(""), step["variants"])
        if distributed.get_rank() == 0:
            path.write_text(json.dumps(findings))
    if distributed.is_initialized():  # its threads would otherwise be running while the process ends
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
