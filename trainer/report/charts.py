"""What TensorBoard shows first (tab "Custom Scalars"), and the hyper-parameters by which runs are compared (tab "HParams")."""

from __future__ import annotations

from stoker_proto.config import Config

CHARTS = {
    "Does it learn?": {
        "loss": ["Multiline", ["train/loss"]],
        "perplexity": ["Multiline", ["train/perplexity", "val/perplexity", "val/action_perplexity"]],
        "accuracy": ["Multiline", ["train/accuracy", "val/accuracy"]],
    },
    "Does it act?": {
        "success in the simulator": ["Multiline", ["val/success_once.*", "val/success_at_end.*"]],
        "error of actions": [
            "Multiline",
            ["val/action_mae/mean", "val/action_mae_free/mean", "val/action_mae_constant/mean"],
        ],
        "reward": ["Multiline", ["val/reward.*"]],
    },
    "Does it wait?": {
        "share of the time that waits for data": [
            "Multiline",
            ["train/interval_data_wait_frac", "train/data_wait_frac"],
        ],
        "batches that are ready": ["Multiline", ["train/queue_depth"]],
        "tokens/s": ["Multiline", ["train/tokens_per_s"]],
        "samples/s": ["Multiline", ["train/samples_per_s"]],
    },
    "Is it healthy?": {
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "bad samples, skipped steps": ["Multiline", ["train/bad_samples", "train/skipped_steps"]],
    },
}
"""Group -> chart -> kind and figures (regular expressions), in the order in which they matter."""
RESULTS = ("train/loss", "val/perplexity", "val/action_mae/mean", "val/success_once", "val/success_at_end")
"""Figures by which runs are compared."""


def hyper_parameters(config: Config) -> dict[str, str | float | bool]:
    """Name as in the config -> value, of what users vary most."""
    data, model, trainer = config.data, config.model, config.trainer
    found = {
        "model.base_model_path": model.base_model_path,
        "model.lora": model.lora is not None,
        "data.dataset_type": data.dataset_type or "mixture",
        "data.max_seq_len": data.max_seq_len,
        "data.packing": data.packing,
        "data.action.codec": data.action.codec,
        "data.action.chunk": data.action.chunk,
        "trainer.lr": trainer.lr,
        "trainer.lr_schedule": trainer.lr_schedule,
        "trainer.global_batch_size": trainer.global_batch_size,
        "trainer.micro_batch_size": trainer.micro_batch_size,
        "trainer.epochs": trainer.epochs,
        "trainer.weight_decay": trainer.weight_decay,
        "trainer.zero_stage": trainer.zero_stage,
        "model.precision": model.precision,
        "trainer.loss.type": trainer.loss.type,
        "trainer.seed": trainer.seed,
    }
    return {name: value if isinstance(value, str | float | bool | int) else str(value) for name, value in found.items()}
