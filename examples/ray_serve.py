"""The server on a Ray of this machine: two replicas on the CPU, a few requests, and its numbers.

pip install '.[ray]'
python examples/ray_serve.py
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import ray
from ray import serve

from diffusion_fast.serving.cluster import application
from diffusion_fast.serving.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": options.port})
    settings = Settings(model=options.model, replicas=options.replicas, slots=4)
    serve.run(application(settings))
    url = f"http://127.0.0.1:{options.port}"

    def draw(what: str) -> bytes:
        body = {"prompt": what, "response_format": "url", "seed": 1}
        head = {"content-type": "application/json"}
        asked = Request(f"{url}/v1/images/generations", json.dumps(body).encode(), head)
        with urlopen(asked) as answer:
            [made] = json.load(answer)["data"]
        with urlopen(made["url"]) as answer:
            return answer.read()

    prompts = ["a red apple", "a blue fish", "a green house", "a purple owl"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        pictures = list(pool.map(draw, prompts))
    options.out.mkdir(parents=True, exist_ok=True)
    for prompt, picture in zip(prompts, pictures, strict=True):
        (options.out / f"{prompt}.png").write_bytes(picture)
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    for line in lines:
        if line.startswith(("diffusion_fast_slots", "diffusion_fast_step")):
            print(line)
    serve.shutdown()
    ray.shutdown()
    print(f"{len(pictures)} pictures in {options.out}")


if __name__ == "__main__":
    main()
