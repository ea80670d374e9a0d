"""What `gpu_check` measures on a machine with a GPU, each part in a process of its own."""
