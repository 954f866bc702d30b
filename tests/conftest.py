"""What many tests share: a home of their own, tiny real models, an S3 server, a PostgreSQL server, one Ray.

Nothing is started before the first test that asks for it. Costs: a tiny model 0.1 to 0.5 s after torch is imported, `s3`
about 3 s once, `postgres` about 3 s once, `ray_local` about 4 s once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Set before any library is imported: no test leaves the machine, and Ray's workers import what this process imports.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are taken by the other processes of this session
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ARCHITECTURES = ("llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Every tiny model that the fused decoder supports. Besides: `llama-wide` has 33 MB of weights; `phi` takes the plain path
(parallel blocks, layer norms with biases, partial rotary); `gpt2` has nothing that an adapter could target."""

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PEOPLE = ("Ada Lovelace", "Alan Turing", "Grace Hopper", "Edsger Dijkstra", "Barbara Liskov", "Tony Hoare")
PLACES = ("London", "New York", "Rotterdam", "Los Angeles", "Wilmslow", "Colombo")
COMPANIES = ("Analytical Engines Ltd", "Bletchley Bank", "Harvard Mark Inc", "Semaphore NV")


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ADAPTORY_HOME of this test alone; used by every test, so that none can touch the person's own."""
    for name in [name for name in os.environ if name.startswith("ADAPTORY_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "home"
    monkeypatch.setenv("ADAPTORY_HOME", str(path))
    return path


# --- disks ----------------------------------------------------------------------------------------------------------


@dataclass
class SmallDisk:
    """A file system of its own that a test can fill."""

    path: Path

    def fill(self) -> None:
        """To the last byte, as another program would."""
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as filler:
            for size in (2**16, 2**10, 1):
                with contextlib.suppress(OSError):
                    while filler.write(b"x" * size) == size:
                        pass

    def free(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def small_disk() -> Iterator[SmallDisk]:
    """A tmpfs of 16 MiB. Mounting needs root."""
    path = Path(tempfile.mkdtemp(prefix="disk-", dir="/tmp"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        path.rmdir()
        pytest.skip(f"a small disk cannot be mounted here; run the tests as root (sudo -E make test): {mounted.stderr}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
        path.rmdir()


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def device() -> str:
    """Where networks are computed; `tests/gpu` has its own, and runs the tests that take this one on a GPU."""
    return "cpu"


# --- data -----------------------------------------------------------------------------------------------------------


def _entities(number: int) -> dict[str, Any]:
    person, place = PEOPLE[number % len(PEOPLE)], PLACES[(number // 2) % len(PLACES)]
    company = COMPANIES[(number // 3) % len(COMPANIES)]
    sentence = f"{person} of {company} signed agreement {number} in {place}."
    if number % 3 == 0:  # rows of unequal length, as in life
        sentence += f" The board of {company} met again before the end of the year."
    answer = f'{{"person": ["{person}"], "organization": ["{company}"], "location": ["{place}"]}}'
    return {
        "messages": [
            {"role": "system", "content": "Extract the named entities as JSON."},
            {"role": "user", "content": sentence},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(scope="session")
def entities_rows() -> list[dict[str, Any]]:
    """48 distinct chat rows of unequal length, each answered with a JSON object of entities."""
    return [_entities(number) for number in range(48)]


# --- models ---------------------------------------------------------------------------------------------------------


def _tokenizer(rows: list[dict[str, Any]]) -> Any:
    """Byte-level BPE of 320 entries trained on the rows themselves, with ChatML and no unknown tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=512,
    )


def _config(architecture: str, vocab: int) -> Any:
    """Small on purpose, but with every feature of its family: a window shorter than a row, soft caps below the scores."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    gemma = shape | {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8}
    alternating = ["sliding_attention", "full_attention", "sliding_attention"]
    match architecture:
        case "llama":
            return transformers.LlamaConfig(**shape, tie_word_embeddings=True)
        case "llama-untied":
            return transformers.LlamaConfig(**shape, tie_word_embeddings=False)
        case "mistral":
            return transformers.MistralConfig(**shape, sliding_window=8)
        case "qwen2":
            shape.pop("head_dim")
            return transformers.Qwen2Config(**shape, tie_word_embeddings=True)
        case "qwen3":
            return transformers.Qwen3Config(**shape, tie_word_embeddings=True)
        case "gemma2":
            extra = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
            return transformers.Gemma2Config(**gemma | extra | {"num_hidden_layers": 3, "layer_types": alternating})
        case "gemma3_text":
            return transformers.Gemma3TextConfig(**gemma | {"num_hidden_layers": 3, "layer_types": alternating})
        case "llama-wide":
            wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
            return transformers.LlamaConfig(**shape | wide)
        case "phi":
            for name in ("num_key_value_heads", "head_dim"):
                shape.pop(name)
            return transformers.PhiConfig(**shape)
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=vocab, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=2
            )
    raise ValueError(
        f"no tiny model for {architecture!r}: one of {', '.join((*ARCHITECTURES, 'llama-wide', 'phi', 'gpt2'))}"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, entities_rows: list[dict[str, Any]]) -> Callable[[str], Path]:
    """`tiny_model("llama")` → directory with config, fp32 safetensors, tokenizer and chat template. Do not write into it.

    Weights are random but not degenerate: norm weights differ from one and biases from zero, so that a layer which
    forgets one of them gives other logits.
    """
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = _write_model(architecture, tmp_path_factory.mktemp(architecture), entities_rows)
        return made[architecture]

    return make


def _write_model(architecture: str, directory: Path, rows: list[dict[str, Any]]) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(rows)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(sum(map(ord, architecture)))
        model = AutoModelForCausalLM.from_config(_config(architecture, len(tokenizer)), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# --- S3 -------------------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def _serving(
    command: list[str],
    port: int,
    *,
    patience: float = 60.0,
    user: str | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[None]:
    """Run a server (as `user`) until the block ends; yields once it accepts connections on the loopback `port`."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, user=user
    )
    try:
        deadline = time.monotonic() + patience
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}: {process.stderr.read().decode()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{command} does not answer on port {port}")
            time.sleep(0.05)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, stop)
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def _s3_endpoint() -> Iterator[str]:
    port = _free_port()
    with _serving([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def s3(_s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3://bucket/prefix` of a fresh bucket; endpoint and credentials are in the AWS_* environment, for child processes too."""
    import boto3
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": _s3_endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"adaptory-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem.clear_instance_cache()  # instances remember the credentials of the test before
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/store"
    s3fs.S3FileSystem.clear_instance_cache()


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


def _postgres_binaries() -> Path | None:
    """Directory of `initdb` and `postgres`: on the PATH, or where Debian hides the newest."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()]
    return max(versions, key=lambda path: int(path.parent.name), default=None)


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[str]:
    """A server of this session's own; yields its URL. It refuses root, so root lends it a user."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: `make test` does it, or apt-get install postgresql")
    pytest.importorskip("psycopg", reason="the driver is not installed: pip install 'psycopg[binary]'")
    user = "postgres" if os.geteuid() == 0 else None
    directory = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))  # short: its socket's path may have 107 characters
    try:
        if user:
            shutil.chown(directory, user)
        data, port = directory / "data", _free_port()
        create = ["--auth", "trust", "--username", "adaptory", "--no-sync", "--no-locale", "--encoding", "UTF8"]
        command = [str(binaries / "initdb"), "--pgdata", str(data), *create]
        subprocess.run(command, check=True, capture_output=True, user=user, cwd="/")
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(directory), "-c", "fsync=off"]
        command = [str(binaries / "postgres"), "-D", str(data), *options]
        with _serving(command, port, user=user, stop=signal.SIGQUIT):  # at once: nothing of it is kept
            url = f"postgresql://adaptory@127.0.0.1:{port}/postgres"
            _answering(url)
            yield url
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _answering(url: str, *, patience: float = 60.0) -> None:
    """Wait for the server to answer: it accepts connections a moment before."""
    import psycopg

    deadline = time.monotonic() + patience
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture
def postgres(_postgres_server: str) -> str:
    """URL of fresh, empty state: a schema of its own, since a database costs ten times as much."""
    import psycopg

    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(_postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{_postgres_server}?options=-csearch_path%3D{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a fresh database; a test that takes it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'both' / 'state.db'}"
    return request.getfixturevalue("postgres")


@pytest.fixture
def db(database_url: str) -> Iterator[Any]:
    """An open database with the newest schema, on SQLite and on PostgreSQL."""
    from orchestrator.db import open_database

    db = open_database(database_url)
    yield db
    db.close()


@pytest.fixture
def register_adapter() -> Callable[..., None]:
    """`register_adapter(db, "acme/intents", digest, base)`: as an import registers it, without any bytes in the store."""
    from orchestrator.db.models import AdapterRow
    from orchestrator.registry.versions import register

    def make(db: Any, name: str, digest: str, base: str | None) -> None:
        tenant, _, short = name.partition("/")
        with db.write() as session:
            register(session, tenant, short, digest, actor="ada")
            given = {"rank": 4, "created_at": 1.0, "metrics": {}, "provenance": {}}
            if session.get(AdapterRow, (tenant, digest)) is None:
                session.add(AdapterRow(tenant=tenant, digest=digest, name=short, base_digest=base, **given))

    return make


# --- Ray ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray of two CPUs for the whole session, without a dashboard; its workers import this work tree.

    Ray's own directory is short, since a Unix socket's path may have 107 characters only.
    """
    import ray

    directory = Path(tempfile.mkdtemp(prefix="ar-", dir="/tmp"))
    patch = pytest.MonkeyPatch()
    (directory / "token").write_text(secrets.token_hex(32))  # never the person's own ~/.ray/auth_token
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(directory / "token"))
    patch.delenv("RAY_ADDRESS", raising=False)
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(directory),
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        yield
    finally:
        ray.shutdown()
        patch.undo()
        shutil.rmtree(directory, ignore_errors=True)
