"""The GPU without engines: products by cuBLASLt, convolutions by cuDNN, and kernels of our own."""
