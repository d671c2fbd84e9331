"""LoRi's open switches on the embedded example, one changed at a time: `python -m benchmarks.lori switches`.

Everything else is the table's LoRi: its rate (6e-3), 500 steps, the test split. For what the rationale sees the rate is the better of two by the validation
split at seed 0. The same and the two ablations are also run for 2000 steps at LoRi's rate there (3e-3). The most important come first: hours on one core, and
a study that is stopped has written what it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.lori_runs import RESULTS, kept, known, write
from red.lori.demo.experiment import MethodRun
from red.lori.demo.main import learning_rates, summary

SEES = {"all layers": {}, "without the embedding": {"rationale_layers": "1,2"}, "the embedding alone": {"rationale_layers": "0"}}
SHORT, LONG = 500, 2000
RATES, LONG_RATE = (3e-3, 6e-3), 3e-3
ABLATIONS = ("lori_no_anchor", "lori_no_second_order")
SWITCHES = {  # name -> the values beside the default
    "latent_steps": (1, 3, 8),
    "rank_channels": (4, 8, 64),
    "centred": (False,),
    "second_order_weight": (0.1, 10.0),
    "rationale_weight": (0.1, 10.0),
    "anchor_weight": (0.1, 10.0),
    "projection": (False,),
    "rank_layers": (1,),
    "normalize_layers": (False,),
    "anchor_distance": ("mse",),
    "energy": (0.8, 0.99),
}


def switches(results: Path = RESULTS) -> None:
    def make(run: MethodRun) -> dict:
        is_new = known(run, results) is None
        found = kept(run, results)
        if is_new:
            write(results, {"switches": study(lambda run: known(run, results))})
        return found

    write(results, {"switches": study(make)})


def study(outcome: Callable[[MethodRun], dict | None]) -> dict:
    """Every comparison, in the order of its worth; where `outcome` has none of a run, its row is of the other seeds, or missing."""
    def row(count: int, steps: int, rate: float, given: dict, method: str = "lori") -> dict | None:
        runs = [run for seed in range(count) if (run := outcome(MethodRun(method, rate, seed=seed, steps=steps, switches=given))) is not None]
        return {**{name: value for name, value in summary(runs).items() if name != "runs"}, "each": [run["accuracy"] for run in runs]} if runs else None

    def chosen(given: dict) -> dict | None:
        scores = {rate: found["validation_accuracy"] for rate in RATES if (found := outcome(MethodRun("lori", rate, steps=SHORT, switches=given)))}
        return row(3, SHORT, max(scores, key=scores.get), given) if len(scores) == len(RATES) else None

    rate = learning_rates()["lori"]
    found = {"sees": {name: chosen(given) for name, given in SEES.items()}}
    found["sees_longer"] = {name: row(2, LONG, LONG_RATE, given) for name, given in list(SEES.items())[:2]}
    found["ablations_longer"] = {method: row(2, LONG, LONG_RATE, {}, method) for method in ABLATIONS}
    found["default"] = row(2, SHORT, rate, {})
    found["others"] = [{"name": name, "value": value, **one} for name, values in SWITCHES.items() for value in values
                       if (one := row(2, SHORT, rate, {name: value}))]
    found["sees_longer"] |= {name: row(2, LONG, LONG_RATE, given) for name, given in list(SEES.items())[2:]}
    return found
