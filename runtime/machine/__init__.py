"""What this process may use of the machine: processors, threads, control groups; and what it loses by a fork."""
