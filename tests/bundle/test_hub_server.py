"""Models by hub id: from a server over HTTP, and to it. No network outside this machine."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from helpers.hub_fixtures import WEIGHTS, contents
from scm_sdk.bundle import hub as hub_module
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.hub import fetch, push
from scm_sdk.bundle.manifest import MANIFEST_NAME
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError
from scm_sdk.export.cli import main
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel

pytestmark = pytest.mark.usefixtures("hub_cache")


def open_it(path, **options):
    return Generator.from_pretrained(path, backend="onnxruntime", **options)


# Over HTTP


def test_a_bundle_from_a_server(hub, linear, tmp_path):
    hub.repos["someone/linear"] = contents(linear) | {"evil.pkl": b"cos\nsystem\n", "train.py": b"boom"}
    with open_it("hf:someone/linear") as gen:
        assert gen(seed=1, output_type="raw").images.shape == (1, 3, 4, 4)
        assert not (gen.source.path / "evil.pkl").exists()
    assert not [line for line in hub.asked if "evil.pkl" in line or "train.py" in line]
    asked = len(hub.asked)
    assert fetch("someone/linear", local_files_only=True) == fetch("someone/linear", revision=hub.sha("someone/linear"))
    assert len(hub.asked) - asked <= 3, "what is in the cache is not fetched again"


def test_names_with_wildcards_fetch_themselves_alone(hub, toy, tmp_path):
    toy.export(tmp_path / "toy")
    files = contents(tmp_path / "toy")
    hub.repos["someone/toy"] = files | {"reports/parity-2.json": b"not listed", "reports/[x].json": b"{}"}
    fetch("someone/toy")
    assert not [line for line in hub.asked if "parity-2" in line]


def test_what_the_server_says(hub, linear):
    hub.repos["someone/linear"] = contents(linear)
    with pytest.raises(BundleError, match="hf:someone/absent is no repository of the hub"):
        Generator.from_pretrained("hf:someone/absent")
    with pytest.raises(BundleError, match=r"linear@v9.*this revision is not"):
        Generator.from_pretrained("hf:someone/linear", revision="v9")
    hub.repos["someone/pickles"] = {"model.ckpt": b"x"}
    with pytest.raises(BundleError, match=r"expected a bundle or a checkpoint; it holds model\.ckpt"):
        Generator.from_pretrained("hf:someone/pickles")


def test_files_that_are_not_as_listed(hub, linear):
    name = "onnx/fp32/1step/model.onnx"
    hub.repos["someone/linear"] = contents(linear)
    hub.claimed_sizes[name] = 10**12
    with pytest.raises(IntegrityError, match=r"model\.onnx has 1000000000000 bytes, its manifest lists"):
        fetch("someone/linear")
    hub.claimed_sizes.clear()
    hub.repos["someone/linear"].pop(name)
    with pytest.raises(IntegrityError, match=r"model\.onnx is not there"):
        fetch("someone/linear")
    data = bytearray(contents(linear)[name])
    data[-1] ^= 1
    hub.repos["someone/linear"][name] = bytes(data)
    with pytest.raises(IntegrityError, match="was altered or damaged"):
        Generator.from_pretrained("hf:someone/linear", backend="onnxruntime")
    assert not [line for line in hub.asked[:4] if name in line], "sizes are compared before anything is fetched"


def test_the_number_of_files_is_capped(hub, linear, monkeypatch):
    hub.repos["someone/linear"] = contents(linear)
    listed = len(Bundle.open(linear).manifest.files) + 1
    assert hub_module.MAX_FILES == 4096
    monkeypatch.setattr(hub_module, "MAX_FILES", listed - 1)
    with pytest.raises(BundleError, match=rf"holds {listed} files of \d+ bytes, expected at most {listed - 1} files"):
        fetch("someone/linear")
    assert not [line for line in hub.asked if "/resolve/" in line and "scm_manifest" not in line]
    monkeypatch.setattr(hub_module, "MAX_FILES", listed)
    assert fetch("someone/linear").is_dir()


def test_sizes_are_capped(hub, linear, unet_checkpoint):
    hub.repos["someone/linear"] = contents(linear)
    with pytest.raises(BundleError, match="expected at most 4096 files and 1000 bytes"):
        fetch("someone/linear", max_bytes=1000)
    hub.claimed_sizes[MANIFEST_NAME] = 1 << 40
    with pytest.raises(BundleError, match=r"scm_manifest\.json has 1099511627776 bytes"):
        fetch("someone/linear")
    hub.repos["someone/unet"] = contents(unet_checkpoint)
    hub.claimed_sizes["config.json"] = 1 << 30
    with pytest.raises(BundleError, match=r"config\.json has 1073741824 bytes"):
        fetch("someone/unet")
    assert not [line for line in hub.asked if "/resolve/" in line and "scm_manifest" not in line]


@pytest.mark.parametrize("path", ["../../escaped", "/etc/escaped", "a\\..\\escaped"])
def test_a_manifest_whose_paths_lead_out(hub, linear, path):
    files = contents(linear)
    manifest = json.loads(files[MANIFEST_NAME])
    manifest["files"][0]["path"] = path
    hub.repos["someone/linear"] = files | {MANIFEST_NAME: json.dumps(manifest).encode(), path: b"x"}
    with pytest.raises(ScmError):
        fetch("someone/linear")
    assert not [line for line in hub.asked if "escaped" in line]


# Pushing


def test_a_bundle_goes_there_and_back(hub, linear):
    (linear / "notes.txt").write_text("not listed: it stays here", encoding="utf-8")
    before = contents(linear)
    address = Bundle.open(linear).push_to_hub("me/linear", message="First")
    assert address.startswith(f"{hub.url}/me/linear/commit/")
    assert contents(linear) == before, "the bundle on disk stays as it is"
    there = dict(hub.repos["me/linear"])
    assert 'Generator.from_pretrained("hf:me/linear")' in there.pop("README.md").decode()
    assert there.pop(MANIFEST_NAME) != before.pop(MANIFEST_NAME)
    assert there == {n: d for n, d in before.items() if n != "notes.txt"}
    with open_it("hf:me/linear") as gen:
        assert gen.source.build_id == Bundle.open(linear).manifest.build_id


def test_a_model_goes_there_and_back_with_its_card(hub, unet_checkpoint):
    model = ConsistencyModel.from_pretrained(unet_checkpoint)
    model.push_to_hub("me/unet")
    assert set(hub.repos["me/unet"]) == {"config.json", WEIGHTS, "README.md"}
    card = hub.repos["me/unet"]["README.md"].decode()
    assert 'Generator.from_pretrained("hf:me/unet")' in card
    again = ConsistencyModel.from_pretrained("hf:me/unet")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_persons_card_is_pushed_as_it_is(hub, bundle_copy):
    before = contents(bundle_copy)
    assert before["README.md"] == b"# A model card\n"
    Bundle.open(bundle_copy).push_to_hub("me/mine")
    assert hub.repos["me/mine"] == before == contents(bundle_copy)


@pytest.mark.parametrize(("library", "code"), [(True, 6), (False, 7)])
def test_a_push_that_fails_changes_nothing(bundle_copy, monkeypatch, library, code):
    if not library:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    Bundle.open(bundle_copy).with_card()  # one that would be generated for the hub
    before = contents(bundle_copy)
    result = CliRunner().invoke(main, ["bundle", "push", str(bundle_copy), "me/mine"])
    assert result.exit_code == code, result.output
    assert contents(bundle_copy) == before


def test_pushing_without_a_network_says_so(linear):
    with pytest.raises(BundleError, match=r"me/linear could not be filled: .*Nothing was committed"):
        Bundle.open(linear).push_to_hub("me/linear")
    with pytest.raises(ConfigError, match="expected 'owner/name'"):
        Bundle.open(linear).push_to_hub("linear")


def test_a_damaged_bundle_is_not_pushed(hub, linear):
    opened = Bundle.open(linear)
    (linear / "onnx/fp32/1step/model.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        opened.push_to_hub("me/linear")
    assert hub.asked == []


def test_links_are_not_followed_when_pushing(hub, tmp_path):
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="leads out of"):
        push(tmp_path / "out", ["config.json"], "me/x")
    assert hub.asked == []


def test_save_pretrained_copies_what_is_listed(linear, tmp_path):
    (linear / "notes.txt").write_text("not listed", encoding="utf-8")
    copy = Bundle.open(linear).save_pretrained(tmp_path / "copy")
    assert contents(copy.path) == {n: d for n, d in contents(linear).items() if n != "notes.txt"}
    with pytest.raises(BundleError, match="exists and is not empty"):
        Bundle.open(linear).save_pretrained(tmp_path / "copy")
