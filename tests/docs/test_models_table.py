"""The table of the models guide is what `ernie models` counts."""

import re

from ernie45.models.released import RELEASES
from ernie45.recipes.models import STARTER, row


def expected(release):
    """One line of the guide."""
    data = row(release, cached=False)
    experts = data["experts"]
    shared = f" + {experts['shared']}" if experts and experts["shared"] else ""
    cells = (
        data["name"],
        data["layers"],
        data["width"],
        f"{experts['per_token']} of {experts['routed']}{shared}" if experts else "-",
        f"{data['parameters']:,}",
        f"{data['active']:,}",
        f"{data['bytes']['bf16'] / 1e9:.1f} GB",
        f"{data['kv_bytes_per_token']:,}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def test_the_guide_shows_what_is_counted(pages):
    [page] = [page for page in pages if page.path.name == "models.md" and page.path.parent.name == "guides"]
    shown = re.findall(r"^\| (?:ERNIE-|starter).*\|$", page.path.read_text("utf-8"), re.MULTILINE)
    assert shown == [expected(release) for release in (*RELEASES, STARTER)]
