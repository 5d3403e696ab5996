"""URLs in options: neither a login nor a token, in whatever form, and nothing secret in the answer."""

from __future__ import annotations

import pytest

from launcher.config.urls import HTTP, validate_url


def errors(url: str, **options: object) -> list[str]:
    found = validate_url("deploy.x", url, what="a URL", example="s3://bucket/x", **options)  # type: ignore[arg-type]
    return [str(error) for error in found]


@pytest.mark.parametrize(
    "url",
    [
        *("s3://user:hunter2@b/x", "s3://hunter2@b/x", "s3://user:hun/ter2@b/x", "https://b/x?token=hunter2"),
        *("http://p:9090/?key=hunter2", "http://p/#hunter2", "https://:hunter2@p", "abfs://user:hunter2@account/x"),
    ],
)
def test_a_login_or_token_is_refused_and_not_shown(url: str) -> None:
    (said,) = errors(url)
    assert said.startswith("deploy.x: is not a URL ")
    assert "hunter2" not in said
    assert "ter2" not in said


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket", "s3://bucket/a/b", "s3://bucket/me@here/x", "file:///folder", "http://p:9090/prefix"),
        *("abfs://container@account.dfs.core.windows.net/x", "http://[::1]:9090"),
    ],
)
def test_other_urls_are_accepted(url: str) -> None:
    assert errors(url) == []


def test_a_scheme_or_a_host_that_is_not_there_is_named() -> None:
    (said,) = errors("s3://bucket", schemes=HTTP)
    assert said == "deploy.x=s3://bucket: is not a URL; write it like s3://bucket/x"
    for text in ("bucket", "", "s3:/bucket", "s3://", "S 3://b", "s3://a b"):
        assert errors(text), text
