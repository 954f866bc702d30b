"""A sweep's makespan beside Ray Tune with one run a trial: over TRL's SFTTrainer, and over our own loop.

Learning rate x epochs, 8 x {1, 2, 3} = 24 trials of LoRA rank 8 on SmolLM2-135M, 64 real rows, 8 rows a step, ASHA that
compares trials at the end of their epochs. Every side begins without Ray and ends with every trial done and the best known:

- ours: `adaptory run` of a spec, whole: also with neither early stopping nor trunks (a linear schedule has none), and with early
  stopping alone, so that each gain is seen for itself: over our loop's makespan if nobody is stopped, which is put together from its trials;
- our loop: Ray Tune, a process for each trial, the same rows, batches and schedules, whole;
- TRL: Ray Tune, a process for each trial, packed, in the length that is fastest here. One trial of each number of epochs is
  measured whole, and the makespan of all 24 is put together from them, each with as many epochs as the same ASHA gave it in our
  loop's sweep.

The usual ways have as many trials at once as are fastest: one with all cores, or as many as there are cores with one each, tried
first. Their trials come in the order of the grid, ours in the one that the seed decides; how many ASHA stops depends on it. So our loop's
makespan is also put together for as many epochs of each trial as ours took (`same_epochs`). Ours is measured before the others and after
them, since a machine's speed may change meanwhile, and the mean is taken.

The last line is `sweep_vs_tune ratio=… loop_ratio=… …`: TRL's makespan over ours, our loop's over ours.

One to two hours on two idle cores, once the model, the data and TRL's environment are there; 40 minutes with `ARGS=--brief`, which leaves
out what shows each gain for itself.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from sides.running import BUILD, SIDES, Result, compiled, environment, measure
from sides.setting_up import base_model

from orchestrator.modeling.dtypes import DTYPES, chosen_dtype

EPOCHS = (1, 2, 3)
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
ROWS, HELD_OUT, BATCH, RANK = 64, 16, 8, 8
PACK_LENGTHS = (512, 1024)
WORK = BUILD / "sweep"
LANES = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, default=len(RATES), help="how many of the learning rates")
    parser.add_argument("--brief", action="store_true", help="only what the two ratios need")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of all sides' base model; auto: what this CPU is made for",
    )
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    model, trl_python = base_model(), environment("trl", SIDES / "trl-requirements.txt")
    for python in (sys.executable, trl_python):
        compiled(python)
    spec = write_case(model, RATES[: options.rates], chosen_dtype(options.dtype, "cpu"))
    case = WORK / "case.json"
    lanes = [measure(sys.executable, "packed_lanes.py", {"case": case, "lanes": n}, patience=1200) for n in LANES]
    for count, found in zip(LANES, lanes, strict=True):
        print(f"{count} packed: {found['tokens_per_second']:.0f} tokens/s, {found['peak_rss_mb']:.0f} MB", flush=True)
    memory = lanes[-1]["peak_rss_mb"] / lanes[0]["peak_rss_mb"]

    ours = {"all": sweep(spec, "all", {})}
    loop_case, _ = placed(case, "ours_train.py", sys.executable, [{}])
    stopped = measure(sys.executable, "tune_ours.py", {"case": loop_case, "early": True}, patience=3600)
    say_tune("our loop", stopped)
    modes = [{"mode": "packed", "micro-batch": 1, "pack-length": length} for length in PACK_LENGTHS]
    trl_case, mode = placed(case, "trl_train.py", trl_python, modes)
    rewritten(trl_case, pack_length=mode["pack-length"])
    trl = measure(trl_python, "tune_trl.py", {"case": trl_case}, patience=3600)
    say_tune("TRL, three trials", trl)
    again = sweep(spec, "again", {})
    if not options.brief:
        plain = {"train.schedule": "linear", "sweep.scheduler": "none"}
        ours |= {"packing": sweep(spec, "packing", plain), "early": sweep(spec, "early", {"train.schedule": "linear"})}
    cases = [json.loads(one.read_text()) for one in (loop_case, trl_case)]
    report(ours, again, stopped, trl, [one["places"] for one in cases], memory)


def report(
    ours: dict[str, Result],
    again: Result,
    stopped: Result,
    trl: Result,
    places: list[int],
    memory: float,
) -> None:
    theirs = put_together(trl, stopped["trials"], places[1])
    alike = put_together(stopped, ours["all"]["trials"], places[0])
    print(f"TRL's {len(stopped['trials'])} trials, put together from three: {theirs:.0f} s")
    print(f"our loop's, for as many epochs of each as ours took: {alike:.0f} s")
    best = min(stopped["trials"], key=lambda t: t["validation_loss"] if t["finished"] else float("inf"))
    loss, mine = ours["all"]["value"], statistics.mean(run["makespan"] for run in (ours["all"], again))
    print(f"winner's validation loss: ours {loss:.4f}, our loop under Tune {best['validation_loss']:.4f} "
          f"(learning rate {best['learning_rate']:g}, {best['epochs']} epochs)")  # fmt: skip
    whole = put_together(stopped, [trial | {"epoch": trial["epochs"]} for trial in stopped["trials"]], places[0])
    print(f"our loop's, if nobody were stopped: {whole:.0f} s")
    runs = {"packing": "packing", "packing_early": "early", "packing_early_trunks": "all"}
    gains = "".join(f"{name}={whole / ours[run]['makespan']:.2f} " for name, run in runs.items() if run in ours)
    print(
        f"sweep_vs_tune ratio={theirs / mine:.2f} loop_ratio={stopped['makespan'] / mine:.2f} ours={mine:.0f} trl={theirs:.0f} "
        f"loop={stopped['makespan']:.0f} same_epochs={alike / mine:.2f} {gains}winner_loss={loss / best['validation_loss'] - 1:+.2%} memory_of_8={memory:.2f}"
    )


def say_tune(name: str, run: Result) -> None:
    print(f"{name}: {run['makespan']:.0f} s", flush=True)
    for trial in run["trials"]:
        print(f"  {trial['learning_rate']:<8g} {trial['epochs']} epochs: {trial['epoch']:.0f} done in "
              f"{trial['seconds']:.0f} s, validation loss {trial['validation_loss']:.4f}", flush=True)  # fmt: skip


def put_together(measured: Result, trials: list[Result], places: int) -> float:
    """The makespan of trials that end after other epochs, each as long as those that were measured for as many."""
    seconds: dict[int, list[float]] = defaultdict(list)
    for trial in measured["trials"]:
        seconds[round(trial["epoch"])].append(trial["seconds"])
    each = [statistics.mean(seconds[round(trial["epoch"])]) for trial in trials]
    return float(measured["start"]) + one_after_another(each, places)


def one_after_another(seconds: list[float], places: int) -> float:
    """The time of trials in this order, each in the place that is free first."""
    free = [0.0] * places
    for one in seconds:
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


# --- ours -----------------------------------------------------------------------------------------------------------


def sweep(spec: Path, name: str, changed: dict[str, str]) -> Result:
    """`adaptory run` in a home of its own, from a machine without Ray to the published winner."""
    from orchestrator.settings import load_settings

    home = WORK / "home"
    home.mkdir(exist_ok=True)
    if not (home / "cache").exists():
        (home / "cache").symlink_to(load_settings().cache)
    adaptory = [str(Path(sys.executable).with_name("adaptory"))]
    known = os.environ | {"ADAPTORY_HOME": str(home)}
    sets = [part for field, value in changed.items() for part in ("--set", f"{field}={value}")]
    began = time.perf_counter()
    with (WORK / f"{name}.log").open("w") as log:
        command = [*adaptory, "run", str(spec), "--name", name, "--follow", *sets]
        done = subprocess.run(command, env=known, stdout=log, stderr=log, check=False)
    makespan = time.perf_counter() - began
    if done.returncode:
        raise SystemExit((WORK / f"{name}.log").read_text()[-4000:])
    shown = subprocess.run([*adaptory, "sweep", "show", name, "--json"], env=known, check=True, capture_output=True)
    subprocess.run([*adaptory, "down"], env=known, check=True, capture_output=True)
    found = json.loads(shown.stdout) | {"makespan": makespan}
    computed = found["compute"]
    print(f"ours, {name}: {makespan:.0f} s, of which {computed['seconds']:.0f} of training; {computed['steps']} steps computed, "
          f"{computed['separate_steps']} one by one; best {found['best']}: {found['value']:.4f}", flush=True)  # fmt: skip
    for trial in found["trials"]:
        print(f"  {trial['config']['train.learning_rate']:<8g} {trial['config']['train.epochs']} epochs: {trial['epoch']:.0f} done, "
              f"{trial['state']}, validation loss {trial['validation_loss'] or float('nan'):.4f}", flush=True)  # fmt: skip
    return found


# --- the case -------------------------------------------------------------------------------------------------------


def write_case(model: Path, rates: tuple[float, ...], dtype: str) -> Path:
    """The same rows for all: as a person has them for ours, rendered and masked for the others."""
    import yaml
    from transformers import AutoTokenizer

    from jobs.data.catalogue import example_rows
    from jobs.data.formats import conversations
    from jobs.data.render import Renderer
    from orchestrator.settings import load_settings
    from orchestrator.spec.job import JobSpec
    from orchestrator.spec.sweep import trial_spec, trunk_warmup

    cache = load_settings().cache
    raw = list(islice(example_rows("finance-entities/train", cache), ROWS + HELD_OUT))
    renderer = Renderer(AutoTokenizer.from_pretrained(model))
    paths = {}
    for name, part in (("rows", raw[:ROWS]), ("validation", raw[ROWS:])):
        (WORK / f"{name}-chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in part))
        rendered = renderer.tokens([conversation for conversation, _ in conversations(iter(part))])
        paths[name] = WORK / f"{name}.jsonl"
        with paths[name].open("w") as out:
            for tokens in (tokens for row in rendered for tokens in row):
                ids = [int(token) for token in tokens.ids]
                labels = [t if learned else -100 for t, learned in zip(ids, tokens.loss_mask, strict=True)]
                out.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    written: dict[str, Any] = {
        "name": "sweep",
        "base_model": str(model),
        "data": {"train": str(WORK / "rows-chat.jsonl"), "validation": str(WORK / "validation-chat.jsonl")},
        "tuning": {"type": "lora", "rank": RANK, "alpha": 2 * RANK},
        "train": {"schedule": "warmup_stable_decay", "batch_size": BATCH, "max_length": 512, "dtype": dtype},
        "sweep": {
            "search": {"learning_rate": {"choice": list(rates)}, "epochs": {"choice": list(EPOCHS)}},
            "trials": "all",
            "scheduler": "asha",
        },
    }
    spec = WORK / "sweep.yaml"
    spec.write_text(yaml.safe_dump(written, sort_keys=False))
    job = JobSpec.model_validate(written)
    trials = []
    for rate in rates:
        for epochs in EPOCHS:
            config = {"train.learning_rate": rate, "train.epochs": epochs}
            own = trial_spec(job, config, warmup_steps=trunk_warmup(job, config, ROWS))
            trials.append({"learning_rate": rate, "epochs": epochs, "spec": own.model_dump(mode="json")})
    middle = rates[len(rates) // 2]
    case = {
        "model": str(model), "dtype": dtype, "rows": str(paths["rows"]), "validation": str(paths["validation"]),
        "batch_size": BATCH, "rank": RANK, "longest": max(EPOCHS), "trials": trials,
        "measured": [{"learning_rate": middle, "epochs": epochs} for epochs in reversed(EPOCHS)],
    }  # fmt: skip
    (WORK / "case.json").write_text(json.dumps(case))
    return spec


def placed(case: Path, script: str, python: str, modes: list[Result]) -> tuple[Path, Result]:
    """How the usual way is fastest: the mode of training, and one trial with all cores or one on each core."""
    cores = os.cpu_count() or 1
    dtype = json.loads(case.read_text())["dtype"]
    common = {
        "model": base_model(),
        "dtype": dtype,
        "rows": WORK / "rows.jsonl",
        "batch-size": BATCH,
        "rank": RANK,
        "steps": 4,
    }

    def speed(mode: Result, places: int) -> float:
        threads = cores // places
        options = common | mode | {"threads": threads}
        with ThreadPoolExecutor(places) as pool:
            sides = [pool.submit(measure, python, script, options, OMP_NUM_THREADS=str(threads)) for _ in range(places)]
            found = sum(side.result()["tokens_per_second"] for side in sides)
        print(f"{script} {mode or ''} {places} at once: {found:.0f} tokens/s", flush=True)
        return found

    best = max(((mode, places) for mode in modes for places in (1, cores)), key=lambda choice: speed(*choice))
    target = WORK / f"{script.removesuffix('.py')}.json"
    target.write_text(case.read_text())
    rewritten(target, places=best[1], threads=cores // best[1], storage=tempfile.mkdtemp(prefix="tune-", dir=WORK))
    return target, best[0]


def rewritten(case: Path, **more: Any) -> None:
    case.write_text(json.dumps(json.loads(case.read_text()) | more))


if __name__ == "__main__":
    main()
