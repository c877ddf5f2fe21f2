"""The family of ``examples/seed_oss_family``, installed beside Selfloop, against transformers in float32."""

import json

import pytest
import torch
from transformers import SeedOssConfig, SeedOssForCausalLM

import tiny_models
from installed_package import EXAMPLES, declared, install, run

PACKAGE = EXAMPLES / "seed_oss_family"
IDS = tiny_models.random_ids(20, seed=1)
NUM_NEW = 12

COMPUTE = f"""
import json, pathlib, sys
from selfloop.types.model_folder import SUPPORTED_MODEL_TYPES
assert "seed_oss" in SUPPORTED_MODEL_TYPES and "torch" not in sys.modules
import tiny_models
from selfloop.engine.engine import Engine
from selfloop.types.sampling import SampleRequest, SamplingParams

engine = Engine.load(pathlib.Path(sys.argv[1]), device="cpu", dtype="float32")
engine.init_run("run", rank=4, seed=3)
trained = engine.forward_backward("run", [tiny_models.next_token_datum({IDS})], "cross_entropy", {{}})
engine.submit_sample(SampleRequest("greedy", {IDS}, 1, SamplingParams({NUM_NEW}, temperature=0)))
results = []
while engine.num_sampling:
    results += engine.sample_step()
print(json.dumps([list(trained.logprobs[0].values()), trained.loss, results[0].sequences[0].tokens]))
"""


def seed_oss() -> SeedOssForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny_models.VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    model = SeedOssForCausalLM(SeedOssConfig(**sizes, **heads, eos_token_id=tiny_models.EOS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def test_a_family_of_another_package_computes_as_transformers(tmp_path):
    model = seed_oss()
    tiny_models.save_quietly(model, tmp_path / "model")
    done = run(COMPUTE, tmp_path / "model", path=install(PACKAGE, declared(PACKAGE), tmp_path))
    assert done.returncode == 0, done.stderr
    logprobs, loss, tokens = json.loads(done.stdout)

    ids = torch.tensor([IDS])
    with torch.no_grad():
        lp_NV = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        generated = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=2
        )
    expected = lp_NV.gather(1, ids[0, 1:, None])[:, 0]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert loss == pytest.approx(-float(expected.mean()), abs=1e-4)
    assert tokens == generated[0, len(IDS) :].tolist()
    assert len(tokens) == NUM_NEW
