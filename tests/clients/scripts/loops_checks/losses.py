"""Each loss does what it is for, and gradients add up as they should."""

import random
import statistics

from baseten.loops import Datum, ModelInput, SampledSequence, SamplingParams, TensorData, TrainingClient
from shared import ADAM, close, ids, logprobs, plain, step, trainer

POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "dppo", "dro")


def reward_of(answer: SampledSequence) -> float:
    """The share of tokens with an even id: half of them by chance."""
    return statistics.fmean(token % 2 == 0 for token in answer.tokens)


def to_datum(prompt: list[int], answer: SampledSequence, advantage: float) -> Datum:
    before = len(prompt) - 1
    return Datum(
        model_input=ModelInput.from_ints((prompt + answer.tokens)[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData.from_list([-100] * before + answer.tokens, dtype="int64"),
            "logprobs": TensorData.from_list([0.0] * before + answer.logprobs),
            "advantages": TensorData.from_list([0.0] * before + [advantage] * len(answer.tokens)),
        },
    )


def improve(client: TrainingClient, loss_fn: str, prompt: list[int], seed: int) -> float:
    """One step on a group of samples, in two updates, so that the second is off the policy; the mean reward."""
    sampler = client.save_weights_and_get_sampling_client("policy")
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=seed)
    answers = sampler.sample(ModelInput.from_ints(prompt), 16, params).sequences
    rewards = [reward_of(answer) for answer in answers]
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    data = [to_datum(prompt, a, (r - mean) / (spread + 1e-4)) for a, r in zip(answers, rewards, strict=True)]
    random.Random(seed).shuffle(data)
    for half in (data[::2], data[1::2]):
        client.forward_backward(half, loss_fn)
        client.optim_step(ADAM).result()
    return mean


def check_policy_losses_raise_a_reward():
    for loss_fn in POLICY_LOSSES:
        client = trainer(seed=2)
        rewards = [improve(client, loss_fn, ids(3, 6), seed) for seed in range(8)]
        first, last = rewards[0], statistics.fmean(rewards[-3:])
        assert last > first + 0.2, (loss_fn, rewards)


def check_null_logprobs_of_masked_positions_are_taken_back():
    """What forward answers goes back as it is: on the policy itself every ratio is 1."""
    client = trainer()
    tokens = ids(1, 13)
    targets = [-100 if i < 4 else token for i, token in enumerate(tokens[1:])]
    inputs = {"target_tokens": TensorData.from_list(targets, dtype="int64")}
    datum = Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    (output,) = client.forward([datum], "cross_entropy").result().loss_fn_outputs
    own = output["logprobs"]
    assert [value is None or value != value for value in own.data] == [target == -100 for target in targets]
    advantages = [float("nan")] * 4 + [0.5] * 8
    policy = {"logprobs": own, "advantages": TensorData.from_list(advantages)}
    for loss_fn, expected in (("ppo", -0.5), ("importance_sampling", -0.5)):
        sent = datum.model_copy(update={"loss_fn_inputs": inputs | policy})
        result = client.forward_backward([sent], loss_fn).result()
        close([result.loss], [expected], 1e-4)
        assert result.metrics["num_trained_tokens"] == 8
    assert client.optim_step(ADAM).result().metrics["grad_norm"] > 0


def check_gradients_of_several_calls_are_those_of_one():
    data = [plain(seed, 5 + 3 * seed) for seed in range(5)]
    whole, split = trainer(seed=6), trainer(seed=6)
    step(whole, *data)
    split.forward_backward(data[:1], "cross_entropy")
    split.forward_backward(data[1:4], "cross_entropy")
    split.forward_backward(data[4:], "cross_entropy")
    split.optim_step(ADAM).result()
    close(logprobs(split), logprobs(whole), 1e-4)


def check_init_trainer_server_resets():
    client, fresh = trainer(seed=8), trainer(seed=8)
    start = logprobs(client)
    step(client, plain(1))
    client.forward_backward([plain(2)], "cross_entropy").result()
    close_to_start = max(abs(a - b) for a, b in zip(logprobs(client), start, strict=True))
    assert close_to_start > 1e-3, close_to_start
    client.init_trainer_server(8)
    assert logprobs(client) == start
    assert client.policy_version == 0
    for one in (client, fresh):
        step(one, plain(3))
    assert logprobs(client) == logprobs(fresh)


def squared_margin(data: list[Datum], rows: list[list[float]], goal: float = -2.0) -> list[list[float]]:
    """The gradient of the mean over datums of (goal - mean logprob)^2, where the goal is not reached."""
    gradients: list[list[float]] = []
    for row in rows:
        mean = statistics.fmean(row)
        slope = -2 * max(0.0, goal - mean) / len(row) / len(data)
        gradients.append([slope] * len(row))
    return gradients


def check_custom_loss_by_hand():
    """The two calls of a custom loss, without torch: logprobs out, weights of -dC/dlogprob back."""
    client = trainer()
    data = [plain(1), plain(2, 9)]
    config = {"skip_token_normalization": True}
    means: list[float] = []
    for _ in range(12):
        answer = client.forward(data, "cross_entropy", loss_fn_config=config).result()
        assert answer.metrics["skip_token_normalization"] == 1.0, answer.metrics
        rows = [output["logprobs"].data for output in answer.loss_fn_outputs]
        means.append(min(statistics.fmean(row) for row in rows))
        weighted = [
            datum.model_copy(
                update={
                    "loss_fn_inputs": datum.loss_fn_inputs
                    | {"weights": TensorData.from_list([-slope for slope in gradient])}
                }
            )
            for datum, gradient in zip(data, squared_margin(data, rows), strict=True)
        ]
        client.forward_backward(weighted, "cross_entropy", loss_fn_config=config)
        client.optim_step(ADAM).result()
    assert means[-1] > means[0] + 0.5, means
