"""From arguments to an experiment: task, tokenizer, model, data sets and what describes them."""
