import numpy as np
import pytest

from stoker_proto.actions import codec_report, fit_codec
from stoker_proto.errors import DataError


def test_the_report_on_four_actions_worked_out_by_hand(summary):
    statistics, sample = summary([[-1.0, 3.0], [1.0, 3.0]])
    codec = fit_codec("bins", sample, statistics, chunk=1, num_bins=3)  # edges -1, 0, 1; centres -0.5, 0.5
    object.__setattr__(codec.statistics, "q01", np.array([-1.0, 3.0]))
    object.__setattr__(codec.statistics, "q99", np.array([1.0, 3.0]))
    report = codec_report(codec, np.array([[-1.0, 3.0], [0.25, 3.0], [0.5, 3.0], [-0.5, 3.0]]))
    assert (report.num_actions, report.tokens_per_action, report.num_codes) == (4, 2.0, 3)
    assert report.mean_abs_error == pytest.approx([0.1875, 0.0])
    assert report.max_abs_error == pytest.approx([0.5, 0.0])
    assert report.code_use == pytest.approx([2 / 3, 1 / 3])
    assert report.code_perplexity == pytest.approx([2.0, 1.0])
    assert report.format() == (
        "action codec bins: 2.00 tokens per action, 3 codes, chunk 1, measured on 4 actions\n"
        "tokens per chunk: 2.00 on average, 2 the most here, 2 the most possible; clamped: 0.0000% of the numbers\n"
        " dimension  mean abs error       rms error   max abs error\n"
        "         0        0.187500        0.279508        0.500000\n"
        "         1        0.000000        0.000000        0.000000\n"
        "       all        0.093750        0.197642        0.500000\n"
        "     token      codes used      perplexity\n"
        "         0           66.7%             2.0\n"
        "         1           33.3%             1.0"
    )


def test_actions_that_fill_no_whole_chunk_are_all_counted(smooth_actions, summary):
    statistics, sample = summary(smooth_actions(300, seed=2))
    single = fit_codec("vq", sample, statistics, chunk=1, levels=3)
    chunked = fit_codec("vq", sample, statistics, chunk=8, levels=3)
    actions = smooth_actions(21, seed=4)
    one, eight = codec_report(single, actions), codec_report(chunked, actions)
    assert eight.num_actions == 21
    assert eight.tokens_per_action == one.tokens_per_action == 3.0
    assert eight.mean_abs_error.tolist() == one.mean_abs_error.tolist()
    assert len(eight.code_use) == 3


def test_nothing_to_report_on(smooth_actions, summary):
    statistics, sample = summary(smooth_actions(50, seed=2))
    with pytest.raises(DataError, match="no actions to report on"):
        codec_report(fit_codec("bins", sample, statistics, chunk=1), sample[:0])
