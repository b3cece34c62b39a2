"""Without a GPU the Triton kernels of the tests run in Triton's interpreter, chosen before they are decorated."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
