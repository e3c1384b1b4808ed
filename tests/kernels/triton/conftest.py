"""Tests of GPU kernels. Those in kernels/ run them: on a GPU where there is one, else in Triton's interpreter, which must be
chosen before triton is imported: test_interpreted.py starts a process for that."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["kernels"]
