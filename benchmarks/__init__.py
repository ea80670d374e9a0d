"""FlexVAR benchmarks: latency, throughput and quality against the reference and the physical limit."""
