"""What a run's facts say, in sentences and tables of plain text, for the page and the model card; nothing is claimed that is not there."""

from __future__ import annotations

from red.report.run import Run, finite_number
from red.report.units import count, duration, number, percent, ratio, size

NOT_MEASURED = "not measured"
SAYS_NOTHING = "its teacher solves none of the canary's problems, which therefore say nothing of the student."
LOGGED = "By optimiser step; means over the steps since the line before. Axes of losses are logarithmic where the values differ much."
FLUENT = ("Text that is easy to predict comes back long before reasoning does: a cross entropy that falls while the share of problems solved stays low is a "
          "student that talks fluently and cannot do its steps.")
VERBS = {"red": "distilled", "compress": "narrowed", "lori": "taught"}


def teacher_name(run: Run) -> str:
    return run.text("teacher", "name") or "its teacher"


def headline(run: Run) -> str:
    """One line for the top."""
    width, wide, kept = run.number("student", "hidden_size"), run.number("teacher", "hidden_size"), canary(run)[2]
    if run.method == "lori":
        return (
            f"{teacher_name(run)} that reasons in {number(setting(run, 'latent_steps'))} latent steps"
            if setting(run, "latent_steps")
            else f"{teacher_name(run)}, {setting(run, 'preset')}"
        )
    if not width or not wide:
        return f"A student of {teacher_name(run)}"
    sizes = f"width {width:.0f} instead of {wide:.0f}"
    return f"{percent(kept)} of what {teacher_name(run)} solves, at {sizes}" if kept is not None else f"{teacher_name(run)}, {sizes}"


def done(run: Run) -> str:
    """What was done, in one sentence; and whether it was finished."""
    teacher, student = run.number("teacher", "parameters"), run.number("student", "parameters")
    wide, narrow = run.number("teacher", "hidden_size"), run.number("student", "hidden_size")
    text = f"red {VERBS.get(run.method, 'made')} {teacher_name(run)}"
    if wide:
        text += f" (width {wide:.0f}, {count(teacher)} parameters)"
    if run.method == "lori":
        text += (
            f" to answer after {number(setting(run, 'latent_steps'))} latent steps (preset {setting(run, 'preset')})"
            if setting(run, "latent_steps")
            else f" (preset {setting(run, 'preset')})"
        )
    elif narrow:
        text += f" into a student of width {narrow:.0f} with {count(student)} ({percent(ratio(student, teacher))}), start {start_name(run)}"
    if run.method == "compress":
        return f"{text}, without training."
    steps, planned, tokens, seconds = run.number("steps", "done"), run.number("steps", "planned"), run.last("tokens"), training_seconds(run)
    parts = [f"{steps:,.0f} steps" if steps is not None else "", f"{count(tokens)} tokens" if tokens else "", duration(seconds) if seconds else ""]
    if run.text("device"):
        parts.append(f"{run.number('processes') or 1:.0f} × {run.text('device')}" if (run.number("processes") or 1) > 1 else run.text("device"))
    text += ": " + ", ".join(part for part in parts if part) + "."
    if not run.finished:
        text += f" It was not finished, or still runs: the record ends at step {steps or 0:,.0f}" + (f" of {planned:,.0f}." if planned else ".")
    return text


def start_name(run: Run) -> str:
    return run.text("channels", "start") or str(setting(run, "start") or "not recorded")


def setting(run: Run, name: str):
    """A setting's value, chosen or not; None where it is not known."""
    changed = run.get("settings", "changed", name)
    return changed.get("value") if isinstance(changed, dict) else run.get("settings", "default", name)


def training_seconds(run: Run) -> float | None:
    sessions = run.get("sessions")
    found = [finite_number(one.get("seconds")) for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []
    return sum(value or 0 for value in found) if found else None


def rate(run: Run) -> float | None:
    """Tokens a second of training: the median of what was logged, so that checkpoints and checks do not count."""
    found = sorted(value for _, value in run.series("tokens_per_second"))
    return found[len(found) // 2] if found else None


def step_seconds(run: Run) -> float | None:
    """Of one step, by the median rate."""
    tokens, steps = run.last("tokens"), run.number("steps", "done")
    per_step = ratio(tokens, steps)
    return ratio(per_step, rate(run)) if per_step else None


def canary(run: Run) -> tuple[float | None, float | None, float | None, float | None]:
    """The teacher's score, the student's, its share of the teacher's at the end, and at the start."""
    shares = run.series("canary/share")
    return run.last("canary/teacher"), run.last("canary/student"), shares[-1][1] if shares else None, shares[0][1] if shares else None


def lowest_share(run: Run, which: str) -> float | None:
    """eRank of the student over the teacher's, at the layer where that is least."""
    which = "start" if run.method == "compress" else which
    pairs = [(mine, theirs) for mine, theirs in zip(run.ranks(which), run.ranks("teacher"), strict=False) if theirs]
    return min((1.0 if mine is None else mine) / theirs for mine, theirs in pairs) if pairs else None


def worth(run: Run) -> tuple[list[str], list[list[str]]]:
    """A table: teacher, student at its start, at its end. What was not measured says how it would have been."""
    rows = []
    teacher, student, _, _ = canary(run)
    first = run.series("canary/student")
    if first:
        problems = run.number("measured", "canary_problems")
        rows.append(
            [
                f"canary: problems solved, of {number(problems)}" if problems else "canary: problems solved",
                percent(teacher),
                percent(first[0][1]),
                percent(student),
            ]
        )
    elif run.method != "lori":
        rows.append(["reasoning (canary)", "–", "–", f"{NOT_MEASURED}: {'' if run.method == 'compress' else 'canary_steps=100, or '}red eval"])
    for name, label in (
        ("loss", "training loss"),
        ("ce", "cross entropy, nats a token"),
        ("kl", "KL to the teacher, nats a token"),
        ("tap_mse", "taps' error"),
        ("task", "task loss"),
        ("rationale", "rationale's distance"),
        ("anchor", "anchor's distance"),
        ("eval_loss", "held-out loss"),
    ):
        if values := run.series(name):
            rows.append([label, "–", f"{number(values[0][1])} (step {values[0][0]:.0f})", number(values[-1][1])])
    ranks = [run.ranks(which) for which in ("teacher", "start", "end")]
    if run.method != "lori":
        if run.method == "compress":
            ranks[1:] = [[], ranks[1]]  # its end is its start
        if ranks[0] and (ranks[1] or ranks[2]):
            rows.append(["effective rank, mean of the layers", *(number(_mean(values)) if values else "–" for values in ranks)])
            rows.append(
                ["effective rank, lowest share of the teacher's", "100.0 %", *(percent(lowest_share(run, which)) for which in ("start", "end"))]
            )
        else:
            rows.append(["effective rank", "–", "–", f"{NOT_MEASURED}: erank_steps=50, or red erank"])
    if run.method == "compress":
        return ["", "teacher", "student"], [[name, theirs, mine] for name, theirs, _, mine in rows]
    return ["", "teacher", "start", "end" if run.finished else "last"], rows


def judged(judgement: dict) -> tuple[list[str], list[list[str]]]:
    """The tasks of one `red eval`."""
    rows = []
    for row in judgement["rows"]:
        gap = row.get("difference") if isinstance(row, dict) else None
        if isinstance(gap, dict):
            low, high = finite_number(gap.get("low")), finite_number(gap.get("high"))
            rows.append(
                [
                    str(row.get("task")),
                    str(row.get("metric")),
                    count(finite_number(row.get("n"))),
                    number(finite_number(row.get("teacher"))),
                    number(finite_number(row.get("student"))),
                    number(finite_number(gap.get("value"))),
                    "–" if low is None or high is None else f"{low:+.3g} to {high:+.3g}",
                ]
            )
    divergence = judgement.get("divergence")
    for key, label in (
        ("kl", "KL(teacher‖student)"),
        ("teacher_loss", "teacher's loss"),
        ("student_loss", "student's loss"),
        ("agreement", "same likeliest token"),
    ):
        found = divergence.get(key) if isinstance(divergence, dict) else None
        if isinstance(found, dict) and finite_number(found.get("mean")) is not None:
            tokens, mean = finite_number(divergence.get("tokens")), finite_number(found["mean"])
            rows.append(["held-out text", label, count(tokens), "–", number(mean), "–", "–"])
    return ["task", "metric", "n", "teacher", "student", "difference", "95 % interval"], rows


def forecasts(run: Run) -> tuple[list[str], list[list[str]]]:
    """What red forecast beside what was measured."""
    rows = []

    def row(label, expected, found, form, how) -> None:
        share = ratio(found, expected)
        rows.append(
            [label, form(expected), form(found) if found is not None else NOT_MEASURED, "–" if share is None else f"{share:.2g} ×", how or ""]
        )

    start = run.get("forecast", "start")
    if run.number("measured", "start_seconds") is not None:
        how = "with whatever else the machine did" if start else "the start came out of a file"
        row("calibration and start", run.number("forecast", "start", "seconds"), run.number("measured", "start_seconds"), duration, how)
    if run.get("forecast", "training"):
        step = run.number("forecast", "training", "step_seconds")
        row("a step", step, step_seconds(run), duration, "median over the log, with what runs between the steps")
        row("tokens a second", ratio(run.number("forecast", "training", "step_tokens"), step), rate(run), count, "forecast of full rows")
        row("peak memory", run.number("forecast", "training", "bytes"), run.number("measured", "peak_bytes"), size, run.text("measured", "peak_of"))
    elif run.number("measured", "peak_bytes") is not None:
        host = run.number("forecast", "start", "host_bytes")
        row(
            "peak memory",
            host,
            run.number("measured", "peak_bytes"),
            size,
            (run.text("measured", "peak_of") or "") + ("; the forecast is of the start, beside the teacher" if host else ""),
        )
    return ["", "forecast", "measured", "measured / forecast", "how"], rows


def reloaded(run: Run) -> str:
    """What the preflight of the export found."""
    apart = run.number("export", "max_abs_logit_difference")
    same = f"differ by {number(apart)} at most" if apart else "are the same"
    return "" if apart is None else f"The exported checkpoint was reloaded in a fresh process; its logits {same}."


def how_to_judge(run: Run) -> str:
    if run.method == "lori":
        return f"{NOT_MEASURED.capitalize()}: red.lori.evaluate asks the student."
    if canary(run)[0] == 0:
        return f"{NOT_MEASURED.capitalize()}: {SAYS_NOTHING}"
    asks = "" if run.method == "compress" else "canary_steps=100 with canary_file asks while it trains; "
    return (f"{NOT_MEASURED.capitalize()}: {asks}red eval STUDENT --against TEACHER --output RUN/eval.json, "
            "then red report RUN, judges what came out.")


def ranked(run: Run) -> str:
    """What the effective ranks are of."""
    text, tokens = "Effective rank of the residual stream by layer. A stream that has collapsed makes tokens look alike.", run.number("erank",
                                                            "tokens")
    if not tokens:
        return text
    where = "held-out" if run.get("erank", "held_out") else "training"
    return (f"{text} Of {tokens:,.0f} tokens of the {where} text; it took {duration(run.number('erank', 'seconds'))}. It grows with the number of tokens: "
            "compare only at the same.")


def chosen(run: Run) -> str:
    """What the start did with the teacher's channels."""
    kept, text = run.channels.get("kept"), f"Start {start_name(run)}. "
    if kept is None:
        return text + "Which channels it keeps was not recorded."
    if run.get("channels", "selected"):
        return text + f"It keeps {int(kept.sum())} of {len(kept)} channels and drops the others."
    return (f"{text}It selects no channels: its stream is a mixture of all, of {kept.sum():.0f} dimensions out of {len(kept)}. Shown is the share of each "
            "channel that lies in the span of the embedding's map.")


def limitations(run: Run) -> list[str]:
    """What a reader should not believe without looking."""
    found = ["The student has its teacher's knowledge, errors and biases, and those of the text it was trained on; nobody has checked it for safety."]
    share = canary(run)[2]
    if run.method != "lori":
        found.append("A narrower model forgets: what was not measured above may be lost, long chains of reasoning first.")
    if share is None and not run.judgements:
        found.append(f"Its reasoning has not been measured{f': {SAYS_NOTHING}' if canary(run)[0] == 0 else '.'}")
    elif share is not None and not run.judgements:
        found.append("Its reasoning has been measured on a few short problems that were asked all through the training, not on a benchmark.")
    if not any("divergence" in judgement and judgement["divergence"] for _, judgement in run.judgements) and not run.series("eval_loss"):
        found.append("Its loss on held-out text has not been measured.")
    if run.method == "compress":
        found.append("It has not been trained after it was narrowed; red.distill goes on from its start.")
    if run.method == "lori":
        found.append("Without red it is an ordinary language model: only red.lori runs its latent steps.")
    if not run.finished:
        found.append("The run was not finished.")
    return found


def _mean(values) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
