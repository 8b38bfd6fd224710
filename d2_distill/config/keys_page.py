"""Writes docs/keys.md: ``python -m d2_distill.config.keys_page > docs/keys.md``."""

from __future__ import annotations

from .keys import get_distill_cfg
from .rules import ABSENT, RULES, value_of


def page() -> str:
    """Return docs/keys.md."""
    defaults = get_distill_cfg()
    lines = [
        "# Config keys and their values", "",
        "These keys are checked before anything is written, with all problems in one message. Any other key has to have the type of its default, a value",
        "and finite numbers. `python -m d2_distill.config.keys_page` writes this page.", "",
        "| key | sets | must be | default |", "|---|---|---|---|",
    ]
    for rule in RULES:
        default = value_of(defaults, rule.key)
        shown = "" if default is ABSENT else f"`{default!r}`".replace("|", "\\|")
        lines.append(f"| `{rule.key}` | {rule.meaning} | {rule.wanted} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
