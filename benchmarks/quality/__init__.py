"""What benchmarks.continual and benchmarks.continual_text share: ways to learn, and runs that can be taken up again."""
