"""Trained binary networks on a CPU, without PyTorch."""
