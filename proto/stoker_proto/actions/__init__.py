"""Actions <-> token ids.

In: float32 actions in the units of the dataset. Out: statistics, a fitted codec, its codes, and their token ids; and back.
Read `statistics` and `chunk_sample` (what a codec is fitted to), `base` (what every codec offers), `registry` (codecs by name and
their files), then the codecs: `bins`; `vq` with `space`, `kmeans`, `codebook` and `lattice`; `fast` with `cosine` and
`byte_pairs`. `vocabulary` maps codes to token ids, `report` measures a codec.
"""

from stoker_proto.actions.base import ActionCodec
from stoker_proto.actions.chunk_sample import ChunkSample
from stoker_proto.actions.registry import CODECS, codec_class, codec_from_json, fit_codec, load_codec, save_codec
from stoker_proto.actions.report import CodecReport, codec_report
from stoker_proto.actions.statistics import ActionStatistics, StatisticsAccumulator
from stoker_proto.actions.vocabulary import ActionVocabulary

__all__ = [
    "CODECS",
    "ActionCodec",
    "ActionStatistics",
    "ActionVocabulary",
    "ChunkSample",
    "CodecReport",
    "StatisticsAccumulator",
    "codec_class",
    "codec_from_json",
    "codec_report",
    "fit_codec",
    "load_codec",
    "save_codec",
]
