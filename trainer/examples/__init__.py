"""Complete programs that train on a Stoker fleet without Stoker's own trainer.

In: a config, and running loaders. Out: a model in `--out`, with checkpoints from which the same command resumes. Read `options`
(their command line), then `plain_loop`, `hugging_face` (transformers' Trainer) and `trl_sft` (TRL's SFTTrainer).
"""
