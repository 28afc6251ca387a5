"""Many runs: the log, grids, tables and ensembles."""
