"""Pretrained weights are downloaded before training starts, or an error says what to do."""

import urllib.error
from pathlib import Path

import pytest
import torch

from misa.errors import UserError
from misa.experiment import Network
from misa.models.backbones import require_weights

FILE = "resnet50-0676ba61.pth"  # torchvision's name


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the requested URLs, without network access."""
    found: list[str] = []

    def fail(url: str, place: str, **_: object) -> None:
        found.append(url)
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return found


def test_without_a_network_the_file_and_its_place_are_named(tmp_path: Path, asked: list[str]) -> None:
    with pytest.raises(UserError, match=f"{FILE} are not in .*/hub/checkpoints .* put https://.*/{FILE} there"):
        require_weights(Network(backbone="resnet50"))
    assert asked == [f"https://download.pytorch.org/models/{FILE}"]


def test_what_is_there_or_not_wanted_is_not_fetched(tmp_path: Path, asked: list[str]) -> None:
    require_weights(Network(backbone="resnet50", pretrained=False))
    require_weights(Network(backbone="resnet50", weights=str(tmp_path / "own.pth")))
    place = tmp_path / "hub" / "checkpoints" / FILE
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    require_weights(Network(backbone="resnet50"))
    assert asked == []
