"""What a person writes becomes a JobSpec, or an error that says which line and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job import FullTuning, JobSpec, LoraTuning, QloraTuning
from orchestrator.spec.loading import json_schema, load_spec, parse_spec

BASE = "name: a\nbase_model: m\ndata:\n  train: x.jsonl\n"
EXAMPLES = sorted((Path(__file__).parents[3] / "jobs" / "examples").glob("*.yaml"))


def refused(text: str, *overrides: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "job.yaml", list(overrides))
    return caught.value


def test_there_are_examples():
    assert "finance-entities.yaml" in {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_spec_and_survives_json(path: Path):
    spec = load_spec(path)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_the_shortest_spec_has_every_default():
    spec = parse_spec(BASE, "job.yaml")
    assert spec == JobSpec.model_validate({"name": "a", "base_model": "m", "data": {"train": "x.jsonl"}})
    assert spec.tuning == LoraTuning()


@pytest.mark.parametrize(
    ("yaml_text", "value"), [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("5E-4", 5e-4), ("2", 2.0), (".5e-2", 5e-3)]
)
def test_numbers_are_read_as_a_person_means_them(yaml_text: str, value: float):
    assert parse_spec(f"{BASE}train: {{learning_rate: {yaml_text}}}\n", "job.yaml").train.learning_rate == value


def test_a_date_may_be_a_name():
    assert parse_spec(BASE.replace("name: a", "name: 2026-11-22"), "job.yaml").name == "2026-11-22"


def test_an_empty_section_means_its_defaults():
    assert parse_spec(BASE + "train:\ntuning:\n", "job.yaml") == parse_spec(BASE, "job.yaml")


def test_merge_keys_and_anchors_work():
    text = BASE + "tuning: &t {type: lora, rank: 4}\ntrain: &d {epochs: 2, seed: 1}\n"
    assert parse_spec(text, "job.yaml").train.seed == 1
    merged = "x: &x {type: lora, rank: 4}\n" + BASE + "tuning: {<<: *x, rank: 5}\n"
    assert refused(merged).context["field"] == "x"
    assert parse_spec(BASE + "tuning: {<<: {type: lora, rank: 4}, rank: 5}\n", "job.yaml").tuning.rank == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("added", "line", "field", "said"),
    [
        ("epochs: 2\n", 5, "epochs", "Did you mean train.epochs?"),
        ("train:\n  epoch: 2\n", 6, "train.epoch", "Did you mean train.epochs?"),
        ("train:\n  packing: true\n  rank: 4\n", 7, "train.rank", "Did you mean tuning.rank?"),
        ("lr: 1\n", 5, "lr", "Did you mean train.learning_rate?"),
        ("tuning: {type: full, rank: 4}\n", 5, "tuning.rank", "tuning.type full has no such field"),
        ("zzz: 2\n", 5, "zzz", "A spec has name, tenant, base_model"),
        ("train:\n  schedule: cosin\n", 6, "train.schedule", "cosine, linear, constant or warmup_stable_decay"),
        ("train:\n  epochs: -2\n", 6, "train.epochs", "a number above 0"),
        ("train:\n  batch_size: x\n", 6, "train.batch_size", "a whole number at least 1"),
        ("train: 3\n", 5, "train", "a section with epochs"),
        ("tuning:\n  type: lorra\n", 6, "tuning.type", "lora, qlora or full. Did you mean lora?"),
        ("tuning: lora\n", 5, "tuning", "a section with type, rank"),
        ("  validation: 2\n", 5, "data.validation", "below 1, text that is not empty or a list of at least one"),
        ("evaluate:\n  metrics: [f1]\n", 6, "evaluate.metrics.0", "exact_match, json_valid or entity_f1"),
        ("evaluate:\n  rows: 3\n", 5, "evaluate", "needs data.test"),
        ("tuning: {type: lora, targets: []}\n", 5, "tuning.targets", "at least one module"),
        ("name: b\n", 5, "name", "line 1 sets it first"),
        ("sweep: {trials: 3}\n", 5, "sweep.search", "is missing"),
        ("evaluate:\n  baseline: 3\n", 6, "evaluate.baseline", "a section with few_shot"),
        ("evaluate:\n  baseline: few_shot\n", 6, "evaluate.baseline", "a section with few_shot"),
        ("evaluate:\n  baseline: {}\n", 6, "evaluate.baseline.few_shot", "is missing"),
        ("evaluate:\n  baseline:\n    few_shot: 0\n", 7, "evaluate.baseline.few_shot", "at least 1 and at most 64"),
        ("evaluate:\n  baseline: {few_shot: -1}\n", 6, "evaluate.baseline.few_shot", "at least 1 and at most 64"),
        ("evaluate:\n  baseline: {few_shot: 65}\n", 6, "evaluate.baseline.few_shot", "at least 1 and at most 64"),
        ("evaluate:\n  baseline: {few_shot: 2.5}\n", 6, "evaluate.baseline.few_shot", "a whole number"),
        ("evaluate:\n  baseline: {few_shot: yes}\n", 6, "evaluate.baseline.few_shot", "is true"),
        ("evaluate:\n  baseline: {few_shot: 3, shots: 3}\n", 6, "evaluate.baseline.shots", "there is no field"),
        ("evaluate:\n  gate: [a]\n", 6, "evaluate.gate", "not in this version yet"),
        ("serve:\n  route: R\n", 6, "serve.route", "lower-case"),
        ("method:\n  type: dpo\n", 6, "method.type", "not in this version yet"),
        ("resources: {workers: {min: 1, max: 2}}\n", 5, "resources.workers", "not in this version yet"),
        ("tuning: {type: qlora}\ndeepspeed: {stage: 3}\nresources: {workers: 2}\n", 5, "tuning.type", "stage 1 or 2"),
    ],
)
def test_an_error_names_file_line_field_and_what_is_allowed(added: str, line: int, field: str, said: str):
    error = refused(BASE + added)
    assert error.message.startswith(f"job.yaml, line {line}: ")
    assert said in str(error)
    assert {key: error.context[key] for key in ("file", "line", "field")} == {
        "file": "job.yaml",
        "line": line,
        "field": field,
    }


def test_a_missing_section_is_named():
    error = refused("name: a\nbase_model: m\n")
    assert "`data` is missing" in str(error)


def test_every_problem_is_told_in_the_order_of_the_file():
    error = refused(BASE + "train:\n  epochs: -2\n  batch_size: x\n  seed: 1.5\n")
    words = str(error)
    assert error.context["field"] == "train.epochs"
    assert words.index("train.epochs") < words.index("line 7: `train.batch_size`") < words.index("line 8: `train.seed`")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "is empty"),
        ("# only a comment\n", 1, "is empty"),
        ("- a\n", 1, "this is a list"),
        ("hello", 1, "this is 'hello'"),
        ("name: a\n\tfoo: b\n", 2, "a tab stands where YAML wants spaces"),
        ("name: [a\n", 2, "not YAML"),
        ("name: a\nbad: \x00\n", 2, "special characters are not allowed"),
        ("name: a\nx: !!python/object/apply:os.system ['true']\n", 2, "could not determine a constructor"),
        ("name: a\n---\nname: b\n", 2, "not YAML"),
        ("name: a\nx: &x [*x]\n", 2, "repeats itself"),
        ("name: a\n? {b: c}\n: d\n", 2, "plain text"),
    ],
)
def test_what_is_no_spec_says_on_which_line(text: str, line: int, said: str):
    error = refused(text)
    assert said in str(error)
    assert error.context["line"] == line


def test_aliases_that_multiply_are_refused():
    rows = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    rows += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8))
    assert "alias" in str(refused(rows))


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(SpecError, match="There is no file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: a\nbase_model: caf\xe9\n".encode("latin-1"))
    with pytest.raises(SpecError, match="line 2: byte 0xe9 is not UTF-8"):
        load_spec(tmp_path / "latin.yaml")


def test_a_resolved_spec_in_json_loads(tmp_path: Path):
    spec = parse_spec(BASE, "job.yaml")
    (tmp_path / "spec.json").write_text(spec.model_dump_json(indent=2))
    assert load_spec(tmp_path / "spec.json") == spec


# --- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=2", ("train", "epochs"), 2.0),
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 1e-3),
        ("tuning.targets=[q_proj, v_proj]", ("tuning", "targets"), ["q_proj", "v_proj"]),
        ("train.checkpoint={every: 5}", ("train", "checkpoint", "every"), 5),
        ("train.checkpoint.every=5", ("train", "checkpoint", "every"), 5),
        ("train.max_grad_norm=null", ("train", "max_grad_norm"), None),
        ("data.system=a = b", ("data", "system"), "a = b"),
        ("name=b", ("name",), "b"),
    ],
)
def test_any_field_can_be_set(override: str, path: tuple[str, ...], value: object):
    found: object = parse_spec(BASE, "job.yaml", [override])
    for name in path:
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=2", "Did you mean train.epochs?"),
        ("epochs=2", "Did you mean train.epochs?"),
        ("train.epochs=-1", "a number above 0"),
        ("name.x=3", "name is 'a' and has no field x"),
        ("train.epochs", "an override is `field=value`"),
        ("=3", "an override is `field=value`"),
        ("train.epochs=[1", "the value is not YAML"),
        ("evaluate.gate=x", "not in this version yet"),
        ("serve.route=X", "lower-case"),
    ],
)
def test_a_bad_override_is_named(override: str, said: str):
    error = refused(BASE, override)
    assert f"--set {override}" in error.message
    assert said in str(error)


@pytest.mark.parametrize("value", ["true", "yes", "[true, 0.9]", "false"])
@pytest.mark.parametrize(
    "field", ["tuning.rank", "train.epochs", "train.betas", "data.validation", "deepspeed.stage", "name"]
)
def test_a_truth_value_is_no_number_and_no_text(field: str, value: str):
    error = refused(BASE, f"{field}={value}")
    assert error.context["field"] == field
    assert f"`{field}` is " in error.message
    assert "allowed: " in error.message


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e308", "1e400", "-1"])
@pytest.mark.parametrize(
    "field",
    [
        *("train.epochs", "train.learning_rate", "train.weight_decay", "train.eps", "train.warmup"),
        *("tuning.alpha", "data.validation"),
    ],
)
def test_a_number_without_sense_is_refused(field: str, value: str):
    error = refused(BASE, f"{field}={value}")
    assert error.context["field"] == field
    assert "allowed: a number" in str(error)
    json.dumps(error.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=-1", "at least 0 and below 9,223,372,036,854,775,808"),
        (f"train.seed={2**63}", "at least 0 and below 9,223,372,036,854,775,808"),
        ("train.batch_size=1e10", "at most 1,000,000,000"),
        ("train.betas=[0.9, 1]", "`train.betas.1` is 1; allowed: a list of 2: a number at least 0 and below 1"),
        ("train.max_grad_norm=.inf", "a number above 0 or null"),
        ("data.train=[]", "`data.train` is []; allowed: text that is not empty or a list of at least one"),
        ("data.validation=[]", "`data.validation` is []"),
        ("data.test=[]", "`data.test` is []"),
        ("data.train=''", "`data.train` is ''; allowed: text that is not empty"),
        ("data.train=[a.jsonl, '']", "`data.train.1` is ''"),
        ("base_model=''", "`base_model` is ''; allowed: text that is not empty"),
        ("data.validation=1", "`data.validation` is 1; allowed: a number at least 0 and below 1"),
        ("data.validation=1.0", "`data.validation` is 1.0"),
    ],
)
def test_what_no_run_could_use_is_refused(override: str, said: str):
    assert said in str(refused(BASE, override))


def test_the_largest_seed_is_one_that_numpy_and_torch_take():
    import numpy as np
    import torch

    seed = parse_spec(BASE, "job.yaml", [f"train.seed={2**63 - 1}"]).train.seed
    np.random.default_rng([seed, 0])
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("9" * 5000, "which cannot be read"),
        ("0x" + "f" * 5000, "which no field can hold"),
        ("!!int x", "which cannot be read"),
        ("[" * 60 + "]" * 60, "nested more than 50 levels deep"),
        ("[" * 5000 + "]" * 5000, "nested more than 50 levels deep"),
        ("{a: " * 5000 + "}" * 5000, "nested more than 50 levels deep"),
    ],
    ids=["digits", "bits", "tag", "deep", "deeper", "deeper still"],
)
def test_values_beyond_reason_are_named_with_their_line(value: str, said: str):
    error = refused(f"{BASE}train:\n  seed: {value}\n")
    assert said in str(error)
    assert error.context["line"] == 6
    assert len(str(error)) < 300
    error = refused(BASE, f"train.seed={value}")
    assert said in str(error)
    assert error.message.startswith("--set train.seed=")


def test_another_type_resets_its_section_whatever_the_order():
    text = BASE + "tuning: {type: lora, rank: 3, alpha: 4}\n"
    assert parse_spec(text, "job.yaml", ["tuning.type=full"]).tuning == FullTuning()
    assert parse_spec(text, "job.yaml", ["tuning.rank=9", "tuning.type=qlora"]).tuning == QloraTuning(rank=9)
    assert parse_spec(text, "job.yaml", ["tuning.type=lora"]).tuning == LoraTuning(rank=3, alpha=4)


# --- schema


def test_the_schema_accepts_every_example_and_refuses_a_typo():
    jsonschema = pytest.importorskip("jsonschema")
    import yaml

    validator = jsonschema.Draft202012Validator(json_schema())
    for path in EXAMPLES:
        # PyYAML reads 1e-3 as text where the loader and editors read a number; through the loader both agree.
        validator.validate(json.loads(load_spec(path).model_dump_json()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**yaml.safe_load(BASE), "trian": {}})


def test_the_schema_documents_every_field_that_the_code_documents():
    schema = json_schema()
    assert (
        "examples per optimiser step" in schema["$defs"]["TrainSpec"]["properties"]["batch_size"]["description"].lower()
    )


@pytest.mark.parametrize("name", ["openai-chat", "csv-prompts"])
def test_an_example_with_data_of_its_own_reads_it(name: str, monkeypatch: pytest.MonkeyPatch):
    from jobs.data import check

    monkeypatch.chdir(EXAMPLES[0].parents[2])
    spec = load_spec(f"jobs/examples/{name}.yaml")
    assert check(spec.data).format == spec.data.format
