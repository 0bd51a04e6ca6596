"""Statistics, tables and plots of runs, and benchmarks."""
