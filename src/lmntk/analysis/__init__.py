"""What stored kernels tell: statistics, saved runs, comparisons."""
