"""What Trainer would refuse after a start was fitted is refused before the teacher is read, by one message."""

import huggingface_hub
import pytest

from red import REDConfig, REDError
from red.cli import main
from red.lori.config import LoRiConfig
from red.training.rehearsal import rehearse


def settings(kind=REDConfig, **given):
    return kind(output_dir="nowhere", use_cpu=True, **{"report_to": "none", **given})


@pytest.mark.parametrize("kind", [REDConfig, LoRiConfig])
@pytest.mark.parametrize("given, message", [
    (dict(report_to="nonsense"), "report_to=nonsense: nonsense is not supported"),
    (dict(optim="adamw_bnb_8bit"), r"optim='adamw_bnb_8bit': .*bitsandbytes"),
    (dict(adam_beta1=1.5), r"optim=.*Invalid beta parameter at index 0: 1.5"),
    (dict(learning_rate=-1.0), r"optim=.*learning_rate=-1"),
    (dict(lr_scheduler_type="cosine_with_min_lr"), r"lr_scheduler_type='cosine_with_min_lr': .*Set lr_scheduler_kwargs"),
    (dict(seed=-1), r"seed=-1: expected a number from 0"),
    (dict(eval_strategy="steps", eval_steps=5), r"eval_strategy='steps' needs held-out text"),
])
def test_each_is_named_with_a_remedy(kind, given, message):
    with pytest.raises(REDError, match=message):
        rehearse(settings(kind, **given), held_out=False)


def test_what_is_well_passes():
    for given in (dict(), dict(optim="sgd"), dict(optim="lomo"), dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6}),
                  dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 1})):
        try:
            rehearse(settings(**given), held_out=False)
        except REDError as error:
            assert given.get("optim") == "lomo" and "lomo" in str(error)  # a package that is not installed here
    rehearse(settings(eval_strategy="steps", eval_steps=5), held_out=True)
    rehearse(settings(eval_strategy="steps", eval_steps=5))  # not known yet


def test_the_best_checkpoint_is_chosen_by_what_is_measured():
    wanted = settings(eval_strategy="steps", eval_steps=5, save_steps=5, load_best_model_at_end=True, metric_for_best_model="accuracy")
    with pytest.raises(REDError, match="metric_for_best_model='accuracy' is not measured here"):
        rehearse(wanted, held_out=True)
    rehearse(wanted, held_out=True, own_metrics=True)


def test_the_hub_is_asked_first(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "someone"})
    rehearse(settings(push_to_hub=True))

    def unknown(self):
        raise RuntimeError("Invalid user token.\nmore")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", unknown)
    with pytest.raises(REDError, match=r"the hub does not know you: Invalid user token. Log in with hf auth login"):
        rehearse(settings(push_to_hub=True))


def test_red_distill_says_so_before_it_reads_a_weight(tiny_teacher, tiny_tokenizer, tmp_path, capsys):
    shape = tmp_path / "shape"  # a config and a tokenizer, and no weights
    tiny_teacher().config.save_pretrained(shape)
    tiny_tokenizer.save_pretrained(shape)
    (tmp_path / "text.txt").write_text("w5 w6 w7\n" * 50)
    run = ["distill", "--teacher_model_name_or_path", str(shape), "--train_file", str(tmp_path / "text.txt"), "--hidden_size", "16", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert main([*run, "--report_to", "nonsense"]) == 2 and "report_to=nonsense" in capsys.readouterr().err
    assert main([*run, "--report_to", "none", "--eval_strategy", "steps"]) == 2 and "needs held-out text" in capsys.readouterr().err
    assert main([*run, "--report_to", "none", "--eval_strategy", "steps", "--dry_run"]) == 2 and "needs held-out text" in capsys.readouterr().err
    assert main([*run, "--report_to", "none", "--resume", str(shape)]) == 2 and "is no checkpoint to resume from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from red.data.sources import named_dataset
    with pytest.raises(REDError, match=r"dataset_name='no/such-set' cannot be loaded: .*dataset_split='train'"):
        named_dataset("no/such-set", "train")
    assert named_dataset(None, "train") is None
