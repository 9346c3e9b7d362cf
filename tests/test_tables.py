"""The tables of the documents are those of the committed results."""

import re

import pytest

from benchmarks import tables

DOCUMENTS = sorted((tables.ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_the_tables_of_the_results(path):
    text = path.read_text()
    assert tables.render(text) == text, "run python -m benchmarks.tables"


def test_every_table_stands_in_a_document():
    named = {m[2] for path in DOCUMENTS for m in tables.MARKED.finditer(path.read_text())}
    assert named == set(tables.TABLES)
    assert not re.search(r"table: \w+ -->\s*<!-- end", "".join(p.read_text() for p in DOCUMENTS))
