"""The command line reads long lists page by page."""

import httpx

from selfloop.cli.remote import Server


def test_every_page_is_asked_for():
    asked: list[dict[str, str]] = []
    tokens = {None: "a", "a": "b", "b": None}

    def answer(request: httpx.Request) -> httpx.Response:
        params = dict(request.url.params)
        asked.append(params)
        token = params.get("page_token")
        return httpx.Response(200, json={"runs": [{"id": token}], "next_page_token": tokens[token]})

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as http:
        rows = Server(http).rows("/v1/loops/runs", "runs", scope="org", base_model=None)
    assert [row["id"] for row in rows] == [None, "a", "b"]
    assert [params.get("page_token") for params in asked] == [None, "a", "b"]
    assert all(params["scope"] == "org" and int(params["page_size"]) <= 1000 for params in asked)
