"""Actions -> codes -> token ids -> actions, as a sample takes this way through the loader, the model and the policy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor


def round_trip(actions: NDArray[np.float32], processor: Processor) -> NDArray[np.float32]:
    """float32[T, D]: the actions of an episode as a perfect model would give them back, chunk after chunk.

    The last chunk is filled with copies of the last action, which are cut off again. Raises ConfigError, DataError.
    """
    codec, vocabulary = processor.codec, processor.vocabulary
    if codec is None or vocabulary is None:
        raise ConfigError("the processor has no action codec: it was made for a training without actions")
    if actions.shape[1] != codec.dim:
        raise ConfigError(
            f"the demonstrations have {actions.shape[1]} numbers per action, and the codec {codec.dim}: it is of other data"
        )
    length, chunk = len(actions), codec.chunk
    rest = -length % chunk
    filled = np.concatenate([actions, np.repeat(actions[-1:], rest, axis=0)]) if rest else actions
    chunks = filled.reshape(-1, chunk, codec.dim)
    ids = [vocabulary.to_ids(np.asarray(codes)) for codes in codec.encode(chunks)]
    found = np.concatenate([processor.actions_from_ids(of_chunk) for of_chunk in ids])
    return found[:length]
