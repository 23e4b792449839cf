"""Each row of ``architectures``: quantized, verified, stopped, resumed, saved, loaded, exported."""

from __future__ import annotations

import pytest

from corequant.errors import CorequantError
from tests.models.architectures import PAGES, ROWS, exported, quantized, rendered

WORKING = [row for row in ROWS if not row.refused]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_tiny_model_of_each_kind_works_or_is_refused_with_the_reason(row, tmp_path):
    model = row.model()
    if row.refused:
        with pytest.raises(CorequantError, match=row.refused):
            quantized(model, tmp_path)
        return
    assert quantized(model, tmp_path) < 1e-10


@pytest.mark.parametrize("row", WORKING, ids=lambda row: row.label)
def test_a_tiny_model_of_each_kind_is_exported_or_refused_with_the_reason(row, tmp_path):
    model = row.model()
    if row.unexported:
        with pytest.raises(CorequantError, match=row.unexported):
            exported(model, tmp_path)
        return
    assert exported(model, tmp_path) < 0.01


def test_the_readmes_list_and_the_pages_table_are_made_of_the_rows():
    assert len(WORKING) >= 62
    assert len({row.label for row in ROWS}) == len(ROWS)
    for page, made in PAGES:
        text = page.read_text(encoding="utf-8")
        assert rendered(text, made()) == text
