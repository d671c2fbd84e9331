"""What transformers' Trainer refuses only once it is made, or trains, is asked before hours go into a start: trackers, optimiser, schedule, held-out text, the hub."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from red.errors import REDError


def rehearse(args: TrainingArguments, *, held_out: bool | None = None, own_metrics: bool = False) -> None:
    """Make what the settings name, as Trainer will, and throw it away.

    Args:
        held_out: whether there is text to evaluate on; None: not known yet.
        own_metrics: whether the caller measures more than the loss.

    Raises:
        REDError: naming the setting, what its owner says, and the remedy.
    """
    if held_out is False and args.eval_strategy.value != "no":
        raise REDError(f"eval_strategy={args.eval_strategy.value!r} needs held-out text. Give eval_file (eval_data in Python), or leave eval_strategy out.")
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if not own_metrics and best != "loss" and (args.load_best_model_at_end or args.save_strategy.value == "best"):
        raise REDError(f"metric_for_best_model={args.metric_for_best_model!r} is not measured here; use eval_loss, or leave it out.")
    for name in ("seed", "data_seed"):
        seed = getattr(args, name)
        if seed is not None and not 0 <= seed < 2**32:
            raise REDError(f"{name}={seed}: expected a number from 0 to 2**32 - 1.")
    if args.process_index:
        return  # the first process speaks for all
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise REDError(f"report_to={', '.join(args.report_to)}: {error} Install it, or leave report_to out.") from error
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise REDError(f"optim={getattr(args.optim, 'value', args.optim)!r}: {error}") from error
    except (ValueError, AttributeError):
        kind, settings = torch.optim.SGD, {"lr": args.learning_rate}  # one that asks for the model itself
    try:
        kind([weight], **settings)
    except ValueError as error:
        raise REDError(f"optim={getattr(args.optim, 'value', args.optim)!r} cannot be made: {error}. Look at learning_rate={args.learning_rate:g}, weight_decay and optim_args.") from error
    try:
        optimizer = torch.optim.SGD([weight], lr=1.0)
        get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=0, num_training_steps=2, scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}))
    except (ValueError, TypeError, ImportError) as error:
        raise REDError(f"lr_scheduler_type={getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)!r}: {error}. Set lr_scheduler_kwargs, or choose another.") from error
    if args.push_to_hub:
        from huggingface_hub import HfApi

        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as error:  # no network, no token, a wrong one: each of a kind of its own
            raise REDError(f"push_to_hub=True, and the hub does not know you: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__} "
                           "Log in with hf auth login (or set HF_TOKEN), or leave push_to_hub out.") from error
