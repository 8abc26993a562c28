"""Pretrained weights are downloaded before training starts, or an error says what to do."""

import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

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
    require_weights(Network(backbone="resnet18", pretrained=False))
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"  # torchvision's name
    place.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), place)
    require_weights(Network(backbone="resnet18"))
    require_weights(Network(backbone="resnet18", weights=str(place)))
    assert asked == []


def test_weights_that_do_not_fit_are_refused_for_students_too(tmp_path: Path, asked: list[str]) -> None:
    """mmengine loads what fits and says nothing of the rest: the training would begin from scratch."""
    torch.save({"other": torch.ones(3)}, tmp_path / "other.pth")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    wrong = {
        "only 0% of the network's numbers are in it": {"weights": "other.pth"},
        "only [1-4][0-9]% of the network": {"weights": "resnet34.pth", "backbone": "resnet50"},
        "only [0-9]+% of the network": {"weights": "resnet18.pth", "base_channels": 32},
        r"could not be loaded \(FileNotFoundError": {"weights": "missing.pth"},
    }
    (tmp_path / "page.html").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("page.html", "empty.pth", "list.pth"):
        wrong[f"{name} could not be loaded"] = {"weights": name, "backbone": "swin_t"}
    for words, fields in wrong.items():
        weights = str(tmp_path / fields["weights"])
        with pytest.raises(UserError, match=words):
            require_weights(Network(**{"backbone": "resnet18", **fields, "weights": weights}))
    with pytest.raises(UserError, match=r"torchvision://resnet500 could not be loaded \(KeyError"):
        require_weights(Network(backbone="resnet18", weights="torchvision://resnet500"))
    assert asked == []


def test_the_check_of_the_weights_draws_no_random_number(tmp_path: Path, asked: list[str]) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "own.pth")
    before = torch.get_rng_state()
    require_weights(Network(backbone="resnet18", weights=str(tmp_path / "own.pth")))
    assert torch.equal(torch.get_rng_state(), before)
