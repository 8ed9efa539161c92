"""The service's page in a real browser: what it shows, that names stay text, and that a checkpoint comes whole."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.chromium import BINARY, Browser
from tests.conformance.test_service_by_hand import new_model, one_step
from tests.service_rig import KEY, Service, finish

pytestmark = pytest.mark.slow
in_browser = pytest.mark.skipif(BINARY is None, reason="no Chromium here; Debian's: apt-get install chromium")
ATTACK = "a<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def page(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    state = tmp_path_factory.mktemp("page") / "state"
    with Service(tiny_folder("llama-tied"), state, "dtype=float32", f'model_names=["{ATTACK}"]') as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    each = Browser(tmp_path / "profile")
    yield each
    each.close()


def trained(page: Service, api: httpx.Client) -> tuple[str, str]:
    model = new_model(api, page)
    for seq in (1, 3):
        one_step(api, model, seq)
    body = {"model_id": model, "path": "first", "seq_id": 5}
    return model, finish(api, api.post("save_weights", json=body))["path"]


@in_browser
def test_models_curves_and_checkpoints_are_shown_live(page: Service, browser: Browser) -> None:
    with page.api() as api:
        model, path = trained(page, api)
        browser.open(page.url)
        browser.wait_for(f"!!document.querySelector('[data-model=\"{model}\"] polyline')")
        assert browser.run(f"document.querySelector('[data-path=\"{path}\"] td').textContent") == path
        card = f"document.querySelector('[data-model=\"{model}\"] .loss').textContent"
        assert "at step 2" in browser.run(card)
        one_step(api, model, 6)
        browser.wait_for(f"{card}.includes('at step 3')")
        browser.run(f"document.querySelectorAll('[data-path=\"{path}\"] button')[1].click()")
        assert f"foundry export {path}" in browser.run("document.getElementById('said').textContent")
        browser.run(f"document.querySelectorAll('[data-path=\"{path}\"] button')[0].click()")
        browser.wait_for("document.getElementById('said').textContent.endsWith('was downloaded')")
    assert browser.problems == []
    assert all(url.startswith((page.url, "data:", "about:", "blob:")) for url in browser.requests), browser.requests


@in_browser
def test_names_stay_text(page: Service, browser: Browser) -> None:
    browser.open(page.url)
    browser.wait_for("document.getElementById('state').textContent.includes('sessions')")
    assert ATTACK in browser.run("document.getElementById('state').textContent")
    assert browser.run("document.querySelectorAll('main img, header img').length") == 0
    assert browser.run("document.title") == "Model Foundry: training service"


def test_a_checkpoint_comes_as_one_file(page: Service) -> None:
    with page.api() as api:
        _, path = trained(page, api)
    answer = httpx.get(f"{page.url}/page/archive", params={"path": path}, headers={"X-API-Key": KEY})
    folder = page.state / "runs" / path.removeprefix("tinker://").replace(":", "-")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        for member in archive.getmembers():
            stored = archive.extractfile(member)
            assert stored is not None
            file = folder / member.name
            assert stored.read() == (file if file.exists() else folder / "adapter" / member.name).read_bytes()
        names = {"adapter_config.json", "adapter_model.safetensors", "state/optimizer.safetensors"}
        assert names <= set(archive.getnames())
    with page.api() as api:
        run, segment, name = path.removeprefix("tinker://").split("/")
        other = api.get(f"training_runs/{run}/checkpoints/{segment}/{name}/archive", follow_redirects=True)
    assert other.content == answer.content
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    damaged = httpx.get(f"{page.url}/page/archive", params={"path": path}, headers={"X-API-Key": KEY})
    assert damaged.status_code == 410


def test_a_key_sees_its_own_and_a_foreign_name_sees_nothing(page: Service) -> None:
    """A web page that has its name point to this machine must not read everybody's (DNS rebinding)."""
    with page.api() as api:
        model, path = trained(page, api)
    other = {"X-API-Key": "tml-other"}
    assert model not in httpx.get(f"{page.url}/page/state.json", headers=other).text
    assert model in httpx.get(f"{page.url}/page/state.json", headers={"X-API-Key": KEY}).text
    assert model in httpx.get(f"{page.url}/page/state.json").text
    assert httpx.get(f"{page.url}/page/archive", params={"path": path}, headers=other).status_code == 404
    foreign = httpx.get(f"{page.url}/page/state.json", headers={"Host": "evil.example"})
    assert foreign.status_code == 401
