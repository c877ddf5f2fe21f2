"""Save, load, go on; snapshots and named checkpoints."""

import numpy as np
import tinker
from shared import close, datum, ids, logprobs, refused, sampled, service, step, trainer
from tinker import types


def check_training_goes_on_from_a_checkpoint() -> None:
    """With the optimizer as if it had never stopped, without it otherwise."""
    client = trainer()
    for _ in range(3):
        step(client, datum(ids(1)))
    path = client.save_state("half").result().path
    assert path == f"tinker://{client.model_id}/weights/half", path
    resumed = service().create_training_client_from_state_with_optimizer(path).result()
    fresh = service().create_training_client_from_state(path).result()
    assert resumed.get_info().lora_rank == 8
    for each in (resumed, fresh):
        close(logprobs(each), logprobs(client), 0.0)
        step(each, datum(ids(2)))
    step(client, datum(ids(2)))
    close(logprobs(resumed), logprobs(client), 0.0)
    assert np.abs(logprobs(fresh) - logprobs(client)).max() > 1e-4


def check_load_in_place() -> None:
    client = trainer()
    step(client, datum(ids(1)))
    before = logprobs(client)
    path = client.save_state("here").result().path
    step(client, datum(ids(2)))
    client.load_state(path).result()
    close(logprobs(client), before, 0.0)


def check_a_name_is_taken_once() -> None:
    client = trainer()
    client.save_state("name").result()
    refused(lambda: client.save_state("name").result(), "has a checkpoint 'name'")
    step(client, datum(ids(1)))
    path = client.save_state("name", overwrite=True).result().path
    close(logprobs(service().create_training_client_from_state(path).result()), logprobs(client), 0.0)


def check_snapshots_keep_their_weights() -> None:
    client = trainer()
    step(client, datum(ids(1)))
    at_one = logprobs(client)
    first = client.save_weights_and_get_sampling_client().result()
    step(client, datum(ids(2)))
    second = client.save_weights_and_get_sampling_client().result()
    for _ in range(2):
        close(sampled(first), at_one)
        close(sampled(second), logprobs(client))


def check_named_sampler_weights() -> None:
    client = trainer()
    step(client, datum(ids(1)))
    at_one = logprobs(client)
    path = client.save_weights_for_sampler("for-others").result().path
    step(client, datum(ids(2)))
    assert path == f"tinker://{client.model_id}/sampler_weights/for-others", path
    sampler = service().create_sampling_client(model_path=path).result()
    assert sampler.get_base_model() == "tiny/llama"
    close(sampled(sampler), at_one)
    other = tinker.ServiceClient()
    close(sampled(other.create_sampling_client(model_path=path).result()), at_one)


def check_sampling_a_training_checkpoint() -> None:
    client = trainer(train_unembed=True)
    step(client, datum(ids(1)))
    path = client.save_state("both").result().path
    close(sampled(service().create_sampling_client(model_path=path).result()), logprobs(client))


def check_missing_checkpoints() -> None:
    gone = "tinker://aaaaaaa:train:0/weights/x"
    create = service().create_training_client_from_state
    refused(lambda: create(gone).result(), gone, tinker.NotFoundError)
    refused(lambda: trainer().load_state(gone).result(), gone)
    refused(lambda: create("tinker://x").result(), "tinker://<training run>", tinker.BadRequestError)
    sample = service().create_sampling_client
    refused(lambda: sample(model_path=gone).result(), gone, tinker.NotFoundError)


def check_user_metadata_is_taken() -> None:
    client = service().create_lora_training_client("tiny/llama", rank=4, user_metadata={"renderer_name": "x"}).result()
    client.save_state("with", ttl_seconds=3600, user_metadata={"step": "1"}).result()


def check_a_pickled_sampler() -> None:
    """A clone counts its requests elsewhere, and samples the same weights."""
    import pickle

    client = trainer()
    step(client, datum(ids(1)))
    sampler = client.save_weights_and_get_sampling_client().result()
    clone = pickle.loads(pickle.dumps(sampler))
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    answers = [
        s.sample(types.ModelInput.from_ints(ids(1)[:4]), 1, params).result().sequences[0] for s in (sampler, clone)
    ]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].sequence_id != answers[1].sequence_id
