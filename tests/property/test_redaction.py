"""Names that say that a value is a secret, in every way that such names are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specsplit.provenance.redaction import REDACTED, find_secret, is_secret_name, redact, redact_arguments

# One word or name a line: the next case is one more.
WORDS = [
    *("token", "password", "passwd", "passphrase", "pass", "pwd", "secret", "credentials", "creds", "pat", "jwt"),
    *("api key", "access key", "private key", "secret key", "signing key", "bearer", "cookie", "authorization", "auth"),
]
GLUED = ["PGPASS", "PGPASSWORD", "SSHPASS", "DBPWD", "MYSQLPWD", "APIKEY", "AUTHTOKEN", "accesstoken", "CLIENTSECRET"]
HARMLESS = [
    *("max_output_tokens", "tokens_per_second", "tokenizer", "tokenizer_sha256", "PWD", "OLDPWD", "compass", "bypass"),
    *(
        "author",
        "authors",
        "keys",
        "cache_key",
        "PATH",
        "passes",
        "passed",
        "pattern",
        "path",
        "secretary",
        "key",
        "cwd",
    ),
    *("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "tokenized", "num_key_value_heads", "cookiecutter", "patch"),
]
FILES = [
    "token_file",
    "HF_TOKEN_PATH",
    "PGPASSFILE",
    "PASSWORD_FILE",
    "db-pass-file",
    "SSH_AUTH_SOCK",
    "credentialsFile",
]
prefixes = st.lists(st.sampled_from(["db", "hf", "my", "pg", "aws", "ci", "test", "smtp2"]), max_size=2)


def names(words: list[str]) -> st.SearchStrategy[str]:
    def write(style: str) -> str:
        if style == "camel":
            return words[0] + "".join(word.capitalize() for word in words[1:])
        text = {"upper": "_", "snake": "_", "kebab": "-", "dotted": "."}[style].join(words)
        return text.upper() if style == "upper" else f"--{text}" if style == "kebab" else text

    return st.sampled_from(["upper", "snake", "kebab", "dotted", "camel"]).map(write)


@given(st.data(), prefixes, st.sampled_from(WORDS))
def test_every_way_to_write_a_name(data: st.DataObject, before: list[str], word: str) -> None:
    name = data.draw(names([*before, *word.split()]))
    if name.lower() == "pwd":  # the working directory
        return
    assert is_secret_name(name), name
    assert redact({name: "x"}) == {name: REDACTED}
    assert redact_arguments([f"{name}=x"]) == [f"{name}={REDACTED}"]


@pytest.mark.parametrize("name", [*GLUED, "DB_PASS", "MYSQL_PWD", "REDIS_AUTH", "AWS_ACCESS_KEY_ID", "GITHUB_TOKEN_2"])
def test_names_of_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_secret_name(name)
    monkeypatch.setenv(name, "correct-horse-battery")
    assert redact(["say correct-horse-battery"]) == [f"say {REDACTED}"]
    assert find_secret("a correct-horse-battery") == 2


@pytest.mark.parametrize("name", [*HARMLESS, *FILES])
def test_names_of_no_secret(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize("name", [name for name in FILES if "SOCK" not in name])
def test_a_file_of_secrets(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("secret") / "file"
    file.write_text("correct-horse-battery\n")
    monkeypatch.setenv(name, str(file))
    assert redact({name: str(file), "log": "correct-horse-battery"}) == {name: str(file), "log": REDACTED}
