"""The tables of docs/lori.md and its picture, from benchmarks/results/lori.json: `python -m benchmarks.lori_documents` writes them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.documents import between_markers, table
from red.lori.config import PRESETS, LoRiConfig
from red.lori.demo import spectrum

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "lori.md", ROOT / "benchmarks" / "results" / "lori.json"
PICTURES = (ROOT / "docs" / "lori-spectrum.svg", ROOT / "docs" / "lori-spectrum-dark.svg")
LABELS = {"explicit_cot": "explicit CoT: the teacher itself", "no_cot": "no CoT", "coconut": "COCONUT", "codi": "CODI against the offline teacher", "codi_joint": "CODI, joint",
          "lori": "LoRi", "lori_no_anchor": "LoRi without the anchor", "lori_no_second_order": "LoRi without the second order"}
NOTHING = "Not measured: `python -m benchmarks.lori switches`."


def methods(found: dict) -> str:
    rows = [(LABELS[name], solved(one), hops(one), f"{one['tokens']:.1f}", one["latent_steps"], f"{one['latency_ms']:.0f}", one["learning_rate"] or "–")
            for name, one in found["methods"].items()]
    return table(("method", "solved, % (spread)", "by hops 1 … 5, %", "words said", "latent steps", "ms an answer", "learning rate"), rows)


def longer(found: dict) -> str:
    every = found["longer"]["methods"] | {name: one for name, one in found.get("switches", {}).get("ablations_longer", {}).items() if one}
    rows = [(LABELS[name], solved(one), each(one), hops(one), one["learning_rate"]) for name, one in every.items()]
    return table((f"method, {found['longer']['steps']} steps", "solved, % (spread)", "each seed", "by hops 1 … 5, %", "learning rate"), rows)


def sees(found: dict) -> str:
    """What the rationale sees: the table that says where LoRi's gain comes from."""
    switches = found.get("switches", {})
    rows = [(name, steps, solved(one), each(one), hops(one), one["learning_rate"]) for part, steps in (("sees", 500), ("sees_longer", 2000))
            for name, one in switches.get(part, {}).items() if one]
    return table(("the rationale sees", "steps", "solved, % (spread)", "each seed", "by hops 1 … 5, %", "learning rate"), rows) if rows else NOTHING


def switches(found: dict) -> str:
    """Each switch at values beside its default."""
    study = found.get("switches", {})
    if not study.get("default"):
        return NOTHING
    rows = [("all at their defaults", "", "", solved(study["default"]), each(study["default"]), hops(study["default"]))]
    rows += [(f"`{one['name']}`", shown(one["value"]), default(one["name"]), solved(one), each(one), hops(one)) for one in study["others"]]
    return table(("switch", "value", "default", "solved, % (spread)", "each seed", "by hops 1 … 5, %"), rows)


def corners(found: dict) -> str:
    rows = [(name, f"{100 * one['accuracy']:.1f}", hops(one), f"{one['parameters']:,}".replace(",", " "), f"{one['tokens']:.1f}", one["latent_steps"], f"{one['latency_ms']:.0f}")
            for name, one in found["corners"].items() if isinstance(one, dict)]
    return table(("", "solved, %", "by hops 1 … 5, %", "parameters", "words said", "latent steps", "ms an answer"), rows)


def default(name: str) -> str:
    """Of LoRi; a rank that is not given follows from the energy, and is 20 channels and 3 layers here."""
    if name in ("rank_channels", "rank_layers"):
        return "by `energy`"
    value = PRESETS["lori"].get(name)
    return shown(LoRiConfig.__dataclass_fields__[name].default if value is None else value)


def shown(value) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def solved(one: dict) -> str:
    """Mean and, of several seeds, the largest less the smallest."""
    return f"{100 * one['accuracy']:.1f}" + (f" ({100 * one['spread']:.1f})" if len(one["seeds"]) > 1 else "")


def each(one: dict) -> str:
    return " ".join(f"{100 * score:.1f}" for score in one.get("each") or [run["accuracy"] for run in one["runs"]])


def hops(one: dict) -> str:
    return " ".join(f"{100 * share:.0f}" for share in one["accuracy_by_steps"].values())


def filled(page: str, found: dict) -> str:
    """`page` with every table between its markers."""
    return between_markers(page, {part.__name__: part(found) for part in (methods, longer, sees, switches, corners)})


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for dark, picture in enumerate(PICTURES):
        spectrum.plot(results["low_rank"], picture, dark=bool(dark))
