"""The processors, threads and control groups of this process, and what a fork does to it."""
