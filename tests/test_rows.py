"""A row and its split: what every source yields, whatever it was read from."""

import subprocess
import sys

from distil_jax.data.rows import Row, as_conversation, split_of, stable_fraction


def test_the_split_has_its_shares_and_depends_on_the_key_alone():
    shares = [split_of(str(i), validation=0.1, test=0.2) for i in range(4000)]
    assert abs(shares.count("test") / 4000 - 0.2) < 0.02 and abs(shares.count("validation") / 4000 - 0.1) < 0.02
    code = "from distil_jax.data.rows import stable_fraction; print(stable_fraction('x', 3))"
    other_process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(other_process.stdout) == stable_fraction("x", 3)


def test_what_a_source_says_of_a_row_goes_where_the_row_goes():
    plain = Row("1", "s", "train", "x", "other", "QA", "Q?", " A.")
    row = Row("1", "s", "train", "x", "other", "QA", "Q?", " A.", meta={"cluster": "c"})
    assert plain.meta == {} and as_conversation(row).meta == {"cluster": "c"}
    assert len({plain, Row("1", "s", "train", "x", "other", "QA", "Q?", " A.")}) == 1
