"""The OpenAPI document: keys, addresses, what may be null, and whose words it is in."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from asgi import app_for_documents
from selfloop.types.settings import CapacitySettings, ControlSettings, Offered, Settings

Json = dict[str, Any]
# SHA-256 of each description of the hosted create-run specification, whitespace and case folded: ours are others.
THEIRS = {
    "0424e1413fff4a4147c37bbe8e74718608eb417dddad93ef0af332c4ab1c5c4f",
    "051308c08f5228044bf514acf87a8468fa3845f31516e7269c241a7aab6c1ecd",
    "16e40836a86bb95b7da98072408a61816c8778bd4062fd68b6b5af3bf9a56631",
    "2a5ff845e77d5458c3c501d4f2de006b5fb5c7d31e9ff4b4139c29d262d44940",
    "2e8cfe4cb1cb5be7de276be6b4c227927c98ce57e07c0211c5664c6a2bc8eb45",
    "33c75bece788b93ff1b12cca068fca00c7b82dda6c48e2dc86a85cb9c9e5b8e9",
    "386a8ba2bc907f13e215e1c307d817b0aa0047a64d602b94404e7a985a510041",
    "3c5dd03dc101a9af4538fba3e7769525d882d1c70a102a95ce298ab140d3a0b3",
    "4e037835c4b027f7484656ebfc00515e33a10e76e2c5c69c462061c3a8cfdd28",
    "51df98d44e5043325aea72d82a90f8c706b82ae91c866b07efdc981e98170f38",
    "53d3efd733de286295044beb8962917ca46539948d5d38b8639dac7e47aacbaf",
    "5574f6a8877fcb1639bc09e2f947c1be850d44e8df2a3b5442f62a0f333517c5",
    "591e20956d7b6f6e4137757940b8ce4d260b21acfa906f9c938f9188d717c0ac",
    "5cb2c4d91a34cc1ad6b52c5e4de10dd43f438ae92b3f0efd0690311516cc4979",
    "6a24eed40e0e914b29578c3b224bb8138b1e667251a28eda3040414739da50e8",
    "6fdf0e0c078f7c0dcb0abb7cfbcf17821d46ab250e89a0f7eba10362cae618f9",
    "74bbdb29418d859154364d2e5ad2dd91676fd69b531c98f767a9587930509658",
    "823609503d1507c8b6e0f94561bed6ec49b3de409898b4d811c8d19a7be238fc",
    "878c2beeef869106a3765875103792ca105df7b4f580e742711e102c8f793f40",
    "88fde0acc0c4b6a1729fd2da9999c2a52b6439866858dd6fefb5723e8a84459b",
    "905f3cb98b65c70a06c2783e15275f6f02c2d4d2cd31d343ba056ae84222fb3b",
    "9309198aca3dab0ef5c1f20a5a5684781662ba42f50173bf98381507345e0b7b",
    "a1afbe78cb3cedf55bb13a5ca6f5b692b949fc5639cde852bd6b40d6276460ef",
    "a6e887a070890ef91740eb92ef52ec76aa6ca612d0f184d9361e7f2a5c415d1d",
    "b647a57679498784bd8ee8bff2f5a90e24791508c8370ef1dd5bc52825abe167",
    "b97cd0c1c823c9e6734d0d611b578f24c42a886733e7322c49c74e019cc511f0",
    "bd50fc175d439614999ae1d57503a823c060e2f1fbba79d063f4cb3b0dbf1f0a",
    "c84d22d5069e83f591a6839b08f3b8ebd7d04e6b7a82229f47a9106886a30af8",
    "d0cb2702576919dfc380b9da80a76b7ea4d06c7275a81cc05607825e4269cde1",
    "d42a9f731c5321040e4c466b2494358d96128a8925754184944cbac4670dfd81",
    "d4677b8a596286fe42452e3fdf06a33f8114ccc9d64827691a5a4bb9b9725068",
    "e4049af56e3facbc935e96524dc4deec19a8294dadf4acfc552ee612e8d20307",
    "f117a8b863b5eacc29eeb6f91ea8108f8e98e24b2d61a969ace2cb45ae37fe64",
    "f7dea97c4cccd11be68c8432b5461c0e2b5cd9c1ab2a24cf7edf9d49f952a23e",
    "fdc64c7f11b3d2ae928e1c72c2891478edcb9ef7a67876cac34d27bbd33daa49",
    "ff46c314a2444f5fc2f747f0e71aa9fab4ae776966678b81b9287c4b7f88924d",
}


def document(offered: Offered = "dedicated") -> Json:
    settings = Settings("127.0.0.1", 8000, Path("unused"), control=ControlSettings(capacity=CapacitySettings(offered)))
    return app_for_documents(settings).openapi()


def operations(found: Json) -> list[tuple[str, Json]]:
    return [(f"{m.upper()} {p}", op) for p, item in found["paths"].items() for m, op in item.items()]


def test_schemas_have_names_of_their_own():
    """Two of one name would be distinguished by their modules, which are none of a client's business."""
    assert [name for name in document()["components"]["schemas"] if "." in name] == []


def test_both_ways_to_send_a_key():
    found = document()
    schemes = found["components"]["securitySchemes"]
    assert (schemes["BearerAuth"]["type"], schemes["BearerAuth"]["scheme"]) == ("http", "bearer")
    api_key = schemes["ApiKeyAuth"]
    assert (api_key["type"], api_key["in"], api_key["name"]) == ("apiKey", "header", "Authorization")
    assert {"BearerAuth": []} in found["security"]
    assert {"ApiKeyAuth": []} in found["security"]


def test_what_needs_no_key_says_so():
    keyless = {name for name, op in operations(document()) if op.get("security") == []}
    assert "GET /healthz" in keyless
    assert "GET /files/{checkpoint_id}/{name}" in keyless
    assert not [name for name in keyless if " /v1/" in name or " /loops/" in name]


def test_absent_nullable_fields_and_parameters_are_null():
    found = document()
    missing = [
        f"{name}.{field}"
        for name, schema in found["components"]["schemas"].items()
        for field, value in schema.get("properties", {}).items()
        if {"type": "null"} in value.get("anyOf", [])
        and field not in schema.get("required", [])
        and "default" not in value
    ]
    assert not missing
    body = found["components"]["schemas"]["CreateLoopsRunRequestV1"]["properties"]
    assert body["max_seq_len"]["default"] is None
    for name, op in operations(found):
        for parameter in op.get("parameters", []):
            schema = parameter["schema"]
            if not parameter.get("required") and {"type": "null"} in schema.get("anyOf", []):
                assert "default" in schema, (name, parameter["name"])


def test_every_parameter_of_a_path_is_there_and_no_team_is_asked_for_beside_it():
    for name, op in operations(document()):
        parameters = {(p["in"], p["name"]) for p in op.get("parameters", [])}
        assert {("path", part) for part in re.findall(r"\{(\w+)", name)} <= parameters, name
        assert ("query", "team_id") not in parameters, name


@pytest.mark.parametrize(("offered", "is_null"), [("dedicated", False), ("both", True), ("serverless", True)])
def test_ids_of_capacity_are_null_where_they_can_be(offered: Offered, is_null: bool):
    schemas = document(offered)["components"]["schemas"]
    for name, field in (
        ("LoopsRunV1", "deployment_id"),
        ("LoopsSamplerV1", "model_id"),
        ("LoopsSamplerV1", "deployment_id"),
    ):
        schema = schemas[name]["properties"][field]
        assert ({"type": "null"} in schema.get("anyOf", [])) == is_null
        assert (schema.get("type") == "string") != is_null
        assert field in schemas[name]["required"]


def test_create_run_is_shown_by_example():
    operation = document()["paths"]["/v1/loops/runs"]["post"]
    samples = {sample["lang"]: sample["source"] for sample in operation["x-codeSamples"]}
    assert set(samples) == {"bash", "python"}
    compile(samples["python"], "sample", "exec")
    assert all("/v1/loops/runs" in sample and "BASETEN_API_KEY" in sample for sample in samples.values())


def test_create_run_is_described_in_our_own_words():
    schemas = document()["components"]["schemas"]
    names = ("CreateLoopsRunRequestV1", "CreateLoopsRunResponseV1", "LoopsRunV1", "LoopsSamplerV1")
    texts = [schemas[n].get("description", "") for n in (*names, "LoopsSamplerStatusV1", "DeploymentStatusV1")]
    texts += [field.get("description", "") for n in names for field in schemas[n]["properties"].values()]
    operation = document()["paths"]["/v1/loops/runs"]["post"]
    sentences = {s for t in [*texts, operation["summary"], operation["description"]] for s in folded(t)}
    assert sentences
    assert not [s for s in sentences if hashlib.sha256(s.encode()).hexdigest() in THEIRS]


def folded(text: str) -> list[str]:
    """Its sentences, without capitals, marks and breaks of lines."""
    return [" ".join(re.findall(r"\w+", s.lower())) for s in re.split(r"\.\s", text) if s.strip()]
