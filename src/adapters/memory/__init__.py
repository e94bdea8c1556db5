"""The record in memory: for tests and benchmarks. Keeps the same contract."""
