"""What a reader must know to read a table."""

from __future__ import annotations

from collections import defaultdict

from svl.report.published import published_notes
from svl.report.rows import Section, answer_speed, benchmark_speed
from svl.report.significance import LEVEL


def table_notes(section: Section) -> list[str]:
    """The notes below the table of a section, plain sentences."""
    result = section.last.result
    tasks = ", ".join(f"{task} ({score['metric']}, n = {score['n']})" for task, score in result["scores"].items())
    notes = [
        f"Benchmarks: {tasks or 'none'}.",
        f"±: {error_meaning(section)}.",
        *_beside_notes(section),
        *_average_notes(section),
        f"{BOLD}, question by question where the answers are stored.",
        *_speed_notes(section),
        *_training_notes(section),
    ]
    if section.limit is not None:
        notes.insert(0, f"Caution: limit={section.limit:g}, so only a part of every benchmark was used.")
    if len({run.main_metric(None).get("dense") for run in section.runs}) > 1:
        notes.append("Caution: the dense average differs between runs (versions? device?); the newest is shown.")
    if several := _several_versions(section):
        notes.append(f"Caution: the runs were made with different versions of {', '.join(several)}.")
    return [*notes, *_pair_notes(section), *_seed_notes(section), *published_notes(section)]


def _average_notes(section: Section) -> list[str]:
    """What the average and the retained share are, or why there are none."""
    if problem := section.last.average_problem:
        return [f"No average over these benchmarks, as it would mean nothing: {problem}."]
    return ["Retained: average relative to the dense average."]


def _several_versions(section: Section) -> list[str]:
    """What runs were made with several versions of; one that did not need it tells none."""
    known: dict[str, set[str]] = defaultdict(set)
    for run in section.runs:
        for name, version in run.result["versions"].items():
            known[name].add(str(version))
    return sorted(name for name, versions in known.items() if len(versions) > 1)


def table_caption(section: Section) -> list[str]:
    """What a paper says below the table, plain sentences; how runs came about is left to the notes."""
    scores = section.last.result["scores"]
    tasks = ", ".join(f"{section.short_name(task)} (n = {score['n']})" for task, score in scores.items())
    sentences = [f"{section.model} without some of its decoder layers" + (f": {tasks}." if tasks else ".")]
    if section.limit is not None:
        sentences.append(f"Only a part of every benchmark was used (limit {section.limit:g}).")
    return [*sentences, f"±: {error_meaning(section)}.", f"{BOLD}."]


def error_meaning(section: Section) -> str:
    """What stands behind ±."""
    seeds = any(len(row.runs) > 1 for row in section.rows)
    return "standard error over the questions" + (", and over the seeds where a row has several" if seeds else "")


BOLD = f"Bold: the best of its ratio, and all that do not differ from it significantly (paired tests, p < {LEVEL:g})"
MEANINGS = {
    "likelihood": "the average if the likeliest option were the answer, of benchmarks with closed questions",
    "above_chance": "(accuracy - chance) / (1 - chance) of yes-or-no and multiple-choice questions, 0 for guesses",
    "off_format": "answers that are read only because markup, leading words or what follows was taken away",
}


def _beside_notes(section: Section) -> list[str]:
    """What the averages besides that of the main metrics are."""
    return [f"{name.replace('_', ' ').capitalize()}: {MEANINGS[name]}." for name in section.metrics_beside]


def _training_notes(section: Section) -> list[str]:
    """What recovery was trained on and where, and whether it saw pictures of the benchmarks."""
    spent = [run.result["training"] for run in section.runs if run.result.get("training")]
    if not spent:
        return []
    rows: dict[str, set[str]] = defaultdict(set)
    for row in section.rows:
        for run in row.runs:
            if run.trained_on:
                rows[run.trained_on].add(row.label)
    devices = [f"{', '.join(sorted(labels))} on {device}" for device, labels in sorted(rows.items())]
    where = devices if len(rows) > 1 else [f"on {device}" for device in rows]
    notes = [
        "Training: what recovery cost after pruning: steps of the optimiser, samples and tokens that went through the "
        f"model (repeated ones counted again), seconds of training alone ({'; '.join(where)}); 0: training-free."
    ]
    known = [t["shared_pictures"] for t in spent]
    if shared := max((n for n in known if n is not None), default=0):
        notes.append(f"Caution: up to {shared} of the samples trained on show a picture of a benchmark.")
    elif None not in known:
        videos = "; videos were not compared" if any(t.get("videos_not_compared") for t in spent) else ""
        notes.append(f"No picture of the benchmarks is among those trained on (compared pixel by pixel{videos}).")
    return notes


def _pair_notes(section: Section) -> list[str]:
    """What besides pruning may have changed answers."""
    notes: dict[str, set[str]] = defaultdict(set)
    for row in section.rows:
        for run in row.runs:
            for score in run.result["scores"].values():
                if note := (score.get("change") or {}).get("note"):
                    notes[note].add(row.label)
    ordered = {note: [label for label in section.labels if label in labels] for note, labels in notes.items()}
    return [
        f"Caution: for {', '.join(ordered[note])}, the pruned and the dense model {note}; rounding alone may change "
        "answers."
        for note in sorted(notes)
    ]


def _speed_notes(section: Section) -> list[str]:
    """How speeds were measured, and why some are not shown."""
    if section.clock is None:
        return ["Speed: not measured, or not beside a dense model on the same device with the same batch size."]
    rate = section.last.result["cost"].get("samples_per_second_dense")
    conditions = f"; {section.clock.conditions}" if section.clock.conditions else ""
    if section.clock.what == "answer":
        how = "time of one answer, dense over pruned, both measured in turn (median of the rounds)"
    else:
        how = "samples per second relative to the dense model" + (f" ({rate:.3g} per second)" if rate else "")
        how += ", each while it answered the benchmarks, so other work on the machine counts"
    notes = [f"Speed: {how}{conditions}."]
    measure = answer_speed if section.clock.what == "answer" else benchmark_speed
    found = [speed.clock for row in section.rows for run in row.runs if (speed := measure(run))]
    others = sorted({clock.conditions or "an unknown device" for clock in found if clock != section.clock})
    if others:
        notes.append(f"Speed is left empty where it was measured under other conditions ({'; '.join(others)}).")
    return notes


def _seed_notes(section: Section) -> list[str]:
    """Which runs count once, or not at all."""
    notes = []
    same = list(dict.fromkeys(row.label for row in section.rows if row.seeds > len(row.runs)))
    if same:
        notes.append(f"The seed changes nothing for {', '.join(same)}: one run, with the error of its samples.")
    if section.replaced:
        is_older = all(run.created < shown.created for run, shown in section.replaced)
        which = "older run(s)" if is_older else "run(s)"
        notes.append(f"Left out: {len(section.replaced)} {which} with the same method, ratio and seed as another one.")
    return notes
