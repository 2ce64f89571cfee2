"""
Trains as scripts/train.py does, writes down each row that is trained on, and does harm when it is told to.

    python -m tests.recorded_run RECORDS HARM train.py's arguments

RECORDS is the beginning of the files' names, one for each process; a line of them is a step and the ids of its rows.
HARM is `none`, or KIND:PROCESS:STEP, done once: `kill` and `terminate` the process, `interrupt` it twice at that step,
or make its loss `nan`. The harm is not done again in a run that is started anew with the same RECORDS.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from scripts.training.trainer import RecipeTrainer


def recorded(records: Path, harm: str):
    """A `training_step` that records, and a `compute_loss` that may be spoiled."""
    step_before, loss_before = RecipeTrainer.training_step, RecipeTrainer.compute_loss
    kind, process, step = harm.split(":") if harm != "none" else ("none", -1, -1)

    def due(trainer, *kinds: str) -> bool:
        place = (trainer.args.process_index, trainer.state.global_step)
        if kind not in kinds or place != (int(process), int(step)):
            return False
        done = records.with_name(records.name + ".harmed")
        if done.exists():
            return False
        done.touch()
        return True

    def training_step(self, model, inputs, num_items_in_batch=None):
        line = {"step": self.state.global_step, "input_ids": inputs["input_ids"].tolist()}
        line["predicted"] = [row[1:] for row in inputs["labels"].tolist()]
        with records.with_name(f"{records.name}.{self.args.process_index}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if due(self, "kill", "terminate", "interrupt"):
            number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[kind]
            for _ in range(2 if kind == "interrupt" else 1):
                os.kill(os.getpid(), number)
        return step_before(self, model, inputs, num_items_in_batch)

    def compute_loss(self, *arguments, **options):
        loss = loss_before(self, *arguments, **options)
        return loss * float("nan") if self.is_in_train and due(self, "nan") else loss

    return training_step, compute_loss


def read(records: Path, processes: int = 1) -> list[dict[int, dict]]:
    """By process: the last record of each step, so that of steps made twice the one that counts."""
    lines = [records.with_name(f"{records.name}.{rank}").read_text().splitlines() for rank in range(processes)]
    return [{record["step"]: record for record in map(json.loads, process)} for process in lines]


if __name__ == "__main__":
    RecipeTrainer.training_step, RecipeTrainer.compute_loss = recorded(Path(sys.argv[1]), sys.argv[2])
    del sys.argv[1:3]
    runpy.run_module("scripts.train", run_name="__main__", alter_sys=True)
