"""Speed, told side by side: cases, peers, the pytest-benchmark suite and the interleaved comparison."""
