from treering.techniques.lora.config import LoRA

__all__ = ["LoRA"]
