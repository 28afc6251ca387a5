"""The record of a run: its keys are a file format, which tools and users read."""

import dataclasses
import json

from transformers import TrainingArguments

from command_line import Workplace

OWN_KEYS = """
    adafactor adjust_for_init apply_lora array_id as_published auto_demo binary_classification cache_dir cg_tolerance
    clip_frozen config_name custom_columns data_dir debug_mode decay_head_norm demo_filter demo_filter_model
    demo_filter_rate double_demo dry_run evaluate_during_training exclude_embeddings exclude_first_layers exclude_head
    f0_scaling few_shot_type fine_tuned_model first_sent_limit fix_layers flattened_targets fp16_backend fp16_opt_level
    from_linearhead gguf_file gpt3_in_context_head gpt3_in_context_num gpt3_in_context_tail group_by_length
    keeps_checkpoints kernel_dtype kernel_engine kernel_formula kernel_gamma kernel_influence kernel_lambda
    kernel_lora_rank kernel_lora_targets kernel_memory_gb kernel_parts kernel_per_layer kernel_regularization
    kernel_selection kernel_solver kernel_steps kernel_variance l2_loss linear_head_halved linear_head_order
    load_kernels logging_dir lora_alpha lora_r lstsq_method mapping mapping_id mapping_path max_seq_length model_family
    model_id model_name_or_path no_predict no_train num_demo num_k num_sample only_biases optimizer optimizer_variant
    other_sent_limit overwrite_cache overwrite_kernels overwrite_output_dir past_index plain_lbfgs projection_check
    projection_seed projection_tolerance projection_width prompt_id prompt_path published_settings random_model_init
    random_segment save_at_last save_logit save_logit_dir save_logit_pairs segments select_by sharded_ddp sweep tag
    task_defaults task_name template template_id template_path tokenizer_name top_n_template tpu_metrics_debug
    tpu_num_cores train_tile trainer truncate_demonstrations_only truncate_head use_full_length use_task_word
    warmup_ratio x_tile
"""
"""The settings but for those that transformers has too."""


def test_a_record_has_the_keys_that_it_has_always_had(place: Workplace) -> None:
    folder = place.run("--per_device_eval_batch_size", "3")
    of_transformers = {
        field.name for field in dataclasses.fields(TrainingArguments) if not field.name.endswith("_token")
    }
    record = json.loads((folder / "run_sst-2.json").read_text(encoding="utf-8"))
    found = {key for key in record if not key.startswith("sst-2_")}
    assert found == {*OWN_KEYS.split()} | of_transformers | {"time", "seconds", "versions"}
    assert (record["train_tile"], record["x_tile"]) == (None, 3)
    assert place.last_record() == record
