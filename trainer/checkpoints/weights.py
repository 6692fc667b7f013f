"""The trained weights out of a checkpoint's files, without ranks: DeepSpeed's own reader joins the parts of all ranks.

The files are pickled, as `trainer/main.py` reads them on a resume: read checkpoints of your own runs only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import zipfile
from pathlib import Path
from typing import Any

from stoker_proto.errors import DataError

log = logging.getLogger(__name__)

_TAG = "deepspeed"
"""Folder of a checkpoint in which DeepSpeed's files lie."""


def read_weights(folder: Path, *, adapters_only: bool, averages: bool = False) -> dict[str, Any]:
    """Name -> float32 tensor of what was trained, of a checkpoint's folder. Raises DataError for damaged files.

    adapters_only: the checkpoint of a run with `model.lora`. averages: those of `trainer.ema_decay` in place of the weights.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from trainer.engine.averages import readable_states

    for file in sorted((folder / _TAG).glob("*.pt")):
        if not zipfile.is_zipfile(file):  # torch.load would take other content for a format of its early days
            raise DataError("not a file of torch.save: it is damaged; take another checkpoint", file=str(file))
    said = io.StringIO()  # it reports on stdout, which belongs to the command's own output
    try:
        with readable_states(averages=averages), contextlib.redirect_stdout(said):
            found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag=_TAG, exclude_frozen_parameters=adapters_only
            )
    except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"its weights cannot be loaded: {reason}; take another checkpoint, or the run's export", file=str(folder)
        ) from error
    log.debug("%s", said.getvalue())
    return found
