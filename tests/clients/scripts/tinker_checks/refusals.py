"""What bad input gets: an answer at once that names the field, and no harm to what comes after."""

import tinker
from shared import ADAM, MODEL, base_sampler, datum, ids, prompt, refused, service, step, tensor, trainer
from tinker import types


def check_bad_operations_do_not_block() -> None:
    client = trainer()
    run = client.forward_backward
    refused(lambda: run([datum(ids(1))], "no_such_loss").result(), "loss_fn: one of cross_entropy")
    refused(lambda: run([datum([5, 9999])], "cross_entropy").result(), "data[0].loss_fn_inputs.target_tokens")
    refused(lambda: run([datum(ids(1))], "ppo").result(), "logprobs: required by ppo")
    refused(lambda: run([datum(ids(1), nonsense=[0.0] * 15)], "cross_entropy").result(), "nonsense")
    refused(lambda: run([datum(ids(1), weights=[0.0] * 3)], "cross_entropy").result(), "weights.shape")
    refused(lambda: run([datum(ids(1), weights=[float("nan")] * 15)], "cross_entropy").result(), "finite")
    refused(lambda: run([datum(ids(1))], "cross_entropy", {"beta": 1.0}).result(), "loss_fn_config.beta")
    refused(lambda: run([datum(ids(1, 300))], "cross_entropy").result(), "1 to 256 tokens")
    refused(lambda: client.optim_step(types.AdamParams(learning_rate=-1.0)).result(), "adam_params.learning_rate")
    refused(lambda: client.save_state("a b").result(), "path")
    losses = [step(client, datum(ids(1))) for _ in range(3)]
    assert losses[-1] < losses[0]


def check_one_bad_part_of_many() -> None:
    """The call fails, what comes after it does not."""
    client = trainer()
    data = [datum(ids(seed, 6)) for seed in range(1030)]
    data[1026] = datum(ids(1, 6), target_tokens=tensor([9999] * 5, dtype=int))
    refused(lambda: client.forward_backward(data, "cross_entropy").result(), "data[2].loss_fn_inputs")
    client.optim_step(ADAM).result()
    step(client, datum(ids(1)))


def check_bad_samples() -> None:
    def sample(tokens: list[int], num: int = 1, **params):
        return base_sampler().sample(prompt(tokens), num, types.SamplingParams(**params)).result()

    bad = tinker.BadRequestError
    refused(lambda: sample(ids(1), max_tokens=5000), "max_tokens: 1 to 240", bad)
    refused(lambda: sample([9999], max_tokens=1), "prompt: token ids", bad)
    refused(lambda: sample([], max_tokens=1), "prompt: at least one token", bad)
    refused(lambda: sample(ids(1), num=0, max_tokens=1), "num_samples", bad)
    refused(lambda: sample(ids(1), max_tokens=1, temperature=-1.0), "temperature", bad)
    refused(lambda: sample(ids(1), max_tokens=1, top_p=0.0), "top_p", bad)


def check_bad_models() -> None:
    create = service().create_lora_training_client
    refused(lambda: create("no/such").result(), "no/such", tinker.NotFoundError)
    refused(lambda: create(MODEL, rank=0).result(), "lora_rank", tinker.BadRequestError)
    nothing = {"train_attn": False, "train_mlp": False, "train_unembed": False}
    try:
        create(MODEL, **nothing).result()
    except (tinker.BadRequestError, ValueError, AssertionError):
        return
    raise AssertionError("a model without anything to train")


def check_a_wrong_key() -> None:
    client = tinker.ServiceClient(api_key="tml-wrong")
    refused(lambda: client.create_lora_training_client(MODEL).result(), "not valid here", tinker.AuthenticationError)
