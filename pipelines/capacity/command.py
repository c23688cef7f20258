"""`rankloop plan`: what a model needs of which GPU, stage by stage, before any is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.services.exits import DoNotRetry
from pipelines.display import console_of


def plan(
    model: Annotated[str, typer.Option(help="Folder, config.json, a name such as Llama-3.1-8B, or a name on the Hub.")],
    gpus: Annotated[str, typer.Option(help="GPUs to choose from, by commas, such as L4,H100. Default: all that are known.")] = "",
    profile: Annotated[str, typer.Option(help="Profile: a name (tiny, smollm2, llm-1b, llm-8b) or a YAML file.")] = "llm-8b",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="A stage's setting, as stage.key=value; repeatable.", metavar="STAGE.KEY=VALUE"),
    ] = None,
    method: Annotated[str, typer.Option(help="What fine-tunes the policy: ppo, dpo or both. Default: the profile's.")] = "",
    rankings: Annotated[int, typer.Option(min=1, help="How many rankings there are.")] = 10000,
    completions: Annotated[int, typer.Option(min=2, help="Completions of a ranking.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Longest prompt; 0: what PPO's settings allow.")] = 0,
    completion_tokens: Annotated[int, typer.Option(min=0, help="Longest completion; 0: what PPO's settings allow.")] = 0,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU for an hour, for the cost of each stage.")] = None,
    output: Annotated[Path | None, typer.Option(help="Writes the plan as one HTML page.")] = None,
    resources: Annotated[Path | None, typer.Option(help="Writes a table of resources for `rankloop compile --resources`.")] = None,
) -> None:
    """Plans memory by role, tokens per second, hours and cost of each stage on the smallest GPUs that hold it.

    Nothing is downloaded but a configuration, and no GPU is needed. Exit codes: 0 done, 65 unknown model, GPU or setting,
    or a stage that no named GPU holds.
    """
    from pipelines import METHODS
    from pipelines import profile as profile_file
    from pipelines.capacity import page
    from pipelines.capacity.gpus import GPUS, gpu
    from pipelines.capacity.placing import place
    from pipelines.capacity.shapes import config_of
    from pipelines.capacity.stages import data_of, needs_of, parameters_of

    names = [next(key for key in GPUS if GPUS[key] == gpu(name)) for name in gpus.split(",")] if gpus else list(GPUS)
    resolved = profile_file.load(profile, assignments or (), None, method)
    config = config_of(model)
    data = data_of(config, resolved.stages, rankings, completions, prompt_tokens, completion_tokens)
    parameters = parameters_of(config)
    itemsize = 2 if resolved.stages["ppo_finetune"]["precision"] == "bfloat16" else 4
    needs = needs_of(config, resolved.stages, METHODS[resolved.method], data)
    stages = [place(each, names, config, parameters, itemsize) for each in needs]
    made = page.Plan(model, profile, parameters, itemsize, data, names, price, stages)
    console = console_of()
    page.show(made, console)
    if output:
        output.write_text(page.html(made), encoding="utf-8")
        console.print(f"wrote {output}", highlight=False)
    left_out = [f"{each.stage} ({each.gib:.1f} GiB on each of eight)" for each in stages if not each.gpu]
    if left_out:
        raise DoNotRetry(
            f"none of {', '.join(names)} holds {', '.join(left_out)}",
            "name larger GPUs, set lora_rank, or precision float32 with which layers are sharded",
        )
    if resources:
        resources.write_text(page.resources(made), encoding="utf-8")
        console.print(f"wrote {resources}", highlight=False)
