"""Models as roles: a backbone with a head. Loading, LoRA adapters, and saving as plain Hugging Face folders.

With LoRA one frozen base plays every role: the policy, the reward model and the value model are adapters on it with heads of their
own, and the reference is the base with its adapters off. With full fine-tuning each role is a model of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.rlhf.attention import use_short_rows

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Precision = Literal["float32", "bfloat16"]
PAD_TOKEN = "<|pad|>"
ADAPTER_FOLDER = "adapter"
HEAD = "score.weight"
MEMBER_FOLDER = "member-{}"  # of an ensemble, inside the folder of its first member
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Role:
    """A backbone and a head that together are the policy, the reference, the reward model or the value model.

    Attributes:
        backbone: gives `last_hidden_state` [B, T, D].
        head: [N, D] -> logits [N, V] of a policy, or scores [N, 1].
        trainable: what an optimiser may change; empty for a frozen role.
    """

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

    def hidden(self, ids_BT: Tensor, attention_BTT: Tensor | None = None, positions_BT: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] under this role.

        Args:
            attention_BTT: True where token t may look at token s. Default: at all before it; no real token looks at padding on the
                right, so that needs no mask.
            positions_BT: of the tokens; default 0, 1, 2, ...
        """
        self.activate()
        mask = None
        if attention_BTT is not None:
            dtype = next(self.backbone.parameters()).dtype
            barred = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=ids_BT.device)
            mask = torch.where(attention_BTT, 0.0, barred)[:, None]
        result: Tensor = self.backbone(
            input_ids=ids_BT, attention_mask=mask, position_ids=positions_BT, use_cache=False
        ).last_hidden_state
        return result


def dtype_of(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu") if torch.accelerator.is_available() else torch.device("cpu")
    )


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


def load_scorer(folder: Path | str, precision: Precision = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer, in eval mode and frozen.

    Raises:
        OSError: not a model folder, no safetensors in it, or weights that do not fit its config.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _load_whole(AutoModelForSequenceClassification, folder, precision)
    return _ready(model).requires_grad_(False), tokenizer


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


def new_scorer(policy_folder: Path | str, seed: int, precision: Precision = "float32") -> PreTrainedModel:
    """A reward model that starts from a policy: its backbone, and a head drawn from N(0, 1/sqrt(d+1)) without bias.

    The deviation is 1/sqrt(d+1), as in Stiennon 2020's code; the paper's text lost the root (Huang 2024, detail 8).
    """
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        policy_folder, num_labels=1, dtype=dtype_of(precision), use_safetensors=True
    )
    init_head(model.score, seed)
    return _ready(model)


def _ready(model: PreTrainedModel, place: torch.device | None = None) -> PreTrainedModel:
    """On the device, without dropout, with the attention that is fastest there."""
    model = model.to(place or device()).eval()
    if model.device.type == "cpu":
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


def lora_config(rank: int, alpha: int) -> LoraConfig:
    """LoRA on every linear layer of the backbone, without dropout (the ratio of PPO needs the same network twice)."""
    from peft import LoraConfig

    from components.rlhf.lora import LoraLinear

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", bias="none")
    config._register_custom_module({nn.Linear: LoraLinear})
    return config


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that carry adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def adapter_role(model: PreTrainedModel, adapter: str, head: nn.Module, trainable: bool, head_trainable: bool) -> Role:
    """The role that `adapter` plays on a shared base; `adapter=""` is the base itself (the reference)."""
    layers = [layer for _, layer in lora_layers(model)]

    def activate() -> None:
        for layer in layers:
            layer.enable_adapters(bool(adapter))
            if adapter:
                layer.set_adapter(adapter, inference_mode=not trainable)

    parameters: list[nn.Parameter] = []
    if trainable:
        parameters += adapter_parameters(model, adapter).values()
    if head_trainable:
        parameters += list(head.requires_grad_(True).parameters())
    return Role(model.base_model, head, parameters, activate)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by name."""
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name and "lora_" in name}


def add_adapter(model: PreTrainedModel, adapter: str, rank: int, alpha: int, seed: int) -> None:
    """Adds an adapter that changes nothing yet (B = 0); A is drawn from the seed, whatever was drawn before."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(rank, alpha), model.base_model, adapter_name=adapter)
    model.base_model.to(model.device)
    for parameter in adapter_parameters(model, adapter).values():
        parameter.data = parameter.data.float()  # small, and AdamW's steps would be lost in bfloat16


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Makes adapter `target` equal to `source`."""
    weights = adapter_parameters(model, source)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, target).items():
            parameter.copy_(weights[name.replace(f".{target}.", f".{source}.")])


def save_adapter(model: nn.Module, adapter: str, folder: Path, rank: int, alpha: int) -> None:
    """Writes one adapter beside the merged model, so that PPO can hang it on the base that it shares."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name.replace(f".{adapter}.", "."): p.detach().cpu() for name, p in adapter_parameters(model, adapter).items()}
    save_file(weights, folder / "adapter.safetensors")
    (folder / "adapter.json").write_text(json.dumps({"rank": rank, "alpha": alpha}), encoding="utf-8")


def load_adapter(model: PreTrainedModel, adapter: str, folder: Path) -> tuple[int, int]:
    """Adds the adapter that `save_adapter` wrote, under the name `adapter`; gives its rank and alpha.

    Raises:
        ValueError: it does not fit this base.
    """
    facts = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    add_adapter(model, adapter, facts["rank"], facts["alpha"], seed=0)
    weights = load_file(folder / "adapter.safetensors")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, adapter).items():
            key = name.replace(f".{adapter}.", ".")
            if key not in weights or weights[key].shape != parameter.shape:
                raise ValueError(f"{folder}: the adapter has no weight {key} of {tuple(parameter.shape)}")
            parameter.copy_(weights[key])
    return facts["rank"], facts["alpha"]


def adapter_bytes(folder: Path) -> int:
    """Bytes of the float32 weights of the adapter beside a saved reward model; 0 if it has none."""
    path = folder / ADAPTER_FOLDER / "adapter.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as weights:
        return 4 * sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())


# -- saving ------------------------------------------------------------------------------------------------------------


def merge_adapter_into(target: PreTrainedModel, source: PreTrainedModel, adapter: str) -> None:
    """Adds what an adapter of `source` learned to the weights of `target`, a fresh copy of its base."""
    with torch.no_grad():
        for name, layer in lora_layers(source):
            weight = target.get_submodule(name).weight
            weight += layer.get_delta_weight(adapter).to(weight)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, base: Path, adapter: str) -> None:
    """A policy as `save_model` writes it; `adapter`, if there is one, is merged into a fresh float32 copy of `base`.

    The copy is made on the CPU: beside a model in bfloat16 the device may not have room for it.
    """
    if adapter:
        plain, _ = load_policy(base, place=torch.device("cpu"))
        merge_adapter_into(plain, model, adapter)
        model = plain
    save_model(model, tokenizer, folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain Hugging Face folder: safetensors, tokenizer, chat template. Loads with any `AutoModel`."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
