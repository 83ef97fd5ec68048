"""Settings for all tests: one thread (the machine has few cores and Ray actors need them), no network, Ctrl-C heard."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what it runs in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one


def pytest_collection_modifyitems(items):
    num_gpus = torch.cuda.device_count()
    for item in items:
        if "multi_gpu" in item.keywords and num_gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA GPUs, {num_gpus} here"))
        elif "gpu" in item.keywords and num_gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, none here"))
