"""docs/errors.md quotes messages that the code has, and the ones that can be provoked without a model say what the page says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.MULTILINE)


def templates() -> list[str]:
    """Every text of red, `…` where a value goes in."""
    found = []
    for path in (ROOT / "red").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                found.append(node.value)
    return found


def says(text: str, quoted: str) -> bool:
    """Are the quoted words in the text, in order? `…` may be a value, or words that depend on one."""
    place = 0
    for part in quoted.rstrip("…. ").split("…"):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_every_quoted_message_is_in_the_code():
    texts = templates()
    assert 15 <= len(QUOTED) <= 35 and len(set(QUOTED)) == len(QUOTED)
    lost = [quoted for quoted in QUOTED if not any(says(text, quoted) for text in texts)]
    assert not lost, f"docs/errors.md quotes what red no longer says: {lost}"


def test_the_check_finds_a_message_that_is_not_there():
    texts = templates()
    assert not any(says(text, "hidden_size=… is not a divisor of num_attention_heads=…") for text in texts)


@pytest.mark.parametrize("settings, quoted", [
    ({"hiden_size": 64}, "Unknown setting …"),
    ({"learning_rate": "fast"}, "…=… is …; expected …"),
    ({"deepspeed": None, "load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"}, "These settings do not go together: …"),
    ({"fsdp": "full_shard"}, "fsdp shards over processes, and there is one."),
])
def test_what_is_provoked_says_what_is_quoted(settings, quoted, tmp_path):
    from red.errors import REDError
    from red.settings import build_config

    assert quoted in QUOTED
    with pytest.raises(REDError) as raised:
        build_config({"output_dir": str(tmp_path), "hidden_size": 64, "report_to": "none", "use_cpu": True, **settings})
    assert says(str(raised.value), quoted)
