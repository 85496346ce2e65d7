"""Both sides of the comparison with mini_trainer: the same model, batch, loss and optimizer, and clocks inside."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 2048
RATIO = 0.25
CLIP = 1.0
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}
Times = dict[str, float]
clock = time.process_time  # of one thread: its own seconds, whatever else the machine does


DEFAULT, FULL = "merged, inputs (the default)", "full fine-tuning of the linears"


def sides() -> dict[str, Any]:
    """Return every form, and training without protection."""
    import treering as tr

    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {**forms(), FULL: tr.Full(train=linears)}


def forms() -> dict[str, Any]:
    import treering as tr

    def weights(form: str, **more: Any) -> Any:
        return tr.OSFT(protect="weights", form=form, ratio=RATIO, **more)  # type: ignore[arg-type]

    return {
        DEFAULT: tr.OSFT(),
        "update, inputs": tr.OSFT(form="update"),
        "update, inputs hard": tr.OSFT(form="update", ratio=RATIO, strength="hard"),
        "update, weights": weights("update"),
        "one_sided, inputs": tr.OSFT(ratio=RATIO, form="one_sided"),
        "one_sided, weights": weights("one_sided"),
        "core, weights": weights("core"),
        "forward": weights("forward"),
        "factors": weights("factors"),
    }


def base(width: int = 512, layers: int = 4) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def batch() -> dict[str, Any]:
    ids = torch.randint(0, 1024, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone(), "count": TOKENS - 1, "samples": ["0"]}


class Theirs:
    """Non-targets are frozen, as in ours; everything else as its own trainer does it."""

    def __init__(self, state: dict[str, Tensor], config: Any):
        from mini_trainer import osft_utils
        from transformers import LlamaForCausalLM

        kind = osft_utils.create_osft_model_class(LlamaForCausalLM)
        model: Any = kind(
            config, osft_config={}, initialize_osft=False, upcast_dtype=torch.float32, output_dtype=torch.float32
        )
        model.load_state_dict(state)
        model.osft_config = osft_utils.auto_generate_target_osft_config(model, "llama", rank_ratio=1 - RATIO)
        model.reinitialize_osft(decompose_existing_weights=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("osft_params" in name)
        self.times: Times = {}
        model.project_gradients = timed(self.times, "hooks", model.project_gradients)
        model.project_parameters = timed(self.times, "hooks", model.project_parameters)
        self.model = model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
        self.optimizer: Any = osft_utils.optim_wrapper(optimizer, model)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        from treering.plan.batches import cross_entropy, with_targets

        return cross_entropy(self.model, with_targets(batch)) / batch["count"]

    def finish(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def inside(self) -> float:
        return 0.0


class Ours:
    def __init__(self, model: Any, technique: Any, like: Any):
        import treering as tr
        from treering.plan import Run

        statistics = Falling(like, technique) if getattr(technique, "measured", False) else None
        run = tr.compose(model, [technique], statistics=statistics)
        self.times: Times = {}
        hooks = ("gradients", "before_step", "after_step")
        applied = tuple(
            replace(one, **{name: timed(self.times, "hooks", getattr(one, name)) for name in hooks})
            for one in run.plan.applied
        )
        self.run = Run(replace(run.plan, applied=applied), {})
        self.model = self.run.model
        self.optimizer = self.run.optimizer(torch.optim.AdamW, **ADAMW)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return self.run.loss(batch)

    def finish(self) -> None:
        self.run.step(self.optimizer, clip=CLIP)

    def inside(self) -> float:
        """Seconds of a step's forward and backward that went into projecting: nothing else is what they are for."""
        return sum(projecting(module) for module in self.model.modules())


def projecting(module: nn.Module) -> float:
    from treering.techniques.osft.forward_factors import passes
    from treering.techniques.osft.forward_factors.factored import FactoredLinear
    from treering.techniques.osft.protected_adapter import ProtectedAdapter, projected

    began = clock()
    if isinstance(module, FactoredLinear) and module.projected and module.high is not None:
        for _ in range(3):  # in the forward, in the backward once more, and of the gradient
            for X, Q in zip(module.low[::2], module.high[::2]):
                passes.project(X.detach(), Q)
    elif isinstance(module, ProtectedAdapter):
        Z = projected(module.shapes, dict(module.named_parameters()))
        torch.autograd.grad(Z, module.Z, torch.ones_like(Z))
    else:
        return 0.0
    return clock() - began


class Falling(Mapping[str, Mapping[str, Tensor]]):
    """As if text had been measured: second moments with a spectrum that falls, made when asked for, as if read."""

    def __init__(self, model: Any, technique: Any):
        from treering.anatomy import examine
        from treering.techniques.osft.protection.targets import targets

        self.inputs = {target.weight: target.inputs for target in targets(technique, examine(model))}

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        size = self.inputs[name]
        v = torch.nn.functional.normalize(torch.randn(size, generator=torch.Generator().manual_seed(size)), dim=0)
        mirror = torch.eye(size) - 2 * torch.outer(v, v)
        return {"inputs": (mirror * torch.logspace(0, -4, size)) @ mirror, "tokens": torch.tensor(1.0)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


def timed(times: Times, name: str, function: Callable[..., Any] | None) -> Any:
    if function is None:
        return None

    def run(*arguments: Any) -> Any:
        began = clock()
        try:
            return function(*arguments)
        finally:
            times[name] = times.get(name, 0.0) + clock() - began

    return run


def one_step(side: Any, data: dict[str, Any]) -> Times:
    side.times.clear()
    began = clock()
    side.loss(data).backward()
    middle = clock()
    side.finish()
    end = clock()
    return {"step": end - began, "model": middle - began, "hooks": side.times.get("hooks", 0.0)}
