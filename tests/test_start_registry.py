"""The registry of starts: names, needs, and that a new start is one new file."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from reference_lrc import random_batch

from red import starts
from red.calibration import calibrate_batches
from red.errors import REDError
from red.training.projections import Projections
from red.starts import base
from red.starts.base import StartContext, selection
from red.student import build_student

NARROW = 16


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(REDError, match="start='activaton' is unknown.*random_selection.*Did you mean 'activation'"):
        starts.get("activaton")


def test_missing_or_foreign_calibration_is_refused(tiny_teacher):
    teacher, batches = tiny_teacher(), [random_batch()]
    with pytest.raises(REDError, match="'activation' needs a calibration"):
        starts.get("activation")(StartContext(teacher, NARROW))
    with pytest.raises(REDError, match="'pca' needs a calibration with covariance.*covariance=True"):
        starts.get("pca")(StartContext(teacher, NARROW, calibrate_batches(teacher, batches)))
    with pytest.raises(REDError, match="'explained' needs a calibration with point_covariance.*point_covariance=True"):
        starts.get("explained")(StartContext(teacher, NARROW, calibrate_batches(teacher, batches, covariance=True)))
    with pytest.raises(REDError, match="'fitted' fits to the calibration text itself. Pass it: batches="):
        starts.get("fitted")(StartContext(teacher, NARROW, calibrate_batches(teacher, batches, point_covariance=True)))
    with pytest.raises(REDError, match="has 48 channels, the teacher 32"):
        starts.get("activation")(StartContext(teacher, NARROW, calibrate_batches(tiny_teacher(hidden_size=48), batches)))


def test_only_fitted_is_fitted_unless_it_is_said():
    fits = {name: starts.get(name).fit for name in starts.names()}
    assert fits.pop("fitted") == "full" and set(fits.values()) == {"none"}


def test_a_new_start_is_one_file(tiny_teacher, tmp_path, monkeypatch):
    """The package's own code, run over a folder with one new file in it, finds and registers that file's start; nothing else changes."""
    (tmp_path / "weakest.py").write_text(
        "from red.starts.base import register, selection\n\n"
        "@register('weakest', needs=('scores',))\ndef weakest(context):\n"
        "    return selection(context, (-context.calibration.scores).topk(context.hidden_size).indices)\n")
    monkeypatch.setattr(base, "_registry", {})
    spec = importlib.util.spec_from_file_location("_starts_of_a_test", starts.__file__, submodule_search_locations=[str(tmp_path)])
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, package)
    spec.loader.exec_module(package)
    monkeypatch.delitem(sys.modules, f"{spec.name}.weakest")
    assert starts.names() == ("weakest",)

    teacher = tiny_teacher()
    calibration = calibrate_batches(teacher, [random_batch()])
    start = starts.get("weakest")(StartContext(teacher, NARROW, calibration))
    projections = Projections(teacher, build_student(teacher, NARROW), start)
    assert projections.channels.tolist() == calibration.scores.argsort()[:NARROW].sort().values.tolist()


def test_registering_wrongly_is_refused():
    with pytest.raises(ValueError, match="registered twice"):
        base.register("activation")(lambda context: None)
    with pytest.raises(ValueError, match="needs=\\('spectrum',\\)"):
        base.register("other", needs=("spectrum",))
    assert "other" not in starts.names()


def test_an_incomplete_start_is_refused(tiny_teacher):
    teacher = tiny_teacher()
    start = selection(StartContext(teacher, NARROW), torch.arange(NARROW))
    del start.maps["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(REDError, match="no map for .*model.layers.1.mlp.up_proj.weight"):
        Projections(teacher, build_student(teacher, NARROW), start)
