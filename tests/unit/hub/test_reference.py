"""Names of models, well formed and not."""

import pytest

from qvgen.hub.reference import HubId, Reference, parse_hub_id, parse_reference


def test_versions_and_aliases() -> None:
    assert parse_reference("models:/qvgen@champion") == Reference("qvgen", alias="champion")
    assert parse_reference("models:/my-model.2/v12") == parse_reference("models:/my-model.2/12")
    assert str(parse_reference("models:/qvgen/3")) == "models:/qvgen/3"
    assert str(parse_reference("models:/qvgen@champion")) == "models:/qvgen@champion"


@pytest.mark.parametrize(
    "text",
    ["qvgen", "models:/qvgen", "models:/m-1234", "models:/a/../b@c", "models:/a@b@c", "models:/a/x", "models:/'@a", "/tmp"],
)
def test_what_names_no_version(text: str) -> None:
    with pytest.raises(ValueError, match=r"models:/NAME@ALIAS"):
        parse_reference(text)


def test_hub_ids() -> None:
    assert parse_hub_id(f"org/name@{'a' * 40}") == HubId("org/name", "a" * 40)
    assert parse_hub_id("artifacts/packed") is None and parse_hub_id("/tmp/x@y") is None
    with pytest.raises(ValueError, match="40 hex digits"):
        parse_hub_id("org/name@main")
