"""Models as roles: a backbone with a head. Loading, and saving as plain Hugging Face folders.

With full fine-tuning each role is a model of its own; with LoRA (`rlhf.adapters`) one frozen base plays every role.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from components.rlhf import sharding
from components.rlhf.attention import use_short_rows
from components.rlhf.distributed import processes, rank

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Precision = Literal["float32", "bfloat16"]
PAD_TOKEN = "<|pad|>"
HEAD = "score.weight"
MEMBER_FOLDER = "member-{}"  # of an ensemble, inside the folder of its first member
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Role:
    """A backbone and a head that together are the policy, the reference, the reward model or the value model.

    Attributes:
        backbone: gives `last_hidden_state` [B, T, D].
        head: [N, D] -> logits [N, V] of a policy, or scores [N, 1].
        trainable: what an optimiser may change; empty for a frozen role.
        upper: the backbone without its trunk, where the role shares one (`rlhf.trunk`).
        divided: whether its layers are divided over the processes (`rlhf.sharding`).
    """

    upper: nn.Module | None = None
    divided = False

    def __init__(
        self, backbone: nn.Module, head: nn.Module, trainable: list[nn.Parameter], activate: Callable[[], None] | None = None
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.trainable = trainable
        self._activate = activate

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def activate(self) -> None:
        """Makes a shared base play this role; until another role is activated, forward and backward belong to it."""
        if self._activate is not None:
            self._activate()

    def hidden(
        self,
        ids_BT: Tensor,
        attention_BTT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        trunk_BTD: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] under this role.

        Args:
            attention_BTT: True where token t may look at token s. Default: at all before it; no real token looks at padding on the
                right, so that needs no mask.
            positions_BT: of the tokens; default 0, 1, 2, ...
            trunk_BTD: what the trunk makes of these tokens, if it is known; then only the layers above it are computed.
        """
        self.activate()
        mask = None
        if attention_BTT is not None:
            dtype = next(self.backbone.parameters()).dtype
            barred = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=ids_BT.device)
            mask = torch.where(attention_BTT, 0.0, barred)[:, None]
        network, given = self.backbone, {"input_ids": ids_BT}
        if trunk_BTD is not None:
            assert self.upper is not None, "hidden states of a trunk that this role does not share"
            network, given = self.upper, {"inputs_embeds": trunk_BTD}
        result: Tensor = network(**given, attention_mask=mask, position_ids=positions_BT, use_cache=False).last_hidden_state
        return result


def dtype_of(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu") if torch.accelerator.is_available() else torch.device("cpu")
    )


def devices() -> list[torch.device]:
    """All accelerators that this process has to itself, or its device where there are others or none."""
    if not torch.accelerator.is_available() or processes() > 1:
        return [device()]
    return [torch.device(device().type, number) for number in range(torch.accelerator.device_count())]


def load_policy(
    folder: Path | str, precision: Precision = "float32", place: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in eval mode (no dropout), with a pad token that is not EOS.

    It is put on `place`, or else on this process's device.

    Raises:
        ValueError: no EOS token or no chat template, or logits that are changed after the head.
        OSError: not a model folder, no safetensors in it, or weights that do not fit its config.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # four seconds, which reading a config need not cost

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _load_whole(AutoModelForCausalLM, folder, precision)
    for name in _SCALED_LOGITS:
        if getattr(model.config, name, None) not in (None, 0, 1, 1.0):
            raise ValueError(f"{folder}: its config sets {name}: logits that are changed after the head are not supported")
    _prepare_tokenizer(model, tokenizer, folder)
    return _ready(model, place), tokenizer


def read_policy(folder: Path) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration of a policy that `save_model` wrote, without its weights.

    Raises:
        OSError: not a model folder.
    """
    from transformers import AutoConfig, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)


def load_scorer(
    folder: Path | str, precision: Precision = "float32", place: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer, in eval mode and frozen; its head is float32, so that scores keep their digits.

    It is put on `place`, or else on this process's device.

    Raises:
        OSError: not a model folder, no safetensors in it, or weights that do not fit its config.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _load_whole(AutoModelForSequenceClassification, folder, precision)
    model.score.float()
    return _ready(model, place).requires_grad_(False), tokenizer


def load_head(folder: Path) -> tuple[nn.Linear, PretrainedConfig]:
    """The head of a saved reward model and its config, without reading its backbone.

    Raises:
        OSError: not a reward model's folder, or weights that are damaged.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                if HEAD in weights.keys():
                    head = nn.utils.skip_init(nn.Linear, config.hidden_size, 1, bias=False)
                    head.weight.data.copy_(weights.get_tensor(HEAD))
                    return head.to(device()).requires_grad_(False), config
        except SafetensorError as error:
            raise OSError(f"{file} is damaged: {error}") from error
    raise OSError(f"{folder} has no weight {HEAD}: it is not a reward model")


def member_folders(folder: Path) -> list[Path]:
    """The folders of a reward model's members: its own, and `member-1`, `member-2`, ... in it if it is an ensemble."""
    found = [folder]
    while (member := folder / MEMBER_FOLDER.format(len(found))).is_dir():
        found.append(member)
    return found


def _load_whole(auto_class: Any, folder: Path | str, precision: Precision) -> PreTrainedModel:
    """A model of which every weight was in the folder: `from_pretrained` would draw missing ones at random and go on."""
    try:
        model, found = auto_class.from_pretrained(folder, dtype=dtype_of(precision), use_safetensors=True, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{folder}: its weights are damaged or do not fit its config.json: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise OSError(
            f"{folder}: config.json asks for weights that are not there: {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    return cast("PreTrainedModel", model)


def new_scorer(
    policy_folder: Path | str, seed: int, precision: Precision = "float32", place: torch.device | None = None
) -> PreTrainedModel:
    """A reward model that starts from a policy: its backbone, and a head drawn from N(0, 1/sqrt(d+1)) without bias.

    The deviation is 1/sqrt(d+1), as in Stiennon 2020's code; the paper's text lost the root (Huang 2024, detail 8).
    """
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        policy_folder, num_labels=1, dtype=dtype_of(precision), use_safetensors=True
    )
    init_head(model.score, seed)
    return _ready(model, place)


def _ready(model: PreTrainedModel, place: torch.device | None = None) -> PreTrainedModel:
    """On its place, without dropout, with the attention that is fastest on this process's device, where it computes in the end."""
    model = model.to(place or device()).eval()
    if device().type == "cpu":
        use_short_rows(model)
    return model


def init_head(head: nn.Linear, seed: int) -> None:
    """Draws the weights from N(0, 1/sqrt(d+1)) and sets the bias, if there is one, to 0."""
    generator = torch.Generator().manual_seed(seed)
    deviation = 1 / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * deviation)
        if head.bias is not None:
            head.bias.zero_()


def _prepare_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Gives the tokenizer a pad token of its own: where padding is EOS, a model never learns to stop."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no EOS token, so a completion cannot end")
    if not tokenizer.chat_template:
        raise ValueError(f"{folder}: the tokenizer has no chat template; save one with the model")
    ends = model.generation_config.eos_token_id if model.generation_config else None
    taken = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.suppress_tokens = [tokenizer.pad_token_id]  # as our sampler: padding is never an answer


def context_tokens(config: PretrainedConfig) -> int:
    """How many tokens a model can attend to."""
    return int(getattr(config, "max_position_embeddings", 0) or 2**31)


# -- roles -------------------------------------------------------------------------------------------------------------


def policy_role(model: PreTrainedModel, trainable: bool = False) -> Role:
    """The role of a causal language model that is not shared."""
    model.requires_grad_(trainable)
    return Role(model.base_model, model.get_output_embeddings(), [p for p in model.parameters() if p.requires_grad])


def scorer_role(model: PreTrainedModel, trainable: bool = False) -> Role:
    """The role of a sequence classification model that is not shared."""
    model.requires_grad_(trainable)
    return Role(model.base_model, model.score, [p for p in model.parameters() if p.requires_grad])


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain Hugging Face folder: safetensors, tokenizer, chat template. Loads with any `AutoModel`.

    Of several processes the first one writes it; the folder is there in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = sharding.whole(model.state_dict()) if sharding.divided(list(model.parameters())) else None
    if rank() != 0:
        return
    model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
