"""Complete programs around Stoker: training on its fleet without its trainer, and a trained policy on recorded frames.

In: a config, and running loaders. Out: a model in `--out`, with checkpoints from which the same command resumes. Read `options`
(their command line), then `plain_loop`, `hugging_face` (transformers' Trainer) and `trl_sft` (TRL's SFTTrainer).

`predictions` draws what a policy answers beside what was recorded: `make demo` ends with it.
"""
