"""Settles what must be so before triton and CUDA start: kernels are interpreted where no GPU can run them."""

import os

import torch

# What cuBLAS needs to be deterministic, which tests of operators ask for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
