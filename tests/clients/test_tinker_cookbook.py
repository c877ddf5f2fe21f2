"""Recipes of the unmodified Tinker cookbook against a real gateway and worker, without a network.

A tiny model is served under a name that the cookbook knows; its tokenizer comes from the server's own hub.
"""

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tinker_exit import ended_well

from gateway import KEY, MODEL, Gateway, environment, selfloop, until

KNOWN_NAME = "Qwen/Qwen3-8B"
RENDERER = "qwen3_instruct"
RECIPE_SECONDS = 200

pytestmark = pytest.mark.clients


class Cookbook:
    """Runs recipes in a folder of their own."""

    def __init__(self, python: str, gateway: Gateway, folder: Path) -> None:
        self.python = python
        self.gateway = gateway
        self.folder = folder
        given = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        self.environment = given | {
            "TINKER_BASE_URL": gateway.url,
            "TINKER_API_KEY": f"tml-{KEY}",
            "TINKER_TELEMETRY": "0",
            "WANDB_MODE": "disabled",
            "HF_ENDPOINT": f"{gateway.url}/hf",
            "HF_HOME": str(folder / "hf"),
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONFAULTHANDLER": "1",
            "HOME": str(folder),
        }

    def start(self, module: str, log: str, **options: object) -> subprocess.Popen[bytes]:
        options = {"model_name": KNOWN_NAME, "log_path": self.folder / log, "max_steps": 2} | options
        arguments = [f"{name}={value}" for name, value in options.items() if value is not None]
        with open(self.folder / f"{log}.out", "ab") as output:
            return subprocess.Popen(
                [self.python, "-m", f"tinker_cookbook.{module}", *arguments],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def run(self, module: str, log: str, **options: object) -> list[dict[str, float]]:
        """A recipe to its end; returns the rows of its metrics."""
        process = self.start(f"recipes.{module}", log, **options)
        assert ended_well(process.wait(RECIPE_SECONDS)), self.output(log)
        assert "completed successfully" in self.output(log), self.output(log)
        return self.metrics(log)

    def output(self, log: str) -> str:
        return (self.folder / f"{log}.out").read_text(errors="replace")[-6000:] + self.gateway.log[-3000:]

    def rows(self, log: str, name: str) -> list[dict[str, float]]:
        path = self.folder / log / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def metrics(self, log: str) -> list[dict[str, float]]:
        return self.rows(log, "metrics.jsonl")


@pytest.fixture(scope="module")
def cookbook(
    cookbook_python: str, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cookbook]:
    folder = tmp_path_factory.mktemp("cookbook")
    model = Path(shutil.copytree(tiny_model_folder, folder / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    data = folder / "data"
    selfloop("models", "add", str(model), "--name", MODEL, "--data-dir", str(data))
    selfloop("models", "add", MODEL, "--alias", KNOWN_NAME, "--data-dir", str(data))
    gateway = Gateway(data).start()
    yield Cookbook(cookbook_python, gateway, folder)
    gateway.close()


def _conversations(path: Path) -> Path:
    """Sums, asked as the arithmetic environment asks."""
    rows = [
        [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": str(a + b)},
        ]
        for a in range(10)
        for b in range(8)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def taught(cookbook: Cookbook) -> str:
    """The first checkpoint of a run that was killed and resumed: a model that ends some of its answers."""
    options = {
        "dataset": _conversations(cookbook.folder / "sums.jsonl"),
        "renderer_name": RENDERER,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "lr_schedule": "constant",
        "lora_rank": 8,
        "num_epochs": 3,
        "save_every": 2,
        "max_steps": 12,
    }
    killed = cookbook.start("recipes.chat_sl.train", "chat", **options)

    def half_way() -> bool:
        assert killed.poll() is None, cookbook.output("chat")
        return bool(cookbook.rows("chat", "checkpoints.jsonl")) and len(cookbook.metrics("chat")) >= 5

    until(half_way, "half of the steps are done", RECIPE_SECONDS)
    killed.kill()
    killed.wait()
    done = len(cookbook.metrics("chat"))
    assert done < 12
    cookbook.run("chat_sl.train", "chat", behavior_if_log_dir_exists="resume", **options)
    (cookbook.folder / "killed_after").write_text(str(done))
    return str(cookbook.rows("chat", "checkpoints.jsonl")[0]["state_path"])


def test_a_killed_run_goes_on(cookbook: Cookbook, taught: str):
    """From the weights it had, and down to far below the first loss."""
    done = int((cookbook.folder / "killed_after").read_text())
    rows = [(row["progress"], row["train_mean_nll"]) for row in cookbook.metrics("chat")]
    before, after = rows[:done], rows[done:]
    assert 0 < len(after) < 12
    assert after[-1][0] == 1.0
    # The step that a checkpoint is named after is submitted before the save: repeated, it meets what it taught.
    assert after[0][1] < dict(before)[after[0][0]] < 0.8 * before[0][1]
    assert after[-1][1] < 0.5 * before[0][1]
    assert cookbook.rows("chat", "checkpoints.jsonl")[-1]["name"] == "final"


def test_weights_are_downloaded(cookbook: Cookbook, taught: str):
    """Encrypted to the client's own key, file by file."""
    fetch = f"from tinker_cookbook import weights; weights.download(tinker_path={taught!r}, output_dir='fetched')"
    command = [cookbook.python, "-c", fetch]
    done = subprocess.run(
        command,
        env=cookbook.environment,
        cwd=cookbook.folder,
        capture_output=True,
        text=True,
        timeout=RECIPE_SECONDS,
        check=False,
    )
    assert ended_well(done.returncode), done.stderr
    fetched = cookbook.folder / "fetched"
    assert json.loads((fetched / "adapter_config.json").read_text())["r"] == 8
    assert (fetched / "adapter_model.safetensors").stat().st_size > 1000


# What was taught has one digit or two: with two tokens only the former end in time, so that rewards differ.
ARITHMETIC = {
    "max_tokens": 2,
    "renderer_name": RENDERER,
    "env": "arithmetic",
    "group_size": 4,
    "groups_per_batch": 4,
    "learning_rate": 1e-3,
    "lora_rank": 8,
    "save_every": 0,
    "eval_every": 0,
}


def _close_to_the_sampler(row: dict[str, float]) -> None:
    """Trainer and sampler agree before anything was learned from the samples."""
    assert abs(row["optim/kl_sample_train_v1"]) < 1e-4, row
    assert 0 <= row["optim/kl_sample_train_v2"] < 1e-4, row


def _sampled(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Those of steps on samples."""
    return [row for row in rows if "env/all/reward/total" in row]


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "gspo"])
def test_reinforcement_learning(cookbook: Cookbook, taught: str, loss_fn: str):
    """Steps on samples of the newest weights; whether the reward climbs is chance in so few of them."""
    options: dict[str, object] = ARITHMETIC | {"load_checkpoint_path": taught, "max_steps": 4}
    rows = _sampled(cookbook.run("math_rl.train", loss_fn, loss_fn=loss_fn, **options))
    rewards = [row["env/all/reward/total"] for row in rows]
    assert len(rewards) == 4
    for row in rows:
        assert -0.1 <= row["env/all/reward/total"] <= 1
        assert math.isfinite(row["grad_norm"])
        _close_to_the_sampler(row)


def test_streamed_minibatches_and_the_drift_after_a_step(cookbook: Cookbook, taught: str):
    streamed = {"stream_minibatch_config.groups_per_batch": 4, "stream_minibatch_config.num_minibatches": 2}
    options: dict[str, object] = ARITHMETIC | streamed | {"load_checkpoint_path": taught}
    rows = _sampled(cookbook.run("math_rl.train", "streamed", loss_fn="ppo", compute_post_kl=True, **options))
    assert len(rows) == 2
    assert all(math.isfinite(row["kl_pre_post_v1"]) for row in rows), sorted(rows[0])


def test_off_policy_with_the_default_loss(cookbook: Cookbook, taught: str):
    """``stable_reinforce``; sampling goes on while the model trains."""
    options: dict[str, object] = ARITHMETIC | {
        "load_checkpoint_path": taught,
        "max_steps_off_policy": 2,
        "max_steps": 3,
    }
    assert _sampled(cookbook.run("math_rl.train", "off-policy", **options))


def test_numerics_check(cookbook: Cookbook):
    """Several turns of long documents: sampler and trainer agree."""
    corpus = cookbook.folder / "Salesforce" / "wikitext"
    corpus.mkdir(parents=True)
    text = "The ship came in before the winter , and until then the town had only the river to talk about ."
    (corpus / "train.jsonl").write_text((json.dumps({"text": text}) + "\n") * 2000)
    (corpus / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-103-raw-v1\n  data_files:\n"
        "  - split: train\n    path: train.jsonl\n---\n"
    )
    rows = cookbook.run(
        "rl_numerics_check.train",
        "numerics",
        renderer_name=RENDERER,
        lora_rank=8,
        group_size=2,
        groups_per_batch=2,
        max_tokens=24,
        max_trajectory_tokens=8000,
        save_every=0,
        max_steps=1,
        **{"task.num_pages_min": 2, "task.num_pages_max": 2},
    )
    _close_to_the_sampler(rows[0])


def test_preferences(cookbook: Cookbook):
    """DPO: the loss starts at ln 2, its client-side gradient lowers it."""
    folder = cookbook.folder / "Anthropic" / "hh-rlhf"
    folder.mkdir(parents=True)
    for split, count in (("train", 1100), ("test", 64)):
        rows = []
        for i in range(count):
            asked = f"\n\nHuman: Who keeps light {i}?\n\nAssistant: "
            rows.append({"chosen": f"{asked}Marta.", "rejected": f"{asked}Nobody."})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cookbook.run(
        "preference.dpo.train", "dpo", renderer_name=RENDERER, batch_size=4, learning_rate=1e-3, max_steps=4
    )
    losses = [row["dpo_loss"] for row in found if "dpo_loss" in row]
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-3)
    assert losses[-1] < losses[0]


def test_self_distillation(cookbook: Cookbook):
    """The twenty likeliest tokens of each position, as targets (N, 20)."""
    rows = [{"prompt": f"Who keeps light {i}?", "golden_response": ["Marta."]} for i in range(20)]
    (cookbook.folder / "tools.json").write_text(json.dumps(rows))
    make = "import datasets, json; datasets.Dataset.from_list(json.load(open('tools.json'))).save_to_disk('tools')"
    subprocess.run([cookbook.python, "-c", make], cwd=cookbook.folder, env=cookbook.environment, check=True)
    found = cookbook.run(
        "sdft.train",
        "sdft",
        renderer_name=RENDERER,
        dataset="toolalpaca",
        toolalpaca_data_path="tools",
        groups_per_batch=2,
        max_tokens=8,
        lora_rank=8,
        eval_every=0,
        save_every=0,
    )
    assert len(found) >= 2


def test_prompt_distillation(cookbook: Cookbook):
    rows = cookbook.run(
        "prompt_distillation.train",
        "distilled",
        file_path=_conversations(cookbook.folder / "distill.jsonl"),
        renderer_name=RENDERER,
        batch_size=8,
        learning_rate=5e-3,
        lora_rank=8,
        max_steps=4,
    )
    losses = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
    assert losses[-1] < losses[0]


def test_a_decision(cookbook: Cookbook):
    """The probabilities of a question's choices, from the logprobs of given tokens."""
    done = subprocess.run(
        [cookbook.python, "-m", "tinker_cookbook.recipes.decisions.demo", f"model_name={KNOWN_NAME}"],
        env=cookbook.environment,
        cwd=cookbook.folder,
        input="How do I log in?\n",
        capture_output=True,
        text=True,
        timeout=RECIPE_SECONDS,
        check=False,
    )
    assert ended_well(done.returncode), done.stderr
    probabilities = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert set(probabilities) == {"billing", "sdk", "console", "cookbook"}
    assert math.isclose(sum(probabilities.values()), 1, abs_tol=1e-3)


@pytest.mark.parametrize("recipe", ["preference.shorter", "multiplayer_rl.guess_number"])
def test_environments_without_data(cookbook: Cookbook, recipe: str):
    rows = cookbook.run(
        f"{recipe}.train",
        recipe,
        renderer_name=RENDERER,
        batch_size=2,
        group_size=2,
        max_tokens=8,
        eval_every=0,
        learning_rate=1e-3,
        max_steps=1,
    )
    assert _sampled(rows)
    assert all(math.isfinite(row["env/all/reward/total"]) for row in _sampled(rows))
