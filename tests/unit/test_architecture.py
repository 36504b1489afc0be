"""The tables of docs/architecture.md name every file of the product once, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_name_every_file_once():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE)
    files = [
        p for room in ("model", "training", "tools") for p in (ROOT / room).rglob("*.py") if p.name != "__init__.py"
    ]
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in files)
