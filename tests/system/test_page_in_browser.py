"""The page in a real browser, on a real server: what a person does there, by pointer and by keyboard."""

import json
import os
from collections.abc import Iterator

import httpx
import pytest

from browser import Browser, Missing, program
from gateway import KEY, MODEL, Gateway, Run, ok, selfloop, until


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        program()
    except Missing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(browser: Browser, gateway: Gateway) -> Iterator[Browser]:
    """Signed in, at the overview; its scripts fail at nothing, and load nothing from elsewhere."""
    browser.size(1280, 900)
    browser.open(gateway.url + "/")
    browser.until("document.readyState === 'complete' && document.querySelector('#key, header')")
    if browser.value("!document.querySelector('header')"):
        sign_in(browser, KEY)
    browser.shows("Overview")
    yield browser
    assert browser.problems == []
    assert all(address.startswith((gateway.url, "about:", "data:")) for address in browser.addresses)


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    made = Run.create(http, name="on the page").attached()
    made.train(1, 2)
    made.save("seen", "save_weights_for_sampler")
    return made


def sign_in(browser: Browser, key: str) -> None:
    """By keyboard alone: the field has the focus."""
    browser.until("document.activeElement && document.activeElement.id === 'key'")
    browser.value("document.querySelector('#key').select()")
    browser.type(key)
    browser.press("Enter", 13)


def go(page: Browser, place: str) -> None:
    page.value(f"location.hash = {json.dumps(place)}")


def test_a_wrong_key_is_refused_and_a_right_one_is_kept_in_the_tab(browser: Browser, gateway: Gateway):
    browser.open(gateway.url + "/")
    browser.until("document.querySelector('#key')")
    sign_in(browser, "wrong")
    browser.until("document.querySelector('[role=alert]')")
    assert browser.value("sessionStorage.length") == 0
    sign_in(browser, KEY)
    browser.shows("Overview")
    browser.open(gateway.url + "/#/setup")
    browser.shows(f"LOOPS_BASE_URL={gateway.url}")
    assert browser.value("localStorage.length + document.cookie.length") == 0


def test_the_overview_has_models_and_capacity_with_its_reason(page: Browser, run: Run, http: httpx.Client):
    page.shows(MODEL)
    page.shows(run.resource["deployment_id"])
    deployments = ok(http.get("/v1/loops/deployments", params={"scope": "org"}))["deployments"]
    (mine,) = [one for one in deployments if one["id"] == run.resource["deployment_id"]]
    page.shows(mine["status"]["name"])


def test_curves_grow_while_the_run_trains(page: Browser, run: Run):
    go(page, f"#/runs/{run.id}")
    page.shows("on the page")
    page.until("document.querySelectorAll('.chart canvas').length >= 3")
    label = "document.querySelector('.chart [role=img]').getAttribute('aria-label')"
    before = page.value(label)
    assert before.startswith("train/loss_mean over optimizer steps, last ")
    page.shows("live")
    run.train(3)
    page.until(f"{label} !== {json.dumps(before)}")


def test_a_run_shows_what_it_waited_for_and_computed(page: Browser, run: Run):
    go(page, f"#/runs/{run.id}")
    page.until("document.querySelectorAll('.timeline .computes').length >= 4")
    cells = "[...document.querySelectorAll('table tr')].map(row => row.innerText)"
    page.until(f"{cells}.some(row => row.startsWith('optim_step'))")
    page.click("button", "File for Perfetto")
    page.until(
        "document.querySelector('a[download]') && document.querySelector('a[download]').href.startsWith('blob:')"
    )


def test_runs_are_compared(page: Browser, run: Run, http: httpx.Client):
    other = Run.create(http, name="the other").attached()
    other.train(5)
    go(page, "#/runs")
    for id in (run.id, other.id):
        page.click(f"input[aria-label='Compare {id}']")
    page.click("a.button", "Compare 2")
    page.shows("2 runs beside each other")
    page.until("document.querySelectorAll('.chart canvas').length >= 3")
    legend = page.value("document.querySelector('.u-legend').innerText")
    assert run.id in legend
    assert other.id in legend


@pytest.mark.parametrize("kind", ["Chat", "Completion"])
@pytest.mark.parametrize("of_run", [True, False])
def test_sampled_tokens_show_their_probability(page: Browser, run: Run, kind: str, of_run: bool):
    (path,) = [
        one["path"] for one in ok(run.http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]
    ]
    go(page, f"#/playground/run:{run.id}" if of_run else f"#/playground/{path}")
    page.until("document.querySelector('textarea')")
    page.click(".playground button", kind)
    page.value("document.querySelectorAll('input[type=number]')[1].select()")
    page.value("document.querySelectorAll('input[type=number]')[1].focus()")
    page.type("5")
    page.value("document.querySelector('textarea').focus()")
    page.type("Hello")
    page.click("button[type=submit]")
    page.until("document.querySelectorAll('.tokens span').length >= 1 && document.querySelector('button[type=submit]')")
    page.value("document.querySelector('.tokens').focus()")
    page.press("ArrowRight", 39)
    page.shows("logprob")
    assert page.value("document.querySelectorAll('[role=alert]').length") == 0
    go(page, "#/")


def test_a_sampler_that_the_playground_made_of_a_run_is_ended(page: Browser, run: Run, http: httpx.Client):
    def live() -> int:
        rows = ok(http.get("/v1/loops/samplers", params={"scope": "org"}))["samplers"]
        return sum(row["status"]["name"] != "INACTIVE" and row["id"] != run.resource["sampler"]["id"] for row in rows)

    before = live()
    go(page, f"#/playground/run:{run.id}")
    page.until("document.querySelector('textarea')")
    page.value("document.querySelector('textarea').focus()")
    page.type("Hello")
    page.click("button[type=submit]")
    page.until("document.querySelectorAll('.tokens span').length >= 1 && document.querySelector('button[type=submit]')")
    go(page, "#/")
    until(lambda: live() <= before, "the sampler has ended")


def test_a_checkpoint_is_deleted_only_when_it_is_confirmed(page: Browser, run: Run, http: httpx.Client):
    path = run.save("doomed")
    go(page, f"#/checkpoints/{run.id}")
    page.click("button[aria-label^='Delete'][aria-label$='doomed']")
    page.until("document.querySelector('dialog[open]')")
    page.press("Escape", 27)
    page.until("!document.querySelector('dialog')")
    assert http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}).status_code == 200
    page.click("button[aria-label^='Delete'][aria-label$='doomed']")
    page.click("dialog button", "Delete")
    page.until("!document.body.innerText.includes('weights/doomed')")
    assert http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}).status_code == 404


def test_files_of_a_checkpoint_have_links(page: Browser, run: Run):
    go(page, f"#/checkpoints/{run.id}")
    page.click("button[aria-expanded]", "Files")
    link = page.until("document.querySelector('a[download^=adapter_model]')?.href")
    assert httpx.get(link).status_code == 200


def test_usage_is_shown_by_run_and_key(page: Browser, run: Run):
    go(page, "#/usage")
    page.shows(run.id)
    page.click("button", "By key")
    page.until("document.querySelector('button[aria-pressed=true]').innerText === 'By key'")
    assert page.value("document.querySelectorAll('tbody tr').length") >= 1


def test_nothing_is_wider_than_a_narrow_screen_in_the_dark(page: Browser, run: Run):
    page.size(360, 740, dark=True)
    for place in ("#/", "#/runs", f"#/runs/{run.id}", "#/playground", "#/checkpoints", "#/usage", "#/setup"):
        go(page, place)
        page.until("document.querySelector('h1') && !document.body.innerText.includes('Loading')")
        assert page.value("document.documentElement.scrollWidth <= innerWidth"), place
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


def test_everything_to_press_has_a_name(page: Browser, run: Run):
    for place in ("#/", "#/runs", f"#/runs/{run.id}", "#/playground", "#/checkpoints", "#/usage", "#/setup"):
        go(page, place)
        page.until("document.querySelector('h1') && !document.body.innerText.includes('Loading')")
        nameless = page.value(
            "[...document.querySelectorAll('a, button, input, select, textarea, [tabindex=\"0\"]')]"
            ".filter(one => !(one.innerText || one.getAttribute('aria-label') || one.labels?.length)).length"
        )
        assert nameless == 0, place


def test_signing_out_forgets_the_key(page: Browser):
    page.click("button", "Sign out")
    page.until("document.querySelector('#key')")
    assert page.value("sessionStorage.length") == 0


def test_an_empty_server_says_what_is_next(browser: Browser, gateway: Gateway):
    """As the newest of teams sees it."""
    made = selfloop("keys", "create", "new", "--team", "new-on-the-page", "--data-dir", str(gateway.data_dir))
    browser.open(gateway.url + "/")
    browser.until("document.querySelector('#key')")
    sign_in(browser, made.split()[-1])
    browser.shows("Nothing runs yet")
    for place, said in (
        ("#/runs", "No run yet"),
        ("#/checkpoints", "Nothing saved yet"),
        ("#/usage", "Nothing used yet"),
    ):
        go(browser, place)
        browser.shows(said)
    browser.click("button", "Sign out")


def test_a_route_is_tried_with_the_key_that_is_typed_into_the_api_browser(browser: Browser, gateway: Gateway):
    browser.size(1280, 900)
    browser.open(gateway.url + "/")
    browser.until("document.readyState === 'complete'")
    browser.value("sessionStorage.clear()")
    browser.open(gateway.url + "/docs")
    assert call_from_the_api_browser(browser) == "401"
    browser.open(gateway.url + "/docs")
    browser.until("!window.row && document.querySelector('.opblock')")
    browser.click("button.authorize", "Authorize")
    browser.until("document.querySelector('.auth-container input')")
    browser.value("document.querySelector('.auth-container input').focus()")
    browser.type(KEY)
    browser.click(".auth-container button.authorize", "Authorize")
    browser.click(".auth-container button.btn-done", "Close")
    assert call_from_the_api_browser(browser) == "200"


def test_the_api_browser_knows_the_key_of_who_signed_in(page: Browser):
    page.click("nav a", "API")
    page.until("document.querySelector('.opblock')")
    page.until("document.querySelector('button.authorize.locked')")
    assert call_from_the_api_browser(page) == "200"


def call_from_the_api_browser(page: Browser) -> str:
    """The status of GET /v1/loops/runs, sent by its own buttons."""
    page.until("document.querySelector('.opblock')")
    # Rows are made as they come into view.
    page.until(
        "(scrollBy(0, 300), window.row = [...document.querySelectorAll('.opblock-get')]"
        ".find(one => one.querySelector('[data-path=\"/v1/loops/runs\"]')))"
    )
    page.value("row.querySelector('.opblock-summary-control').click()")
    page.until("row.querySelector('.try-out__btn')")
    page.value("row.querySelector('.try-out__btn').click()")
    page.until("row.querySelector('button.execute')")
    page.value("row.querySelector('button.execute').click()")
    status = "row.querySelector('.live-responses-table .response .response-col_status')"
    return page.until(f"(found => found && found.innerText.trim().slice(0, 3))({status})")
