"""No secret of a URL or a command is shown, and nothing else of them changes."""

from __future__ import annotations

import string
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kit import calls

from d2m_hpc.storage.urls import MASK, has_secret, masked, masked_all

SECRET = "S3cr3t/V4lue+x="
"""As AWS makes them."""
SECRETS = st.text(string.ascii_letters + string.digits + "-._~!$()*+,;=:%/", min_size=4)
WORDS = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=12)

SHELL = [
    "curl -s -H 'Authorization: Bearer {}' https://host/a.tar",
    'curl -fsSH"authorization:token {}" https://host/a.tar',
    "curl --header='X-Made-Up: {}' https://host/a.tar",
    'wget -O- --header "PRIVATE-TOKEN: {}" https://host/a.tar',
    "curl -u me:{} https://host/a.tar",
    "curl -fsSu 'me:{} and more' https://host/a.tar",
    "curl --proxy-user=me:{} https://host/a.tar",
    "curl -b 'a=1; sid={}' https://host/a.tar",
    "AWS_SECRET_ACCESS_KEY={} aws s3 cp s3://b/a.tar -",
    'export HF_TOKEN="{}"; get a.tar',
    "wget --http-password={} -O- https://host/a.tar",
    "get --api-key {} a.tar",
    "sshpass -p{} ssh host cat a.tar",
    "curl https://me:{}@host/a.tar",
    "curl 'https://host/a.tar?X-Goog-Signature={}&alt=media' | cat",
]
SAID = [
    "{{'Authorization': 'Basic {}', 'Accept': '*/*'}}",
    '{{"access_token": "{}", "expires": 1}}',
    "> Authorization: Bearer {}",
    "ClientError('https://host/a.tar?token={}', status=403)",
    "https://host/get?url=https%3A%2F%2Fx%2Fa.tar%3Fsig%3D{}",
    "Bearer {} is not known",
    "https://host/get?file=1.tar;apiKey={}",
]


@pytest.mark.parametrize("text", [*(f"pipe:{s}" for s in SHELL), *SHELL, *SAID])
def test_each_way_to_give_a_secret_is_known(text: str) -> None:
    shown = masked(text.format(SECRET))
    assert "S3cr3t" not in shown
    assert "V4lue" not in shown
    assert MASK in shown
    assert masked(shown) == shown
    assert has_secret(text.format(SECRET))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pw@host/a.tar?x=1#y", "https://***@host/a.tar?x=1#y"),
        ("https://hf_token@host/a.tar", "https://***@host/a.tar"),
        ("s3://AKIA:a/b+c@bucket/a.tar", "s3://AKIA:***@bucket/a.tar"),
        ("simplecache::sftp://me:p@w@host/a@b.tar", "simplecache::sftp://me:***@host/a@b.tar"),
        (
            "https://h/a.tar?X-Amz-Signature=0f&X-Amz-Date=1&X-Amz-Security-Token=q%2F",
            "https://h/a.tar?X-Amz-Signature=***&X-Amz-Date=1&X-Amz-Security-Token=***",
        ),
        ("https://h/a.tar?sv=1&sig=a%3D&se=2", "https://h/a.tar?sv=1&sig=***&se=2"),
        ("https://h/a.tar?key=AIza12&b=1", "https://h/a.tar?key=***&b=1"),
        ("'https://h/a?sig=x': no such file", "'https://h/a?sig=***': no such file"),
        ("pipe:curl -u me:pw x.tar | cat", "pipe:curl -u me:*** x.tar | cat"),
    ],
)
def test_what_is_no_secret_stays(url: str, shown: str) -> None:
    assert masked(url) == shown


ORDINARY = [
    "/data/laion/{00000..00999}.tar",
    "s3://bucket/year=2024/key=a/part.tar",
    "s3://arn:aws:s3:us-east-1:1:accesspoint/n/o@1.tar",
    "https://host:8080/a@b.tar?x=1&file=00000.tar",
    "https://host/get?key=tars/00000.tar",
    "http://[::1]:9000/a@b.tar",
    "abfs://box@account.dfs.core.windows.net/a.tar",
    "hdfs://me@host/a.tar",
    "pipe:aws s3 cp --profile x s3://bucket/{0..3}.tar -",
    "pipe:curl -sL -H 'Accept: a/b' --retry 3 https://host/a.tar | zcat -u",
    "pipe:hdfs dfs -cat hdfs://host:9000/a.tar",
    "the tokenizer says: bad token: x; cookies are off; key: 7",
    "postprocess_columns: found 'x'; valid is y (--set token-free)",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_text_stays_as_it_is(text: str) -> None:
    assert masked(text) == text
    assert not has_secret({"input_tars": [text]})


@given(SECRETS, st.sampled_from(["https", "s3", "sftp", "filecache::http"]), WORDS, WORDS)
@example("a/@b", "s3", "x", "y")
def test_a_password_is_never_shown(secret: str, scheme: str, user: str, path: str) -> None:
    assume(not secret.startswith(MASK))
    password = quote(secret, safe="!$&'()*+,;=")
    url = f"{scheme}://{user}:{password}@host/{path}.tar"
    assert masked(url) in (
        f"{scheme}://{MASK}@host/{path}.tar",
        f"{scheme}://{user}:{MASK}@host/{path}.tar",
    )


@given(SECRETS, st.sampled_from(SHELL), WORDS)
def test_no_command_shows_its_secret(secret: str, command: str, before: str) -> None:
    assume("z" not in before.lower())
    text = f"pipe:{before}; " + command.format(f"Zz{secret}zZ")
    shown = masked(text)
    assert "Zz" not in shown
    assert "zZ" not in shown
    assert masked(shown) == shown


@given(
    st.sampled_from(["https://host", "s3://bucket", "/data", "gs://b"]),
    st.lists(WORDS, max_size=4),
    st.dictionaries(st.sampled_from(["part", "x", "file", "version"]), WORDS),
)
def test_other_urls_are_never_changed(root: str, folders: list[str], query: dict[str, str]) -> None:
    url = "/".join([root, *folders, "a.tar"])
    if query:
        url += "?" + "&".join(f"{k}={v}" for k, v in query.items())
    assert masked(url) == url


@given(st.text(st.sampled_from("a:/@=?&-'\"\\ \n*%3dfHu.") | st.characters(), max_size=80))
def test_twice_is_once(text: str) -> None:
    assert masked(masked(text)) == masked(text)


PIECES = [
    "token=",
    "https://a:",
    "://",
    "@",
    "'",
    '"',
    "-H ",
    "Authorization:",
    "\\",
    "a",
    "&",
    "?",
]
PIECES += ["-u ", "-b,", "--token ", "?key=", "Bearer ", "%3f", " ", "=", "x-token:", "'token'"]


@pytest.mark.parametrize("piece", PIECES)
def test_the_work_does_not_grow_with_the_square_of_the_length(piece: str) -> None:
    """The calls are counted; within a regular expression, a square would take minutes."""
    for more in ("", "x", "token="):
        text = (piece + more) * (15_000 // len(piece + more))
        half, whole = (calls(masked, text * n) for n in (1, 2))
        assert whole <= 2.1 * half + 50
        masked(text * 20)


def test_values_of_a_config_are_masked_by_their_keys_too() -> None:
    values = {"models": [{"x": {"hf_token": SECRET, "size": 3}}], "setup": [f"A_TOKEN={SECRET}"]}
    assert masked_all(values) == {
        "models": [{"x": {"hf_token": MASK, "size": 3}}],
        "setup": [f"A_TOKEN={MASK}"],
    }
    assert has_secret(values)
