"""Runs at an address, under outages of every kind: each ends bit for bit as one without, and loses nothing."""

import pytest

from exhaustive import outages


@pytest.mark.exhaustive
def test_runs_at_an_address_outlive_outages_of_every_kind():
    assert outages.disturb(runs=50, minutes=45, seed=0) == []
