"""Text that is too long is refused before it is tokenized, and a team's text does not stand in another's way."""

from concurrent.futures import ThreadPoolExecutor

import httpx

from gateway import MODEL, Gateway, Run, datum, ok, words

LONG = "the captain's parrot " * 90_000


def test_long_prompts_of_one_team_beside_the_training_of_another(
    gateway: Gateway, http: httpx.Client, other_team: httpx.Client
):
    sampler = Run.create(http).resource["sampler"]["base_url"]
    run = Run.create(other_team).attached()

    def completion(_number: int) -> httpx.Response:
        return http.post(f"{sampler}/v1/completions", json={"model": MODEL, "prompt": LONG, "max_tokens": 1})

    def chat(_number: int) -> httpx.Response:
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "aye"} for i in range(20_001)]
        return http.post(f"{sampler}/v1/chat/completions", json={"model": MODEL, "messages": messages})

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(kind, number) for number in range(4) for kind in (completion, chat)]
        run.forward_backward([datum(words(1))])
        refused = [one.result() for one in asked]
    for response in refused:
        assert response.status_code == 400, response.text[:500]
        error = response.json()["error"]
        assert error["param"] in ("prompt", "messages")
        assert "tokens" in error["message"] or "rendered within" in error["message"]
    message = refused[0].json()["error"]["message"]
    assert f"{len(LONG)} bytes" in message, "it was measured, not tokenized"
    short = http.post(f"{sampler}/v1/completions", json={"model": MODEL, "prompt": "aye", "max_tokens": 1})
    assert ok(short)["usage"]["prompt_tokens"] > 0
