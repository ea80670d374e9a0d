"""The GPU: device, arrays, streams, capture and our kernels."""
