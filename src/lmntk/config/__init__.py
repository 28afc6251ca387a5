"""Everything that is a flag: the arguments, their checks and their old spellings."""
