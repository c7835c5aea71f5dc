"""verify catches every kind of damage: each test breaks one thing in a good output and names what must be said."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from checkpoints import read_shards
from safetensors.torch import load_file, save_file

from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.soundness import group_counts
from tsenor_cli.errors import CheckFailed, InputRefused
from tsenor_cli.pipeline import prune, verify
from tsenor_cli.specs import NMPattern, PruneSpec

NAME = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def good(pristine_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("good") / "out"
    prune(PruneSpec(str(pristine_llama), output, NMPattern(2, 4)))
    return output


@pytest.fixture(scope="module")
def good_with_masks(pristine_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("good") / "out"
    prune(PruneSpec(str(pristine_llama), output, NMPattern(2, 4), save_masks=True))
    return output


@pytest.fixture
def masked(good_with_masks, tmp_path):
    return shutil.copytree(good_with_masks, tmp_path / "masked")


@pytest.fixture
def sparse(good, tmp_path):
    return shutil.copytree(good, tmp_path / "sparse")


def edit(directory, name, change):
    """Change one tensor on disk in place."""
    for file, tensors in read_shards(directory).items():
        if name in tensors:
            change(tensors[name])
            save_file(tensors, directory / file, metadata={"format": "pt"})
            return
    raise KeyError(name)


def first(condition):
    return tuple(condition.nonzero()[0].tolist())


def failures(directory, **options):
    return {failure.where: failure.what for failure in verify(str(directory), **options).failures}


def test_a_good_output_passes(sparse, pristine_llama):
    result = verify(str(sparse), against=str(pristine_llama))
    assert result.ok
    assert all(tensor.exact for tensor in result.tensors)
    assert verify(str(sparse), NMPattern(2, 4)).ok
    assert verify(str(sparse), NMPattern(2, 4, transposable=False)).ok


def test_a_report_of_the_schema_before_is_believed_as_ever(sparse, pristine_llama):
    path = sparse / "tsenor-report.json"
    facts = json.loads(path.read_text())
    del facts["training"]
    for record in facts["tensors"]:
        del record["mask_sha256"]
    path.write_text(json.dumps({**facts, "schema_version": 5}))
    assert verify(str(sparse), against=str(pristine_llama)).ok


def test_one_weight_too_many_along_rows(sparse):
    edit(sparse, NAME, lambda w: w.__setitem__(first(w == 0), 1.0))
    assert "more than 2" in failures(sparse)[NAME]


def test_columns_are_checked_even_if_every_row_is_right(sparse):
    """Two rows of a tile swap nothing but places within the row: rows stay 2:4, columns do not."""

    def shift(w):
        row = w[5]  # rotate within each group of four until the columns break
        w[5] = row.view(-1, 4).roll(1, dims=1).reshape(-1)

    edit(sparse, NAME, shift)
    assert verify(str(sparse), NMPattern(2, 4, transposable=False)).ok
    found = verify(str(sparse)).failures
    assert [failure.where for failure in found] == [NAME]
    assert "along the output axis" in found[0].what


@pytest.mark.parametrize("m", [2, 3, 4, 6, 8, 15, 24, 32, 62, 64])
def test_nonzeros_are_counted_in_groups_of_any_size(m):
    nonzero = torch.rand(3, 2 * m, 6 * m, generator=torch.Generator().manual_seed(m)) < 0.7
    nonzero[0] = True  # all m of every group
    counts = group_counts(nonzero, NMPattern(1, m))
    assert torch.equal(counts[-1].long(), nonzero.view(3, 2 * m, 6, m).sum(-1))
    assert torch.equal(counts[-2].long(), nonzero.view(3, 2, m, 6 * m).sum(-2))
    alone = nonzero[0].as_strided((1, 1, 2 * m, 6 * m), (1, 1, 6 * m, 1))  # contiguous: an axis of one may step anyhow
    assert torch.equal(group_counts(alone, NMPattern(1, m))[-1][0, 0], counts[-1][0])


def test_fewer_nonzeros_are_allowed_and_said(sparse):
    edit(sparse, NAME, lambda w: w.__setitem__(first(w != 0), 0.0))
    result = verify(str(sparse), NMPattern(2, 4))  # by its report it would have to have the report's bytes
    assert result.ok
    assert {tensor.name: tensor.exact for tensor in result.tensors}[NAME] is False


@pytest.mark.parametrize(
    ("value", "what"), [(-0.0, "negative zero"), (float("nan"), "not finite"), (float("inf"), "not finite")]
)
def test_values_that_no_kernel_should_meet(sparse, value, what):
    edit(sparse, NAME, lambda w: w.__setitem__(first(w == 0) if value == 0 else first(w != 0), value))
    assert what in failures(sparse)[NAME]


def test_the_place_is_that_of_the_first_failure(sparse):
    edit(
        sparse, NAME, lambda w: w.__setitem__((70, 33), -0.0) if w[70, 33] == 0 else w.__setitem__((70, 33), torch.nan)
    )
    assert "first at [70, 33]" in failures(sparse)[NAME]


def test_the_place_is_counted_over_the_whole_tensor(sparse, monkeypatch):
    monkeypatch.setattr("tsenor_cli.checkpoint.plan.BAND_BYTES", 4096)  # 32 rows
    edit(sparse, NAME, lambda w: w.__setitem__((70, 33), torch.nan))
    assert "first at [70, 33]" in failures(sparse)[NAME]


def test_a_kept_weight_that_changed(sparse, pristine_llama):
    edit(sparse, NAME, lambda w: w.__setitem__(first(w != 0), 7.0))
    assert verify(str(sparse), NMPattern(2, 4)).ok
    assert "not the original's" in failures(sparse, against=str(pristine_llama))[NAME]


@pytest.mark.parametrize("name", [NAME, "model.norm.weight", "lm_head.weight"])
def test_bytes_that_are_not_those_of_the_report(sparse, name):
    """What no pattern forbids, and what only the original could tell."""
    edit(sparse, name, lambda w: w.view(-1).__setitem__(first(w.view(-1) != 0), 7.0))
    assert failures(sparse) == {name: "its bytes are not those that the report was written for"}


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.9.mtp.weight"])
def test_an_unpruned_tensor_that_changed(sparse, pristine_llama, name):
    edit(sparse, name, lambda w: w.view(-1).__setitem__(0, 7.0))
    assert "bit-identical" in failures(sparse, against=str(pristine_llama))[name]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "assets/more/params.json"])
def test_another_file_that_changed(sparse, pristine_llama, file):
    (sparse / file).write_text((sparse / file).read_text(errors="replace") + " ")
    assert failures(sparse, against=str(pristine_llama)) == {file: "this file is not the original's"}


def test_the_last_byte_of_a_large_file_counts(sparse, pristine_llama, tmp_path):
    original = shutil.copytree(pristine_llama, tmp_path / "original")
    for directory, last in ((original, b"a"), (sparse, b"b")):
        (directory / "notes.bin").write_bytes(bytes(2**21 + 5) + last)
    assert failures(sparse, against=str(original)) == {"notes.bin": "this file is not the original's"}


def rename_tensor(directory, name, other=None):
    """In its shard and in the index; without another name it is lost."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop(name)
    tensors = load_file(directory / file)
    tensor = tensors.pop(name)
    if other is not None:
        tensors[other], index["weight_map"][other] = tensor, file
    save_file(tensors, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_lost_tensor(sparse, pristine_llama):
    rename_tensor(sparse, NAME)
    assert "as the report describes" in failures(sparse)[NAME]
    assert "in the original" in failures(sparse, against=str(pristine_llama))[NAME]


def test_tensors_that_are_not_those_of_the_report(sparse):
    """Also such as were not pruned."""
    rename_tensor(sparse, "model.norm.weight", "model.form.weight")
    assert failures(sparse) == {
        "model.form.weight": "in the checkpoint, but not in the report",
        "model.norm.weight": "in the report, but not in the checkpoint",
    }


def edit_mask(directory, change):
    """Change the packed mask of NAME on disk in place."""
    (path,) = (file for file in (directory / "tsenor-masks").iterdir() if NAME in load_file(file))
    masks = load_file(path)
    change(masks)
    save_file(masks, path, metadata={"tsenor_masks": "1"})


def flip(*places):
    """Bits of a packed mask."""

    def change(masks):
        for row, column in places:
            masks[NAME][row, column // 8] ^= 1 << column % 8

    return change


def test_a_bit_of_a_mask(masked):
    edit_mask(masked, flip((70, 33)))
    found = verify(str(masked)).failures
    assert {failure.where for failure in found} == {NAME}
    what = {failure.what for failure in found}
    for axis in ("input", "output"):
        assert any(f"along the {axis} axis of which the mask does not keep 2, first at [" in one for one in what)
    assert verify(str(masked), NMPattern(2, 4)).ok, "the report is not believed, masks included"


def test_a_weight_that_its_mask_drops(masked, monkeypatch):
    """A weight changes places with a zero and the mask stays; the place is counted over all bands."""
    monkeypatch.setattr("tsenor_cli.checkpoint.plan.BAND_BYTES", 4096)  # 32 rows

    def swap(w):
        group = w[70, 32:36]
        kept, dropped = (int((group == 0).eq(zero).nonzero()[0]) for zero in (False, True))
        group[dropped], group[kept] = group[kept].clone(), 0
        edited.append(32 + dropped)

    edited = []
    edit(masked, NAME, swap)
    wanted = f"not zero, and its mask drops it, first at [70, {edited[0]}] of [.., out, in]"
    assert wanted in {failure.what for failure in verify(str(masked)).failures}


def test_another_mask_of_the_pattern(masked):
    """A tile upside down: every count is right. All its weights are zero, so that only the hash tells."""

    def upside_down(masks):
        rows = masks[NAME][:4].clone()
        masks[NAME][:4] = rows.flip(0)

    edit(masked, NAME, lambda w: w[:4].zero_())
    report = json.loads((masked / "tsenor-report.json").read_text())
    tensor = open_checkpoint(masked).tensors[NAME]
    record = next(record for record in report["tensors"] if record["name"] == NAME)
    record["sha256"] = hashlib.sha256(b"".join(tensor.chunks())).hexdigest()
    (masked / "tsenor-report.json").write_text(json.dumps(report))
    assert verify(str(masked)).ok
    edit_mask(masked, upside_down)
    assert failures(masked) == {NAME: "its mask is not the one that the report was written for"}


def test_masks_that_are_lost(masked):
    edit_mask(masked, lambda masks: masks.pop(NAME))
    assert failures(masked) == {NAME: "its mask is not there as the report describes it"}
    path = next((masked / "tsenor-masks").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    (found,) = verify(str(masked)).failures
    assert found.where == "tsenor-masks"
    assert "cut short" in found.what
    shutil.rmtree(masked / "tsenor-masks")
    found = verify(str(masked)).failures
    assert len(found) == 14
    assert {failure.what for failure in found} == {"its mask is not there as the report describes it"}


def pruned_record(report):
    return next(record for record in report["tensors"] if record["action"] == "pruned")


def test_a_dense_checkpoint(pristine_llama):
    with pytest.raises(CheckFailed, match="claims no sparsity"):
        verify(str(pristine_llama))
    assert len(verify(str(pristine_llama), NMPattern(2, 4)).failures) == 28


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("tensors"),
        lambda r: pruned_record(r).pop("pattern"),
        lambda r: pruned_record(r).update(pattern="2"),
        lambda r: pruned_record(r).update(pattern=2),
        lambda r: r.update(tensors=[1]),
        lambda r: r["tensors"][0].update(action="pruned", layout="sideways"),
    ],
)
def test_a_report_that_is_none_is_refused(sparse, change):
    report = json.loads((sparse / "tsenor-report.json").read_text())
    change(report)
    (sparse / "tsenor-report.json").write_text(json.dumps(report))
    with pytest.raises(InputRefused, match="not a report"):
        verify(str(sparse))
