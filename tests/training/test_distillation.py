"""A model that learns from another's predictions: its loss, its teacher on record."""

import json
import math

import pytest
import torch
from building import train_on_text, write_text

from zoo.cli.train import main
from zoo.config.schema.train import Distil
from zoo.model.checkpoint import load
from zoo.runs.folder import RunFolder
from zoo.training.distillation import distillation_loss

TINY = ["batch_tokens=128", "trainer.max_steps=3", "save_every=1", "optim.warmup_steps=1"]


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (4.0, 0.25), (0.5, 1.0)])
def test_the_loss_is_that_of_a_plain_loop(temperature, weight):
    generator = torch.Generator().manual_seed(0)
    z, theirs = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    targets = torch.randint(5, (2, 3), generator=generator)
    how = Distil(teacher="x", temperature=temperature, weight=weight)
    total = 0.0
    for row in range(2):
        for token in range(3):
            student, teacher = z[row, token].tolist(), theirs[row, token].tolist()
            norm = math.log(sum(map(math.exp, student)))
            hard = norm - student[int(targets[row, token])]
            p, q = ([math.exp(x / temperature) for x in logits] for logits in (teacher, student))
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            soft = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            total += (1 - weight) * hard + weight * temperature**2 * soft
    found = distillation_loss(z, theirs, targets, how)
    assert float(found) == pytest.approx(total / 6, rel=1e-12)
    same = distillation_loss(z, z, targets, Distil(teacher="x", weight=1.0))
    assert float(same) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("more", [0, 2])
def test_tokens_that_are_not_the_tokenizers_are_left_out_of_the_soft_term(more):
    """Of the teacher before, of a student that has them here; its own loss is over all."""
    z, theirs = torch.randn(1, 3, 5 + more), torch.randn(1, 3, 5)
    targets = torch.randint(5, (1, 3))
    soft = distillation_loss(z, theirs, targets, Distil(teacher="x", weight=1.0, temperature=1.0))
    p = theirs[0].softmax(-1)
    q = z[0].softmax(-1)[:, :5]
    q = q / q.sum(-1, keepdim=True)
    assert float(soft) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    both = distillation_loss(z, theirs, targets, Distil(teacher="x", weight=0.5, temperature=1.0))
    hard = torch.nn.functional.cross_entropy(z[0], targets[0])
    assert float(both) == pytest.approx(float(0.5 * soft + 0.5 * hard), rel=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    train_on_text(folder, "model=transformer", *TINY, f"runs={folder}", "name=teacher")
    return folder / "teacher"


def taught(teacher, *words: str) -> list[str]:
    folder = teacher.parent
    place = ["data=text", f"data.path={folder / 'text'}", f"data.cache={folder / 'cache'}"]
    small = ["model=mamba", "size=tiny", "match=none", "seq_len=32", "logger=none"]
    every = [*place, *small, *TINY, f"runs={folder}", f"distil.teacher={teacher}"]
    given = {word.partition("=")[0] for word in words}
    return [*(word for word in every if word.partition("=")[0] not in given), *words]


def test_a_student_learns_resumes_and_names_its_teacher(teacher, capsys):
    assert main(taught(teacher, "name=whole", "trainer.max_steps=4")) == 0
    said = capsys.readouterr().err
    assert main(taught(teacher, "name=parts", "trainer.max_steps=2")) == 0
    more = [f"resume={teacher.parent / 'parts'}", "trainer.max_steps=4"]
    assert main([*more, "optim.continuation=constant"]) == 0
    whole, own = RunFolder.open(teacher.parent / "whole"), RunFolder.open(teacher)
    record = whole.info["teacher"]
    assert record["weights"] == next(own.whole_checkpoints()).content
    assert record["parameters"] == own.info["parameters"]
    assert record["flops_per_token"] == own.info["flops_per_token"]
    assert f"teaches, {record['flops_per_token']:,} FLOPs a token beside" in said
    model = load(whole)
    assert not any("teacher" in name for name in model.state_dict())
    assert whole.info["parameters"] == sum(weight.numel() for weight in model.parameters())
    alone = taught(teacher, "name=alone", "distil.teacher=null", "trainer.max_steps=4")
    assert main(alone) == 0
    other = load(RunFolder.open(teacher.parent / "alone"))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)  # it taught something


def test_a_teacher_whose_weights_changed_is_refused(teacher, capsys):
    from shutil import copytree

    moved = copytree(teacher, teacher.parent / "moved")
    assert main(taught(moved, "name=student")) == 0
    record = json.loads((teacher.parent / "student" / "run.json").read_text())
    assert record["teacher"]["run"] == str(moved)
    assert main([f"resume={moved}", "trainer.max_steps=5", "optim.continuation=constant"]) == 0
    capsys.readouterr()
    more = ["trainer.max_steps=5", "optim.continuation=constant"]
    assert main([f"resume={teacher.parent / 'student'}", *more]) == 2
    assert "its weights changed since this run began. Put them back" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["distil.teacher=nowhere"], "distil.teacher=nowhere: is no run and no checkpoint."),
        (["distil.weight=0"], "distil.weight=0: must be"),
        (["distil.temperature=-1"], "distil.temperature=-1: must be"),
        # its square times the cross-entropy would be nothing in float32
        (["distil.temperature=1e-30"], "distil.temperature=1e-30: must be"),
        (["state_passing=carry"], "acts on separate windows of a text"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(teacher, words, line, capsys):
    assert main(taught(teacher, "name=refused", *words)) == 2
    assert line in capsys.readouterr().err
    assert not (teacher.parent / "refused").exists()


def test_options_of_a_teacher_without_one_are_refused(teacher, capsys):
    rest = [word for word in taught(teacher, "name=refused") if "teacher=" not in word]
    assert main([*rest, "distil.temperature=3"]) == 2
    assert "distil.temperature=3: is of a teacher. Add" in capsys.readouterr().err


def test_a_teacher_of_other_tokens_is_refused(teacher, tmp_path, capsys):
    text = write_text(tmp_path)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    file = tmp_path / "tokenizer.json"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet)
    made.train([str(text / "train" / "a.txt")], trainer)
    made.save(str(file))
    own = [f"data.path={text}", f"data.cache={tmp_path / 'cache'}", f"data.tokenizer={file}"]
    assert main(taught(teacher, "name=other", *own)) == 2
    said = capsys.readouterr().err
    assert "its tokens (bytes, 256 tokens) are not the run's (tokenizer.json@" in said
    assert said.endswith("Train with its tokenizer: data.tokenizer=bytes.\n")
    assert not (teacher.parent / "other").exists()
