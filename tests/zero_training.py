"""Run by tests/unit/converters/test_zero.py, once a rank: trains a few steps with DeepSpeed, and saves.

    python zero_training.py RANK WORLD PORT JOBS.json

Each job: the model's folder, where to save, and DeepSpeed's settings. Rank 0 adds `oracle.safetensors`, what
DeepSpeed itself makes of the checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

RANK, WORLD, PORT = sys.argv[1:4]
os.environ |= {"RANK": RANK, "LOCAL_RANK": RANK, "WORLD_SIZE": WORLD, "LOCAL_SIZE": WORLD, "DS_ACCELERATOR": "cpu"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def run(job: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not (job["frozen"] and job["frozen"] in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        # Compiling the fused Adam takes minutes.
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        **job["config"],
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    generator = torch.Generator().manual_seed(int(RANK))
    for _step in range(2):
        tokens = torch.randint(3, 320, (1, 16), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(job["out"])
    torch.distributed.barrier()
    if RANK == "0":
        found = get_fp32_state_dict_from_zero_checkpoint(job["out"])
        values = {name: value.float().clone() for name, value in found.items()}
        save_file(values, Path(job["out"]) / "oracle.safetensors")
    torch.distributed.barrier()


# Compiling the shared memory transport takes minutes as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
for item in json.loads(Path(sys.argv[4]).read_text(encoding="utf-8")):
    run(item)
# Its threads outlive the process group now and then, and the interpreter's end with it.
sys.stdout.flush()
os._exit(0)
