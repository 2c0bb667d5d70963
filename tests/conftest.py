"""Shared by all tests."""

import torch

torch.set_num_threads(1)  # tiny models: threads cost more than they bring
