"""Runs: accumulation, normalisation, failures that change nothing, files."""

import json
import random

import pytest
import safetensors.torch
import torch

import tiny_models
from selfloop.engine.files import checkpoint
from selfloop.engine.losses.registry import LOSS_FUNCTIONS
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.digests import MANIFEST_FILE
from selfloop.types.errors import BadRequest, CheckpointDamaged, NotFound, OperationFailed
from selfloop.types.losses import LOSSES
from selfloop.types.operation import AdamParams
from selfloop.types.settings import EngineLimits

SKIP = {"skip_token_normalization": True}
ADAM = AdamParams(learning_rate=1e-2)


def some_data(num=4, seed=0):
    return [tiny_models.next_token_datum(tiny_models.random_ids(5 + 3 * i, seed=seed + i)) for i in range(num)]


def train(engine, run_id="run", steps=2, seed=0):
    for step in range(steps):
        engine.forward_backward(run_id, some_data(seed=seed + 10 * step), "cross_entropy", {})
        engine.optim_step(run_id, ADAM)


def state(engine, run_id="run"):
    """Everything a run is, as comparable values."""
    run = engine._runs[run_id]
    tensors = [run.theta_P]
    numbers = [run.step, run.shape.rank, run.alpha]
    if run.moments is not None:
        tensors += run.moments[:2]
        numbers.append(run.moments.num_updates)
    if run.accumulated is not None:
        tensors.append(run.accumulated.grad_P)
        numbers += [run.accumulated.num_tokens, run.accumulated.normalised]
    return [t.clone() for t in tensors], numbers


def same(one, other):
    return (
        one[1] == other[1]
        and len(one[0]) == len(other[0])
        and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    )


@pytest.fixture
def trained(engine):
    engine.init_run("run", rank=4, seed=1)
    train(engine)
    return engine


def test_every_declared_loss_is_there_and_no_other():
    assert LOSS_FUNCTIONS.keys() == LOSSES.keys()


def test_info(engine):
    info = engine.info
    reference = tiny_models.build("llama-tied")
    assert info.num_parameters == reference.num_parameters()
    assert (info.vocab_size, info.eos_token_ids) == (tiny_models.VOCAB_SIZE, (tiny_models.EOS,))
    assert (info.device, info.dtype) == ("cpu", "float32")


def test_unknown_run_is_not_found(engine):
    with pytest.raises(NotFound):
        engine.forward("nobody", some_data(), "cross_entropy", {})


def test_training_lowers_the_loss(engine):
    engine.init_run("run", rank=4, seed=1)
    losses = []
    for _ in range(8):
        losses.append(engine.forward_backward("run", some_data(), "cross_entropy", {}).loss)
        engine.optim_step("run", ADAM)
    assert losses[-1] < losses[0] - 0.5


def test_same_seed_and_operations_give_the_same_bits(trained, load):
    again = load()
    again.init_run("run", rank=4, seed=1)
    train(again)
    assert same(state(trained), state(again))


def test_init_run_resets(trained):
    result = trained.init_run("run", rank=2, seed=1)
    assert (result.step, result.lora_rank) == (0, 2)
    assert trained._runs["run"].moments is None
    assert trained.has_run("run")
    trained.remove_run("run")
    assert not trained.has_run("run")


def test_forward_changes_nothing(trained):
    trained.forward_backward("run", some_data(), "cross_entropy", {})
    before = state(trained)
    result = trained.forward("run", some_data(), "cross_entropy", {})
    assert same(before, state(trained))
    assert result.loss == pytest.approx(trained.forward_backward("run", some_data(), "cross_entropy", {}).loss)


def test_logprobs_have_the_targets_shape_and_nan_where_masked(trained):
    targets = [5, IGNORED_TARGET, 7]
    datum = Datum(Tensor.of([3, 4, 5], "int64"), {"target_tokens": Tensor.of(targets, "int64", (3, 1))})
    result = trained.forward("run", [datum], "cross_entropy", {})
    assert result.logprobs[0].shape == (3, 1)
    values = torch.tensor(result.logprobs[0].values())
    assert values.isnan().tolist() == [False, True, False]
    assert result.loss == pytest.approx(-float(values[0] + values[2]) / 2)


def test_all_masked_has_no_loss_and_no_effect(trained):
    datum = Datum(Tensor.of([3, 4], "int64"), {"target_tokens": Tensor.of([IGNORED_TARGET] * 2, "int64")})
    before = state(trained)
    result = trained.forward_backward("run", [datum], "cross_entropy", {})
    assert (result.loss, result.metrics["num_trained_tokens"]) == (0.0, 0.0)
    metrics = trained.optim_step("run", ADAM).metrics
    assert metrics["grad_norm"] == 0.0
    assert torch.equal(before[0][0], trained._runs["run"].theta_P)


def test_zero_weight_is_not_trained_but_has_a_logprob(trained):
    ids = tiny_models.random_ids(6, seed=0)
    datum = tiny_models.next_token_datum(ids, [1.0, 0.0, 1.0, 0.0, 2.0])
    result = trained.forward_backward("run", [datum], "cross_entropy", {})
    assert result.metrics["num_trained_tokens"] == 3
    assert not any(value != value for value in result.logprobs[0].values())


def test_split_requests_accumulate_like_one(trained, load):
    other = load(limits=EngineLimits(train_token_budget=8))
    other.init_run("run", rank=4, seed=1)
    other._runs["run"].theta_P.copy_(trained._runs["run"].theta_P)
    data = some_data()
    trained.forward_backward("run", data, "cross_entropy", {})
    for datum in data:
        other.forward_backward("run", [datum], "cross_entropy", {})
    one, many = trained._runs["run"].accumulated, other._runs["run"].accumulated
    assert one.num_tokens == many.num_tokens
    torch.testing.assert_close(one.grad_P, many.grad_P, atol=1e-4, rtol=1e-4)


def test_skip_token_normalization_takes_plain_sums(trained):
    mean = trained.forward_backward("run", some_data(), "cross_entropy", {})
    mean_norm = trained.optim_step("run", AdamParams(learning_rate=0.0)).metrics["grad_norm"]
    plain = trained.forward_backward("run", some_data(), "cross_entropy", SKIP)
    plain_norm = trained.optim_step("run", AdamParams(learning_rate=0.0)).metrics["grad_norm"]
    num = mean.metrics["num_trained_tokens"]
    assert plain.loss == pytest.approx(mean.loss * num)
    assert plain_norm == pytest.approx(mean_norm * num, rel=1e-5)
    assert plain.metrics["skip_token_normalization"] == 1.0
    assert "skip_token_normalization" not in mean.metrics


@pytest.mark.parametrize(("first", "second"), [({}, SKIP), (SKIP, {})])
def test_the_two_normalisations_cannot_share_a_step(trained, first, second):
    trained.forward_backward("run", some_data(), "cross_entropy", first)
    before = state(trained)
    with pytest.raises(BadRequest) as error:
        trained.forward_backward("run", some_data(), "cross_entropy", second)
    assert error.value.field == "loss_fn_config.skip_token_normalization"
    assert same(before, state(trained))
    trained.optim_step("run", ADAM)
    trained.forward_backward("run", some_data(), "cross_entropy", second)


def test_a_loss_that_is_not_finite_leaves_the_run_as_it_was(trained):
    trained.forward_backward("run", some_data(), "cross_entropy", {})
    before = state(trained)
    bad = tiny_models.next_token_datum(tiny_models.random_ids(4, seed=0), [1.0, float("inf"), 1.0])
    with pytest.raises(OperationFailed, match=r"data\[4\] is not finite at token 1"):
        trained.forward_backward("run", [*some_data(), bad], "cross_entropy", {})
    assert same(before, state(trained))


def test_a_gradient_that_is_not_finite_leaves_the_run_as_it_was(trained):
    before = state(trained)
    huge = tiny_models.next_token_datum(tiny_models.random_ids(3, seed=0), [3e38, 0.0])
    with pytest.raises(OperationFailed, match="not finite"):
        trained.forward_backward("run", [huge], "cross_entropy", {})
    assert same(before, state(trained))


def test_steps_without_gradient_count_and_change_nothing(trained):
    before = trained._runs["run"].theta_P.clone()
    metrics = trained.optim_step("run", ADAM).metrics
    assert metrics == {
        "step": 3.0,
        "learning_rate": 1e-2,
        "lr": 1e-2,
        "grad_norm": 0.0,
        "num_trained_tokens": 0.0,
    }
    assert torch.equal(before, trained._runs["run"].theta_P)


@pytest.mark.parametrize(
    ("datum", "field"),
    [
        (Datum(Tensor.of([], "int64"), {"target_tokens": Tensor.of([], "int64")}), "model_input"),
        (Datum(Tensor.of([96], "int64"), {"target_tokens": Tensor.of([1], "int64")}), "model_input"),
        (Datum(Tensor.of([1], "int64"), {}), "loss_fn_inputs.target_tokens"),
        (Datum(Tensor.of([1], "int64"), {"target_tokens": Tensor.of([-1], "int64")}), "loss_fn_inputs.target_tokens"),
        (Datum(Tensor.of([1], "int64"), {"target_tokens": Tensor.of([1, 2], "int64")}), "loss_fn_inputs.target_tokens"),
        (Datum(Tensor.of([1] * 257, "int64"), {"target_tokens": Tensor.of([1] * 257, "int64")}), "model_input"),
    ],
)
def test_a_datum_that_does_not_fit_is_named(trained, datum, field):
    good = some_data(1)
    with pytest.raises(BadRequest) as error:
        trained.forward_backward("run", [*good, datum], "cross_entropy", {})
    assert error.value.field == f"data[1].{field}"


def test_unknown_loss_and_configuration_are_named(trained):
    with pytest.raises(BadRequest, match="loss_fn"):
        trained.forward("run", some_data(), "no_such_loss", {})
    with pytest.raises(BadRequest, match=r"loss_fn_config\.clip"):
        trained.forward("run", some_data(), "cross_entropy", {"clip": 1.0})


@pytest.mark.parametrize("config", [{}, SKIP])
def test_snapshot_restores_every_bit(trained, load, tmp_path, config):
    trained.forward_backward("run", some_data(seed=50), "cross_entropy", config)
    trained.snapshot("run", tmp_path / "snapshot")
    restored = load()
    result = restored.restore("run", tmp_path / "snapshot")
    assert (result.step, result.lora_rank) == (2, 4)
    assert same(state(trained), state(restored))
    for engine in (trained, restored):
        engine.forward_backward("run", some_data(seed=60), "cross_entropy", config)
        engine.optim_step("run", ADAM)
        train(engine, seed=70)
    assert same(state(trained), state(restored))


def test_a_snapshot_is_of_the_moment_that_it_was_begun(trained, tmp_path):
    trained.forward_backward("run", some_data(seed=50), "cross_entropy", {})
    write, before = trained.begin_snapshot("run", tmp_path / "snapshot"), state(trained)
    # The copy is written while these go on: they must not reach it.
    trained.forward_backward("run", some_data(seed=60), "cross_entropy", {})
    train(trained)
    assert write() > 0
    trained.restore("again", tmp_path / "snapshot")
    assert same(before, state(trained, "again"))


def test_a_snapshot_of_a_version_before_is_read(trained, load, tmp_path):
    """It was a trainer checkpoint with the gradients beside it."""
    trained.forward_backward("run", some_data(seed=50), "cross_entropy", {})
    run = trained._runs["run"]
    folder = tmp_path / "snapshot"
    checkpoint.write_trainer(folder, run)
    gradients = {f"grad.{p.name}": p.view.clone() for p in run.shape.named(run.accumulated.grad_P)}
    safetensors.torch.save_file(gradients, folder / "gradients.safetensors")
    scalars = json.loads((folder / "selfloop.json").read_text())
    scalars["accumulated"] = {"num_tokens": run.accumulated.num_tokens, "normalised": True, "num_pairs": None}
    (folder / "selfloop.json").write_text(json.dumps(scalars))
    (folder / MANIFEST_FILE).unlink()
    restored = load()
    restored.restore("run", folder)
    assert same(state(trained), state(restored))


def test_snapshot_of_a_fresh_run(engine, load, tmp_path):
    engine.init_run("run", rank=4, seed=1)
    engine.snapshot("run", tmp_path / "snapshot")
    restored = load()
    restored.restore("run", tmp_path / "snapshot")
    assert same(state(engine), state(restored))


def test_trainer_checkpoint_resumes(trained, load, tmp_path):
    saved = trained.save_trainer_checkpoint("run", tmp_path / "checkpoint")
    assert (saved.step, saved.lora_rank, saved.lora_alpha) == (2, 4, 32.0)
    other = load()
    other.init_run("run", rank=8, seed=5)
    other.forward_backward("run", some_data(), "cross_entropy", {})
    result = other.load_checkpoint("run", tmp_path / "checkpoint", with_optimizer=True)
    assert (result.step, result.lora_rank) == (2, 4)
    assert same(state(trained), state(other))


def test_weights_only_load_drops_moments_step_and_gradients(trained, tmp_path):
    trained.save_trainer_checkpoint("run", tmp_path / "checkpoint")
    weights = trained._runs["run"].theta_P.clone()
    trained.forward_backward("run", some_data(), "cross_entropy", {})
    result = trained.load_checkpoint("run", tmp_path / "checkpoint", with_optimizer=False)
    assert (result.step, result.lora_rank) == (0, 4)
    run = trained._runs["run"]
    assert run.moments is None
    assert run.accumulated is None
    assert torch.equal(run.theta_P, weights)


def test_a_sampler_checkpoint_has_no_optimizer_to_resume(trained, tmp_path):
    trained.save_sampler_checkpoint("run", tmp_path / "checkpoint")
    before = state(trained)
    with pytest.raises(OperationFailed, match="not a trainer checkpoint"):
        trained.load_checkpoint("run", tmp_path / "checkpoint", with_optimizer=True)
    assert same(before, state(trained))


def test_existing_directory_is_not_written_into(trained, tmp_path):
    with pytest.raises(FileExistsError):
        trained.save_sampler_checkpoint("run", tmp_path)


def test_no_flipped_bit_of_what_was_written_is_read(trained, tmp_path):
    """Of any file, also of those that a load of weights alone would not need."""
    trained.forward_backward("run", some_data(seed=50), "cross_entropy", {})
    trained.save_trainer_checkpoint("run", tmp_path / "checkpoint")
    trained.snapshot("run", tmp_path / "snapshot")
    readers = {
        "checkpoint": [
            lambda folder: trained.load_checkpoint("run", folder, with_optimizer=True),
            lambda folder: trained.load_checkpoint("run", folder, with_optimizer=False),
            lambda folder: trained.load_adapter("c", folder),
            lambda folder: trained.init_run("run", rank=4, seed=1, initial=folder),
        ],
        "snapshot": [lambda folder: trained.restore("run", folder)],
    }
    before, rng = state(trained), random.Random(5)
    for name, reads in readers.items():
        for path in sorted((tmp_path / name).iterdir()):
            content = path.read_bytes()
            for _ in range(20):
                bit = rng.randrange(len(content) * 8)
                changed = bytearray(content)
                changed[bit // 8] ^= 1 << bit % 8
                path.write_bytes(changed)
                for read in reads:
                    with pytest.raises(CheckpointDamaged, match=f"{name}/{path.name} is damaged"):
                        read(tmp_path / name)
            path.write_bytes(content)
    assert same(before, state(trained))


def test_a_snapshot_that_is_gone_is_named_in_words(trained, tmp_path):
    with pytest.raises(CheckpointDamaged, match="run0001/1-7 is damaged: the folder is gone"):
        trained.restore("run", tmp_path / "snapshots" / "run0001" / "1-7")


@pytest.fixture
def adapter_dir(trained, tmp_path):
    """An adapter as another program might have written it: without digests of ours."""
    trained.save_sampler_checkpoint("run", tmp_path / "adapter")
    (tmp_path / "adapter" / MANIFEST_FILE).unlink()
    return tmp_path / "adapter"


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 8}, "shape"),
    ],
)
def test_adapter_features_beyond_plain_lora_are_refused_by_name(engine, adapter_dir, changes, message):
    edit_config(adapter_dir, **changes)
    with pytest.raises(OperationFailed, match=message):
        engine.load_adapter("c", adapter_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("nan")), "not finite"),
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), "without its lora_B"),
        (lambda t: t.update({"lm_head.lora_A.weight": torch.ones(1)}), "without its|no place"),
        (lambda t: t.update({"extra": torch.ones(1)}), "no place"),
    ],
)
def test_broken_adapter_weights_are_refused(engine, adapter_dir, change, message):
    edit_weights(adapter_dir, change)
    with pytest.raises(OperationFailed, match=message):
        engine.load_adapter("c", adapter_dir)


def test_truncated_adapter_is_refused(engine, adapter_dir):
    path = adapter_dir / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OperationFailed, match="cannot be read"):
        engine.load_adapter("c", adapter_dir)


def test_gradients_whose_sum_overflows_leave_the_run_as_it_was(trained):
    run = trained._runs["run"]
    trained.forward_backward("run", some_data(), "cross_entropy", {})
    run.accumulated.grad_P.fill_(3e38)
    weights = [3e37 * (-1.0) ** i for i in range(9)]
    large = tiny_models.next_token_datum(tiny_models.random_ids(10, seed=3), weights)
    before = state(trained)
    with pytest.raises(OperationFailed, match="not finite"):
        trained.forward_backward("run", [large], "cross_entropy", {})
    assert same(before, state(trained))


def columns(datum, num_targets=1):
    """The same datum with its targets and weights in ``num_targets`` equal columns."""
    num = datum.tokens.num_elements
    repeated = {
        name: Tensor.of([v for v in tensor.values() for _ in range(num_targets)], tensor.dtype, (num, num_targets))
        for name, tensor in datum.loss_inputs.items()
    }
    return Datum(datum.tokens, repeated)


def test_one_column_of_targets_is_the_same_as_none(trained, load):
    other = load()
    other.init_run("run", rank=4, seed=1)
    other._runs["run"].theta_P.copy_(trained._runs["run"].theta_P)
    flat = trained.forward_backward("run", some_data(), "cross_entropy", {})
    column = other.forward_backward("run", [columns(d) for d in some_data()], "cross_entropy", {})
    assert (flat.loss, flat.metrics) == (column.loss, column.metrics)
    assert [t.data for t in flat.logprobs] == [t.data for t in column.logprobs]
    assert [len(t.shape) for t in column.logprobs] == [2] * 4
    assert torch.equal(trained._runs["run"].accumulated.grad_P, other._runs["run"].accumulated.grad_P)


def test_equal_columns_multiply_the_loss_and_count_a_token_once(trained):
    flat = trained.forward("run", some_data(), "cross_entropy", {})
    three = trained.forward("run", [columns(d, 3) for d in some_data()], "cross_entropy", {})
    assert three.loss == pytest.approx(3 * flat.loss, rel=1e-5)
    assert three.metrics["num_trained_tokens"] == flat.metrics["num_trained_tokens"]


def test_datums_may_have_different_numbers_of_targets(trained):
    flat = trained.forward("run", some_data(4), "cross_entropy", {})
    mixed = [columns(d, k) for d, k in zip(some_data(4), (2, 2, 1, 3), strict=True)]
    result = trained.forward("run", mixed, "cross_entropy", {}, summed=True)
    assert [tensor.shape[1] for tensor in result.logprobs] == [2, 2, 1, 3]
    for tensor, k, alone in zip(result.logprobs, (2, 2, 1, 3), flat.logprobs, strict=True):
        assert list(tensor.values())[::k] == pytest.approx(list(alone.values()), rel=1e-5, nan_ok=True)


def pairs(num=4):
    """Rows that follow each other as chosen and rejected, with made-up reference logprobs."""
    return [
        Datum(d.tokens, d.loss_inputs | {"ref_logprobs": Tensor.of([-3.0] * d.tokens.num_elements, "float32")})
        for d in some_data(num)
    ]


def test_split_pairs_accumulate_like_one_call(trained, load):
    other = load(limits=EngineLimits(train_token_budget=8))
    other.init_run("run", rank=4, seed=1)
    other._runs["run"].theta_P.copy_(trained._runs["run"].theta_P)
    data = pairs(6)
    whole = trained.forward_backward("run", data, "dpo", {})
    parts = [other.forward_backward("run", data[at : at + 2], "dpo", {}) for at in (0, 2, 4)]
    assert whole.loss == pytest.approx(sum(part.loss for part in parts) / 3, abs=1e-5)
    one, many = trained._runs["run"].accumulated, other._runs["run"].accumulated
    assert one.num_pairs == many.num_pairs == 3
    torch.testing.assert_close(one.grad_P, many.grad_P, atol=1e-4, rtol=1e-4)
    norms = [engine.optim_step("run", ADAM).metrics["grad_norm"] for engine in (trained, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_training_on_pairs_widens_the_margin(trained):
    results = []
    for _ in range(6):
        results.append(trained.forward_backward("run", pairs(), "dpo", {"beta": 0.5}))
        trained.optim_step("run", ADAM)
    assert results[-1].loss < results[0].loss
    assert results[-1].metrics["margin"] > results[0].metrics["margin"]


def test_a_snapshot_keeps_what_pairs_are_divided_by(trained, tmp_path):
    trained.forward_backward("run", pairs(), "dpo", {})
    trained.snapshot("run", tmp_path / "snapshot")
    trained.restore("again", tmp_path / "snapshot")
    assert trained._runs["again"].accumulated.num_pairs == 2
    results = [trained.optim_step(run_id, ADAM).metrics for run_id in ("run", "again")]
    assert results[0] == results[1]


@pytest.mark.parametrize("dpo_first", [True, False])
def test_gradients_of_pairs_and_of_tokens_cannot_share_a_step(trained, dpo_first):
    calls = [(pairs(), "dpo", {}), (some_data(), "cross_entropy", {})]
    first, second = calls if dpo_first else calls[::-1]
    trained.forward_backward("run", *first)
    before = state(trained)
    with pytest.raises(BadRequest) as error:
        trained.forward_backward("run", *second)
    assert error.value.field == "loss_fn"
    assert same(before, state(trained))
    trained.optim_step("run", ADAM)
    trained.forward_backward("run", *second)


def test_pairs_that_are_no_pairs(trained):
    with pytest.raises(BadRequest) as odd:
        trained.forward("run", pairs(3), "dpo", {})
    assert odd.value.field == "data"
    with pytest.raises(BadRequest) as neither:
        trained.forward("run", some_data(2), "dpo", {})
    assert neither.value.field == "data[0].loss_fn_inputs.ref_logprobs"
    both = [Datum(d.tokens, d.loss_inputs | {"logprobs": d.loss_inputs["ref_logprobs"]}) for d in pairs(2)]
    with pytest.raises(BadRequest) as twice:
        trained.forward("run", both, "dpo", {})
    assert twice.value.field == "data[0].loss_fn_inputs.logprobs"


def test_a_pair_whose_loss_is_not_finite_is_named(trained):
    data = pairs(4)
    wild = Tensor.of([3e38] * data[2].tokens.num_elements, "float32")
    data[2] = Datum(data[2].tokens, data[2].loss_inputs | {"ref_logprobs": wild})
    with pytest.raises(OperationFailed, match=r"data\[2\] and data\[3\] is not finite"):
        trained.forward_backward("run", data, "dpo", {})
    # The other way round the loss would be zero, but the margin has no number.
    data[2], data[3] = data[3], data[2]
    with pytest.raises(OperationFailed, match=r"data\[2\] and data\[3\] is not finite"):
        trained.forward("run", data, "dpo", {})


def test_weights_that_equal_the_base_model_are_named(load, tmp_path, caplog):
    """A sampler over a run that never trained, or over an adapter whose B is zero, answers as the base model does."""
    engine = load()
    engine.init_run("run", rank=4, seed=0)
    engine.publish("run", "fresh")
    assert "the weights published as fresh equal the base model" in caplog.text
    engine.save_sampler_checkpoint("run", tmp_path / "fresh")
    caplog.clear()
    engine.load_adapter("read", tmp_path / "fresh")
    assert "checkpoint read samples as the base model" in caplog.text
    caplog.clear()
    train(engine, steps=1)
    engine.publish("run", "trained")
    engine.save_sampler_checkpoint("run", tmp_path / "trained")
    engine.load_adapter("read", tmp_path / "trained")
    assert "base model" not in caplog.text
