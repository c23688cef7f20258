"""KFP wrapper of the stage `close_run`: the exit handler."""

from kfp import dsl

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def close_run(status: dsl.PipelineTaskFinalStatus) -> None:
    from components.services.launch import launch

    launch("close_run", {}, {"state": status.state, "error": status.error_message or ""})
