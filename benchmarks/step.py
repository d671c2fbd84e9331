"""A whole training step, optimisation by optimisation, with the eager LRC step beside it: `python benchmarks/step.py --out DIR`.

Each rung of `benchmarks/ladder.py` runs in a process of its own, so that peaks of memory are its own: a teacher of the size's shape with random weights, rows
packed of several documents, and `REDTrainer.train` itself with logging off. Times are taken at the borders of micro-steps and updates; a whole step is
composed of their medians where fewer micro-steps were run than it has. MFU is floor FLOPs, 2 P_T + 6 P_S a token, over the matrix product's rate in the same
run. Results: DIR/step_<device>.json. Without a GPU the size is small and only the rungs that mean something there are run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from benchmarks import report, timing
from benchmarks.ladder import LADDER, SIZES, Setup, Size, setups
from benchmarks.lrc_step import LRCStep
from benchmarks.timing import DEVICE, GPU
from benchmarks.watch import Watch, memory
from red.planning import costs
from red.config import REDConfig
from red.errors import REDError
from red.files import atomic_write_text
from red.data.packing import PackedDataset, collate, pack
from red.prepare import ready_calibration, start_projections
from red.training.trainer import REDTrainer

OUT_OF_MEMORY = "out of memory"
FEWEST_SECONDS = 20  # left, for a rung to be started: its process imports for that long
SPEED, PEER, PEAK, LOW_PEAK = 25_000, 1.7, 48, 40  # tokens a second, times the peer, GiB; of the Llama-3.2-3B shape on one H100


def build_teacher(size: Size) -> PreTrainedModel:
    """Random weights, bf16 on a GPU and fp32 on a CPU."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**size.teacher)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if GPU else torch.float32, attn_implementation="sdpa").eval()


def packed_rows(size: Size, count: int) -> PackedDataset:
    """`count` full rows of `size.documents` documents of random lengths and random tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        cuts = (torch.randperm(size.length // 2 - 1, generator=generator)[: size.documents - 1] * 2 + 2).sort().values.tolist()
        for begin, end in zip([0, *cuts], [*cuts, size.length], strict=True):
            examples.append({"input_ids": torch.randint(size.teacher["vocab_size"], (end - begin,), generator=generator).tolist()})
    return pack(examples, size.length, pad_token_id=0)


class WatchedTrainer(REDTrainer):
    watch: Watch

    def training_step(self, *args, **kwargs):
        self.watch.micro()
        return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model):
        self.watch.update()
        return super()._clip_grad_norm(model)


class StepEnds(TrainerCallback):
    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_end(self, *args, **kwargs):
        self.watch.ended()


def config_of(size: Size, folder: str | Path, **changes) -> REDConfig:
    """RED's settings for a run that only trains: no log, no checkpoint, no warm-up."""
    return REDConfig(**{**dict(output_dir=str(folder), hidden_size=size.width, start="activation", calibration_samples=1, max_length=size.length, bf16=GPU, use_cpu=not GPU,
                               per_device_train_batch_size=size.rows, gradient_accumulation_steps=size.micro_steps, logging_strategy="no", save_strategy="no",
                               report_to="none", disable_tqdm=True, warmup_steps=0, train_sampling_strategy="sequential"), **changes})  # fmt: skip


def make_trainer(teacher: PreTrainedModel, rows: PackedDataset, config: REDConfig, trainer_class=REDTrainer, **kwargs) -> REDTrainer:
    calibration = ready_calibration(teacher, config, rows=rows)
    with DEVICE if GPU else nullcontext():  # the student's throw-away initialisation takes a minute on a CPU
        projections = start_projections(teacher, config, calibration)
    return trainer_class(teacher, config, train_dataset=rows, calibration=calibration, projections=projections, **kwargs)


def run_red(setup: Setup, size: Size, micro_steps: int, watch: Watch) -> float:
    """Trains; returns the loss of the last step."""
    if not setup.split_products:
        use_plain_products()
    per_batch = setup.rung.rows or size.rows
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(size, folder, per_device_train_batch_size=per_batch, gradient_accumulation_steps=micro_steps, max_steps=watch.total, **setup.settings)
        rows = packed_rows(size, per_batch * micro_steps * 2)
        trainer = make_trainer(build_teacher(size), rows, config, WatchedTrainer, callbacks=[StepEnds(watch)])
        trainer.watch = watch
        return trainer.train().training_loss


def use_plain_products() -> None:
    """A rung below the split products multiplies in fp32."""
    try:
        from red.training import precision
    except ImportError:
        return
    precision.split_product = lambda a, b: a.float() @ b.float()


def run_peer(setup: Setup, size: Size, per_batch: int, micro_steps: int, watch: Watch) -> float:
    step = LRCStep(build_teacher(size), size.width, documents=setup.rung.documents)
    batches = DataLoader(packed_rows(size, per_batch * micro_steps * 2), per_batch, collate_fn=collate, pin_memory=GPU)
    feed, loss = iter(()), torch.zeros((), device=DEVICE)
    for _ in range(watch.total):
        loss.zero_()
        for _ in range(micro_steps):
            batch = next(feed, None) or next(feed := iter(batches))
            batch = {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}
            watch.micro()
            ce, kl, taps = step.micro_step(batch, micro_steps)
            loss += (ce + kl + step.tap_weight * taps) / micro_steps
        watch.update()
        step.update()
        watch.ended()
    return float(loss)


def floor_flops(size: Size) -> dict[str, float]:
    """FLOPs a token: the floor, and with attention over whole rows and the products of an optimiser step."""
    shape = costs.Sizes.of(AutoConfig.for_model(**size.teacher))
    found = costs.flops(shape, size.width, context=size.length, sharing=size.tokens)
    return {"floor": found.floor, "useful": found.useful}


def one_rung(name: str, size_name: str, micro_steps: int, steps: int, warmup: int, rows: int | None) -> dict:
    """Runs in a process of its own. `rows` of a micro-batch for the peer, where its usual ones do not fit."""
    began, size = time.monotonic(), SIZES[size_name]
    setup = next(one for one in setups(GPU) if one.rung.name == name)
    watch, per_batch = Watch(warmup, steps), rows or setup.rung.rows or size.rows
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    try:
        if setup.rung.peer:
            loss = run_peer(setup, size, per_batch, micro_steps, watch)
        else:
            loss = run_red(setup, size, micro_steps, watch)
    except (torch.OutOfMemoryError, REDError) as error:  # REDTrainer explains it
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        return {"status": OUT_OF_MEMORY, "rows": per_batch, "memory": memory()}
    whole = max(size.tokens // (per_batch * size.length), 1)  # micro-steps of a full step
    times = watch.times(whole)
    tokens = whole * per_batch * size.length / times["step_s"]
    return {"status": "measured", "rows": per_batch, "micro_steps": whole, "tokens_per_second": tokens, **times, "memory": memory(), "loss": loss, "waits": watch.waits(),
            "kernels": watch.kernels(), "seconds": time.monotonic() - began}  # fmt: skip


def in_a_process(words: Sequence[object], environment: dict[str, str], seconds: float) -> dict:
    """The last line that this script printed, from JSON; or how it failed."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **environment}  # the script finds the repository itself
    try:
        done = subprocess.run([sys.executable, __file__, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(seconds, 1))
        said, failure = done.stderr.strip(), "failed" if done.returncode else None
    except subprocess.TimeoutExpired as error:
        said, failure = (error.stderr or b"").decode(errors="replace").strip(), f"out of time, after {seconds:.0f} s"
    if failure is None:
        return json.loads(done.stdout.strip().splitlines()[-1])
    said = said.splitlines() or ["no output"]
    print("\n    ".join([" ".join(map(str, words)), *said[-40:]]), file=sys.stderr, flush=True)  # the row has its last line alone
    return {"status": failure if failure != "failed" else f"failed: {said[-1][:300]}"}


def climb(size_name: str, wanted: Sequence[str], micro_steps: int, steps: int, warmup: int, seconds: float, keep: Callable[[dict], None] = lambda found: None) -> dict:
    """Every rung, the top one first, then the peers and the settings apart: what matters most is there when time is out. Rows come back in the ladder's order.

    `keep` gets what was found after every rung, because this may be stopped in the next one.
    """
    deadline, size, found = time.monotonic() + seconds, SIZES[size_name], {}
    ceilings = in_a_process(["--ceilings"], {}, min(seconds, 90))
    top = tops(GPU)
    for setup in sorted(setups(GPU), key=lambda one: (one.rung is not top, not (one.rung.peer or one.rung.apart), LADDER.index(one.rung))):
        rung, row = setup.rung, None
        if wanted and rung.name not in wanted:
            continue
        for rows in range(rung.rows or size.rows, 0, -1):
            words = ["--rung", rung.name, "--size", size_name, "--micro_steps", micro_steps, "--steps", steps, "--warmup", warmup, "--rows", rows]
            left = deadline - time.monotonic()
            why_not = setup.why_not or ("no time left" if left < FEWEST_SECONDS else None)
            row = {"status": why_not} if why_not else in_a_process(words, setup.environment, left)
            if row["status"] != OUT_OF_MEMORY or not rung.peer:
                break
        found[rung.name] = {"rung": rung.name, "why": rung.why, "peer": rung.peer, "settings": setup.settings, **row}
        print(line(found[rung.name]), flush=True)
        keep(document(found, size_name, ceilings))
    return document(found, size_name, ceilings)


def document(found: dict[str, dict], size_name: str, ceilings: dict) -> dict:
    """What the file holds, of rows by their rung's name. Without ceilings (their process failed) there is no MFU."""
    size, rows = SIZES[size_name], [found[rung.name] for rung in LADDER if rung.name in found]
    flops = floor_flops(size)
    for row in rows if "product_tflops" in ceilings else ():
        if row["status"] == "measured":
            row["mfu"] = row["tokens_per_second"] * flops["floor"] / ceilings["product_tflops"] / 1e12
            row["mfu_useful"] = row["tokens_per_second"] * flops["useful"] / ceilings["product_tflops"] / 1e12
    return report.document(rows, ceilings) | {"size": size_name, "shape": {"width": size.width, "rows": size.rows, "length": size.length, "micro_steps": size.micro_steps,
                                                                           "documents": size.documents}, "flops_per_token": flops, "goals": goals(rows, size_name)}  # fmt: skip


def tops(gpu: bool):
    """The highest rung that all others lead to."""
    return [one.rung for one in setups(gpu) if one.why_not is None and not one.rung.apart and not one.rung.peer][-1]


def goals(rows: Sequence[dict], size_name: str) -> list[dict]:
    """What the Llama-3.2-3B shape should reach on one H100; not measured is None."""
    measured = [row for row in rows if row["status"] == "measured"]
    ours, peers = ([row for row in measured if row["peer"] == peer] for peer in (False, True))
    best = max(ours, key=lambda row: row["tokens_per_second"], default=None)
    fastest_peer = max((row["tokens_per_second"] for row in peers), default=None)
    least = min((row["memory"].get("device_gib", float("inf")) for row in ours), default=None)
    judged = GPU and size_name == "llama-3.2-3b"

    def goal(name: str, relation: str, bound: float, value: float | None) -> dict:
        met = None if value is None or not judged else value >= bound if relation == ">=" else value <= bound
        return {"name": name, "goal": f"{relation} {bound:g}", "value": value, "met": met}

    ratio = best["tokens_per_second"] / fastest_peer if best and fastest_peer else None
    return [goal("tokens a second", ">=", SPEED, best and best["tokens_per_second"]), goal("peak GiB of that rung", "<=", PEAK, best and best["memory"].get("device_gib")),
            goal("times the peer", ">=", PEER, ratio), goal("peak GiB of the least rung", "<=", LOW_PEAK, None if least == float("inf") else least)]  # fmt: skip


def lines(found: dict) -> list[str]:
    """The goals, then the rungs."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    met = []
    for goal in found["goals"]:
        value = "" if goal["value"] is None else f" ({goal['value']:.4g})"
        met.append(f"step {found['size']}: {goal['name']} {goal['goal']}: {words[goal['met']]}{value}")
    return met + [f"step {line(row)}" for row in found["rows"]]


def line(row: dict) -> str:
    if row["status"] != "measured":
        return f"{row['rung']}: {row['status']}"
    peak = row["memory"].get("device_gib", row["memory"].get("process_gib"))
    busy = "" if row["kernels"]["busy"] is None else f", {sum(row['waits'].values())} waits of the host, device busy {100 * row['kernels']['busy']:.0f} %"
    return (f"{row['rung']}: {row['tokens_per_second']:.0f} tokens/s, micro-step {1e3 * row['micro_s']:.1f} ms ± {100 * row['micro_spread']:.0f} %, update {1e3 * row['update_s']:.1f} ms, "
            f"peak {peak:.1f} GiB{busy}")


def file_name(found: dict) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    return f"step_{device}{'' if found['size'] == 'llama-3.2-3b' else '_' + found['size']}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file or folder for the JSON")
    parser.add_argument("--size", choices=SIZES, default="llama-3.2-3b" if GPU else "256")
    parser.add_argument("--rungs", nargs="+", default=[], metavar="NAME", help="only these; LRC and the best are needed for the goals")
    parser.add_argument("--micro_steps", type=int, help="of a step that is run (default: all of the size's)")
    parser.add_argument("--steps", type=int, default=5, help="timed (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything; rungs without time are left out")
    parser.add_argument("--rung", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    micro_steps = options.micro_steps or SIZES[options.size].micro_steps
    if options.ceilings:
        print(json.dumps(timing.ceilings()))
    elif options.rung:
        print(json.dumps(one_rung(options.rung, options.size, micro_steps, options.steps, options.warmup, options.rows)))
    else:
        def keep(found: dict) -> None:
            if options.out:
                atomic_write_text(options.out / file_name(found) if options.out.is_dir() else options.out, json.dumps(found, indent=1) + "\n")

        print("\n".join(lines(climb(options.size, options.rungs, micro_steps, options.steps, options.warmup, options.seconds, keep))))


if __name__ == "__main__":
    main()
