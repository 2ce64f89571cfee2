"""Starting several processes for a test, with the settings of configuration/accelerate/."""

import json
import os
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from tests.parallel_worker import PREFIXES


ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "configuration" / "accelerate"
IN_FLOAT32 = ("--mixed_precision", "no")


def environment(name: str, *arguments: str) -> dict[str, str]:
    """What `accelerate launch` hands on to the processes with a file of configuration/accelerate/ and more flags."""
    command = ["--config_file", str(SETTINGS / f"{name}.yaml"), "--main_process_port", "0", *arguments, "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    several = args.multi_gpu or args.use_fsdp
    everything = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
    return {key: value for key, value in everything.items() if key.startswith(PREFIXES)}


def work(plan: list[dict], folder: Path, processes: int) -> None:
    """`accelerate launch` of tests/parallel_worker.py on processors."""
    path = folder / f"plan-{processes}.json"
    path.write_text(json.dumps(plan))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(SETTINGS / "ddp.yaml"),
        *IN_FLOAT32,
    ]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "tests.parallel_worker", str(path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
