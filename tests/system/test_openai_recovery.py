"""A stream whose worker dies goes on as if nothing had happened."""

from collections.abc import Callable

import pytest
from openai import OpenAI

from gateway import KEY, MODEL, Gateway, create_run

ASKED = {"model": MODEL, "prompt": "once", "n": 3, "max_tokens": 200, "seed": 5}


@pytest.mark.parametrize("how_seeded", [{}, {"temperature": 0.0}])
def test_a_killed_worker_is_not_noticed(new_gateway: Callable[[], Gateway], how_seeded: dict[str, float]):
    gateway = new_gateway()
    base_url = create_run(gateway.http())["sampler"]["base_url"]
    with OpenAI(base_url=f"{base_url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        whole = client.completions.create(**ASKED, **how_seeded)
        texts, killed = [""] * 3, 0
        for chunk in client.completions.create(**ASKED, **how_seeded, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            if not killed and len(texts[1]) > 5:
                killed = gateway.kill_worker()
        assert killed
        assert gateway.worker_pid() != killed
        assert texts == [choice.text for choice in whole.choices]
