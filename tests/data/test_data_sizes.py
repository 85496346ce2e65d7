"""What reading costs in memory follows the longest row, not the number of rows that a few bytes stand for."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ranks import PATIENCE
from treering.data.sources.columnar import read_parquet
from treering.data.sources.records import Record
from treering.data.work import _CHARACTERS, batches

CHILD = """
import resource, sys
from pathlib import Path
from treering.data.config import Data
from treering.data.examples import detect
from treering.data.sources import reading
from treering.data.work import batches
import itertools, pyarrow.parquet

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) >> 10

before = peak()
config = Data(train=sys.argv[1])
files = reading.open_sources(config.sources("train"), "train")
first = next(batches(itertools.islice(reading.read(files, config, "train"), 100), 100))
rows = sum(len(record.value["text"]) == 2_000_000 for record in reading.read(files, config, "train"))
print(detect(first, config), rows, peak() - before)
"""


@pytest.fixture
def small_file(tmp_path):
    """512 rows of two megabytes each, in less than a kilobyte."""
    path = tmp_path / "train.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 512, pa.int32()), pa.array(["a" * 2_000_000]))
    pq.write_table(pa.table({"text": text}), path, compression="zstd")
    assert path.stat().st_size < 2_000
    return path


def test_a_small_file_of_long_rows_is_read_a_few_rows_at_a_time(small_file):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small_file)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    format, rows, mebibytes = done.stdout.split()
    assert (format, rows) == ("text", "512") and int(mebibytes) < 200


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 700])
def test_rows_keep_their_numbers_across_batches(tmp_path, count):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(count)]}), path)
    rows = list(read_parquet(path, "train.parquet"))
    assert [number for number, _ in rows] == list(range(1, max(count, 1) + 1))
    assert [row["text"] for _, row in rows if isinstance(row, dict)] == [f"row {i}" for i in range(count)]


def test_a_batch_ends_with_the_record_that_is_too_long():
    records = (Record(file=0, row=i, where=f"f:{i}", value={"text": "x" * (_CHARACTERS // 2)}) for i in range(9))
    assert [len(batch) for batch in batches(records, 100)] == [3, 3, 3]
