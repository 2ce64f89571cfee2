"""The commit that a result names."""

import subprocess

import pytest

from scripts.results import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a program and a report, both committed."""
    for name in ("scripts/train.py", "docs/RESULTS.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("first\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "end"), [("docs/RESULTS.md", ""), ("scripts/train.py", "-dirty"), ("scripts/not_added.py", "")]
)
def test_a_change_is_told_unless_it_is_a_report(checkout, changed, end):
    clean = provenance.commit()
    assert len(clean) == 40
    (checkout / changed).write_text("second\n")
    assert provenance.commit() == clean + end


def test_outside_of_a_checkout_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None
