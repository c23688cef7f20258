"""Which judges are asked, which one the gate reads, and how the endpoint and the people are reached."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.services.launch import Settings

Judge = Literal["reward_model", "endpoint", "humans"]
DEFAULT_JUDGES: tuple[Judge, ...] = ("reward_model",)


class JudgeSettings(Settings):
    RUNTIME_ONLY = frozenset({"endpoint_parallel", "endpoint_retries", "endpoint_timeout_seconds"})

    judges: list[Judge] = Field(default_factory=lambda: list(DEFAULT_JUDGES), min_length=1)
    """Whose win rates are measured: reward_model (the held-out one), endpoint, humans; any of them."""
    gate_judge: Judge = "reward_model"
    """Whose win rates the gate reads; one of judges."""
    min_judged_fraction: float = Field(0.5, gt=0, le=1, allow_inf_nan=False)
    """Smallest share of the pairs of answers that endpoint or humans must have judged; below it their win rate is missing."""
    endpoint_url: str = Field("", pattern=r"^(https?://[^\s@]+)?$", repr=False)
    """Base address of an OpenAI-compatible API, such as http://judge:8000/v1, without a password; prompts and answers go there."""
    endpoint_model: str = ""
    """Name of the model that judges, as the endpoint knows it."""
    endpoint_key_variable: str = Field("", pattern=r"^([A-Z_][A-Z0-9_]*)?$", repr=False)
    """Name of the environment variable that holds the endpoint's key, in capitals; empty: it has none."""
    endpoint_temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Sampling temperature of the endpoint; some models take 1 only."""
    endpoint_reply_tokens: int = Field(16, ge=1)
    """Longest reply of the endpoint, in tokens; a model that thinks first needs more."""
    endpoint_max_requests: int = Field(2000, ge=1)
    """Budget: requests to the endpoint, retries included; a pair of answers needs two."""
    endpoint_max_tokens: int = Field(2_000_000, ge=1)
    """Budget: tokens read and written by the endpoint; what is under way when it is reached comes on top."""
    endpoint_parallel: int = Field(8, ge=1)
    """Pairs of answers that are with the endpoint at once."""
    endpoint_retries: int = Field(5, ge=0)
    """Retries of a request that failed by 408, 409, 429, 5xx, a timeout or a broken connection."""
    endpoint_timeout_seconds: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Longest wait for one reply of the endpoint, in seconds."""
    human_labels: str = ""
    """Label Studio's JSON export of the tasks that this evaluation wrote, file or s3:// object; empty: there are none yet."""

    @model_validator(mode="after")
    def _check(self) -> JudgeSettings:
        if len(set(self.judges)) != len(self.judges):
            raise ValueError(f"judges names one twice: {self.judges}")
        if self.gate_judge not in self.judges:
            raise ValueError(f"gate_judge is {self.gate_judge!r}, which is not one of judges {self.judges}")
        if "endpoint" in self.judges and not (self.endpoint_url and self.endpoint_model):
            raise ValueError("the judge endpoint needs endpoint_url and endpoint_model")
        if self.human_labels and "humans" not in self.judges:
            raise ValueError("human_labels are given, but humans is not one of judges")
        return self
