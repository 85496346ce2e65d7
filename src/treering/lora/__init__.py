from treering.lora.config import LoRA

__all__ = ["LoRA"]
