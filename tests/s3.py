"""S3 on this machine: moto's server, told what to fail and whom to let in."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import moto.settings
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

_FULL_ACCESS = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'

Request = tuple[str, str]
"""Method and path."""


class S3:
    """The server.

    Attributes:
        requests: so far.
        answer: asked before each; an HTTP status other than None is the answer instead of moto's.
        filesystem: of somebody who may do anything.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Callable[[Request], int | None] = lambda request: None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "S3":
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        iam = boto3.client(
            "iam",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )
        iam.create_user(UserName="tester")
        iam.put_user_policy(UserName="tester", PolicyName="all", PolicyDocument=_FULL_ACCESS)
        created = iam.create_access_key(UserName="tester")["AccessKey"]
        self.key, self.secret = created["AccessKeyId"], created["SecretAccessKey"]
        self.filesystem = fs.S3FileSystem(
            access_key=self.key, secret_key=self.secret, endpoint_override=self.endpoint, allow_bucket_creation=True
        )
        moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = 0  # from here on, who asks must be known
        return self

    def __exit__(self, *_: object) -> None:
        moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf")
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def url(self, path: str, key: str | None = None, secret: str | None = None) -> str:
        """A URL of bucket and key that carries all that is needed to read it."""
        login = f"{quote(key or self.key, safe='')}:{quote(secret or self.secret, safe='')}"
        return f"s3://{login}@{path}?endpoint_override={self.endpoint}&region=us-east-1"

    def upload(self, directory: Path, bucket: str) -> None:
        """A new bucket of everything below the directory."""
        self.filesystem.create_dir(bucket)
        for path in directory.rglob("*"):
            if path.is_file():
                with self.filesystem.open_output_stream(f"{bucket}/{path.relative_to(directory)}") as stream:
                    stream.write(path.read_bytes())

    def names(self, path: str) -> set[str]:
        """Keys below a path, relative to it."""
        found = self.filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        return {info.path.removeprefix(f"{path}/") for info in found if info.is_file}

    @contextmanager
    def failing(self, answer: Callable[[Request], int | None]) -> Iterator[None]:
        """Lets `answer` answer within the block."""
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = (environ["REQUEST_METHOD"], environ["PATH_INFO"])
        self.requests.append(request)
        status = self.answer(request)
        if status is None and "HTTP_AUTHORIZATION" not in environ:
            status = 403  # as S3 itself; moto breaks
        if status is None:
            answered: Iterable[bytes] = self._app(environ, start_response)
            return answered
        code = {403: "AccessDenied", 500: "InternalError"}[status]
        body = f"<Error><Code>{code}</Code><Message>as asked</Message></Error>".encode()
        start_response(f"{status} {code}", [("Content-Length", str(len(body)))])
        return [b"" if request[0] == "HEAD" else body]


class FirstFail:
    """Answers the first `times` requests that `matches` with 500."""

    def __init__(self, times: int, matches: Callable[[Request], bool]) -> None:
        self.left, self._matches, self._lock = times, matches, threading.Lock()

    def __call__(self, request: Request) -> int | None:
        with self._lock:
            if not self.left or not self._matches(request):
                return None
            self.left -= 1
            return 500
