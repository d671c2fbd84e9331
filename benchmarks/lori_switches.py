"""LoRi's open switches on the embedded example, one changed at a time: `python -m benchmarks.lori switches`.

Everything else is the table's LoRi: its rate (6e-3), 500 steps, the test split. What the rationale sees, and the two ablations, are also run for 2000 steps;
for what the rationale sees the rate is chosen anew, by the validation split at seed 0. The most important come first, so that a study cut short says something.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.lori_runs import RESULTS, best_rate, kept, write
from red.lori.demo.experiment import MethodRun
from red.lori.demo.main import learning_rates, summary

SEES = {"all layers": {}, "without the embedding": {"rationale_layers": "1,2"}, "the embedding alone": {"rationale_layers": "0"}}
SHORT, LONG = 500, 2000
SHORT_RATES, LONG_RATES = (3e-3, 6e-3), (1e-3, 3e-3)
LONG_RATE = 3e-3  # LoRi's of `longer`
SWITCHES = {  # name -> the values beside the default
    "latent_steps": (1, 3, 8),
    "rank_channels": (4, 8, 64),
    "rank_layers": (1, 2),
    "centred": (False,),
    "projection": (False,),
    "anchor_distance": ("mse",),
    "normalize_layers": (False,),
    "second_order_weight": (0.1, 10.0),
    "rationale_weight": (0.1, 10.0),
    "anchor_weight": (0.1, 10.0),
    "energy": (0.8, 0.99),
}


def switches(results: Path = RESULTS) -> None:
    rate = learning_rates()["lori"]
    sees = {name: _seeds(results, 3, SHORT, best_rate("lori", SHORT_RATES, results, steps=SHORT, switches=given), given) for name, given in SEES.items()}
    longer = {name: _seeds(results, 2, LONG, best_rate("lori", LONG_RATES, results, steps=LONG, switches=given), given) for name, given in SEES.items()}
    ablations = {method: _seeds(results, 2, LONG, LONG_RATE, {}, method) for method in ("lori_no_anchor", "lori_no_second_order")}
    others = [{"name": name, "value": value, **_seeds(results, 2, SHORT, rate, {name: value})} for name, values in SWITCHES.items() for value in values]
    default = _seeds(results, 2, SHORT, rate, {})
    write(results, {"switches": {"sees": sees, "sees_longer": longer, "ablations_longer": ablations, "others": others, "default": default,
                                 "steps": [SHORT, LONG], "rates": [SHORT_RATES, LONG_RATES]}})


def _seeds(results: Path, seeds: int, steps: int, rate: float, given: dict, method: str = "lori") -> dict:
    """Means over the seeds, as `summary` has them, without the runs themselves, which are in the file of runs."""
    found = summary([kept(MethodRun(method, rate, seed=seed, steps=steps, switches=given), results) for seed in range(seeds)])
    return {**{name: value for name, value in found.items() if name != "runs"}, "each": [run["accuracy"] for run in found["runs"]]}
