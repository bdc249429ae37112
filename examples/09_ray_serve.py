r"""The server of a bundle in replicas of Ray Serve.

RAY_AUTH_MODE=token python examples/09_ray_serve.py scm-demo/avatars 8000 --replicas 2
curl -o red.png -H 'Content-Type: application/json' -H 'Accept: image/png' \
  -d '{"prompt": "red", "seed": 7}' http://127.0.0.1:8000/v1/images/generations

Each replica is ``scm-export serve`` with a model of its own. Ray balances the requests, refuses what is too much for
all of them, and replaces a replica that dies. ``scm_sdk.Client`` repeats what that replica had begun: a seed gives the
same picture again.
"""

import argparse
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def main() -> None:
    """Serve a bundle on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder of the bundle, which every node must see")
    parser.add_argument("port", type=int)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus-per-replica", type=float, default=1)
    chosen = parser.parse_args()
    if os.environ.get("RAY_AUTH_MODE") != "token":  # Ray listens on every address
        sys.exit("set RAY_AUTH_MODE=token, so that others cannot reach Ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    bundle = os.path.abspath(chosen.bundle)

    def build() -> "ASGIApp":  # runs in each replica
        from scm_sdk.serve import ServeOptions, Service, make_app

        return make_app(Service.open(ServeOptions(bundle=bundle, num_threads=1)))

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=chosen.port))
    deployment = serve.deployment(
        num_replicas=chosen.replicas,
        max_ongoing_requests=64,  # of one replica: the server's own queue
        max_queued_requests=64,
        ray_actor_options={"num_cpus": chosen.cpus_per_replica},
    )(serve.ingress(build)())
    serve.run(deployment.bind(), name="scm")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets handlers of its own
        signal.signal(number, lambda *_: ended.set())
    print(f"http://127.0.0.1:{chosen.port} serves {bundle}", flush=True)
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
