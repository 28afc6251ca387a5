"""From arguments to an experiment: task, tokenizer, model and data sets, and the record of the run."""
