"""What several runs say: statistics, tables and plots."""
