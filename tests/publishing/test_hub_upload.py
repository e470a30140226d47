"""Publishing, from a Trainer's folder to loading by name without lorgnette, with huggingface_hub and a local Hub."""

import json
import pickle
import re
import runpy
import shutil
import socket
import subprocess

import datasets
import pytest
import torch
from hub_server import Blob, Hub, run_client, start_client
from huggingface_hub import ModelCard
from repository import ROOT
from safetensors.torch import load_file, save, save_file
from tiny import bert_tokenizer, image_processor, picture
from tiny_models import bert, vision_model
from tiny_training import joined, trainer, write_backbones, write_pairs
from without_lorgnette import WITHOUT_LORGNETTE

from lorgnette import LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.hub_upload import main, prepare
from lorgnette.publishing.export import check, draw, load
from lorgnette.publishing.guards import check_folder
from lorgnette.publishing.push import _identity as identity
from lorgnette.publishing.push import push as push_here
from lorgnette.publishing.verify_export import reference_outputs
from lorgnette.trainer.__main__ import main as run_command


UPLOAD = ROOT / "hub_upload.py"
PUSH = """
import json, logging, sys; logging.basicConfig(level="INFO")
from lorgnette.publishing.push import push
print(push(*sys.argv[1:3], **json.loads(sys.argv[3])).oid)
"""
PUSHES = """
import json, logging, sys; logging.basicConfig(level="INFO")
from lorgnette.publishing.push import push
for folder, options in json.loads(sys.argv[2]):
    try:
        push(folder, sys.argv[1], **options)
    except ValueError as error:
        print(error)
"""
LOSE = """
from huggingface_hub import HfApi
commit = HfApi.create_commit
def lose(self, repo_id, operations, **kwargs):
    return commit(self, repo_id, [o for o in operations if o.path_in_repo != "lost.md"], **kwargs)
HfApi.create_commit = lose
"""
READ = (
    WITHOUT_LORGNETTE
    + """
import re
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, pipeline

repo_id, commit, inputs, seen = sys.argv[1:]
card = open(hf_hub_download(repo_id, "README.md")).read()
for snippet in re.findall("```python\\n(.*?)```", card, flags=re.S):
    exec(snippet, {})
model = AutoModelForImageTextToText.from_pretrained(repo_id, revision=commit, trust_remote_code=True).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, seen)
model.push_to_hub("them/copy")
for token in (None, False):  # another's, and none
    try:
        AutoModelForImageTextToText.from_pretrained("me/private", trust_remote_code=True, token=token)
    except OSError as error:
        print("refused:", type(error).__name__, "not a valid model identifier" in str(error))
"""
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What Trainer leaves of a run of two steps, its optimizer's state in a checkpoint, and its evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    model, processor = joined(write_backbones(folder))
    run = trainer(model, processor, folder / "out", save_strategy="steps", save_steps=2)
    run.train()
    run.save_model()
    run.save_state()
    data = write_pairs(folder / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        command = f"evaluate --model {folder}/out --dataset {data} --split train[:3] --output_dir {folder}/measured"
        run_command([*command.split(), "--max_new_tokens", "4", "--metrics", "cider", "exact_match"])
    return folder / "out"


def folder_of(path, model_type="lorgnette", **files):
    """The least that can be pushed: a config, weights and a card."""
    path.mkdir()
    vision = {"model_type": "vit", "hidden_size": 24}
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "vision_config": vision}))
    (path / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    save_file({"weight": torch.zeros(3)}, path / "model.safetensors")
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def push(hub, home, folder, repo_id, token="token-of-me", **options):
    return run_client(hub, home, "-c", PUSH, folder, repo_id, json.dumps(options), token=token)


def files_of(hub, repo_id, branch="main"):
    repo = hub.repos[repo_id]
    return {path: blob.content for path, blob in repo.commits[repo.branches[branch]].items()}


# ---------------------------------------------------------------------------------------------------- from end to end


@pytest.mark.slow
def test_a_trained_folder_is_published_and_loads_by_name(hub, trained, tmp_path):
    metrics = trained.parent / "measured" / "metrics.json"
    options = ["--license", "mit", "--metrics", metrics]
    done = run_client(hub, tmp_path / "me", UPLOAD, trained, "--repo-id", "me/eyes", *options, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "token-of-me" not in done.stdout + done.stderr
    repo = hub.repos["me/eyes"]
    assert list(repo.titles.values()) == ["initial commit", "Upload model"]
    files = files_of(hub, "me/eyes")
    assert {"config.json", "model.safetensors", "modeling_lorgnette.py", "processor_config.json", "README.md"} <= set(
        files
    )
    assert not [name for name in files if re.search(r"optimizer|\.bin$|\.pt$|trainer_state|training_args", name)]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-text-to-text")
    measured = json.loads(metrics.read_text())["metrics"]["cider"]["cider"]
    assert [r.metric_value for r in card.data.eval_results if r.metric_type == "cider"] == [round(measured, 6)]

    # somebody else, without lorgnette: the card's examples, a pinned commit, a push of their own, a private repository
    push(hub, tmp_path / "me", folder_of(tmp_path / "private"), "me/private", private=True)
    commit, content = repo.branches["main"], repo.commits[repo.branches["main"]]
    blank = save({name: torch.zeros_like(v) for name, v in load_file(trained / "model.safetensors").items()})
    hub.objects[Blob(blank, True).sha256] = blank
    repo.commit("main", content | {"model.safetensors": Blob(blank, True)}, "another model since")
    model, processor = load(trained)
    batch = dict(processor(images=picture(), text=processor.build_prompt(), return_tensors="pt"))
    save_file(batch, tmp_path / "inputs.safetensors")
    (tmp_path / "read.py").write_text(READ)
    draw(tmp_path / "cat.jpg.png").rename(tmp_path / "cat.jpg")
    arguments = ["me/eyes", commit, tmp_path / "inputs.safetensors", tmp_path / "seen.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        read = run_client(hub, tmp_path / "them", "read.py", *arguments, token="token-of-them", timeout=900)
    assert read.returncode == 0, read.stderr[-3000:]
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "seen.safetensors")["logits"], model(**batch).logits)
    assert read.stdout.splitlines()[-2:] == ["refused: OSError True"] * 2
    copy = files_of(hub, "them/copy")
    of_the_package = {"handler.py", "requirements.txt", "web_images.py"}
    of_the_package |= {name for name in files if name.startswith(("space/", "lm_adapter/"))}
    assert {"handler.py", "space/app.py"} <= set(files)
    assert set(files) - of_the_package <= set(copy)
    assert set(ModelCard(copy["README.md"].decode()).data.tags) >= {"lorgnette", "q-former"}
    assert not hub.leaks
    assert not hub.holds(b"token-of-")
    assert not re.search("token-of-", read.stdout + read.stderr)


@pytest.mark.slow
def test_a_stage_1_folder_is_prepared(tmp_path, capsys):
    processor = LorgnetteProcessor.from_backbones(image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=4)
    words = len(processor.qformer_tokenizer)
    stage1 = LorgnetteForImageTextRetrieval.from_backbones(
        vision_model(), qformer=bert(vocab_size=words), processor=processor
    )
    stage1.save_pretrained(tmp_path / "stage1")
    files = prepare(tmp_path / "stage1", "me/finder", tmp_path / "export", license="apache-2.0")
    assert "qformer_tokenizer/tokenizer.json" in files
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    (snippet,) = re.findall("```python\n(.*?)```", card.text, flags=re.S)
    draw(tmp_path / "cat.jpg.png").rename(tmp_path / "cat.jpg")
    (tmp_path / "snippet.py").write_text(snippet.replace("me/finder", str(tmp_path / "export")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        runpy.run_path("snippet.py")
    assert re.match(r"tensor\(\[\[.*, .*\]\]\)", capsys.readouterr().out)


@pytest.mark.slow
def test_a_merged_model_is_prepared_and_tried(trained, tmp_path):
    prepare(trained, "me/eyes", tmp_path / "merged", save_format="merged", license="mit")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["saved_form"] == "merged"
    assert "LoRA is merged into" in (tmp_path / "merged" / "README.md").read_text()
    model, processor = load(trained)
    expected = reference_outputs(model, processor, str(draw(tmp_path / "picture.png")))["logits"]
    merged = reference_outputs(*load(tmp_path / "merged"), str(tmp_path / "picture.png"))["logits"]
    assert 0 < (merged - expected).abs().max() < 1e-4  # the sums are others, and so is the rounding
    with pytest.raises(ValueError, match="cannot be saved thin: its language model comes from a folder"):
        prepare(trained, "me/eyes", tmp_path / "thin", save_format="thin", license="mit")


def test_a_dry_run_shows_what_would_go_and_a_mistake_is_one_message(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lorgnette.hub_upload.check", lambda *args, **kwargs: None)  # it is slow, and tried above
    main([str(trained), "--repo-id", "me/eyes", "--license", "mit", "--dry-run", "--export-dir", str(tmp_path / "to")])
    assert {"config.json", "README.md"} <= {path.name for path in (tmp_path / "to").iterdir()}
    capsys.readouterr()
    for options, message in [
        (["--repo-id", "me/eyes.git"], "cannot end by '.git'"),
        (["--repo-id", "eyes"], "name the owner as well, me/eyes"),
        (["--repo-id", "me/eyes"], "The ViT came from a folder, and its licence is not known"),
        (["--repo-id", "me/eyes", "--license", "mit", "--form", "fat"], "'fat'"),
        (["--repo-id", "me/eyes", "--license", "mit", "--export-dir", str(tmp_path / "to")], "is not empty"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            main([str(trained), "--dry-run", *options])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- refusals


def test_a_folder_that_is_no_model(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load(tmp_path / "nothing")
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model .* name one of its checkpoints \(checkpoint-7\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'llama'; supported: lorgnette"):
        load(trained.parent / "llama")
    folder = folder_of(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=r"holds no processor_config\.json"):
        load(folder)
    shutil.copytree(trained, tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is not a complete safetensors file"):
        load(tmp_path / "cut")
    for content in ("[]", "{"):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"alone/config\.json is not one JSON object"):
            load(folder)


def test_an_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch):
    folder = tmp_path / "there" / "export"
    metrics = tmp_path / "predictions.jsonl"
    metrics.write_text("[1]")
    (tmp_path / "broken.png").write_text("no picture")
    with monkeypatch.context() as patch:
        patch.setattr("lorgnette.LorgnettePreTrainedModel.save_pretrained", None)  # it is not come to
        for mistake, message in [
            ({}, "its licence is not known"),
            ({"license": "unknown"}, "names no licence"),
            ({"license": "mit", "metrics": (metrics,)}, "not one JSON object"),
            ({"license": "mit", "picture": tmp_path / "broken.png"}, r"broken\.png"),
        ]:
            with pytest.raises(ValueError, match=message):
                prepare(trained, "me/eyes", folder, **mistake)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    killed = folder.parent / ".unfinished-export"  # of an earlier process, which could not clean up
    killed.mkdir()
    (killed / "model.safetensors").touch()
    monkeypatch.setattr("lorgnette.LorgnetteProcessor.save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(trained, "me/eyes", folder, license="mit")
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("optimizer.pt", b"x", "a training state"),
        ("training_args.bin", b"x", "a training state"),
        ("rng_state_0.pth", b"x", "a training state"),
        ("weights.pkl", pickle.dumps([1]), "not part of a model"),
        ("notes.txt", pickle.dumps(["\xff"], protocol=5), "not UTF-8 text"),
        ("more.safetensors", pickle.dumps([1]), "not a safetensors file"),
        ("sub/.env", b"A=1", "not part of a model"),
        ("notes.md", b"hf_" + b"a" * 34, "notes.md: a Hugging Face token, in line 1"),
        ("notes.md", b"\n-----BEGIN RSA PRIVATE KEY-----", "a private key, in line 2"),
        ("a.json", b'{"url": "https://me:secret@example.org"}', "a password in a URL"),
        ("a.json", b'{"path": "/home/somebody/models/vit"}', "a path of this machine, in line 1: /home/somebody"),
        ("a.json", b'{"path": "C:\\\\Users\\\\somebody\\\\vit"}', "a path of this machine"),
        ("a.json", b'{"of": [{"path": "/mnt/disk/me/vit"}]}', "a path of this machine: /mnt/disk/me/vit"),
        ("a.json", b'{"path": "/workspace/vit/"}', "a path of this machine: /workspace/vit/"),
        ("a.json", b'{"path": "D:\\\\models\\\\vit"}', "a path of this machine: D:"),
        ("a.json", b'{"path": "file:///scratch/x"}', "a path of this machine: file:///scratch/x"),
        ("a.json", b'["~/models/vit"]', "a path of this machine: ~/models/vit"),
        ("a.json", b"{", "not JSON"),
        ("tokenizer.model", pickle.dumps([1]), "tokenizer.model: a pickle"),
        ("tokenizer.model", b"PK\x03\x04", "tokenizer.model: a pickle"),
        ("new.safetensors", save({}, {"from": "/mnt/disk/me"}), "new.safetensors: a path of this machine"),
        ("new.safetensors", save({}, {"by": "hf_" + "a" * 34}), "new.safetensors: a Hugging Face token"),
    ],
)
def test_what_must_not_be_published(tmp_path, name, content, message):
    folder = folder_of(tmp_path / "export")
    assert check_folder(folder) == ["README.md", "config.json", "model.safetensors"]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be published") as refused:
        check_folder(folder)
    assert message in str(refused.value)
    assert "hf_aaa" not in str(refused.value)


def test_a_link_out_of_the_folder_and_the_source_s_own_path(tmp_path):
    folder = folder_of(tmp_path / "export")
    (tmp_path / "outside.json").write_text("{}")
    (folder / "inside.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match=r"inside\.json: a link"):
        check_folder(folder)
    (folder / "inside.json").unlink()
    for path in (tmp_path / "out" / "data", tmp_path / "out"):
        (folder / "notes.md").write_text(f"Made in {path}, then copied.")
        with pytest.raises(ValueError, match=r"notes\.md: a path of this machine, in line 1"):
            check_folder(folder, private_paths=(tmp_path / "out",))
    (folder / "notes.md").write_text(f"Made in {tmp_path / 'output'}.")
    check_folder(folder, private_paths=(tmp_path / "out", "/root"))


def test_what_only_looks_like_a_path_is_published(tmp_path):
    folder = folder_of(tmp_path / "export")
    words = ["/", "//", "</s>", "/root", "and/or/else", "/no_think", "me/vit", "https://hf.co/me/vit", "~"]
    template = "{% for m in messages %}\n/usr/lib/x\n{% endfor %}"
    auto_map = {"AutoModel": "me/repo--modeling_x.Model"}
    (folder / "tokenizer_config.json").write_text(json.dumps([words, {"chat_template": template}, auto_map]))
    (folder / "tokenizer.json").write_text(json.dumps({"merges": ["/usr/bin", "/a/b"], "vocab": {"/usr/lib/x": 1}}))
    (folder / "vocab.json").write_text(json.dumps({"/root": 1, "C:/": 2}))
    assert "vocab.json" in check_folder(folder, private_paths=("/root",))


def test_an_export_that_answers_otherwise_is_found_out(trained, tmp_path, monkeypatch):
    model, processor = load(trained)
    outputs_file = reference_outputs(model, processor, str(draw(tmp_path / "picture.png")))

    def without_package(command, **_):
        save_file({"logits": outputs_file["logits"] + 1e-3}, command[-1])
        return type("Finished", (), {"returncode": 0})

    monkeypatch.setattr("lorgnette.publishing.export.subprocess.run", without_package)
    with pytest.raises(RuntimeError, match=r"logits differ from the model's by up to 0\.001 \(allowed: 0\)"):
        check(model, processor, tmp_path)
    monkeypatch.setattr(
        "lorgnette.publishing.export.subprocess.run",
        lambda *_, **__: type("Finished", (), {"returncode": 1, "stderr": "ImportError: no module"}),
    )
    with pytest.raises(RuntimeError, match="where lorgnette is not installed:\nImportError: no module"):
        check(model, processor, tmp_path)

    def sleep(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("lorgnette.publishing.export.subprocess.run", sleep)
    with pytest.raises(RuntimeError, match="not loaded and checked within 3600 seconds"):
        check(model, processor, tmp_path)


# ---------------------------------------------------------------------------------------------------- the repository


@pytest.mark.slow
def test_a_new_version_replaces_what_was_loaded_and_another_model_is_refused(hub, tmp_path):
    first = folder_of(tmp_path / "first", modeling_old__py="x = 1", tool__py="x = 1", notes__md="Notes.")
    second = folder_of(tmp_path / "second", modeling_new__py="x = 2")
    other = folder_of(tmp_path / "other", model_type="lorgnette_retrieval")
    for name in ("lm_adapter/adapter_config.json", "tables/data.json"):
        (first / name).parent.mkdir()
        (first / name).write_text("{}")
    pushes = [(first, {}), (second, {}), (other, {}), (other, {"replace": True})]
    pushes_json = json.dumps([(str(folder), options) for folder, options in pushes])
    done = run_client(hub, tmp_path / "me", "-c", PUSHES, "me/versions", pushes_json)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [set(files) for files in hub.repos["me/versions"].commits.values()]
    kept = {".gitattributes", "README.md", "config.json", "model.safetensors", "modeling_new.py"}
    assert states[2] == {*kept, "notes.md", "tool.py", "tables/data.json"}
    assert "deletes the old files lm_adapter/adapter_config.json, modeling_old.py" in done.stderr
    assert "holds another model (model_type is 'lorgnette' there, 'lorgnette_retrieval' here)" in done.stdout
    assert states[3:] == [kept - {"modeling_new.py"}]
    assert "holds 1 file, and no model" in _push_beside_data(hub, tmp_path, first).stderr


def _push_beside_data(hub, tmp_path, folder):
    run_client(hub, tmp_path / "me", "-c", """
from huggingface_hub import CommitOperationAdd, HfApi
HfApi().create_repo("me/data")
HfApi().create_commit("me/data", [CommitOperationAdd("data.csv", b"1,2")], commit_message="x")
""")  # fmt: skip
    return push(hub, tmp_path / "me", folder, "me/data")


@pytest.mark.slow
def test_private_branches_and_logins(hub, tmp_path):
    folder = folder_of(tmp_path / "export")
    assert push(hub, tmp_path / "me", folder, "me/open", revision="next").returncode == 0
    assert "config.json" not in files_of(hub, "me/open")
    assert "config.json" in files_of(hub, "me/open", "next")
    refused = push(hub, tmp_path / "me", folder, "me/open", private=True)
    assert "me/open exists and is public" in refused.stderr
    assert push(hub, tmp_path / "me", folder, "me/closed", private=True).returncode == 0
    assert hub.repos["me/closed"].private
    for name, token in (("me/closed", "token-of-them"), ("me/closed", None), ("me/open", None)):
        before = files_of(hub, name)
        refused = push(hub, tmp_path / f"{name}-{token}", folder, name, token=token)
        assert re.search("Forbidden|401|403", refused.stderr)
        assert files_of(hub, name) == before


@pytest.mark.slow
def test_a_push_that_was_cut_off_goes_on_and_of_two_at_once_one_is_refused(hub, tmp_path):
    folder = folder_of(tmp_path / "export")
    for name in ("model", "more"):  # no weights that another test has brought there
        save_file({name: torch.full((5,), 3.0)}, folder / f"{name}.safetensors")
    hub.hold(after=1)
    with start_client(hub, tmp_path / "me", "-c", PUSH, folder, "me/cut-push", "{}") as process:
        try:
            assert hub.held.wait(300), "no second object came"
            process.kill()
            assert hub.cut.wait(60), "the Hub does not see that its client is gone"
        finally:
            process.kill()
            hub.hold_after = None
    assert set(files_of(hub, "me/cut-push")) == {".gitattributes"}
    assert push(hub, tmp_path / "me", folder, "me/cut-push").returncode == 0
    assert "more.safetensors" in files_of(hub, "me/cut-push")
    assert set(hub.puts.values()) == {1}

    # the second has looked at the repository when the first commits
    late = folder_of(tmp_path / "late", late__md="Late.")
    save_file({"late": torch.ones(7)}, late / "late.safetensors")
    hub.hold(after=0)
    with start_client(hub, tmp_path / "me", "-c", PUSH, late, "me/cut-push", "{}") as process:
        try:
            assert hub.held.wait(300), "no object came"
            (folder / "notes.md").write_text("First.")
            assert push(hub, tmp_path / "me", folder, "me/cut-push").returncode == 0
            hub.hold_after = None
            _, stderr = process.communicate(timeout=900)
        finally:
            hub.hold_after = None
            process.kill()
    assert process.returncode != 0
    assert "Somebody pushed meanwhile" in stderr
    assert "late.md" not in files_of(hub, "me/cut-push")
    assert "notes.md" in files_of(hub, "me/cut-push")


def test_another_size_of_a_kind_is_another_model(tmp_path):
    kinds = {"a": {"n_embd": 32}, "b": {"n_embd": 64, "n_head": 4}, "c": {"n_embd": 32, "n_inner": 7}}
    for name, fields in kinds.items():
        text = {"model_type": "gpt2", "n_head": 4, **fields}
        (tmp_path / name).write_text(json.dumps({"model_type": "lorgnette", "text_config": text}))
    a, b, c = (identity(tmp_path / name) for name in "abc")
    assert a == c
    assert {name for name in a if a[name] != b[name]} == {"text_config.hidden_size"}


def test_a_push_sends_nothing_that_the_guards_refuse(hub, tmp_path):
    folder = folder_of(tmp_path / "export", notes__md="hf_" + "a" * 34)
    with pytest.raises(ValueError, match="a Hugging Face token"):
        push_here(folder, "me/leaky")
    (folder / "notes.md").unlink()
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n")
    with pytest.raises(ValueError, match="names no licence"):
        push_here(folder, "me/leaky")
    assert "me/leaky" not in hub.repos


def test_a_hub_that_is_not_there_is_one_message(hub, tmp_path):
    nobody = Hub()
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # and does not listen
        nobody.url = f"http://127.0.0.1:{port.getsockname()[1]}"
        refused = push(nobody, tmp_path / "me", folder_of(tmp_path / "export"), "me/eyes")
    assert re.search(
        r"ConnectionError: The Hub cannot be reached.*finished files are not uploaded twice", refused.stderr
    )


@pytest.mark.slow
def test_what_the_hub_holds_afterwards_is_compared(hub, tmp_path):
    program = LOSE + PUSH
    folder = folder_of(tmp_path / "export", lost__md="Lost.")
    done = run_client(hub, tmp_path / "me", "-c", program, folder, "me/lossy", "{}")
    assert "differs from the upload:\nlost.md: missing" in done.stderr
