"""The loss of ``examples/focal_loss``, installed beside Selfloop, against its formula in float64 on PEFT's model."""

import json

import pytest
import torch

import tiny_models
from installed_package import EXAMPLES, declared, install, run

PACKAGE = EXAMPLES / "focal_loss"
GAMMA, RATE, STEPS = 1.5, 5e-3, 4
SEQUENCES = [tiny_models.random_ids(num, seed=num) for num in (12, 30, 7)]

TRAIN = f"""
import json, pathlib, sys
from selfloop.types.losses import LOSSES
assert LOSSES["focal"].config == {{"gamma": 2.0}} and "torch" not in sys.modules
import tiny_models
from selfloop.engine.engine import Engine
from selfloop.types.operation import AdamParams

engine = Engine.load(pathlib.Path(sys.argv[1]), device="cpu", dtype="float32")
engine.init_run("run", rank=4, seed=3)
data = [tiny_models.next_token_datum(ids) for ids in {SEQUENCES}]
losses = []
for _ in range({STEPS}):
    losses.append(engine.forward_backward("run", data, "focal", {{"gamma": {GAMMA}}}).loss)
    engine.optim_step("run", AdamParams(learning_rate={RATE}, eps=1e-8, grad_clip_norm=0.0))
print(json.dumps(losses))
"""


def test_a_loss_of_another_package_trains_as_its_formula_says(zoo, tmp_path):
    done = run(TRAIN, zoo.folder("llama"), path=install(PACKAGE, declared(PACKAGE), tmp_path))
    assert done.returncode == 0, done.stderr

    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    model = zoo.peft("llama", engine, "run").double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    expected = []
    for _ in range(STEPS):
        per_token = []
        for ids in SEQUENCES:
            lp_NV = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            lp_N = lp_NV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            per_token.append(-((1 - lp_N.exp()) ** GAMMA) * lp_N)
        loss = torch.cat(per_token).mean()
        expected.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert expected[0] - expected[-1] > 0.05
    assert json.loads(done.stdout) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("entry_points", "error"),
    [
        ({"selfloop.loss_specs": {"ppo": "focal_loss_spec:SPEC"}}, "expected a LossSpec named 'ppo'"),
        ({"selfloop.loss_functions": {"ppo": "focal_loss:focal"}}, "there is a loss of this name already"),
        ({"selfloop.loss_specs": {"focal": "focal_loss_spec:SPEC"}}, "selfloop.loss_functions: focal"),
        (
            {"selfloop.loss_functions": {"focal": "focal_loss:focal"}},
            "selfloop.loss_specs or selfloop.loss_functions: focal",
        ),
    ],
)
def test_half_a_loss_or_a_name_that_is_used_is_an_error(tmp_path, entry_points, error):
    done = run("import selfloop.engine.losses.registry", path=install(PACKAGE, entry_points, tmp_path))
    assert done.returncode != 0
    assert error in done.stderr
