"""The backend `cuda`: our own kernels, cuBLASLt and cuDNN."""
