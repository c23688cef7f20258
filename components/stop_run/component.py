"""KFP wrapper of the stage `stop_run`: ends a run whose gate failed."""

from kfp import dsl

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def stop_run(stage: str, reason: str) -> None:
    from components.services.launch import launch

    launch("stop_run", {}, {"stage": stage, "reason": reason})
