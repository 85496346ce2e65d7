"""Reasons why a test does not run with every version."""

import pytest

from treering.techniques.shard.units import SHARDS_CODES

sharded_codes = pytest.mark.skipif(not SHARDS_CODES, reason="torch before 2.12 cannot shard codes")
