"""Lines of text files: byte order marks, and other encodings."""

from pathlib import Path

import pytest

from hf_maskformer.data.problems import DatasetError
from hf_maskformer.data.text_files import read_lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lines(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Straße\r\nb\n", encoding=encoding)
    assert read_lines(tmp_path / "a.txt") == ["Straße", "b"]


def test_another_encoding_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0 0.5", encoding="utf-16")
    with pytest.raises(DatasetError, match=r"a\.txt: is no UTF-8 text") as error:
        read_lines(tmp_path / "a.txt", "broken_record")
    assert (error.value.problem.kind, error.value.problem.file) == ("broken_record", str(tmp_path / "a.txt"))
