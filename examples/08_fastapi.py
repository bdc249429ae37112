r"""The server of a bundle as a part of a FastAPI application.

python examples/08_fastapi.py scm-demo/avatars 8000
curl http://127.0.0.1:8000/classes
curl -o red.png -H 'Content-Type: application/json' -H 'Accept: image/png' \
  -d '{"prompt": "red", "seed": 7}' http://127.0.0.1:8000/pictures/v1/images/generations

Everything below /pictures is ``scm-export serve``: its API, page, probes and metrics. The limits of connections are
those of the server that runs the application, here uvicorn.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from scm_sdk.serve import ServeOptions, Service, make_app

if TYPE_CHECKING:
    from fastapi import FastAPI


def make(bundle: str) -> "FastAPI":
    """Return an application with routes of its own and the server of a bundle."""
    from fastapi import FastAPI
    from fastapi.concurrency import run_in_threadpool

    service = Service.open(ServeOptions(bundle=bundle, num_threads=1))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)  # after the last answer

    app = FastAPI(title="Shop", lifespan=lifespan)

    def classes() -> list[str]:
        """Return what can be drawn."""
        return service.model.class_names

    app.add_api_route("/classes", classes)
    app.mount("/pictures", make_app(service))
    return app


def main() -> None:
    """Serve a bundle on this machine."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("port", type=int, help="0 takes a free one")
    chosen = parser.parse_args()
    uvicorn.run(make(chosen.bundle), port=chosen.port)


if __name__ == "__main__":
    main()
