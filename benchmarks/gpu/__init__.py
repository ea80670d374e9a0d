"""The measurements of `gpu_check` on a machine with a GPU. Each phase runs in its own process."""
