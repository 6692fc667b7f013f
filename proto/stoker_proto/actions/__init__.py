"""Actions and token ids: statistics, codecs (`vq`, `bins`, `fast`), the ids of their codes, a report on a codec."""

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
