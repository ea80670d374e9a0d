"""The device side: memory, kernels, and a whole generation as one CUDA graph."""
