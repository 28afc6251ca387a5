"""The command lines: `lmntk` and its subcommands, which the scripts in tools/ and run.py call too."""
