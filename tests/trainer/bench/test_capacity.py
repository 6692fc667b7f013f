"""The cost model of `loader-bench --plan`, by arithmetic with literals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.bench.capacity import Measured, Model, need, nic
from trainer.bench.capacity import fit as fit_lanes

BUSY_LOADERS = Measured(
    samples_per_s=3800, num_loaders=2, num_threads=4, loader_cpu_ms=1.0, client_cpu_ms=0.5, wire_bytes=20_000,
    wait_share=0.9, host_busy=0.3, loaders_here=False,
)  # fmt: skip


def fit(measured: Measured, rank_samples_per_s: float) -> Model:
    return fit_lanes(measured, rank_samples_per_s, lanes=32)


def test_loaders_whose_threads_were_busy_give_what_they_gave() -> None:
    model = fit(BUSY_LOADERS, 6000)
    assert (model.loader_limit, model.loader_samples_per_s, model.loader_threads) == ("cores", 1900, 2)
    assert model.samples_per_s(1, 1) == 1900
    assert model.samples_per_s(2, 1) == 3800
    assert model.samples_per_s(3, 1) == pytest.approx(1900 * 32 / 11)  # one of the three has 11 lanes of 32
    assert model.samples_per_s(8, 1) == 6000
    assert model.samples_per_s(8, 2) == 12_000


def test_idle_threads_and_waiting_ranks_mean_another_limit() -> None:
    model = fit(replace(BUSY_LOADERS, samples_per_s=400), 6000)
    assert (model.loader_limit, model.loader_samples_per_s) == ("pace", 200)


def test_ranks_that_did_not_wait_say_nothing_about_loaders() -> None:
    model = fit(replace(BUSY_LOADERS, samples_per_s=400, wait_share=0.1), 6000)
    assert (model.loader_limit, model.loader_samples_per_s) == ("estimate", 2000)


def test_a_full_host_that_both_share_is_no_limit_of_the_loaders() -> None:
    shared = replace(BUSY_LOADERS, samples_per_s=2000, host_busy=0.99)
    assert fit(replace(shared, loaders_here=True), 6000).loader_limit == "estimate"
    assert fit(shared, 6000).loader_limit == "pace"


def test_what_a_run_needs() -> None:
    needs = need(fit(BUSY_LOADERS, 6000), 64, 100, gpus_per_node=8, loader_memory_gb=2.0)
    assert needs.samples_per_s == 6400
    assert needs.loaders == 5  # 6400 / (0.8 x 1900) = 4.2; the busiest has 7 lanes of 32, which is 1400 of 1520
    assert needs.loader_cores == 8  # 6.4 CPU seconds in a second, at 80%
    assert needs.network_gbit == pytest.approx(1.0752)  # 6400 x 20,000 bytes x 8 x 1.05
    assert (needs.node_gbit, needs.node_nic_gbit) == (pytest.approx(0.1344), 1)
    assert (needs.loader_gbit, needs.loader_nic_gbit) == (pytest.approx(0.21504), 1)
    assert needs.client_cores_per_node == pytest.approx(0.4)
    assert needs.memory_gb == 10
    assert needs.binds == "the cores of the loaders"


def test_loaders_that_something_else_limits_need_all_their_cores() -> None:
    needs = need(fit(replace(BUSY_LOADERS, samples_per_s=400), 6000), 8, 100, gpus_per_node=8, loader_memory_gb=2.0)
    assert (needs.loaders, needs.loader_cores) == (6, 12)  # five of 200 would do, but one of five has 7 lanes of 32
    assert needs.binds.startswith("the pace of the loaders")


def test_a_rank_that_is_too_slow_binds_whatever_the_loaders() -> None:
    needs = need(fit(BUSY_LOADERS, 120), 8, 100, gpus_per_node=8, loader_memory_gb=2.0)
    assert needs.binds.startswith("the client: one rank takes 120 samples/s at most")


def test_more_loaders_than_lanes_do_not_help() -> None:
    model = fit(BUSY_LOADERS, 6000)
    assert model.samples_per_s(32, 100) == model.samples_per_s(99, 100) == 1900 * 32
    assert (model.loaders_for(48_000), model.loaders_for(49_000)) == (32, None)
    needs = need(model, 512, 100, gpus_per_node=8, loader_memory_gb=2.0)
    assert needs.loaders == 34
    assert needs.binds.startswith("the lanes: the stream has 32")


def test_network_cards() -> None:
    assert [nic(gbit) for gbit in (0.8, 0.81, 8.0, 8.1, 320, 321)] == [1, 10, 10, 25, 400, None]
    heavy = fit(replace(BUSY_LOADERS, wire_bytes=2e9), 6000)
    assert need(heavy, 8, 100, gpus_per_node=8, loader_memory_gb=2.0).binds.startswith("the network into a node")
