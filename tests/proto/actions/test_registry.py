import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from stoker_proto.actions import CODECS, codec_class, codec_from_json, fit_codec, load_codec, save_codec
from stoker_proto.errors import ConfigError, DataError


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_saved_codec_loads_as_the_same_one(name, tmp_path, smooth_actions, summary):
    statistics, sample = summary(smooth_actions(200, seed=1))
    codec = fit_codec(name, sample.reshape(100, 2, 7) if codec_class(name).fits_chunks else sample, statistics, chunk=2)
    save_codec(codec, tmp_path / "codec.json")
    loaded = load_codec(tmp_path / "codec.json")
    assert type(loaded) is codec_class(name)
    assert loaded.fingerprint == codec.fingerprint
    actions = sample[:10].reshape(5, 2, 7)
    for ours, theirs in zip(loaded.encode(actions), codec.encode(actions), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert loaded.num_clamped(actions) == codec.num_clamped(actions)
    assert [path.name for path in tmp_path.iterdir()] == ["codec.json"]


def test_writers_of_one_file_do_not_take_each_others_temporary_one(tmp_path, smooth_actions, summary):
    """They have one process id here, as they may have in containers that share a folder."""
    statistics, sample = summary(smooth_actions(200, seed=1))
    codec = fit_codec("bins", sample, statistics, chunk=1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: save_codec(codec, tmp_path / "codec.json"), range(100)))
    assert [path.name for path in tmp_path.iterdir()] == ["codec.json"]
    assert load_codec(tmp_path / "codec.json").fingerprint == codec.fingerprint


@pytest.mark.process
def test_codecs_are_imported_when_asked_for():
    program = "import sys, stoker_proto.actions; print('stoker_proto.actions.vq' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_and_options_that_do_not_exist(smooth_actions, summary):
    statistics, sample = summary(smooth_actions(50, seed=1))
    with pytest.raises(ConfigError, match="action codec 'fsq' is unknown; there are bins, fast, vq"):
        fit_codec("fsq", sample, statistics, chunk=1)
    for name in CODECS:
        with pytest.raises(ConfigError, match=f"action codec '{name}': got an unexpected keyword argument 'codes'"):
            fit_codec(name, sample, statistics, chunk=1, codes=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"version": 2, "name": "bins"}',
            "an action codec of version 2; this program reads version 1: run loader-prepare",
        ),
        ('{"name": "bins"}', "an action codec of version None"),
        ('{"version": 1, "name": "pickle"}', "an action codec named 'pickle'; there are bins, fast, vq"),
        ('{"version": 1, "name": "bins"}', "a damaged action codec 'bins'"),
        ('{"version": 1, "na', "not the JSON of an action codec"),
        ("[]", "not the JSON of an action codec"),
    ],
)
def test_a_wrong_file_is_refused_in_words_with_its_name(text, message, tmp_path):
    path = tmp_path / "codec.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_codec(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="run loader-prepare first"):
        load_codec(tmp_path / "none.json")


def test_another_version_is_refused_whoever_asks(smooth_actions, summary):
    statistics, sample = summary(smooth_actions(50, seed=1))
    document = json.loads(json.dumps(fit_codec("bins", sample, statistics, chunk=1).to_json()))
    with pytest.raises(DataError, match="version 99"):
        codec_from_json({**document, "version": 99})
