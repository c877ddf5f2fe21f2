"""The ``baseten`` client's views of the past: logs, metrics and debug archives, sync and async."""

import time
from collections.abc import Iterator

import httpx
import pytest
from baseten.client import AsyncManagementClient, ManagementClient
from baseten.client.managementapi import _models as models

from gateway import KEY, Gateway, Run


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    made = Run.create(http).attached()
    made.train(1)
    return made


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[ManagementClient]:
    with ManagementClient(api_key=KEY, base_url_override=gateway.url) as made:
        yield made


def check_logs(answer: models.GetLogsResponse) -> None:
    assert any("forward_backward (seq_id 2) finished" in log.message for log in answer.logs)
    stamps = [int(log.timestamp) for log in answer.logs]
    assert stamps == sorted(stamps)
    assert abs(stamps[-1] / 1e9 - time.time()) < 3600
    assert all(log.level in ("INFO", "WARNING", "ERROR") for log in answer.logs)


def check_metrics(answer: models.GetLoopsDeploymentMetricsResponse, deployment_id: str) -> None:
    assert answer.deployment_id == deployment_id
    found = answer.metrics
    assert sum(point.value for point in found.inference_volume) > 0
    assert sum(point.status_2xx for point in found.inference_volume_by_status) > 0
    assert any(point.p50 is not None and point.p50 > 0 for point in found.response_time_stats)
    assert [node.node_id for node in found.per_node_metrics] == ["local"]


LOGS = models.GetLoopsDeploymentsLogsParams.model_validate({"direction": "asc", "limit": 1000, "min_level": "INFO"})
METRICS = models.GetLoopsDeploymentMetricsRequest(step_seconds=3600, time_divisor_seconds=60)


def test_logs_metrics_and_archive(client: ManagementClient, run: Run):
    id = run.resource["deployment_id"]
    check_logs(client.api.get_loops_deployments_logs(deployment_id=id, params=LOGS))
    check_metrics(client.api.post_loops_deployments_metrics(deployment_id=id, request=METRICS), id)
    params = models.GetLoopsDeploymentsDebugArchiveFilesParams(page_size=3)
    first = client.api.get_loops_deployments_debug_archive_files(deployment_id=id, params=params)
    params = models.GetLoopsDeploymentsDebugArchiveFilesParams(page_size=3, page_token=first.next_page_token)
    second = client.api.get_loops_deployments_debug_archive_files(deployment_id=id, params=params)
    assert second.next_page_token is None
    files = [*first.presigned_urls, *second.presigned_urls]
    assert len({file.relative_file_name for file in files}) == 5
    for file in files:
        assert len(httpx.get(file.url).raise_for_status().content) == file.size_bytes


async def test_logs_metrics_and_archive_async(gateway: Gateway, run: Run):
    id = run.resource["deployment_id"]
    client = AsyncManagementClient(api_key=KEY, base_url_override=gateway.url)
    try:
        check_logs(await client.api.get_loops_deployments_logs(deployment_id=id, params=LOGS))
        check_metrics(await client.api.post_loops_deployments_metrics(deployment_id=id, request=METRICS), id)
        answer = await client.api.get_loops_deployments_debug_archive_files(deployment_id=id)
    finally:
        await client.http_client.aclose()
    assert {file.relative_file_name for file in answer.presigned_urls} >= {"logs.jsonl", "worker.log"}
