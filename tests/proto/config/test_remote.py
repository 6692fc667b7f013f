"""`data.remote`: ranges, and no secrets in a file that is copied into checkpoints."""

from __future__ import annotations

from typing import Any

import pytest

from stoker_proto.config.reader import config_from_tree
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.errors import ConfigError


def read(remote: dict[str, Any]) -> RemoteConfig:
    """Through the whole config, as the YAML is read."""
    data = {"dataset_type": "chat", "train_data_paths": ["s3://robots/chats"], "max_seq_len": 8, "remote": remote}
    trainer = {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-4}
    return config_from_tree({"model": {"base_model_path": "m"}, "data": data, "trainer": trainer}).data.remote


def test_harmless_options_are_taken() -> None:
    options = {"s3": {"endpoint_url": "https://objects.example.org:9000", "anon": True}, "gs": {"token": "anon"}}
    assert read({"cache_gb": 0.5, "storage_options": options}).storage_options == options


@pytest.mark.parametrize(
    "options",
    [
        {"s3": {"key": "AKIA"}},
        {"s3": {"secret": "x"}},
        {"s3": {"client_kwargs": {"aws_session_token": "x"}}},
        {"gs": {"token": "/home/me/key.json"}},
        {"az": {"connection_string": "x"}},
        {"az": {"sas_token": "x"}},
        {"https": {"headers": {"Authorization": "Bearer x"}}},
        {"https": {"headers": [{"cookie": "x"}]}},
        {"https": {"password": "x"}},
        {"s3": {"endpoint_url": "https://me:secret@objects.example.org"}},
    ],
)
def test_secrets_are_refused_and_not_shown(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.remote\.storage_options\..* may be a secret.*environment") as caught:
        read({"storage_options": options})
    assert "me:secret" not in str(caught.value)
    assert "Bearer" not in str(caught.value)


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ({"cache_gb": 0}, "data.remote.cache_gb is 0.0: it must be above 0"),
        ({"deadline_s": -1}, "data.remote.deadline_s is -1.0: it must be above 0"),
        ({"min_free_gb": -1}, "data.remote.min_free_gb is -1.0: it must not be negative"),
        ({"recheck_hours": -1}, "data.remote.recheck_hours is -1.0: it must not be negative"),
        ({"concurrency": 0}, "data.remote.concurrency is 0: 1 to 256 are possible"),
        ({"storage_options": {"endpoint_url": "x"}}, "data.remote.storage_options.endpoint_url is not a mapping"),
        ({"cache": 1}, "data.remote.cache: unknown key; did you mean data.remote.cache_gb?"),
    ],
)
def test_ranges(remote: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(remote)
    assert str(caught.value).startswith(said)
