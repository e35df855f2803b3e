"""``diffusion-fast serve``: a model behind an HTTP server."""

from __future__ import annotations

from typing import Annotated

import typer

from ..ops import checks
from .common import check_device
from .sample_prompts import lora_of


def serve(
    model: Annotated[
        str, typer.Option(help="A Stable Diffusion folder, single file or hub id; emoji or tiny.")
    ],
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default its file's name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="DIFFUSION_FAST_TOKEN",
            help="What clients must show, as Bearer or as the password of Basic; default none.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name beside localhost that clients use; * for any."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may call this server.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Images drawn at once.", min=1)] = 8,
    queue: Annotated[int, typer.Option(help="Images that may wait.", min=1)] = 64,
    max_steps: Annotated[int, typer.Option(help="Model calls of an image.", min=1)] = 150,
    max_side: Annotated[int, typer.Option(help="Longest side in pixels.", min=8)] = 2048,
    max_batch: Annotated[int, typer.Option(help="Images of one request.", min=1)] = 8,
    max_body: Annotated[int, typer.Option(help="MiB of a request's body.", min=1)] = 32,
    rate: Annotated[
        int, typer.Option(help="Requests a minute and client; 0 for no limit.", min=0)
    ] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[
        int, typer.Option(help="Seconds to finish what runs when the server is stopped.", min=0)
    ] = 60,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA, FILE or FILE=SCALE; on for all requests.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Another autoencoder, also a tiny one (TAESD).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer, for single files.")
    ] = None,
    safety_checker: Annotated[
        bool, typer.Option(help="Use the safety checker that some models have.")
    ] = True,
    variant: Annotated[str | None, typer.Option(help="Which weights, such as fp16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda ...")] = "cpu",
    graph: Annotated[str, typer.Option(help="CUDA graphs: auto or off.")] = "auto",
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve with Ray Serve, on all machines of a Ray cluster.")
    ] = False,
    replicas: Annotated[
        int, typer.Option(help="Copies of the model, each on a GPU of its own; with --ray.", min=1)
    ] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="Let their number grow with the load; with --ray.", min=1)
    ] = None,
) -> None:
    """Serve a model: OpenAI's images API, AUTOMATIC1111's, and a page at /.

    Requests of all kinds share one batch. SIGTERM finishes what runs, then ends.
    """
    try:
        import uvicorn

        from ..serving import Service, create_app
        from ..serving.gate import log_as_json
        from ..serving.settings import Settings
    except ModuleNotFoundError as error:
        needed = "pip install 'diffusion-fast[serve]'"
        raise ImportError(f"serve needs {error.name}, which is not installed: {needed}") from error

    if not ray:  # whose head may have none
        check_device(device)
    if dtype is not None:
        checks.one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    checks.one_of("--graph", graph, ("auto", "off"))
    if not ray and (replicas > 1 or max_replicas is not None):
        checks.fail("--replicas, --max-replicas", "1 and none without --ray", replicas)
    if max_replicas is not None and max_replicas < replicas:
        checks.fail("--max-replicas", f"at least --replicas, {replicas}", max_replicas)
    settings = Settings(
        model=model,
        name=name,
        token=token,
        allow_host=allow_host or [],
        allow_origin=allow_origin or [],
        slots=slots,
        queue=queue,
        max_steps=max_steps,
        max_side=max_side,
        max_batch=max_batch,
        max_body=max_body,
        rate=rate,
        timeout=timeout,
        drain=drain,
        lora=dict(map(lora_of, lora or [])),
        vae=vae,
        tokenizer=tokenizer,
        safety_checker=safety_checker,
        variant=variant,
        dtype=dtype,  # type: ignore[arg-type]  # it was looked at
        device=device,
        graph=graph,  # type: ignore[arg-type]
        replicas=replicas,
        max_replicas=max_replicas,
    )
    log_as_json()
    if ray:
        try:
            from ..serving.cluster import serve_until_stopped
        except ModuleNotFoundError as error:
            needed = "pip install 'diffusion-fast[ray]'"
            raise ImportError(
                f"--ray needs {error.name}, which is not installed: {needed}"
            ) from error
        serve_until_stopped(settings, host, port)
        return
    pipe, loras = settings.load()
    service = Service.of(
        pipe,
        name=settings.served_name,
        loras=loras,
        slots=slots,
        limits=settings.limits,
        graph=graph,
    )
    app = create_app(service, token=token, hosts=settings.allow_host, origins=settings.allow_origin)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,  # the gate writes one line for each request
        timeout_graceful_shutdown=drain,
        server_header=False,
        proxy_headers=False,
    )
