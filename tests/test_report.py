"""The report, the table and the figures say what the numbers say, whoever wins, and load nothing."""

import copy
import json
import re

import pytest

from red.demo import summary
from red.demo.report import render, write_report
from red.demo.study_plot import write_starts_figure
from red.report import provenance


def outcome(curve, eranks, rate=0.004):
    history = []
    for step, score in enumerate(curve):
        entry = {"tokens": 20_000 * step, "step": 15 * step, "exact_match": score,
                 "exact_match_by_steps": {"2": min(1.0, 1.1 * score), "8": 0.9 * score},
                 "easy_accuracy": 0.41 if step else 0.1, "easy_perplexity": 5.7, "seconds": 6.0 * step}
        if step in (0, 2, len(curve) - 1):
            entry["erank"] = eranks[(0, 2, len(curve) - 1).index(step)]
        history.append(entry)
    final = {key: history[-1][key] for key in ("exact_match", "exact_match_by_steps", "easy_accuracy", "easy_perplexity", "erank")}
    return {"learning_rate": rate, "history": history, "final": final}


@pytest.fixture()
def results():
    return {
        "seconds": 173.6,
        "teacher": {"exact_match": 0.9775, "easy_accuracy": 0.4153, "easy_perplexity": 5.59, "erank": [13.4, 8.1, 19.5]},
        "starts": {
            "random": outcome([0, 0, 0, 0, 0.0125], [[12.0, 15.0, 18.0], [7.0, None, 1.7], [9.0, 4.0, 6.0]]),
            "activation": outcome([0, 0.1, 0.5, 0.9, 0.9625], [[12.5, 7.3, 14.8], [12.8, 8.4, 17.3], [13.1, 8.7, 18.2]]),
            "pca": outcome([0.2, 0.6, 0.9, 0.95, 0.9875], [[11.8, 6.8, 14.6], [12.6, 7.9, 17.4], [12.7, 7.4, 16.5]]),
        },
        "versions": {"python": "3.11.0", "torch": "2.13.0"}, "commit": "unknown",
    }


@pytest.fixture()
def details():
    answer = "e 4 + 7 = s 1 ;"
    return {
        "settings": {"steps": 60, "seed": 0, "options": {}}, "device": "cpu: made up",
        "teacher": {"hidden_size": 128, "exact_match_by_steps": {"2": 1.0, "8": 0.9}},
        "train_seconds": {"random": 61.0, "activation": 62.0, "pca": 63.0},
        "problem": {"question": "e = 4 ; e + 7 = s ; ? s :", "answer": answer,
                    "said": {"teacher": answer, "random": "e 4 + 7 = <k> 9 ;", "activation": answer, "pca": answer}},
        "best_other": {"start": "pca", "rule": "by a rule"},
        "tokens_to_90": {"activation": {"mean": 81_000.0, "std": 9_000.0, "per_seed": [72_000, 81_000, 90_000], "budget": 204_000},
                         "random": {"mean": None, "std": None, "per_seed": [None, 700_000, None], "budget": 810_000}},
    }


def test_page_loads_nothing_and_is_whole(results, details, tmp_path):
    write_report(results, tmp_path / "report.html", details)
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)|\bsrc=", page)
    assert page.count("<svg") == page.count("</svg>") == 4
    assert "$" not in page  # no placeholder was left
    assert "prefers-color-scheme: dark" in page and "#010203" not in page  # every stand-in colour became a variable
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", page))
    assert used <= set(re.findall(r"--([a-z0-9]+):", page))
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # figures do not cut each other's lines


def test_page_renders_the_numbers(results, details):
    page = render(results, details)
    for text in ("97.8 %", "96.2 %", "1.2 %", "81k (72k–90k)", "&gt; 810k (1 of 3 seeds sooner)", "5.59", "62", "made up", "by a rule", "0.004", "2.13.0"):
        assert text in page, text
    assert "<mark>&lt;k&gt;</mark>" in page  # what a model says is escaped, and marked where it is wrong
    assert page.count('class="right"') == 3 and page.count('class="wrong"') == 1


@pytest.mark.parametrize("path", [("teacher", "exact_match"), ("teacher", "erank", 1), ("starts", "pca", "final", "exact_match"),
                                  ("starts", "pca", "final", "exact_match_by_steps", "8"), ("starts", "random", "final", "easy_accuracy"),
                                  ("starts", "random", "history", 1, "exact_match"), ("starts", "random", "history", 0, "erank", 0),
                                  ("starts", "activation", "learning_rate"), ("seconds",), ("commit",)])
def test_another_number_makes_another_page(results, details, path):
    changed = copy.deepcopy(results)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "abc" if path == ("commit",) else (place[path[-1]] or 0) * 0.7 + 0.05
    assert render(changed, details) != render(results, details)


def test_results_alone_make_a_page(results):
    page = render(results, {})
    assert "not measured" in page and "96.2 %" in page


def test_words_follow_the_numbers(results, details):
    won = summary.sentences(results, details)
    assert "RED is 95 points ahead of LRC" in won[0] and "cannot do the chains" in won[0]
    assert "RED kept 98 %" in summary.headline(results, details) and "LRC has lost it" in summary.headline(results, details)
    assert "the collapse" in " ".join(won) and "RED and LRC are within 0.0 points of each other" in " ".join(won)
    assert "shows no difference from RED beyond 3.4 points" in " ".join(won)

    lost = copy.deepcopy(results)
    lost["starts"]["activation"], lost["starts"]["random"] = lost["starts"]["random"], lost["starts"]["activation"]
    said = " ".join(summary.sentences(lost, details))
    assert "RED lost" in said and "RED is 95 points ahead" not in said and "no collapse" in said
    assert "RED lost here" in summary.headline(lost, details)

    level = copy.deepcopy(results)
    level["starts"]["random"] = copy.deepcopy(level["starts"]["activation"])
    said = " ".join(summary.sentences(level, details))
    assert "no difference beyond the 4.0 points" in said and "ahead" not in said and "the collapse" not in said
    assert summary.headline(level, details) == "No difference beyond 4.0 points between the reasoning of RED and LRC in this run"

    level["starts"]["random"]["final"]["easy_accuracy"] = 0.2
    assert "RED is 21 points better there" in " ".join(summary.sentences(level, details))


def test_a_difference_needs_more_than_the_error_of_its_problems(results, details):
    assert summary.margin(0.5, 0.5, 400) == pytest.approx(2 * (0.5 / 400) ** 0.5, rel=0.01)  # 7 points near one half
    assert 0.003 < summary.margin(1.0, 1.0, 400) < 0.01 < summary.margin(1.0, 0.97, 400) < 0.025  # less near one, and never 0
    assert summary.margin(0.5, 0.5, 100) > 1.9 * summary.margin(0.5, 0.5, 400)
    details["settings"]["final_problems"] = 5000
    final = results["starts"]["pca"]["final"], results["starts"]["activation"]["final"]
    assert final[0]["exact_match"] - final[1]["exact_match"] == pytest.approx(0.025)
    assert "pca, is 2.5 points better than RED" in " ".join(summary.sentences(results, details))  # 10,000 problems each


def test_conditions_say_what_is_ours(results, details):
    said = " ".join(summary.conditions(details))
    assert "but for one clause: the two output taps" in said and "LRC's start under our objective; the published objective is a row of the study." in said
    assert said.count("mean square there is ours.") == 1 and "that one common grid gave it" in said  # no figure that the study has not
    details["tokens_to_90"] |= {"activation, plain taps": {"mean": None, "std": None, "per_seed": [None], "budget": 612_000},
                                "random, public LRC objective": {"mean": None, "std": None, "per_seed": [None], "budget": 613_000}}
    said = " ".join(summary.conditions(details))
    assert "took 81k (72k–90k) tokens to 90 % of the teacher with it, > 612k without" in said and "and took > 613k tokens" in said
    assert "&gt; 612k without" in render(results, details)
    details["settings"]["options"] = {"lrc_faithful": True}
    said = " ".join(summary.conditions({**details, "given_rates": {"random": 1e-3}}))
    assert "is ours" not in said and '{"lrc_faithful": true}' in said and "given by hand: LRC (random) 0.001" in said


def test_table_is_aligned_and_complete(results, details):
    lines = summary.table(results, details).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert [line.split()[0] for line in lines[2:-1]] == ["teacher", "LRC", "RED", "pca"]
    assert "96.2 %" in lines[4] and "81k (72k–90k)" in lines[4] and lines[5].endswith("not measured")
    assert "not of this run" in lines[-1]


def test_strict_json(tmp_path):
    provenance.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5, (float("inf"), 2)], 3: {"b": -float("inf")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5, [None, 2]], "3": {"b": None}}


def test_readme_picture(results, tmp_path):
    def entry(outcome, mean):
        horizon = {"learning_rate": 0.004, "exact_match": {"mean": outcome["final"]["exact_match"]}, "seeds": {"0": outcome, "1": outcome}}
        return {"horizons": {"150": horizon}, "tokens_to_90": {"mean": mean, "per_seed": [mean, mean], "budget": 204_000}}

    study = {"teacher": results["teacher"], "rows": {name: entry(results["starts"][name], mean)
             for name, mean in {"random": None, "activation": 81_000.0, "pca": 40_000.0}.items()}}
    light, dark = (path.read_text() for path in write_starts_figure(study, tmp_path / "starts.svg"))
    for picture in (light, dark):
        assert "81k" in picture and "&gt; 204k" in picture and "var(" not in picture and "LRC (random)" in picture
    assert light != dark
    study["rows"]["activation"]["tokens_to_90"]["mean"] = 60_000.0
    assert "60k" in write_starts_figure(study, tmp_path / "again.svg")[0].read_text()
