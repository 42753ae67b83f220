"""Files that are no checkpoint of the run are one line; nothing in them is run."""

from pathlib import Path

import pytest
import torch

from xdimo.errors import UserError
from xdimo.train import checkpoint


def state(width: int = 2) -> checkpoint.State:
    model = torch.nn.Linear(width, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    return checkpoint.State(model, torch.nn.Linear(width, 1), optimizer, torch.Generator())


class Code:
    def __reduce__(self):
        return print, ("ran",)


FOREIGN = {
    "weights": {"conv_in.weight": torch.ones(2)},
    "lightning": {"epoch": 1, "global_step": 2, "state_dict": {}},
    "latte": {"model": {}, "ema": {}, "opt": {}, "args": None},
    "list": [1, 2],
    "number": 5,
    "code": {"spec": Code()},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_one_line(kind, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save(FOREIGN[kind], path)
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a (readable )?checkpoint") as said:
        checkpoint.load(path, "sha256:1", state())
    assert "weights_only" not in str(said.value) and capsys.readouterr().out == ""


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "absent.pt", "sha256:1", state())
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path, "sha256:1", state())


@pytest.mark.parametrize(
    ("part", "content"),
    [("model", {}), ("optimizer", {"state": {}}), ("randomness", []), ("step", None), ("ema", [])],
)
def test_a_checkpoint_whose_parts_do_not_fit(part, content, tmp_path):
    path: Path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, "sha256:1", 4, state())
    assert checkpoint.load(path, "sha256:1", state()) == 4
    torch.save({**torch.load(path), part: content}, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt: its content is not that of sha256:1"):
        checkpoint.load(path, "sha256:1", state())
