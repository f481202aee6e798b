"""The token that opens the dashboard: one for each user, kept where only they can read it, so that open pages outlive a
restart."""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

FILE = "dashboard-token"
SHAPE = re.compile(r"[A-Za-z0-9_-]{32,200}")
OTHERS = 0o077  # permission bits of everybody else


@dataclass(frozen=True)
class Token:
    """text: as it stands in the URL. file: where it is kept; None when it dies with this process."""

    text: str
    file: Path | None = None

    @property
    def cookie(self) -> str:
        """What a browser keeps instead of the token: it opens the dashboard and cannot be turned back into it."""
        return hmac.new(self.text.encode(), b"weft dashboard cookie", hashlib.sha256).hexdigest()

    @property
    def mark(self) -> str:
        """Tells two tokens apart, and neither of them."""
        return hashlib.sha256(b"weft dashboard mark" + self.text.encode()).hexdigest()[:16]

    def opens(self, offered: str) -> bool:
        """Whether the token itself was offered, in a time that tells nothing of it."""
        return hmac.compare_digest(offered.encode(), self.text.encode())

    def admits(self, cookie: str) -> bool:
        return hmac.compare_digest(cookie.encode(), self.cookie.encode())


def kept_token(state: Path, renew: bool = False) -> tuple[Token, str]:
    """This user's token, made where there is none, and a notice, or ''. state: the user's folder for Weft's memory.

    One that others could have read is replaced. Where nothing can be kept, the token is this process's alone.
    """
    path, notice = state / FILE, ""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.is_file() and not renew:
            found = path.read_text(encoding="utf-8", errors="replace").strip()
            if SHAPE.fullmatch(found) and is_private(path):
                return Token(found, path), ""
            notice = f"{path} could be read by others or was damaged: there is a new token, and older URLs are void."
        return written(path), notice
    except OSError as error:
        text = (
            f"{path} cannot be written ({error.strerror}): the token is new at every start, and open pages end with it."
        )
        return Token(secrets.token_urlsafe(32)), text


def written(path: Path) -> Token:
    """A new token in its file, which nobody else can read at any moment."""
    token = Token(secrets.token_urlsafe(32), path)
    draft = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(token.text + "\n")
    draft.replace(path)
    return token


def is_private(path: Path) -> bool:
    """Whether the file is this user's and nobody else may read it. Windows keeps profiles apart by itself."""
    if os.name != "posix":
        return True
    facts = path.stat()
    return facts.st_uid == os.getuid() and not facts.st_mode & OTHERS
